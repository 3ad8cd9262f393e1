"""`SQLAlchemySaver`: LangGraph's checkpointer interface, synchronous and asynchronous, in one class.

Every asynchronous method runs the synchronous one in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import copy_context
from datetime import datetime
from functools import partial, wraps
from itertools import islice
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
from langgraph.checkpoint.serde._msgpack import STRICT_MSGPACK_ENABLED
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
from agentmem_sql.serializer import CheckedSerializer
from agentmem_sql.store import Store

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

CACHE_BYTES = 64 * 2**20

P = ParamSpec("P")
T = TypeVar("T")
_PAGE = 32  # items of an iterator that are made at once for a task


def plain_serde(serde: SerializerProtocol) -> SerializerProtocol:
    """The serializer without encryption."""
    # Not isinstance: for subclasses of a protocol that takes as long as serialising a message.
    return serde.serde if EncryptedSerializer in type(serde).__mro__ else serde  # type: ignore[attr-defined]


def _for_tasks(
    method: Callable[Concatenate[SQLAlchemySaver, P], T], *, reads: bool = False
) -> Callable[Concatenate[SQLAlchemySaver, P], Coroutine[Any, Any, T]]:
    """The asynchronous form of a method; `reads`: it never waits for a writer."""

    @wraps(method)
    async def twin(self: SQLAlchemySaver, /, *arguments: P.args, **named: P.kwargs) -> T:
        database = self._store.database
        threads = database.reading_threads if reads else database.writing_threads
        return await self._in_thread(threads, getattr(self, method.__name__), *arguments, **named)

    twin.__name__, twin.__doc__ = f"a{method.__name__}", f"As `{method.__name__}`, for a task."
    return twin


def _iterated_by_tasks(
    method: Callable[Concatenate[SQLAlchemySaver, P], Iterator[T]],
) -> Callable[Concatenate[SQLAlchemySaver, P], AsyncIterator[T]]:
    """The asynchronous form of a method that returns an iterator: a thread makes many items at once."""

    @wraps(method)
    async def twin(self: SQLAlchemySaver, /, *arguments: P.args, **named: P.kwargs) -> AsyncIterator[T]:
        items = getattr(self, method.__name__)(*arguments, **named)
        while True:
            made, error = await self._in_thread(self._store.database.reading_threads, _some_of, items)
            for item in made:
                yield item
            if error is not None:
                raise error
            if len(made) < _PAGE:
                return

    twin.__name__, twin.__doc__ = f"a{method.__name__}", f"As `{method.__name__}`, for a task."
    return twin


def _some_of(items: Iterator[T]) -> tuple[list[T], Exception | None]:
    """The next items, and the error that ended them."""
    made: list[T] = []
    try:
        for item in islice(items, _PAGE):
            made.append(item)
    except Exception as error:  # noqa: BLE001
        return made, error
    return made, None


class SQLAlchemySaver(BaseCheckpointSaver[str]):
    """Stores the threads of LangGraph graphs in a SQL database.

        with SQLAlchemySaver.from_url("sqlite:///threads.db") as saver:
            graph = builder.compile(checkpointer=saver)

    The same object serves `graph.invoke` and `graph.ainvoke`, any number of threads and event loops, and several
    processes on one database: SQLite, PostgreSQL, MySQL or MariaDB. The tables are created on first use. Content is
    stored once per thread, however many checkpoints and pending writes contain it (lists item by item), and is compared
    with its digest when it is read.

    The asynchronous methods (`aput`, `aget_tuple` and so on) run the synchronous ones in the saver's own threads. A
    task that is cancelled while it waits for a free thread does nothing. A task that is cancelled later ends when its
    call has ended, so that the call is always completed.

    Every method raises `StorageError` if the database cannot be opened, reports an error, has a newer schema, or holds
    damaged data; and `ConfigError` if an id is not one (None, for example), or if a single string is passed for a list
    of ids.
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
        """Use your own engine, with its pool and settings; closing the saver leaves it open.

        From an `AsyncEngine` only the URL and options are used: the saver makes its own engine from them, with the
        synchronous driver of the same database. Listeners are not copied.

        Args:
            engine: an engine of SQLAlchemy, or a URL, as for `from_url`.
            serde: as for every LangGraph checkpointer. If left out, a stored value makes only types that LangGraph
                stores and that are loaded, and is refused otherwise. An `EncryptedSerializer` encrypts everything but
                times and the names and ids of threads, namespaces, channels, checkpoints and tasks.
            schema: the schema of the tables; None is the connection's default.
            table_prefix: the beginning of the tables' names.
            hmac_key: at least 16 secret bytes. Digests then become signatures, so that nobody without the key can
                change stored data unnoticed.
            cache_bytes: how much of recently used threads this process keeps in memory, roughly.
            of_url: further arguments of `from_url`.

        Raises:
            StorageError: the engine cannot be used: it has an unsupported driver; or it is asynchronous, and has its
                database in memory, connections made by your code, or an option that the synchronous driver lacks.
            ConfigError: `hmac_key` or `table_prefix` cannot be used.
        """
        super().__init__(serde=serde if serde or STRICT_MSGPACK_ENABLED else CheckedSerializer())
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
        `mysql://user@host/database`. For a URL that names an asynchronous driver (aiosqlite, asyncpg, asyncmy,
        aiomysql) the synchronous driver of the same database is used: pysqlite, psycopg or PyMySQL. Nothing is opened
        yet. SQLite files get a write-ahead log.

        Args:
            url: the database.
            serde: see `SQLAlchemySaver`, as for `schema`, `table_prefix`, `hmac_key` and `cache_bytes`.
            synchronous: SQLite's setting. With FULL, acknowledged checkpoints survive a power cut; with NORMAL the last
                ones may be lost, but none is ever half-written.
            engine_options: further arguments for `create_engine`.
            must_exist: create neither a file nor tables; the first call raises `StorageError` if there are none.

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
        """The serializer without encryption."""
        return plain_serde(self.serde)

    # Opening and closing. Clones made by `with_allowlist` share the database; closing one closes it for all.

    def setup(self) -> None:
        """Create the tables now, and not on first use."""
        self._store.database.run(lambda _: None)

    def close(self) -> None:
        """Close every connection; later calls raise. Works in and outside an event loop."""
        self._store.database.close()

    async def aclose(self) -> None:
        """As `close`, without blocking the event loop."""
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

        Repeating the call changes nothing, unless all writes are to special channels (error, interrupt, resume,
        scheduled): those replace the task's earlier ones.
        """
        self._store.put_writes(self._serde, config, writes, task_id, task_path)

    # Reading.

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that `config` names, or the newest of its namespace; None if there is none."""
        return self._store.get_tuple(self._serde, config)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints by id, newest first: of one thread (and one namespace, if given), or of all threads.

        Each checkpoint is consistent in itself. If a thread is written meanwhile, its state at the time its page is
        read is returned.

        Args:
            config: names the thread; None for all threads.
            filter: metadata keys and the exact values they must have.
            before: only checkpoints with an id below this config's.
            limit: at most this many, counted after the filter.
        """
        return self._store.list(self._serde, config, filter, before, limit)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """What a checkpoint's delta channels are rebuilt from: the nearest stored value, and the writes since.

        The search follows the parents of the checkpoint that `config` names, whose own pending writes do not count. A
        channel without a stored value has no `seed`. Pruning does not change the result for channels that the
        checkpoint itself does not hold, and LangGraph asks for no others.
        """
        return self._store.delta_history(self._serde, config, channels)

    # Deleting and copying.

    def delete_thread(self, thread_id: str) -> None:
        """Delete everything in a thread, content included, in one transaction."""
        self._store.delete_thread(check_id(thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints whose metadata name one of these runs, in all threads.

        Later checkpoints stay as they are: each gets the nearest remaining ancestor as its parent, and what its delta
        channels need from the runs' writes is kept.
        """
        if runs := check_ids(run_ids, "run id"):
            self._store.pruner.delete_runs(self._serde, runs)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all checkpoints, pending writes and content of a thread to another thread, with their ids.

        Data that the other thread has under the same ids is replaced; its other data stays. It is not an error if the
        source does not exist.
        """
        self._store.pruner.copy_thread(check_id(source_thread_id), check_id(target_thread_id))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete checkpoints: `keep_latest` leaves the newest of each namespace, `delete` leaves nothing.

        Each thread is a separate transaction. The state of what is left does not change, delta channels included. A run
        that is writing to the thread waits, or is waited for.

        Raises:
            ConfigError: an unknown strategy.
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

        There is one step for every checkpoint whose memory, in some channel, differs from that of its parent. A
        checkpoint that does not change the memory gives no step, nor does one that empties it; the memory after that
        counts as restarted. Branches that the newest checkpoint does not descend from are not included; pass one of
        their checkpoints to see them.

        A thread that does not exist has no steps. If a thread is pruned meanwhile, the remaining steps are returned.
        The history is read page by page, and one page at a time is in memory; `newest_first` starts at once, without
        going back to the thread's first checkpoint.

        Args:
            thread_id: the thread.
            checkpoint_ns: the namespace of a subgraph.
            checkpoint_id: the checkpoint to end with, in place of the newest.
            channel: the channel of the memory. None finds every channel whose latest value is a memory as written by
                `MemoryState.to_dict`, and leaves out its other values.
            newest_first: reverse the order.

        Raises:
            StorageError: there is no such checkpoint, or stored data is damaged (the error names the checkpoint).
            CorruptStateError: the value in a checkpoint is not a memory, or not one that this version can read.
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
        """Delete what a policy does not keep.

        Each thread is a separate transaction, so an interrupted sweep has finished some threads completely. Threads
        with nothing to delete are not locked. A run that is writing to a thread waits, or is waited for. The state of
        what is left does not change, delta channels and pending writes included.

        Args:
            policy: what to keep.
            thread_ids: the threads to sweep; None for all. It is not an error if one does not exist.
            dry_run: only report what would be deleted. Nothing is changed or locked; the figures are those of a real
                run, if nothing is written in between.
            now: the time from which ages are counted, with a time zone; None for the present.

        Raises:
            ConfigError: `thread_ids` is a single string or holds something that is not an id, or `now` has no time
                zone.
            StorageError: the database reported an error. A thread with damaged data is left as it is and named in the
                report; the other threads are swept.
        """
        return sweep(self._store, self._serde, policy, thread_ids=thread_ids, dry_run=dry_run, now=now)

    def storage_report(self, *, limit: int | None = None, order: Order = "bytes") -> StorageReport:
        """How much space threads take, by a few statements that read the lengths of all rows but no content.

        Args:
            limit: report only this many threads; the sums cover all.
            order: `bytes`: largest first; `checkpoints`: those with most first; `idle`: those not written for the
                longest time first.

        Raises:
            ConfigError: `limit` is below 1, or `order` is unknown.
        """
        return storage_report(self._store.database, limit, order)

    def get_next_version(self, current: str | int | float | None, channel: None) -> Any:
        """The version after `current`: a number that sorts as text, and a random part.

        So two branches from one checkpoint never give different values the same version. The random part does not
        depend on `random.seed`, which a graph may call. A thread copied from a checkpointer with integer versions keeps
        integers, since LangGraph compares all versions of a checkpoint.
        """
        if isinstance(current, int):
            return current + 1
        number = int(current.split(".")[0]) if isinstance(current, str) else int(current or 0)
        return f"{number + 1:032}.{randbelow(10**16):016}"

    # Asynchronous calls.

    async def _in_thread(self, threads: Executor, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call something in one of these threads, with the context variables of this task.

        If the task is cancelled, the cancellation is raised when the call has ended, or at once if it has not begun.
        """
        self._store.database.check_open()
        try:
            future = threads.submit(copy_context().run, partial(call, *arguments, **named))
        except RuntimeError:
            self._store.database.check_open()  # closed this very moment
            raise
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
    aget_tuple = _for_tasks(get_tuple, reads=True)
    alist = _iterated_by_tasks(list)
    aget_delta_channel_history = _for_tasks(get_delta_channel_history, reads=True)
    adelete_thread = _for_tasks(delete_thread)
    adelete_for_runs = _for_tasks(delete_for_runs)
    acopy_thread = _for_tasks(copy_thread)
    aprune = _for_tasks(prune)
    amemory_history = _iterated_by_tasks(memory_history)
    aretain = _for_tasks(retain)
    astorage_report = _for_tasks(storage_report, reads=True)
