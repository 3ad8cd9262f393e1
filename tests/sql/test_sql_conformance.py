"""LangGraph's own conformance suite, through the asynchronous API and, mirrored, the synchronous one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import BASE_CAPABILITIES

from agentmem_sql import SQLAlchemySaver


class SyncMirror(BaseCheckpointSaver[str]):
    """Answers every asynchronous call by the synchronous method of the same saver, in another thread."""

    def __init__(self, saver: SQLAlchemySaver) -> None:
        super().__init__(serde=saver.serde)
        self.saver = saver

    async def aput(self, *args: Any) -> RunnableConfig:
        return await asyncio.to_thread(self.saver.put, *args)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        await asyncio.to_thread(self.saver.put_writes, config, writes, task_id, task_path)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await asyncio.to_thread(self.saver.get_tuple, config)

    async def alist(self, config: RunnableConfig | None, **options: Any) -> AsyncIterator[CheckpointTuple]:
        for found in await asyncio.to_thread(lambda: list(self.saver.list(config, **options))):
            yield found

    async def adelete_thread(self, thread_id: str) -> None:
        await asyncio.to_thread(self.saver.delete_thread, thread_id)


@pytest.mark.parametrize("mirrored", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize("kind", ["file", "memory"])
async def test_base_capabilities_conform(kind: str, mirrored: bool, tmp_path: Path) -> None:
    databases = iter(range(100))

    @checkpointer_test(name=f"SQLAlchemySaver {kind} {mirrored}")
    async def make() -> AsyncGenerator[BaseCheckpointSaver[str], None]:
        name = f"/{tmp_path}/{next(databases)}.db" if kind == "file" else "/:memory:"
        async with SQLAlchemySaver.from_url(f"sqlite://{name}") as saver:
            yield SyncMirror(saver) if mirrored else saver

    report = await validate(make)

    assert [failure for result in report.results.values() for failure in result.failures or []] == []
    assert report.passed_all_base()
    # The report calls a saver complete whose methods it did not find: what it found is asserted as well.
    detected = {name for name, result in report.results.items() if result.detected}
    assert detected == {capability.value for capability in BASE_CAPABILITIES}
    assert sum(result.tests_passed for result in report.results.values()) >= 58
