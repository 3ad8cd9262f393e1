"""``SQLAlchemySaver``: LangGraph's checkpointer interface, synchronous and asynchronous, in one class.

Each pair of methods differs in one word: ``Database.run`` or ``await Database.arun``. What they store and
read is in ``codec`` (values to bytes), ``writing`` and ``reading`` (statements).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from secrets import randbelow
from types import TracebackType
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import URL, Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from agentmem_sql import reading, writing
from agentmem_sql.codec import Address, encode_checkpoint, encode_writes, to_tuple
from agentmem_sql.database import Database


class SQLAlchemySaver(BaseCheckpointSaver[str]):
    """Keeps the threads of LangGraph graphs in a SQL database.

        with SQLAlchemySaver.from_url("sqlite:///threads.db") as saver:
            graph = builder.compile(checkpointer=saver)

    The same object serves ``graph.invoke`` and ``graph.ainvoke``, any number of threads and event loops, and
    several processes on one file. Tables are made when first used. Content is stored once per thread however
    many checkpoints and pending writes hold it, and is compared with its SHA-256 digest when it is read.

    Every method raises ``StorageError`` where the database cannot be opened, refuses, is of a newer schema,
    or holds something else than was stored.
    """

    def __init__(self, engine: Engine | AsyncEngine, *, serde: SerializerProtocol | None = None) -> None:
        """Use an engine of yours, with its pool and settings; closing the saver leaves it open.

        For the other mode (asynchronous for an ``Engine``, synchronous for an ``AsyncEngine``) the saver
        makes an engine of its own from the same URL. ``serde`` is as for every LangGraph checkpointer.
        """
        super().__init__(serde=serde)
        self._database = Database(engine)

    @classmethod
    def from_url(cls, url: str | URL, *, serde: SerializerProtocol | None = None) -> SQLAlchemySaver:
        """A saver for a database URL, such as ``sqlite:///threads.db`` or ``sqlite:///:memory:``.

        Nothing is opened yet. SQLite files are kept with a write-ahead log and ``synchronous=FULL``.

        Raises:
            StorageError: the URL cannot be read, or names a database or driver that cannot be used.
        """
        saver = cls.__new__(cls)
        BaseCheckpointSaver.__init__(saver, serde=serde)
        saver._database = Database(url)
        return saver

    # Opening and closing. Clones made by `with_allowlist` share the database, and close it for each other.

    def setup(self) -> None:
        """Make the tables now instead of on first use."""
        self._database.run(_nothing)

    async def asetup(self) -> None:
        """``setup`` for a task."""
        await self._database.arun(_nothing)

    def close(self) -> None:
        """Close every connection; later calls raise. Works in and outside an event loop."""
        self._database.close()

    async def aclose(self) -> None:
        """``close`` for a task."""
        await self._database.aclose()

    def __enter__(self) -> SQLAlchemySaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> SQLAlchemySaver:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # Writing.

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint and the values of the channels in ``new_versions``; return its config.

        The parent is the checkpoint that ``config`` names. A checkpoint of the same id is replaced.
        """
        new = encode_checkpoint(self.serde, config, checkpoint, metadata, new_versions)
        self._database.run(partial(writing.put_checkpoint, new=new), write=True)
        return Address.of(config).config(checkpoint["id"])

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """``put`` for a task."""
        new = encode_checkpoint(self.serde, config, checkpoint, metadata, new_versions)
        await self._database.arun(partial(writing.put_checkpoint, new=new), write=True)
        return Address.of(config).config(checkpoint["id"])

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task wrote, under the checkpoint that ``config`` names.

        Repeating it changes nothing, unless every write is to a special channel (error, interrupt, resume,
        scheduled): those replace what the task had there.
        """
        new = encode_writes(self.serde, config, writes, task_id, task_path)
        self._database.run(partial(writing.put_writes, new=new), write=True)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """``put_writes`` for a task."""
        new = encode_writes(self.serde, config, writes, task_id, task_path)
        await self._database.arun(partial(writing.put_writes, new=new), write=True)

    def delete_thread(self, thread_id: str) -> None:
        """Remove everything of a thread, content included, in one transaction."""
        self._database.run(partial(writing.delete_thread, thread_id=str(thread_id)), write=True)

    async def adelete_thread(self, thread_id: str) -> None:
        """``delete_thread`` for a task."""
        await self._database.arun(partial(writing.delete_thread, thread_id=str(thread_id)), write=True)

    # Reading.

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that ``config`` names, or its namespace's newest; None where there is none."""
        found = self._database.run(partial(reading.find, serde=self.serde, address=Address.of(config)))
        return None if found is None else to_tuple(self.serde, found)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """``get_tuple`` for a task."""
        found = await self._database.arun(partial(reading.find, serde=self.serde, address=Address.of(config)))
        return None if found is None else to_tuple(self.serde, found)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints by id, newest first: of a thread (and a namespace, if named), or of all.

        Each is consistent in itself. A thread that is written meanwhile is seen as it is when its page is
        read.

        Args:
            config: whose checkpoints; None for every thread.
            filter: metadata keys and the exact values they must have.
            before: only checkpoints with an id below this config's.
            limit: at most so many, counted after the filter.
        """
        listing = reading.Listing(self.serde, config, filter=filter, before=before, limit=limit)
        while not listing.finished:
            for found in self._database.run(listing.next_page):
                yield to_tuple(self.serde, found)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """``list`` for a task."""
        listing = reading.Listing(self.serde, config, filter=filter, before=before, limit=limit)
        while not listing.finished:
            for found in await self._database.arun(listing.next_page):
                yield to_tuple(self.serde, found)

    def get_next_version(self, current: str | int | float | None, channel: None) -> str:
        """The version after ``current``: a number that sorts as text, and a random part.

        Two branches that leave one checkpoint so never give different values the same version. The random
        part ignores ``random.seed``, which a graph may call.
        """
        number = int(current.split(".")[0]) if isinstance(current, str) else int(current or 0)
        return f"{number + 1:032}.{randbelow(10**16):016}"


def _nothing(_connection: Connection) -> None:
    """The work of a transaction that is only begun and ended."""
