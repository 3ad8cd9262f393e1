"""How many bytes threads and the database take.

Counted are the bodies of content and the binary columns of rows. What a database adds (keys, indexes, page headers,
free space) differs between databases; the size that the database itself reports includes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import reduce
from operator import add
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Connection, LargeBinary, Select, Subquery, Table, bindparam, func, select, text

from agentmem.errors import ConfigError
from agentmem_sql.database import Database
from agentmem_sql.schema import Tables, decode_text

Order = Literal["bytes", "checkpoints", "idle"]


@dataclass(frozen=True, kw_only=True)
class ThreadSize:
    """The size of a thread.

    Attributes:
        thread_id: the thread's id.
        checkpoints: number of checkpoints, in all namespaces.
        namespaces: number of namespaces with checkpoints: 1 if no subgraph has any.
        pending_writes: number of pending writes.
        blobs: number of distinct pieces of content.
        content_bytes: size of their bodies, as stored.
        row_bytes: size of its rows.
        oldest: when its oldest checkpoint was stored; None if it has none.
        newest: when its newest checkpoint was stored; None if it has none.
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
        """Size of content and rows."""
        return self.content_bytes + self.row_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times are ISO 8601."""
        times = {name: time and time.isoformat() for name, time in (("oldest", self.oldest), ("newest", self.newest))}
        return {**asdict(self), "bytes": self.bytes, **times}


@dataclass(frozen=True, kw_only=True)
class StorageReport:
    """The size of the threads in a database.

    Attributes:
        threads: the first threads, up to `limit`.
        thread_count: number of all threads. The next five sum over all of them as well, see `ThreadSize`.
        database_bytes: the size that the database reports: on SQLite that of the file, elsewhere that of these tables
            with their indexes. MySQL reports its last statistics, which may be old.
        free_bytes: the part of it that is free for new rows; None if the database does not report it (PostgreSQL).
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
        """Size of content and rows of all threads."""
        return self.content_bytes + self.row_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times are ISO 8601."""
        return {**asdict(self), "bytes": self.bytes, "threads": [thread.to_dict() for thread in self.threads]}


def storage_report(database: Database, limit: int | None, order: Order) -> StorageReport:
    """See `SQLAlchemySaver.storage_report`."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"expected `limit` to be a number of threads from 1 up, or None for all, found {limit!r}")
    if order not in get_args(Order):
        raise ConfigError(f"expected `order` to be one of {', '.join(get_args(Order))}, found {order!r}")
    tables = database.tables
    rows, (total, free) = database.run(
        lambda connection: (
            connection.execute(_statement(tables)).mappings().all(),
            _database_size(connection, tables),
        )
    )
    sizes = [
        ThreadSize(
            thread_id=decode_text(row["name"]),
            oldest=None if row["oldest"] is None else _time(row["oldest"]),
            newest=None if row["newest"] is None else _time(row["newest"]),
            **{name: int(row[name]) for name in _COUNTED},
        )
        for row in rows
    ]
    return StorageReport(
        threads=tuple(sorted(sizes, key=_FIRST[order])[:limit]),
        thread_count=len(sizes),
        **{name: sum(getattr(size, name) for size in sizes) for name in _COUNTED if name != "namespaces"},
        database_bytes=total,
        free_bytes=free,
    )


_COUNTED = ("checkpoints", "namespaces", "pending_writes", "blobs", "content_bytes", "row_bytes")
_FIRST: Mapping[Order, Callable[[ThreadSize], Any]] = {
    "bytes": lambda size: -size.bytes,
    "checkpoints": lambda size: -size.checkpoints,
    "idle": lambda size: size.newest or _time(0),
}


def _time(milliseconds: int) -> datetime:
    """The time that a value of the column `created` stands for."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _row_bytes(table: Table) -> ColumnElement[int]:
    """The bytes of a row's columns."""
    binary = (column for column in table.columns if isinstance(column.type, LargeBinary))
    return reduce(add, (func.coalesce(func.length(column), 0) for column in binary))


def _statement(tables: Tables) -> Select[Any]:
    threads, checkpoints, writes, blobs = tables.threads, tables.checkpoints, tables.writes, tables.blobs

    def by_thread(table: Table, size: ColumnElement[int], *others: ColumnElement[Any]) -> Subquery:
        columns = (table.c.thread, func.count().label("rows"), func.sum(size).label("bytes"), *others)
        return select(*columns).group_by(table.c.thread).subquery()

    namespaces = func.count(checkpoints.c.ns.distinct()).label("namespaces")
    times = (func.min(checkpoints.c.created).label("oldest"), func.max(checkpoints.c.created).label("newest"))
    stored = by_thread(checkpoints, _row_bytes(checkpoints), namespaces, *times)
    pending = by_thread(writes, _row_bytes(writes))
    content = by_thread(blobs, func.length(blobs.c.body))
    row_sizes = (_row_bytes(threads), func.coalesce(stored.c.bytes, 0), func.coalesce(pending.c.bytes, 0))
    counted: dict[str, ColumnElement[Any]] = {
        "checkpoints": stored.c.rows,
        "namespaces": stored.c.namespaces,
        "pending_writes": pending.c.rows,
        "blobs": content.c.rows,
        "content_bytes": content.c.bytes,
        "row_bytes": reduce(add, row_sizes),
    }
    columns = (func.coalesce(column, 0).label(name) for name, column in counted.items())
    query = select(threads.c.name, stored.c.oldest, stored.c.newest, *columns).order_by(threads.c.number)
    for part in (stored, pending, content):
        query = query.outerjoin_from(threads, part, part.c.thread == threads.c.number)
    return query


def _database_size(connection: Connection, tables: Tables) -> tuple[int, int | None]:
    """The size of the database (SQLite) or of these tables, and the free part of it if the database reports it."""
    if connection.dialect.name == "sqlite":
        pragmas = ("page_count", "freelist_count", "page_size")
        pages, free, size = (connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in pragmas)
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
