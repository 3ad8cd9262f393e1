"""Reading the threads of any checkpointer, to copy them.

Checkpoints are read through LangGraph's interface. Two things that it does not tell are looked up in the tables
of LangGraph's own checkpointers (SQLite, PostgreSQL, memory) and of ours: which checkpoints a thread has, without
their values; and the path of the task behind a pending write, by which writes are ordered. Of other checkpointers
the whole thread is listed, and the paths stay unknown.

Where both sides use LangGraph's serializer, values pass as they were serialised: no class of the application is
imported or called, and nothing is lost of a value whose class is not at hand, or not on an allowlist.

What asks is a generator, so that it is written once for threads and for tasks (see ``steps``).
"""

from __future__ import annotations

import asyncio
import copy
from collections import defaultdict
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import ormsgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import EXT_DELTA_SNAPSHOT, JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from sqlalchemy import Connection, select

from agentmem.errors import ConfigError
from agentmem_sql.driven import Driven
from agentmem_sql.keys import decode_text, thread_key
from agentmem_sql.packing import plain_serde
from agentmem_sql.pending import Write, in_order, slots
from agentmem_sql.steps import Job, Steps
from agentmem_sql.tables import Tables

T = TypeVar("T")
Saver = BaseCheckpointSaver[Any]
Mode = Literal["threads", "tasks", "both"]
Key = tuple[str, str]  # a checkpoint's namespace and id
# Of a checkpoint: thread, namespace, id, parent, and the task and channel of each pending write.
Outline = tuple[Any, str, str, str | None, list[tuple[str, str]]]


@dataclass(frozen=True)
class Ask(Generic[T]):
    """Something to ask a checkpointer: in this thread, or as a task."""

    now: Callable[[], T]
    soon: Callable[[], Awaitable[T]]


@dataclass(frozen=True)
class OfOurs(Generic[T]):
    """Steps of a checkpointer of ours."""

    saver: Driven
    steps: Steps[T]


Asking = Generator[Ask[Any] | OfOurs[Any], Any, T]


@dataclass
class Entry:
    """A checkpoint without its values; pending writes in the order in which they count."""

    parent: str | None
    writes: list[Write] = field(default_factory=list)


class Source:
    """A checkpointer that is read through LangGraph's interface alone."""

    def __init__(self, saver: Saver, mode: Mode = "both") -> None:
        self.saver = saver
        self._mode = mode

    def threads(self) -> Asking[list[str]]:
        """The ids of all threads."""
        outlines: list[Outline] = yield self._outlines(None)
        return list(dict.fromkeys(str(one[0]) for one in outlines))

    def index(self, thread: str) -> Asking[dict[Key, Entry]]:
        """The checkpoints of a thread; none if it is not there."""
        outlines: list[Outline] = yield self._outlines({"configurable": {"thread_id": thread}})
        found = {}
        for _, ns, checkpoint, parent, pending in outlines:
            writes = [Write(slot, one[1], None) for slot, one in zip(slots(pending), pending, strict=True)]
            found[ns, checkpoint] = Entry(parent, writes)
        return found

    def read(self, thread: str, key: Key) -> Asking[CheckpointTuple | None]:
        """A checkpoint; None if it was taken out meanwhile."""
        at = {"thread_id": self._own_id(thread), "checkpoint_ns": key[0], "checkpoint_id": key[1]}
        config: RunnableConfig = {"configurable": at}
        found: CheckpointTuple | None = yield self._ask(
            partial(self.saver.get_tuple, config), partial(self.saver.aget_tuple, config)
        )
        return found

    def _own_id(self, thread: str) -> Any:
        return thread

    def _ask(self, now: Callable[[], T], soon: Callable[[], Awaitable[T]]) -> Ask[T]:
        if self._mode == "threads":
            return Ask(now, partial(asyncio.to_thread, now))
        return Ask(self._refuse if self._mode == "tasks" else now, soon)

    def _outlines(self, config: RunnableConfig | None) -> Ask[list[Outline]]:
        async def soon() -> list[Outline]:
            return [_outline(one) async for one in self.saver.alist(config)]

        return self._ask(lambda: [_outline(one) for one in self.saver.list(config)], soon)

    def _refuse(self) -> Any:
        raise ConfigError(
            f"copy_threads was given a {type(self.saver).__name__}, which works inside an event loop only; "
            "await acopy_threads(...) instead"
        )


