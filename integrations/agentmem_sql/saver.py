"""`SQLAlchemySaver`: LangGraph's checkpointer interface, synchronous and asynchronous, in one class.

Every asynchronous method is the synchronous one in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from datetime import datetime
from functools import partial, wraps
from secrets import randbelow
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

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
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from sqlalchemy import URL, Engine

from agentmem_sql.ids import check_id, check_ids
from agentmem_sql.memory_history import MemoryStep, memory_history
from agentmem_sql.protection import Protection
from agentmem_sql.report import Order, StorageReport, storage_report
from agentmem_sql.retention import Retention, RetentionReport, sweep
from agentmem_sql.rows import Address
from agentmem_sql.schema import DEFAULT_PREFIX, Tables
from agentmem_sql.store import Store

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

CACHE_BYTES = 64 * 2**20

P = ParamSpec("P")
T = TypeVar("T")
_END: Any = object()


def plain_serde(serde: SerializerProtocol) -> SerializerProtocol:
    """The serializer that makes plain bytes."""
    # Not isinstance: for subclasses of a protocol that takes as long as serialising a message.
    return serde.serde if EncryptedSerializer in type(serde).__mro__ else serde  # type: ignore[attr-defined]


def _for_tasks(
    method: Callable[Concatenate[SQLAlchemySaver, P], T],
) -> Callable[Concatenate[SQLAlchemySaver, P], Coroutine[Any, Any, T]]:
    """A method as tasks call it."""

    @wraps(method)
    async def twin(self: SQLAlchemySaver, /, *arguments: P.args, **named: P.kwargs) -> T:
        return await self._in_thread(getattr(self, method.__name__), *arguments, **named)

    twin.__name__, twin.__doc__ = f"a{method.__name__}", f"As `{method.__name__}`, for a task."
    return twin


def _iterated_by_tasks(
    method: Callable[Concatenate[SQLAlchemySaver, P], Iterator[T]],
) -> Callable[Concatenate[SQLAlchemySaver, P], AsyncIterator[T]]:
    """The same for a method that gives an iterator: each item is made in one of the threads."""

    @wraps(method)
    async def twin(self: SQLAlchemySaver, /, *arguments: P.args, **named: P.kwargs) -> AsyncIterator[T]:
        items = getattr(self, method.__name__)(*arguments, **named)
        while (item := await self._in_thread(next, items, _END)) is not _END:
            yield item

    twin.__name__, twin.__doc__ = f"a{method.__name__}", f"As `{method.__name__}`, for a task."
    return twin


class SQLAlchemySaver(BaseCheckpointSaver[str]):
    """Keeps the threads of LangGraph graphs in a SQL database.

        with SQLAlchemySaver.from_url("sqlite:///threads.db") as saver:
            graph = builder.compile(checkpointer=saver)

    The same object serves `graph.invoke` and `graph.ainvoke`, any number of threads and event loops, and
    several processes on one database: SQLite, PostgreSQL, MySQL or MariaDB. Tables are made when first used.
    Content is stored once per thread however many checkpoints and pending writes hold it, lists by their items,
    and is compared with its digest when it is read.

    Every method `aput`, `aget_tuple` and so on is its namesake in one of the saver's own threads. A task that is
    cancelled while it waits for a free thread does nothing. One that is cancelled later ends when its call has, so
    that nothing of it is under way any more: the call is done whole.

    Every method raises `StorageError` where the database cannot be opened, refuses, is of a newer schema,
    or holds something else than was stored, and `ConfigError` where an id is none, such as None, or one string
    stands for several ids.
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine | URL | str,
        *,
        serde: SerializerProtocol | None = None,
        schema: str | None = None,
        table_prefix: str = DEFAULT_PREFIX,
        hmac_key: bytes | None = None,
        cache_bytes: int = CACHE_BYTES,
        **of_url: Any,
    ) -> None:
        """Use an engine of yours, with its pool and settings; closing the saver leaves it open.

        An `AsyncEngine` is taken for its URL and options: the saver makes an engine of its own with them, for the
        synchronous driver of the same database. Listeners are not taken along.

        Args:
            engine: of SQLAlchemy; or a URL, as for `from_url`.
            serde: as for every LangGraph checkpointer; an `EncryptedSerializer` encrypts everything but
                names and ids: of threads, namespaces, channels, checkpoints and tasks.
            schema: of the tables; None is the connection's own.
            table_prefix: what the names of the tables begin with.
            hmac_key: at least 16 secret bytes; digests are then signatures, and nobody without the key can
                change what is stored unnoticed.
            cache_bytes: how much of the threads that were last used this process keeps in memory, roughly.
            of_url: further arguments of `from_url`.

        Raises:
            StorageError: the engine cannot be used: its driver is another one, or it is asynchronous and has its
                database in memory, connections that you make, or an option without a counterpart.
            ConfigError: `hmac_key` or `table_prefix` cannot be used.
        """
        super().__init__(serde=serde)
        tables, protection = Tables(prefix=table_prefix, schema=schema), Protection(self.serde, hmac_key)
        self._store = Store(engine, tables=tables, protection=protection, cache_bytes=cache_bytes, **of_url)

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
        must_exist: bool = False,
    ) -> Self:
        """A saver for a database URL.

        For example `sqlite:///threads.db`, `sqlite:///:memory:`, `postgresql://user@host/database`,
        `mysql://user@host/database`. One that names an asynchronous driver (aiosqlite, asyncpg, asyncmy, aiomysql)
        is served by the synchronous driver of the same database: pysqlite, psycopg, PyMySQL. Nothing is opened yet.
        SQLite files are kept with a write-ahead log.

        Args:
            url: where.
            serde: see `SQLAlchemySaver`, as are `schema`, `table_prefix`, `hmac_key` and `cache_bytes`.
            synchronous: of SQLite: FULL keeps what was acknowledged through a power cut, NORMAL may lose the
                last checkpoints then, but never leaves a half-written one.
            engine_options: further arguments for `create_engine`.
            must_exist: make neither a file nor tables; the first call raises `StorageError` where there are none.

        Raises:
            StorageError: the URL cannot be read, or names a database, a driver or an option that cannot be used.
            ConfigError: `hmac_key` or `table_prefix` cannot be used.
        """
        return cls(
            url,
            serde=serde,
            schema=schema,
            table_prefix=table_prefix,
            hmac_key=hmac_key,
            cache_bytes=cache_bytes,
            synchronous=synchronous,
            engine_options=engine_options,
            must_exist=must_exist,
        )

    @property
    def _serde(self) -> SerializerProtocol:
        """The serializer that makes plain bytes."""
        return plain_serde(self.serde)

    # Opening and closing. Clones made by `with_allowlist` share the database, and close it for each other.

    def setup(self) -> None:
        """Make the tables now instead of on first use."""
        self._store.database.run(lambda _: None)

    def close(self) -> None:
        """Close every connection; later calls raise. Works in and outside an event loop."""
        self._store.database.close()

    async def aclose(self) -> None:
        """As `close`, for a task."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    # Writing.

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint and the values of the channels in `new_versions`; return its config.

        The parent is the checkpoint that `config` names. A checkpoint of the same id is replaced.
        """
        return self._store.put(self._serde, config, checkpoint, metadata, new_versions)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task wrote, under the checkpoint that `config` names.

        Repeating it changes nothing, unless every write is to a special channel (error, interrupt, resume,
        scheduled): those replace what the task had there.
        """
        self._store.put_writes(self._serde, config, writes, task_id, task_path)

    # Reading.

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that `config` names, or its namespace's newest; None where there is none."""
        return self._store.get_tuple(self._serde, config)

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
        return self._store.list(self._serde, config, filter, before, limit)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """What the delta channels of a checkpoint are rebuilt from: nearest stored value, and the writes since.

        Along the parents of the checkpoint that `config` names, whose own pending writes do not count. A
        channel without a stored value has no `seed`. Pruning does not change the answer for channels that the
        checkpoint itself does not hold, and LangGraph asks for no others.
        """
        return self._store.delta_history(self._serde, config, channels)

    # Taking out and copying.

    def delete_thread(self, thread_id: str) -> None:
        """Remove everything of a thread, content included, in one transaction."""
        self._store.delete_thread(check_id(thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Remove the checkpoints whose metadata name one of these runs, on all threads.

        Later checkpoints stay as they are: their parent is then the nearest one that is left, and what their
        delta channels need of the runs' writes is kept.
        """
        if runs := check_ids(run_ids, "run id"):
            self._store.pruner.delete_runs(self._serde, runs)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all checkpoints, pending writes and content of a thread, with their ids, to another.

        What the other thread has under the same ids is replaced, the rest of it stays. A source that is not
        there is no error.
        """
        self._store.pruner.copy_thread(check_id(source_thread_id), check_id(target_thread_id))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Thin out threads: `keep_latest` leaves the newest checkpoint of each namespace, `delete` nothing.

        Each thread in a transaction of its own. The state of what is left does not change, delta channels
        included; a run that goes on meanwhile is waited for, or waits.

        Raises:
            ConfigError: another strategy.
        """
        self._store.prune(self._serde, check_ids(thread_ids), strategy)

    # Looking into threads, and keeping the database small.

    def memory_history(
        self,
        thread_id: str,
        *,
        checkpoint_ns: str = "",
        checkpoint_id: str | None = None,
        channel: str | None = None,
        newest_first: bool = False,
    ) -> Iterator[MemoryStep]:
        """The memories that led to the thread's newest checkpoint, oldest first.

        There is one step for every checkpoint in which a channel holds a memory other than in the checkpoint
        before it (its parent). A checkpoint that leaves the memory as it was gives none, nor does one that
        empties it; the memory after that counts from nothing. Branches that the newest checkpoint does not
        come from are not on the way; name a checkpoint of theirs to see them.

        A thread that is not there has no steps. One that is pruned meanwhile gives those that are left. Reads
        page by page and holds one page at a time; `newest_first` begins at once, without following the
        thread to its first checkpoint.

        Args:
            thread_id: whose memory.
            checkpoint_ns: of a subgraph.
            checkpoint_id: where the way ends, instead of the newest checkpoint.
            channel: where the memory is kept. None finds every channel whose latest value is a memory as
                `MemoryState.to_dict` writes it, and leaves out what else such a channel held.
            newest_first: turn the order round.

        Raises:
            StorageError: there is no such checkpoint, or stored bytes were changed or damaged (names the
                checkpoint).
            CorruptStateError: what a checkpoint holds is no memory, or not one that this version reads.
        """
        address = Address(check_id(thread_id), checkpoint_ns, checkpoint_id)
        return memory_history(self._store, self._serde, address, channel, newest_first=newest_first)

    def retain(
        self,
        policy: Retention,
        *,
        thread_ids: Sequence[str] | None = None,
        dry_run: bool = False,
        now: datetime | None = None,
    ) -> RetentionReport:
        """Take out what a policy does not let stay.

        Each thread is a transaction of its own: broken off, a sweep has done whole threads. One that has nothing to
        do is not locked. A run that goes on meanwhile is waited for, or waits; the state of what stays does not
        change, delta channels and pending writes included.

        Args:
            policy: what stays.
            thread_ids: the threads to look at; None for all. One that is not there is no error.
            dry_run: only tell what would go. Nothing is changed or locked; the figures are those of a real run, if
                nothing is written in between.
            now: the time that ages are counted from, with a time zone; None for the clock's.

        Raises:
            ConfigError: `thread_ids` is one string or holds something that is no id, or `now` has no time zone.
            StorageError: the database refused. A thread that holds something else than was stored stays as it is,
                is named in the report, and the others go on.
        """
        return sweep(self._store, self._serde, policy, thread_ids=thread_ids, dry_run=dry_run, now=now)

    def storage_report(self, *, limit: int | None = None, order: Order = "bytes") -> StorageReport:
        """What the threads take, in a few statements that read every row's lengths but no content.

        Args:
            limit: tell of that many threads only; the sums are over all.
            order: `bytes` the largest first, `checkpoints` those with most first, `idle` those first that were
                not written for longest.

        Raises:
            ConfigError: a limit below 1, or another order.
        """
        return storage_report(self._store.database, limit, order)

    def get_next_version(self, current: str | int | float | None, channel: None) -> Any:
        """The version after `current`: a number that sorts as text, and a random part.

        Two branches that leave one checkpoint so never give different values the same version. The random
        part ignores `random.seed`, which a graph may call. A thread that came from a checkpointer with whole
        numbers as versions keeps to whole numbers, since LangGraph compares all versions of a checkpoint.
        """
        if isinstance(current, int):
            return current + 1
        number = int(current.split(".")[0]) if isinstance(current, str) else int(current or 0)
        return f"{number + 1:032}.{randbelow(10**16):016}"

    # For tasks.

    async def _in_thread(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call something in a thread, with the context variables of this task.

        A cancellation is passed on when the call has ended, or at once if it has not begun.
        """
        database = self._store.database
        database.check_open()
        future = database.threads.submit(copy_context().run, partial(call, *arguments, **named))
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if not future.cancel():
                while not waiting.done():
                    with suppress(asyncio.CancelledError):  # another one
                        await asyncio.wait({waiting})
                if not waiting.cancelled():
                    waiting.exception()  # seen; the caller asked for the cancellation and gets that
            raise

    asetup = _for_tasks(setup)
    aput = _for_tasks(put)
    aput_writes = _for_tasks(put_writes)
    aget_tuple = _for_tasks(get_tuple)
    alist = _iterated_by_tasks(list)
    aget_delta_channel_history = _for_tasks(get_delta_channel_history)
    adelete_thread = _for_tasks(delete_thread)
    adelete_for_runs = _for_tasks(delete_for_runs)
    acopy_thread = _for_tasks(copy_thread)
    aprune = _for_tasks(prune)
    amemory_history = _iterated_by_tasks(memory_history)
    aretain = _for_tasks(retain)
    astorage_report = _for_tasks(storage_report)
