"""How many bytes threads and databases take.

Of content the bodies are counted, of rows the columns that hold bytes: what a database adds to both (keys, indexes,
page headers, free space) differs from one to the other, and is in the size that the database itself tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import reduce
from operator import add
from typing import Any, Literal, NamedTuple, get_args

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    LargeBinary,
    Select,
    Subquery,
    Table,
    bindparam,
    func,
    select,
    text,
)

from agentmem.errors import ConfigError
from agentmem_sql.keys import decode_text
from agentmem_sql.sweeping import Sweeper
from agentmem_sql.tables import Tables

Order = Literal["bytes", "checkpoints", "idle"]
_PAGE = 100  # threads looked at in one go


@dataclass(frozen=True, kw_only=True)
class ThreadSize:
    """What a thread takes.

    Attributes:
        thread_id: its name.
        checkpoints: how many it has, in all namespaces.
        namespaces: of checkpoints: 1 where no subgraph has any.
        pending_writes: how many.
        blobs: distinct pieces of content.
        content_bytes: of their bodies, as stored.
        row_bytes: of its rows.
        oldest: when the checkpoint was stored that has been there longest; None where there is none.
        newest: when the last checkpoint was stored.
    """

    thread_id: str
    checkpoints: int
    namespaces: int
    pending_writes: int
    blobs: int
    content_bytes: int
    row_bytes: int
    oldest: datetime | None
    newest: datetime | None

    @property
    def bytes(self) -> int:
        """Content and rows."""
        return self.content_bytes + self.row_bytes


@dataclass(frozen=True, kw_only=True)
class StorageReport:
    """What the threads of a database take.

    Attributes:
        threads: those that were asked for; the sums are over all threads.
        thread_count: how many threads there are.
        checkpoints: of all threads.
        pending_writes: of all threads.
        blobs: of all threads.
        content_bytes: of all threads.
        row_bytes: of all threads.
        database_bytes: what the database says it takes: on SQLite the file, else these tables with their indexes.
            MySQL says what it found when it last looked, which may be a while ago.
        free_bytes: of these, what is free for new rows; None where the database does not tell (PostgreSQL).
        orphan_blobs: content that nothing refers to, which there should be none of; None if it was not looked for.
        orphan_bytes: of it.
    """

    threads: tuple[ThreadSize, ...]
    thread_count: int
    checkpoints: int
    pending_writes: int
    blobs: int
    content_bytes: int
    row_bytes: int
    database_bytes: int
    free_bytes: int | None
    orphan_blobs: int | None = None
    orphan_bytes: int | None = None

    @property
    def bytes(self) -> int:
        """Content and rows of all threads."""
        return self.content_bytes + self.row_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times are ISO 8601."""
        threads = [{**asdict(one), "bytes": one.bytes, **_times(one)} for one in self.threads]
        return {**asdict(self), "bytes": self.bytes, "threads": threads}


class DatabaseSize(NamedTuple):
    """What a database says it takes, in bytes."""

    total: int
    free: int | None


def row_bytes(table: Table) -> ColumnElement[int]:
    """The bytes of a row's columns."""
    held = (column for column in table.columns if isinstance(column.type, LargeBinary))
    return reduce(add, (func.coalesce(func.length(column), 0) for column in held))


def thread_bytes(tables: Tables, thread: BindParameter[int]) -> Select[int]:
    """The bytes of everything that a thread has, its own row included."""
    content = _sum(func.length(tables.blobs.c.body), tables.blobs, thread)
    rows = (_sum(row_bytes(table), table, thread) for table in (tables.checkpoints, tables.writes))
    whole = reduce(add, (row_bytes(tables.threads), content, *rows))
    return select(whole).where(tables.threads.c.number == thread)


def _sum(of: ColumnElement[int], table: Table, thread: BindParameter[int]) -> ColumnElement[int]:
    return func.coalesce(select(func.sum(of)).where(table.c.thread == thread).scalar_subquery(), 0)


def storage_report(connection: Connection, tables: Tables, limit: int | None, order: Order) -> StorageReport:
    """Two or three statements, whatever the number of threads; without orphans."""
    rows = connection.execute(_statement(tables, order).limit(limit)).mappings().all()
    size = database_size(connection, tables)
    sums = {name: int(rows[0][f"all_{name}"]) if rows else 0 for name in _SUMMED}
    threads = tuple(_thread(row) for row in rows)
    return StorageReport(threads=threads, **sums, database_bytes=size.total, free_bytes=size.free)


