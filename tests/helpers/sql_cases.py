"""Shared by the SQL tests: checkpoints made by hand, a mirror of the saver, and child processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, Checkpoint, CheckpointTuple, empty_checkpoint

BACKENDS = ("sqlite", "postgresql", "mysql")

# What fixtures give: what runs a statement and gives its rows; what gives the URL of a new database.
Sql = Callable[..., list[Any]]
NewUrl = Callable[[str], str]


def config(thread: str = "t", ns: str = "", checkpoint_id: str | None = None) -> RunnableConfig:
    named = {} if checkpoint_id is None else {"checkpoint_id": checkpoint_id}
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ns, **named}}


def checkpoint(values: dict[str, Any] | None = None, version: str | int | float = 1) -> Checkpoint:
    made = empty_checkpoint()
    made["channel_values"] = dict(values or {})
    made["channel_versions"] = dict.fromkeys(made["channel_values"], version)
    return made


def put(saver: Any, to: RunnableConfig, values: dict[str, Any] | None = None, **metadata: Any) -> RunnableConfig:
    """Store a checkpoint with all its values; gives its config."""
    version = saver.get_next_version(None, None)
    made = checkpoint(values, version)
    return saver.put(to, made, {"source": "loop", "step": 0, **metadata}, made["channel_versions"])


def get(saver: Any, at: RunnableConfig) -> CheckpointTuple:
    """A checkpoint that must be there."""
    found: CheckpointTuple | None = saver.get_tuple(at)
    assert found is not None
    return found


def read(saver: Any, at: RunnableConfig) -> dict[str, Any]:
    """The channel values of a checkpoint, as they are read now."""
    return get(saver, at).checkpoint["channel_values"]


def memory(fill: int, size: int = 9216) -> dict[str, Any]:
    """The shape of a memory state as graphs carry it: a plain dict around bytes."""
    return {"v": 1, "dtype": "float32", "shape": [36, 1, 8, 8], "matrices": bytes([fill % 256]) * size}


async def aput(saver: Any, thread: str, **values: Any) -> Any:
    made = checkpoint(values, saver.get_next_version(None, None))
    return await saver.aput(config(thread), made, {}, made["channel_versions"])


def start_child(*arguments: str, code: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python on `code`, with this process's import path."""
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([*command, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> str:
    """What the child printed; fails with its error output where it failed."""
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    return out.strip()


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

    def __init__(self, saver: BaseCheckpointSaver[str]) -> None:
        super().__init__(serde=saver.serde)
        self.saver = saver

    def get_next_version(self, current: Any, channel: None) -> Any:
        return self.saver.get_next_version(current, channel)

    async def alist(self, config: RunnableConfig | None, **options: Any) -> AsyncIterator[CheckpointTuple]:
        for found in await asyncio.to_thread(lambda: list(self.saver.list(config, **options))):
            yield found


def _in_a_thread(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def call(self: SyncMirror, *args: Any, **options: Any) -> Any:
        return await asyncio.to_thread(getattr(self.saver, name), *args, **options)

    return call


for _name in METHODS:
    setattr(SyncMirror, f"a{_name}", _in_a_thread(_name))
