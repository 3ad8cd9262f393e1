"""Threads in the database: what one holds, and how a turn is added to it.

A turn is one checkpoint, stored in one transaction: the messages and the memory, or neither. The id of a thread's
newest checkpoint is its version. Who adds a turn names the version that it was made from, and it is compared under the
lock of the thread's row, in the transaction that stores the checkpoint: of two requests that read the same version,
whichever process they are in, one is stored and the other is told so. There is no table for this: the row that the
saver locks and the rows that it orders by are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointMetadata, CheckpointTuple, empty_checkpoint
from langgraph.checkpoint.base.id import UUID, uuid6
from sqlalchemy import Connection, select

from agentmem_serve.errors import ThreadConflict
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.schema import decode_text

MESSAGES, MEMORY = "messages", "memory"
"""The channels of a `MemoryMessagesState`, so that a graph with that state can go on with the thread."""


@dataclass(frozen=True)
class Snapshot:
    """A thread at one checkpoint; at none, it is empty.

    Attributes:
        thread: the thread's id in the database.
        stored: the checkpoint.
    """

    thread: str
    stored: CheckpointTuple | None = None

    @property
    def id(self) -> str | None:
        """The checkpoint's id."""
        return None if self.stored is None else str(self.stored.config["configurable"]["checkpoint_id"])

    @property
    def parent(self) -> str | None:
        """The id of the checkpoint before."""
        config = None if self.stored is None else self.stored.parent_config
        return None if config is None else str(config["configurable"]["checkpoint_id"])

    @property
    def messages(self) -> list[BaseMessage]:
        """What was said."""
        return [] if self.stored is None else list(self.stored.checkpoint["channel_values"].get(MESSAGES, ()))

    @property
    def memory(self) -> Mapping[str, Any] | None:
        """The memory's plain dict."""
        return None if self.stored is None else self.stored.checkpoint["channel_values"].get(MEMORY)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The checkpoint's metadata."""
        return {} if self.stored is None else self.stored.metadata


class Threads:
    """The threads of one saver."""

    def __init__(self, saver: SQLAlchemySaver) -> None:
        self._saver = saver
        tables = saver.parts.database.tables
        threads, checkpoints = tables.threads, tables.checkpoints
        self._ids = select(checkpoints.c.id).where(checkpoints.c.ns == b"")
        self._newest = self._ids.order_by(checkpoints.c.id.desc()).limit(1)
        self._checkpoints = checkpoints
        self._threads = threads

    async def read(self, thread: str, checkpoint: str | None = None) -> Snapshot:
        """A thread at a checkpoint, or at its newest; an empty snapshot if there is none."""
        return Snapshot(thread, await self._saver.aget_tuple(_config(thread, checkpoint)))

    async def append(
        self,
        base: Snapshot,
        new_id: str,
        messages: Sequence[BaseMessage],
        memory: Mapping[str, Any] | None,
        metadata: Mapping[str, Any],
        *,
        version: str | None,
        alone: bool = True,
    ) -> None:
        """Store a turn as a checkpoint after `base`.

        Args:
            base: what the turn was made from.
            new_id: the new checkpoint's id, from `checkpoint_id_after`.
            messages: all messages of the thread from now on.
            memory: the memory's plain dict; None: the model has none.
            metadata: of the checkpoint, besides what LangGraph has there.
            version: the thread's newest checkpoint when the turn was begun.
            alone: whether that still has to be the newest. If not, `base` still has to be there.

        Raises:
            ThreadConflict: it is not; nothing was stored.
            StorageError: the database reports an error; nothing was stored, or the turn was and this could not be
                learnt.
        """
        made = empty_checkpoint() if base.stored is None else base.stored.checkpoint
        values = {**made["channel_values"], MESSAGES: list(messages)}
        if memory is not None:
            values[MEMORY] = memory
        versions = {
            name: self._saver.get_next_version(made["channel_versions"].get(name), None)
            for name in (MESSAGES, MEMORY)
            if name in values
        }
        checkpoint: dict[str, Any] = {
            **made,
            "id": new_id,
            "ts": datetime.now(UTC).isoformat(),
            "channel_values": values,
            "channel_versions": {**made["channel_versions"], **versions},
            "updated_channels": sorted(versions),
        }
        step = int(base.metadata.get("step") or 0) + (base.stored is not None)
        about: CheckpointMetadata = {"source": "loop", "step": step, "parents": {}, **metadata}  # type: ignore[typeddict-item]
        check = self._still_newest(base.thread, version, new_id) if alone else self._still_there(base, new_id)
        put: Any = self._saver.aput  # LangGraph's interface has no `first`
        await put(_config(base.thread, base.id), checkpoint, about, versions, first=check)

    def _still_newest(self, thread: str, version: str | None, own: str) -> Callable[[Connection], None]:
        def check(connection: Connection) -> None:
            # The exclusive lock: nobody else stores anything in the thread before this transaction ends.
            locked = self._saver.parts.writer.open_thread(connection, thread, alone=True)
            newest = connection.execute(self._newest.where(self._checkpoints.c.thread == locked.number)).scalar()
            # Its own, if the answer to the commit was lost and the work is done again.
            if (None if newest is None else decode_text(bytes(newest))) not in (version, own):
                raise ThreadConflict

        return check

    def _still_there(self, base: Snapshot, own: str) -> Callable[[Connection], None]:
        def check(connection: Connection) -> None:
            locked = self._saver.parts.writer.open_thread(connection, base.thread, alone=True)
            if base.id is None:
                return
            at = self._checkpoints.c
            of_base = self._ids.where(at.thread == locked.number, at.id == base.id.encode())
            if connection.execute(of_base).one_or_none() is None:
                raise ThreadConflict

        return check


def checkpoint_id_after(newest: str | None) -> str:
    """An id for a new checkpoint that sorts after the thread's newest, also if the clock of that one's maker is ahead.

    LangGraph's ids hold the time, so that of two machines whose clocks differ, the later turn might sort first.
    """
    made = uuid6()
    if newest is None or str(made) > newest:
        return str(made)
    try:
        last = UUID(newest)
    except ValueError:
        return str(made)
    # The 60 bits of the time stand around the version; the rest of the number stays as it was made.
    time = ((last.int >> 80) << 12 | (last.int >> 64) & 0xFFF) + 1
    number = (time >> 12) << 80 | 6 << 76 | (time & 0xFFF) << 64 | made.int & (1 << 64) - 1
    return str(UUID(int=number))


def _config(thread: str, checkpoint: str | None) -> RunnableConfig:
    named = {} if checkpoint is None else {"checkpoint_id": checkpoint}
    return {"configurable": {"thread_id": thread, "checkpoint_ns": "", **named}}
