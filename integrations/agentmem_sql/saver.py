"""`SQLAlchemySaver`: LangGraph's checkpointer interface, synchronous and asynchronous, in one class.

Values are packed before work that needs a connection and unpacked after it: no code of the caller's in a transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from datetime import datetime
from functools import partial, wraps
from itertools import islice
from secrets import randbelow
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar
from weakref import WeakKeyDictionary

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
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

from agentmem.errors import ConfigError, StorageError
from agentmem_sql import rows
from agentmem_sql.audit import Audit, Event
from agentmem_sql.content import CheckedSerializer, Unpacker, is_langgraphs
from agentmem_sql.database import Database, Work
from agentmem_sql.memory_history import MemoryStep, MemoryWalk
from agentmem_sql.message_cache import CachedThread, ChannelHeads, DecodeTemplates, ThreadCache
from agentmem_sql.protection import Protection
from agentmem_sql.prune import Pruner, all_but_newest
from agentmem_sql.reader import Reader, listing
from agentmem_sql.retention import Retention, RetentionReport, StorageReport, storage_report, sweep
from agentmem_sql.rows import Address, Encoded, check_id, check_ids, encode_checkpoint, encode_writes, to_tuple
from agentmem_sql.schema import DEFAULT_PREFIX, Tables
from agentmem_sql.statements import MOST_CONTENT, MOST_ROWS
from agentmem_sql.writer import Locked, WriteConflict, WriteMode, Writer

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

CACHE_BYTES = 64 * 2**20

# How often a write is tried, and how often of these it relies on what is known of the thread. Where a thread is pruned
# all the time, nothing is left out after that, so that nothing can be wrong.
_ATTEMPTS, _RELYING = 8, 4

P = ParamSpec("P")
T = TypeVar("T")
_PAGE = 32  # items of an iterator that are made at once for a task


class SaverParts(NamedTuple):
    """What a saver is made of, for packages that do more in its transactions."""

    database: Database
    protection: Protection
    cache: ThreadCache
    writer: Writer
    pruner: Pruner
    audit: Audit


def plain_serde(serde: SerializerProtocol) -> SerializerProtocol:
    """The serializer without encryption."""
    # Not isinstance: for subclasses of a protocol that takes as long as serialising a message.
    return serde.serde if EncryptedSerializer in type(serde).__mro__ else serde  # type: ignore[attr-defined]


def _for_tasks(
    method: Callable[Concatenate[SQLAlchemySaver, P], T], *, reads: bool = False
) -> Callable[Concatenate[SQLAlchemySaver, P], Coroutine[Any, Any, T]]:
    """The asynchronous form of a method, which never waits for a writer if it only `reads`."""

    @wraps(method)
    async def twin(self: SQLAlchemySaver, /, *arguments: P.args, **named: P.kwargs) -> T:
        return await self._in_thread(reads, getattr(self, method.__name__), *arguments, **named)

    twin.__name__, twin.__doc__ = f"a{method.__name__}", f"As `{method.__name__}`, for a task."
    return twin


def _iterated_by_tasks(
    method: Callable[Concatenate[SQLAlchemySaver, P], Iterator[T]],
) -> Callable[Concatenate[SQLAlchemySaver, P], AsyncIterator[T]]:
    """The asynchronous form of a method that returns an iterator: a thread makes many items at once."""

    @wraps(method)
    async def twin(self: SQLAlchemySaver, /, *arguments: P.args, **named: P.kwargs) -> AsyncIterator[T]:
        items = getattr(self, method.__name__)(*arguments, **named)
        made: list[T]
        while made := await self._in_thread(True, list, islice(items, _PAGE)):
            for item in made:
                yield item

    twin.__name__, twin.__doc__ = f"a{method.__name__}", f"As `{method.__name__}`, for a task."
    return twin


class SQLAlchemySaver(BaseCheckpointSaver[str]):
    """Stores the threads of LangGraph graphs in a SQL database.

        with SQLAlchemySaver.from_url("sqlite:///threads.db") as saver:
            graph = builder.compile(checkpointer=saver)

    The same object serves `graph.invoke` and `graph.ainvoke`, any number of threads and event loops, and several
    processes on one database: SQLite, PostgreSQL, MySQL or MariaDB. The tables are created on first use. Content is
    stored once per thread, whatever contains it (lists item by item), and is compared with its digest when read.

    The asynchronous methods (`aput`, `aget_tuple` and so on) run the synchronous ones in the saver's own threads. A
    task that is cancelled while it waits for a free thread does nothing; a later one ends when its call is completed.

    Every method raises `StorageError` if the database cannot be opened, reports an error, has a newer schema, or holds
    damaged data; and `ConfigError` for something that is not an id, or a single string instead of a list of ids.
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
        audit: bool = False,
        engine_options: Mapping[str, Any] | None = None,
        must_exist: bool = False,
    ) -> None:
        """Use your own engine, with its pool and settings, which closing the saver leaves open; or a URL.

        From an `AsyncEngine` only the URL and options are used: the saver makes its own engine from them, with the
        synchronous driver of the same database. Listeners are not copied.

        Args:
            engine: an engine of SQLAlchemy, or a URL as for `from_url`.
            serde: as for every LangGraph checkpointer. If left out, a stored value makes only types that LangGraph
                stores and that are loaded, and is refused otherwise. An `EncryptedSerializer` encrypts everything but
                times and the names and ids of threads, namespaces, channels, checkpoints and tasks.
            schema: the schema of the tables; None is the connection's default.
            table_prefix: the beginning of the tables' names.
            hmac_key: at least 16 secret bytes, without which nobody can then change stored data unnoticed.
            cache_bytes: how much of recently used threads this process keeps in memory, roughly.
            audit: from now on this database keeps an audit trail (see `agentmem_sql.audit`), whoever opens it.
            engine_options: further arguments for `create_engine`, for a URL.
            must_exist: create neither a file nor tables; the first call raises `StorageError` if there are none.

        Raises:
            StorageError: the URL cannot be read, or names a database, a driver or an option that cannot be used; or an
                asynchronous engine has a database in memory, a creator, or an option that no synchronous driver has.
            MissingExtraError: the driver is not installed.
            ConfigError: `serde`, `schema`, `table_prefix`, `hmac_key` or `cache_bytes` cannot be used.
        """
        super().__init__(serde=serde if serde or STRICT_MSGPACK_ENABLED else CheckedSerializer())
        tables, protection = Tables(prefix=table_prefix, schema=schema), Protection(self.serde, hmac_key, audit)
        self._protection = protection
        rows.check_count(cache_bytes, "`cache_bytes`", 0)
        self._cache = ThreadCache(cache_bytes)
        self._database = Database(
            engine,
            tables=tables,
            engine_options=engine_options,
            must_exist=must_exist,
            protection=protection,
            cache=self._cache,
        )
        # By serializer: a clone of the saver has another, which may read the same bytes as something else.
        self._templates: WeakKeyDictionary[SerializerProtocol, DecodeTemplates] = WeakKeyDictionary()
        self._reader = Reader(tables, protection, self._cache)
        self._writer = Writer(tables, protection)
        self._audit = Audit(tables, protection)
        self._pruner = Pruner(self._database, self._cache, self._writer, self._reader, self._audit)
        self.parts = SaverParts(self._database, protection, self._cache, self._writer, self._pruner, self._audit)

    @classmethod
    def from_url(cls: Callable[Concatenate[str | URL, P], T], url: str | URL, *args: P.args, **options: P.kwargs) -> T:
        """A saver for a database URL, with the options of `SQLAlchemySaver`; nothing is opened yet.

        For example `sqlite:///threads.db`, `sqlite:///:memory:`, `postgresql://user@host/database`,
        `mysql://user@host/database`. Where it names an asynchronous driver (aiosqlite, asyncpg, asyncmy, aiomysql) the
        synchronous one is used: pysqlite, psycopg or PyMySQL. SQLite files get a write-ahead log.
        """
        return cls(url, *args, **options)

    # Opening and closing. Clones made by `with_allowlist` share the database; closing one closes it for all.

    def setup(self) -> None:
        """Create the tables now, and not on first use."""
        self._database.run(lambda _: None)

    def close(self) -> None:
        """Close every connection; later calls raise. Works in and outside an event loop."""
        self._database.close()

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
        *,
        first: Work[object] | None = None,
    ) -> RunnableConfig:
        """Store a checkpoint and the values of the channels in `new_versions`; return its config.

        The parent is the checkpoint that `config` names. A checkpoint of the same id is replaced.

        Args:
            first: work that comes first in the same transaction; if it raises, nothing is stored. May be done again.
        """
        serde, merged = plain_serde(self.serde), rows.checked_metadata(config, checkpoint, metadata, new_versions)
        encode = partial(encode_checkpoint, serde, self._protection, checkpoint, merged, new_versions)
        if self._protection.audited is None:  # the database was not opened yet
            self.setup()
        put = self._writer.put_checkpoint
        event = self._audit.written(self, config, checkpoint, merged) if self._protection.audited else None
        return self._write(serde, config, encode, put, WriteMode.INSERT, checkpoint["id"], event, first)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task wrote, under the checkpoint that `config` names.

        Repeating the call changes nothing, unless all writes are to special channels (error, interrupt, resume,
        scheduled): those replace the task's earlier ones.
        """
        writes, serde = rows.check_writes(writes), plain_serde(self.serde)
        if not writes:
            return

        def encode(address: Address, known: CachedThread, _parents: ChannelHeads) -> Encoded:
            return encode_writes(serde, self._protection, writes, task_id, task_path, address, known)

        # Writes to special channels replace what the task had there, and a task that was resumed writes its results
        # together with the answers: what is there already is looked for first.
        special = any(channel in WRITES_IDX_MAP for channel, _ in writes)
        mode = WriteMode.CHECK if special else WriteMode.INSERT
        self._write(serde, config, encode, self._writer.put_writes, mode)

    def _write(
        self,
        serde: SerializerProtocol,
        config: RunnableConfig,
        encode: Callable[[Address, CachedThread, ChannelHeads], Encoded],
        put: Callable[..., Locked | None],
        mode: WriteMode,
        checkpoint_id: str = "",
        event: Event | None = None,
        first: Work[object] | None = None,
    ) -> RunnableConfig:
        """Encode and write, again if it must be in another mode; return the config of the checkpoint, if it is one.

        Raises:
            StorageError: others changed the thread every time.
        """
        if not self._protection.has_key:
            self.setup()
        address = Address.of(config)
        for attempt in range(_ATTEMPTS):
            relying = attempt < _RELYING
            known = self._cache.get(address.thread) if relying else CachedThread()
            parents: ChannelHeads | None = None
            if relying and checkpoint_id and address.id is not None:
                parents = known.heads.get((address.ns, address.id))
                if parents is None and (
                    stored := self._database.run(partial(self._reader.row, serde=serde, address=address))
                ):
                    known, parents = stored.known, stored.heads
            new = encode(address, known, parents or {})
            if mode is WriteMode.INSERT and known.number is None:
                mode = WriteMode.CHECK
            small = len(new.packer.new) <= MOST_CONTENT and len(new.rows) <= MOST_ROWS
            write: Work[Locked | None] = partial(put, thread_id=address.thread, new=new, mode=mode, in_one=small)
            alone = small and mode is WriteMode.INSERT
            if event is not None or first is not None:
                write, alone = self._audit.noting(write, address.thread, event, first), False
            try:
                locked = self._database.run(write, write=True, autocommit=alone)
            except WriteConflict as conflict:
                if conflict.mode is WriteMode.CHECK:
                    self._cache.drop(address.thread)
                if mode is not WriteMode.EXCLUSIVE:
                    mode = conflict.mode
                continue
            if locked is not None:
                known = self._cache.at(address.thread, *locked)
                known.add_new(new.packer.new, new.packer.snapshots)
                if new.heads is not None:
                    known.remember_channels(address.ns, checkpoint_id, new.heads)
            return address.config(checkpoint_id)
        raise StorageError(
            f"thread {address.thread[:80]!r} was changed by others {_ATTEMPTS} times while something was being stored "
            "in it; nothing was stored, try again"
        )

    # Reading.

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that `config` names, or the newest of its namespace; None if there is none."""
        serde = plain_serde(self.serde)
        stored = self._database.run(partial(self._reader.find, serde=serde, address=Address.of(config)))
        return None if stored is None else to_tuple(stored, serde, self._templates_of(serde))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints by id, newest first: of one thread (and one namespace, if given), or of all threads.

        Each checkpoint is consistent in itself. A thread that is written meanwhile is as it was when its page was read.

        Args:
            config: names the thread; None for all threads.
            filter: metadata keys and the exact values they must have.
            before: only checkpoints with an id below this config's.
            limit: at most this many, counted after the filter.

        Raises:
            ConfigError: `filter`, `before` or `limit` is something else.
        """
        serde = plain_serde(self.serde)
        reader = self._reader
        for stored in listing(self._database, reader, serde, config, filter=filter, before=before, limit=limit):
            yield to_tuple(stored, serde, self._templates_of(serde))

    def _templates_of(self, serde: SerializerProtocol) -> DecodeTemplates | None:
        """What messages may be decoded by without the serializer; None where it may run code of the caller's."""
        if not is_langgraphs(serde) or getattr(serde, "_custom_unpack_ext_hook", True):
            return None
        return self._templates.get(serde) or self._templates.setdefault(serde, DecodeTemplates())

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """What a checkpoint's delta channels are rebuilt from: the nearest stored value, and the writes since.

        The search follows the parents of the checkpoint that `config` names, whose own pending writes do not count. A
        channel without a stored value has no `seed`. Pruning does not change the result for channels that the
        checkpoint itself does not hold, and LangGraph asks for no others.
        """
        channels = check_ids(channels, "channel")
        if not channels:
            return {}
        read = partial(self._reader.delta_histories, address=Address.of(config), channels=channels)
        stored = self._database.run(read)
        if stored is None:
            return {name: DeltaChannelHistory(writes=[]) for name in channels}
        histories, contents, known = stored
        serde = plain_serde(self.serde)
        unpacker = Unpacker(serde, contents, known, self._templates_of(serde))
        result: dict[str, DeltaChannelHistory] = {}
        for name, history in histories.items():
            values = unpacker.unpack_all([digest for _, digest in history.writes])
            writes = [(task, name, value) for (task, _), value in zip(history.writes, values, strict=True)]
            result[name] = DeltaChannelHistory(writes=writes)
            if history.seed is not None:
                result[name]["seed"] = unpacker.unpack_all([history.seed])[0]
        return result

    # Deleting and copying.

    def delete_thread(self, thread_id: str) -> None:
        """Delete everything in a thread, content included, in one transaction."""
        thread_id = check_id(thread_id)
        work = partial(self._writer.delete_thread, thread_id=thread_id)
        self._database.run(self._audit.noting(work, thread_id, Event("deleted")), write=True)
        self._cache.drop(thread_id)

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints whose metadata name one of these runs, in all threads.

        Later checkpoints stay as they are: each gets the nearest remaining ancestor as its parent, and what its delta
        channels need from the runs' writes is kept.
        """
        if runs := check_ids(run_ids, "run id"):
            self._pruner.delete_runs(plain_serde(self.serde), runs)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all checkpoints, pending writes and content of a thread to another thread, with their ids.

        Data of the same ids in the other thread is replaced; its other data stays. The source need not exist.
        """
        self._pruner.copy_thread(check_id(source_thread_id), check_id(target_thread_id))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete checkpoints: `keep_latest` leaves the newest of each namespace, `delete` leaves nothing.

        Each thread is a separate transaction. The state of what is left does not change, delta channels included. A run
        that is writing to the thread waits, or is waited for.

        Raises:
            ConfigError: an unknown strategy.
        """
        if strategy not in ("keep_latest", "delete"):
            raise ConfigError(f"expected the strategy 'keep_latest' or 'delete', found {strategy!r}")
        for thread_id in check_ids(thread_ids):
            if strategy == "delete":
                self.delete_thread(thread_id)
            else:
                self._pruner.remove(plain_serde(self.serde), thread_id, all_but_newest)

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

        There is one step for every checkpoint whose memory, in some channel, differs from that of its parent, and none
        for one that empties it; the memory after that counts as restarted. Branches that the newest checkpoint does not
        descend from are not included; name one of their checkpoints to see them.

        A thread that does not exist has no steps. If a thread is pruned meanwhile, the remaining steps are returned.
        The history is read page by page; `newest_first` starts without going back to the first checkpoint.

        Args:
            checkpoint_ns: the namespace of a subgraph.
            checkpoint_id: the checkpoint to end with, in place of the newest.
            channel: the channel of the memory. None finds every channel whose latest value is a memory as written by
                `MemoryState.to_dict`, and leaves out its other values.
            newest_first: reverse the order.

        Raises:
            StorageError: there is no such checkpoint, or stored data is damaged (the error names the checkpoint).
            CorruptStateError: a value is not a memory, or not one that this version can read.
        """
        channel = None if channel is None else check_id(channel, "channel")
        named = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns, "checkpoint_id": checkpoint_id}
        address, serde = Address.of({"configurable": named}), plain_serde(self.serde)
        walk = MemoryWalk(self._database, self._reader, serde, address, channel)
        return walk.steps(newest_first=newest_first)

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
            thread_ids: the threads to sweep, which need not exist; None for all.
            dry_run: only report what would be deleted; nothing is changed or locked.
            now: the time from which ages are counted, with a time zone; None for the present.

        Raises:
            ConfigError: `thread_ids` is not a sequence of ids, or `now` has no time zone.
            StorageError: the database reported an error. Damaged threads are left as they are and named in the report.
        """
        return sweep(self._pruner, plain_serde(self.serde), policy, thread_ids=thread_ids, dry_run=dry_run, now=now)

    def storage_report(self, *, limit: int | None = None) -> StorageReport:
        """How much space threads take, largest first, by a statement that reads the lengths of all rows but no content.

        Args:
            limit: report only this many threads; the sums cover all.

        Raises:
            ConfigError: `limit` is below 1.
        """
        return storage_report(self._database, limit)

    def get_next_version(self, current: str | int | float | None, channel: None) -> Any:
        """The version after `current`: a number that sorts as text, and a random part.

        So two branches from one checkpoint never give different values one version; `random.seed` has no influence.
        A thread copied from a checkpointer with integer versions keeps integers, since LangGraph compares them.
        """
        if isinstance(current, int):
            return current + 1
        number = int(current.split(".")[0]) if isinstance(current, str) else int(current or 0)
        return f"{number + 1:032}.{randbelow(10**16):016}"

    # Asynchronous calls.

    async def _in_thread(self, reads: bool, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call something in a thread for those that read, or that write, with the context variables of this task.

        If the task is cancelled, the cancellation is raised when the call has ended, or at once if it has not begun.
        """
        database = self._database
        database.check_open()
        try:
            threads = database.reading_threads if reads else database.writing_threads
            future = threads.submit(copy_context().run, partial(call, *arguments, **named))
        except RuntimeError:
            database.check_open()  # closed this very moment
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
