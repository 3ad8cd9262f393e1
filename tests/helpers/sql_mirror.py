"""The synchronous methods of a saver behind asynchronous names, so that one asynchronous test tries both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple

from agentmem_sql import SQLAlchemySaver

# Every method of a checkpointer that reaches the database, and has an asynchronous twin; `list` is below.
METHODS = (
    "put",
    "put_writes",
    "get_tuple",
    "delete_thread",
    "delete_for_runs",
    "copy_thread",
    "prune",
    "get_delta_channel_history",
)


class SyncMirror(BaseCheckpointSaver[str]):
    """Answers every asynchronous call by the synchronous method of the saver, in another thread."""

    def __init__(self, saver: SQLAlchemySaver) -> None:
        super().__init__(serde=saver.serde)
        self.saver = saver

    async def alist(self, config: RunnableConfig | None, **options: Any) -> AsyncIterator[CheckpointTuple]:
        for found in await asyncio.to_thread(lambda: list(self.saver.list(config, **options))):
            yield found


def _in_a_thread(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def call(self: SyncMirror, *args: Any, **options: Any) -> Any:
        return await asyncio.to_thread(getattr(self.saver, name), *args, **options)

    return call


for _name in METHODS:
    setattr(SyncMirror, f"a{_name}", _in_a_thread(_name))