def check_arguments(limit: int | None, order: str) -> None:
    """Refuse what no report can be made of.

    Raises:
        ConfigError: with what can.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"expected `limit` to be a number of threads from 1 up, or None for all, found {limit!r}")
    if order not in get_args(Order):
        raise ConfigError(f"expected `order` to be one of {', '.join(get_args(Order))}, found {order!r}")


_SUMMED = ("thread_count", "checkpoints", "pending_writes", "blobs", "content_bytes", "row_bytes")


def _statement(tables: Tables, order: Order) -> Select[Any]:
    threads, checkpoints, writes, blobs = tables.threads, tables.checkpoints, tables.writes, tables.blobs
    held = _by_thread(
        checkpoints,
        func.count().label("checkpoints"),
        func.count(checkpoints.c.ns.distinct()).label("namespaces"),
        func.min(checkpoints.c.created).label("oldest"),
        func.max(checkpoints.c.created).label("newest"),
        func.sum(row_bytes(checkpoints)).label("bytes"),
    )
    pending = _by_thread(writes, func.count().label("writes"), func.sum(row_bytes(writes)).label("bytes"))
    content = _by_thread(blobs, func.count().label("blobs"), func.sum(func.length(blobs.c.body)).label("bytes"))
    counted: dict[str, ColumnElement[Any]] = {
        "checkpoints": func.coalesce(held.c.checkpoints, 0),
        "pending_writes": func.coalesce(pending.c.writes, 0),
        "blobs": func.coalesce(content.c.blobs, 0),
        "content_bytes": func.coalesce(content.c.bytes, 0),
        "row_bytes": row_bytes(threads) + func.coalesce(held.c.bytes, 0) + func.coalesce(pending.c.bytes, 0),
    }
    sums = [func.sum(column).over().label(f"all_{name}") for name, column in counted.items()]
    first = {
        "bytes": (counted["content_bytes"] + counted["row_bytes"]).desc(),
        "checkpoints": counted["checkpoints"].desc(),
        "idle": func.coalesce(held.c.newest, 0),
    }
    return (
        select(
            threads.c.name,
            func.coalesce(held.c.namespaces, 0).label("namespaces"),
            held.c.oldest,
            held.c.newest,
            *(column.label(name) for name, column in counted.items()),
            func.count().over().label("all_thread_count"),
            *sums,
        )
        .select_from(threads)
        .outerjoin(held, held.c.thread == threads.c.number)
        .outerjoin(pending, pending.c.thread == threads.c.number)
        .outerjoin(content, content.c.thread == threads.c.number)
        .order_by(first[order], threads.c.number)
    )


def _by_thread(table: Table, *columns: ColumnElement[Any]) -> Subquery:
    return select(table.c.thread, *columns).group_by(table.c.thread).subquery()


def _thread(row: Mapping[Any, Any]) -> ThreadSize:
    counts = ("checkpoints", "namespaces", "pending_writes", "blobs", "content_bytes", "row_bytes")
    return ThreadSize(
        thread_id=decode_text(row["name"]),
        oldest=moment(row["oldest"]),
        newest=moment(row["newest"]),
        **{name: int(row[name]) for name in counts},
    )


def moment(milliseconds: int | None) -> datetime | None:
    """A column ``created`` as a time."""
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _times(one: ThreadSize) -> dict[str, str | None]:
    times = {"oldest": one.oldest, "newest": one.newest}
    return {name: None if time is None else time.isoformat() for name, time in times.items()}


def orphans(connection: Connection, tables: Tables, sweeper: Sweeper, after: int) -> tuple[int, int, int | None]:
    """Content that nothing refers to, of some threads: pieces, bytes, and the number to go on after (None: done)."""
    threads = tables.threads
    found = select(threads.c.number, threads.c.epoch).where(threads.c.number > bindparam("after"))
    page = connection.execute(found.order_by(threads.c.number).limit(_PAGE), {"after": after}).all()
    again = select(threads.c.epoch).where(threads.c.number == bindparam("of"))
    blobs = size = 0
    for number, epoch in page:
        dead = sweeper.unreferenced(connection, number)
        weight = sweeper.weigh(connection, number, dead)
        # In a thread that was swept meanwhile nothing is left that nothing refers to.
        if dead and connection.execute(again, {"of": number}).scalar_one_or_none() == epoch:
            blobs, size = blobs + len(dead), size + weight
    return blobs, size, page[-1].number if len(page) == _PAGE else None


def database_size(connection: Connection, tables: Tables) -> DatabaseSize:
    """What the database says that it takes (SQLite), or that these tables take."""
    if connection.dialect.name == "sqlite":
        pages, size, free = (
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("page_count", "page_size", "freelist_count")
        )
        return DatabaseSize(pages * size, free * size)
    if connection.dialect.name == "postgresql":
        measure = text("SELECT pg_total_relation_size(CAST(:name AS regclass))")
        sizes = (connection.execute(measure, {"name": name}).scalar_one() for name in names(connection, tables))
        return DatabaseSize(sum(sizes), None)
    schema = connection.schema_for_object(tables.threads)
    measure = text(
        "SELECT SUM(data_length + index_length + data_free), SUM(data_free) FROM information_schema.tables "
        "WHERE table_schema = COALESCE(:schema, DATABASE()) AND table_name IN :names"
    ).bindparams(bindparam("names", expanding=True))
    known = [table.name for table in tables.metadata.sorted_tables]
    total, free = connection.execute(measure, {"schema": schema, "names": known}).one()
    return DatabaseSize(int(total or 0), int(free or 0))


def names(connection: Connection, tables: Tables) -> Iterator[str]:
    """The tables as statements name them, quoted."""
    preparer = connection.dialect.identifier_preparer
    for table in tables.metadata.sorted_tables:
        schema, name = connection.schema_for_object(table), preparer.quote(table.name)
        yield name if schema is None else f"{preparer.quote_schema(schema)}.{name}"
