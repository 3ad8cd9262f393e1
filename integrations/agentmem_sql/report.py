"""How many bytes threads and databases take.

Of content the bodies are counted, of rows the columns that hold bytes. What a database adds to both (keys, indexes,
page headers, free space) differs from one to the other, and is in the size that the database itself tells.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial, reduce
from operator import add
from typing import Any, Literal, get_args

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
from agentmem_sql.database import Database
from agentmem_sql.schema import Tables, decode_text

Order = Literal["bytes", "checkpoints", "idle"]


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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times are ISO 8601."""
        times = {name: time and time.isoformat() for name, time in (("oldest", self.oldest), ("newest", self.newest))}
        return {**asdict(self), "bytes": self.bytes, **times}


@dataclass(frozen=True, kw_only=True)
class StorageReport:
    """What the threads of a database take.

    Attributes:
        threads: as many as `limit` allows; the sums are over all threads.
        thread_count: how many threads there are.
        checkpoints: of all threads.
        pending_writes: of all threads.
        blobs: of all threads.
        content_bytes: of all threads.
        row_bytes: of all threads.
        database_bytes: what the database says it takes: on SQLite the file, else these tables with their indexes.
            MySQL says what it found when it last looked, which may be a while ago.
        free_bytes: of these, what is free for new rows; None where the database does not tell (PostgreSQL).
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

    @property
    def bytes(self) -> int:
        """Content and rows of all threads."""
        return self.content_bytes + self.row_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times are ISO 8601."""
        return {**asdict(self), "bytes": self.bytes, "threads": [thread.to_dict() for thread in self.threads]}


def storage_report(database: Database, limit: int | None, order: Order) -> StorageReport:
    """Two or three statements, whatever the number of threads.

    Raises:
        ConfigError: a limit below 1, or another order.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"expected `limit` to be a number of threads from 1 up, or None for all, found {limit!r}")
    if order not in get_args(Order):
        raise ConfigError(f"expected `order` to be one of {', '.join(get_args(Order))}, found {order!r}")
    return database.run(partial(_report, tables=database.tables, limit=limit, order=order))


_SUMMED = ("thread_count", "checkpoints", "pending_writes", "blobs", "content_bytes", "row_bytes")
_COUNTED = ("checkpoints", "namespaces", "pending_writes", "blobs", "content_bytes", "row_bytes")


def _report(connection: Connection, tables: Tables, limit: int | None, order: Order) -> StorageReport:
    rows = connection.execute(_statement(tables, order).limit(limit)).mappings().all()
    total, free = _database_size(connection, tables)
    sums = {name: int(rows[0][f"all_{name}"]) if rows else 0 for name in _SUMMED}
    threads = tuple(
        ThreadSize(
            thread_id=decode_text(row["name"]),
            oldest=_time(row["oldest"]),
            newest=_time(row["newest"]),
            **{name: int(row[name]) for name in _COUNTED},
        )
        for row in rows
    )
    return StorageReport(threads=threads, **sums, database_bytes=total, free_bytes=free)


def _time(milliseconds: int | None) -> datetime | None:
    """A column `created` as a time."""
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def row_bytes(table: Table) -> ColumnElement[int]:
    """The bytes of a row's columns."""
    binary = (column for column in table.columns if isinstance(column.type, LargeBinary))
    return reduce(add, (func.coalesce(func.length(column), 0) for column in binary))


def thread_bytes(tables: Tables, thread: BindParameter[int]) -> Select[int]:
    """The bytes of everything that a thread has, its own row included."""

    def of_thread(size: ColumnElement[int], table: Table) -> ColumnElement[int]:
        return func.coalesce(select(func.sum(size)).where(table.c.thread == thread).scalar_subquery(), 0)

    content = of_thread(func.length(tables.blobs.c.body), tables.blobs)
    rows = (of_thread(row_bytes(table), table) for table in (tables.checkpoints, tables.writes))
    return select(reduce(add, (row_bytes(tables.threads), content, *rows))).where(tables.threads.c.number == thread)


def _statement(tables: Tables, order: Order) -> Select[Any]:
    threads, checkpoints, writes, blobs = tables.threads, tables.checkpoints, tables.writes, tables.blobs
    stored = _by_thread(
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
        "checkpoints": func.coalesce(stored.c.checkpoints, 0),
        "pending_writes": func.coalesce(pending.c.writes, 0),
        "blobs": func.coalesce(content.c.blobs, 0),
        "content_bytes": func.coalesce(content.c.bytes, 0),
        "row_bytes": row_bytes(threads) + func.coalesce(stored.c.bytes, 0) + func.coalesce(pending.c.bytes, 0),
    }
    # Over all threads, though the statement gives only some of them: window functions count before the limit.
    sums = [func.sum(column).over().label(f"all_{name}") for name, column in counted.items()]
    first = {
        "bytes": (counted["content_bytes"] + counted["row_bytes"]).desc(),
        "checkpoints": counted["checkpoints"].desc(),
        "idle": func.coalesce(stored.c.newest, 0),
    }
    return (
        select(
            threads.c.name,
            func.coalesce(stored.c.namespaces, 0).label("namespaces"),
            stored.c.oldest,
            stored.c.newest,
            *(column.label(name) for name, column in counted.items()),
            func.count().over().label("all_thread_count"),
            *sums,
        )
        .select_from(threads)
        .outerjoin(stored, stored.c.thread == threads.c.number)
        .outerjoin(pending, pending.c.thread == threads.c.number)
        .outerjoin(content, content.c.thread == threads.c.number)
        .order_by(first[order], threads.c.number)
    )


def _by_thread(table: Table, *columns: ColumnElement[Any]) -> Subquery:
    return select(table.c.thread, *columns).group_by(table.c.thread).subquery()


def _database_size(connection: Connection, tables: Tables) -> tuple[int, int | None]:
    """What the database says that it takes (SQLite) or that these tables take, and what of it is free if it tells."""
    if connection.dialect.name == "sqlite":
        pages, size, free = (
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("page_count", "page_size", "freelist_count")
        )
        return pages * size, free * size
    schema = connection.schema_for_object(tables.threads)
    every = tables.metadata.sorted_tables
    if connection.dialect.name == "postgresql":
        measure = text(
            "SELECT pg_total_relation_size(CAST(concat_ws('.', quote_ident(:schema), quote_ident(:name)) AS regclass))"
        )
        sizes = (connection.execute(measure, {"schema": schema, "name": table.name}).scalar_one() for table in every)
        return sum(sizes), None
    measure = text(
        "SELECT SUM(data_length + index_length + data_free), SUM(data_free) FROM information_schema.tables "
        "WHERE table_schema = COALESCE(:schema, DATABASE()) AND table_name IN :names"
    ).bindparams(bindparam("names", expanding=True))
    total, free = connection.execute(measure, {"schema": schema, "names": [table.name for table in every]}).one()
    return int(total or 0), int(free or 0)