class _Memory(Source):
    """LangGraph's InMemorySaver; its threads may be named by numbers."""

    saver: InMemorySaver

    def threads(self) -> Asking[list[str]]:
        yield from ()
        return [str(one) for one in self.saver.storage]

    def index(self, thread: str) -> Asking[dict[Key, Entry]]:
        yield from ()
        own = self._own_id(thread)
        found: dict[Key, Entry] = {}
        for ns, checkpoints in list(self.saver.storage.get(own, {}).items()):
            for checkpoint, (_, _, parent) in list(checkpoints.items()):
                stored = self.saver.writes.get((own, ns, checkpoint), {})
                rows = [(task, idx, path, channel) for (task, idx), (_, channel, _, path) in list(stored.items())]
                found[ns, checkpoint] = Entry(parent, in_order(rows))
        return found

    def _own_id(self, thread: str) -> Any:
        return next((one for one in self.saver.storage if str(one) == thread), thread)


class _Tables(Source):
    """One of LangGraph's checkpointers on a database, which all name their columns alike."""

    def __init__(self, saver: Saver, mode: Mode, rows: Callable[..., Any], mark: str, writes: str) -> None:
        super().__init__(saver, mode)
        self._rows = rows
        self._mark = mark
        self._writes = writes

    def threads(self) -> Asking[list[str]]:
        rows = yield self._query("SELECT DISTINCT thread_id FROM checkpoints ORDER BY thread_id")
        return [thread for (thread,) in rows]

    def index(self, thread: str) -> Asking[dict[Key, Entry]]:
        where = f"WHERE thread_id = {self._mark}"
        rows = yield self._query(
            f"SELECT checkpoint_ns, checkpoint_id, parent_checkpoint_id FROM checkpoints {where}", thread
        )
        found = {(ns, checkpoint): Entry(parent or None) for ns, checkpoint, parent in rows}
        # A SQLite file from before there were paths, that cannot be written, is left without.
        path = "task_path" if getattr(self.saver, "_has_task_path", True) else "''"
        rows = yield self._query(
            f"SELECT checkpoint_ns, checkpoint_id, task_id, idx, {path}, channel FROM {self._writes} {where}", thread
        )
        grouped: defaultdict[Key, list[Any]] = defaultdict(list)
        for ns, checkpoint, *write in rows:
            grouped[ns, checkpoint].append(write)
        for key in found.keys() & grouped.keys():
            found[key].writes = in_order(grouped[key])
        return found

    def _query(self, sql: str, *parameters: str) -> Ask[list[Any]]:
        rows = partial(self._rows, self.saver, sql, parameters)
        return self._ask(rows, rows)


class _Ours(Source):
    """A SQLAlchemySaver."""

    saver: Driven

    def threads(self) -> Asking[list[str]]:
        threads = self.saver._store.reader.tables.threads

        def work(connection: Connection) -> list[str]:
            return [decode_text(name) for name in connection.execute(select(threads.c.name)).scalars()]

        found: list[str] = yield OfOurs(self.saver, job(work))
        return found

    def index(self, thread: str) -> Asking[dict[Key, Entry]]:
        found: dict[Key, Entry] = yield OfOurs(self.saver, stored(self.saver, thread))
        return found


def source_of(saver: Saver, serde: SerializerProtocol) -> Source:
    """How to read a checkpointer, for one that stores with ``serde``."""
    saver = _verbatim(saver, serde)
    if isinstance(saver, Driven):
        return _Ours(saver)
    if isinstance(saver, InMemorySaver):
        return _Memory(saver)
    names = {f"{kind.__module__}.{kind.__name__}".removeprefix("langgraph.checkpoint.") for kind in type(saver).__mro__}
    if "sqlite.SqliteSaver" in names:
        return _Tables(saver, "threads", _sqlite_rows, "?", "writes")
    if "sqlite.aio.AsyncSqliteSaver" in names:
        return _Tables(saver, "tasks", _async_sqlite_rows, "?", "writes")
    if "postgres.PostgresSaver" in names:
        return _Tables(saver, "threads", _postgres_rows, "%s", "checkpoint_writes")
    if "postgres.aio.AsyncPostgresSaver" in names:
        return _Tables(saver, "tasks", _async_postgres_rows, "%s", "checkpoint_writes")
    return Source(saver, "threads" if type(saver).aget_tuple is BaseCheckpointSaver.aget_tuple else "both")


