"""``SQLAlchemySaver``: LangGraph's checkpointer interface, synchronous and asynchronous, in one class.

LangGraph's methods are here; what there is beyond them is in ``inspection`` and ``maintenance``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from secrets import randbelow
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from agentmem_sql.database import Database
from agentmem_sql.inspection import Inspection
from agentmem_sql.maintenance import Maintenance
from agentmem_sql.reading import Listing
from agentmem_sql.steps import Store
from agentmem_sql.tables import DEFAULT_PREFIX, Tables
from agentmem_sql.vault import Vault

CACHE_BYTES = 64 * 2**20


class SQLAlchemySaver(Inspection, Maintenance):
    """Keeps the threads of LangGraph graphs in a SQL database.

        with SQLAlchemySaver.from_url("sqlite:///threads.db") as saver:
            graph = builder.compile(checkpointer=saver)

    The same object serves ``graph.invoke`` and ``graph.ainvoke``, any number of threads and event loops, and
    several processes on one database: SQLite, PostgreSQL, MySQL or MariaDB. Tables are made when first used.
    Content is stored once per thread however many checkpoints and pending writes hold it, lists by their items,
    and is compared with its digest when it is read.

    Every method raises ``StorageError`` where the database cannot be opened, refuses, is of a newer schema,
    or holds something else than was stored.
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        *,
        serde: SerializerProtocol | None = None,
        schema: str | None = None,
        table_prefix: str = DEFAULT_PREFIX,
        hmac_key: bytes | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Use an engine of yours, with its pool and settings; closing the saver leaves it open.

        For the other mode (asynchronous for an ``Engine``, synchronous for an ``AsyncEngine``) the saver
        makes an engine of its own from the same URL.

        Args:
            engine: of SQLAlchemy.
            serde: as for every LangGraph checkpointer; an ``EncryptedSerializer`` encrypts everything but
                names and ids: of threads, namespaces, channels, checkpoints and tasks.
            schema: of the tables; None is the connection's own.
            table_prefix: what the names of the tables begin with.
            hmac_key: at least 16 secret bytes; digests are then signatures, and nobody without the key can
                change what is stored unnoticed.
            cache_bytes: how much of the threads that were last used this process keeps in memory, roughly.
        """
        super().__init__(serde=serde)
        self._open(engine, schema, table_prefix, hmac_key, cache_bytes)

    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        serde: SerializerProtocol | None = None,
        schema: str | None = None,
        table_prefix: str = DEFAULT_PREFIX,
        hmac_key: bytes | None = None,
        cache_bytes: int = CACHE_BYTES,
        synchronous: str = "FULL",
        engine_options: Mapping[str, Any] | None = None,
    ) -> SQLAlchemySaver:
        """A saver for a database URL.

        For example ``sqlite:///threads.db``, ``sqlite:///:memory:``, ``postgresql://user@host/database``,
        ``mysql://user@host/database``. The URL names the database; the saver takes a driver for each mode.
        Nothing is opened yet. SQLite files are kept with a write-ahead log.

        Args:
            url: where.
            serde: see ``SQLAlchemySaver``, as are the others that are not named here.
            schema: of the tables.
            table_prefix: of the tables.
            hmac_key: signs what is stored.
            cache_bytes: of memory.
            synchronous: of SQLite: FULL keeps what was acknowledged through a power cut, NORMAL may lose the
                last checkpoints then, but never leaves a half-written one.
            engine_options: further arguments for ``create_engine`` and ``create_async_engine``.

        Raises:
            StorageError: the URL cannot be read, or names a database or driver that cannot be used.
        """
        saver = cls.__new__(cls)
        BaseCheckpointSaver.__init__(saver, serde=serde)
        options = {"synchronous": synchronous, "engine_options": engine_options}
        saver._open(url, schema, table_prefix, hmac_key, cache_bytes, **options)
        return saver

    def _open(
        self,
        engine: Engine | AsyncEngine | URL | str,
        schema: str | None,
        table_prefix: str,
        hmac_key: bytes | None,
        cache_bytes: int,
        **options: Any,
    ) -> None:
        tables = Tables(prefix=table_prefix, schema=schema)
        vault = Vault(self.serde, hmac_key)
        self._store = Store(tables, vault, cache_bytes)
        settle, is_settled = partial(vault.settle, tables=tables), partial(vault.is_settled, tables=tables)
        lost = self._store.cache.lost
        self._database = Database(
            engine, tables=tables, prepare=settle, is_prepared=is_settled, on_lost=lost, **options
        )

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
        return self._run(self._store.put(self._serde, config, checkpoint, metadata, new_versions))

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """``put`` for a task."""
        return await self._arun(self._store.put(self._serde, config, checkpoint, metadata, new_versions))

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task wrote, under the checkpoint that ``config`` names.

        Repeating it changes nothing, unless every write is to a special channel (error, interrupt, resume,
        scheduled): those replace what the task had there.
        """
        self._run(self._store.put_writes(self._serde, config, writes, task_id, task_path))

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """``put_writes`` for a task."""
        await self._arun(self._store.put_writes(self._serde, config, writes, task_id, task_path))

    # Reading.

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that ``config`` names, or its namespace's newest; None where there is none."""
        return self._run(self._store.get_tuple(self._serde, config))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """``get_tuple`` for a task."""
        return await self._arun(self._store.get_tuple(self._serde, config))

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
        serde = self._serde
        listing = Listing(self._store.reader, serde, config, filter=filter, before=before, limit=limit)
        while not listing.finished:
            for found in self._database.run(listing.next_page):
                yield self._store.unpack(serde, found)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """``list`` for a task."""
        serde = self._serde
        listing = Listing(self._store.reader, serde, config, filter=filter, before=before, limit=limit)
        while not listing.finished:
            for found in await self._database.arun(listing.next_page):
                yield self._store.unpack(serde, found)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """What the delta channels of a checkpoint are rebuilt from: nearest stored value, and the writes since.

        Along the parents of the checkpoint that ``config`` names, whose own pending writes do not count. A
        channel without a stored value has no ``seed``. Pruning does not change the answer for channels that the
        checkpoint itself does not hold, and LangGraph asks for no others.
        """
        return self._run(self._store.delta_history(self._serde, config, channels))

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """``get_delta_channel_history`` for a task."""
        return await self._arun(self._store.delta_history(self._serde, config, channels))

    # Taking out and copying.

    def delete_thread(self, thread_id: str) -> None:
        """Remove everything of a thread, content included, in one transaction."""
        self._store.delete_thread(self._database, thread_id)

    async def adelete_thread(self, thread_id: str) -> None:
        """``delete_thread`` for a task."""
        await asyncio.to_thread(self._store.delete_thread, self._database, thread_id)

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Remove the checkpoints whose metadata name one of these runs, on all threads.

        Later checkpoints stay as they are: their parent is then the nearest one that is left, and what their
        delta channels need of the runs' writes is kept.
        """
        self._store.delete_for_runs(self._database, self._serde, run_ids)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """``delete_for_runs`` for a task."""
        await asyncio.to_thread(self._store.delete_for_runs, self._database, self._serde, run_ids)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all checkpoints, pending writes and content of a thread, with their ids, to another.

        What the other thread has under the same ids is replaced, the rest of it stays. A source that is not
        there is no error.
        """
        self._store.copy_thread(self._database, source_thread_id, target_thread_id)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """``copy_thread`` for a task."""
        await asyncio.to_thread(self._store.copy_thread, self._database, source_thread_id, target_thread_id)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Thin out threads: ``keep_latest`` leaves the newest checkpoint of each namespace, ``delete`` nothing.

        Each thread in a transaction of its own. The state of what is left does not change, delta channels
        included; a run that goes on meanwhile is waited for, or waits.

        Raises:
            ConfigError: another strategy.
        """
        self._store.prune(self._database, self._serde, thread_ids, strategy)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """``prune`` for a task."""
        await asyncio.to_thread(self._store.prune, self._database, self._serde, thread_ids, strategy)

    def get_next_version(self, current: str | int | float | None, channel: None) -> Any:
        """The version after ``current``: a number that sorts as text, and a random part.

        Two branches that leave one checkpoint so never give different values the same version. The random
        part ignores ``random.seed``, which a graph may call. A thread that came from a checkpointer with whole
        numbers as versions keeps to whole numbers, since LangGraph compares all versions of a checkpoint.
        """
        if isinstance(current, int):
            return current + 1
        number = int(current.split(".")[0]) if isinstance(current, str) else int(current or 0)
        return f"{number + 1:032}.{randbelow(10**16):016}"