def job(work: Callable[[Connection], T]) -> Steps[T]:
    """Work as the only step."""
    found: T = yield Job(work)
    return found


def stored(saver: Driven, thread: str) -> Steps[dict[Key, Entry]]:
    """The checkpoints of a thread in a database of ours."""
    return job(partial(_stored, saver._store.reader.tables, thread))


def _stored(tables: Tables, thread: str, connection: Connection) -> dict[Key, Entry]:
    threads, checkpoints, writes = tables.threads, tables.checkpoints, tables.writes
    number = connection.execute(select(threads.c.number).where(threads.c.key == thread_key(thread))).scalar()
    if number is None:
        return {}
    found: dict[Key, Entry] = {}
    names: dict[bytes, str] = {}
    columns = (checkpoints.c.ns, checkpoints.c.ns_name, checkpoints.c.id, checkpoints.c.parent)
    for ns, name, checkpoint, parent in connection.execute(select(*columns).where(checkpoints.c.thread == number)):
        names[ns] = decode_text(ns if name is None else name)
        found[names[ns], decode_text(checkpoint)] = Entry(None if parent is None else decode_text(parent))
    grouped: defaultdict[Key, list[Any]] = defaultdict(list)
    for row in connection.execute(select(writes).where(writes.c.thread == number)):
        write = (decode_text(row.task), row.idx, decode_text(row.path), decode_text(row.channel), row.digest)
        grouped[names.get(row.ns, ""), decode_text(row.checkpoint)].append(write)
    for key in found.keys() & grouped.keys():
        found[key].writes = in_order(grouped[key])
    return found


def _outline(found: CheckpointTuple) -> Outline:
    at = found.config["configurable"]
    parent = None if found.parent_config is None else found.parent_config["configurable"]["checkpoint_id"]
    pending = [(task, channel) for task, channel, _ in found.pending_writes or ()]
    return at["thread_id"], at.get("checkpoint_ns", ""), at["checkpoint_id"], parent, pending


# Rows of LangGraph's own checkpointers, by the locks and connections that they use themselves.


def _sqlite_rows(saver: Any, sql: str, parameters: Sequence[str]) -> list[Any]:
    with saver.cursor(transaction=False) as cursor:
        found: list[Any] = cursor.execute(sql, parameters).fetchall()
    return found


async def _async_sqlite_rows(saver: Any, sql: str, parameters: Sequence[str]) -> list[Any]:
    await saver.setup()
    async with saver.lock, saver.conn.execute(sql, parameters) as cursor:
        return list(await cursor.fetchall())


def _postgres_rows(saver: Any, sql: str, parameters: Sequence[str]) -> list[Any]:
    with saver._cursor() as cursor:
        cursor.execute(sql, parameters)
        return [tuple(row.values()) for row in cursor.fetchall()]


async def _async_postgres_rows(saver: Any, sql: str, parameters: Sequence[str]) -> list[Any]:
    async with saver._cursor() as cursor:
        await cursor.execute(sql, parameters)
        return [tuple(row.values()) for row in await cursor.fetchall()]


# Values as they were serialised.


def _verbatim(saver: Saver, serde: SerializerProtocol) -> Saver:
    """A clone whose values are not deserialised further than to plain data, if ``serde`` would store them the same."""
    inner = plain_serde(saver.serde)
    if type(inner) is not JsonPlusSerializer or type(plain_serde(serde)) is not JsonPlusSerializer:
        return saver
    keeping: SerializerProtocol = JsonPlusSerializer(
        pickle_fallback=inner.pickle_fallback,
        allowed_json_modules=inner._allowed_json_modules,
        __unpack_ext_hook__=_keep,
    )
    if isinstance(saver.serde, EncryptedSerializer):
        keeping = EncryptedSerializer(saver.serde.cipher, keeping)
    clone = copy.copy(saver)
    clone.serde = keeping
    return clone


def _keep(code: int, data: bytes) -> Any:
    if code == EXT_DELTA_SNAPSHOT:  # the list in it is stored as a list, whose items are shared
        return _DeltaSnapshot(ormsgpack.unpackb(data, ext_hook=_keep, option=ormsgpack.OPT_NON_STR_KEYS))
    return ormsgpack.Ext(code, data)
