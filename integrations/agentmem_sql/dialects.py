"""Where databases differ: drivers, how a transaction begins, insert-or-ignore, upsert.

Statements elsewhere are plain SQLAlchemy Core. The two kinds of insert are written for SQLite, PostgreSQL and
MySQL/MariaDB; connections are opened to SQLite only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.sql.dml import Insert

from agentmem.errors import StorageError

# How long a writer waits for another process, in milliseconds.
BUSY_TIMEOUT_MS = 30_000


@dataclass(frozen=True)
class Drivers:
    """The two drivers of a database, as SQLAlchemy names them, and the extra that installs them."""

    sync: str
    asynchronous: str
    extra: str


_DRIVERS = {"sqlite": Drivers(sync="sqlite+pysqlite", asynchronous="sqlite+aiosqlite", extra="sql")}


def drivers(url: URL) -> Drivers:
    """The drivers for a URL's database.

    Raises:
        StorageError: a database or a driver that this version does not speak.
    """
    found = _DRIVERS.get(url.get_backend_name())
    if found is None or url.drivername not in (url.get_backend_name(), found.sync, found.asynchronous):
        raise StorageError(
            f"expected a SQLite URL such as 'sqlite:///threads.db', found the driver {url.drivername!r}, "
            "which this version cannot use"
        )
    return found


@cache
def insert_missing(dialect: str, table: Table) -> Insert:
    """INSERT that leaves a row alone whose primary key (or unique key) is there already."""
    if dialect in ("mysql", "mariadb"):
        # Not INSERT IGNORE: that also cuts over-long values short without an error.
        first = next(iter(table.primary_key))
        return mysql.insert(table).on_duplicate_key_update({first.name: first})
    return _insert(dialect, table).on_conflict_do_nothing()


@cache
def upsert(dialect: str, table: Table) -> Insert:
    """INSERT that replaces every other column of a row whose primary key is there already."""
    others = [column.name for column in table.columns if not column.primary_key]
    if dialect in ("mysql", "mariadb"):
        replacing = mysql.insert(table)
        return replacing.on_duplicate_key_update({name: replacing.inserted[name] for name in others})
    inserting = _insert(dialect, table)
    return inserting.on_conflict_do_update(
        index_elements=list(table.primary_key), set_={name: inserting.excluded[name] for name in others}
    )


def _insert(dialect: str, table: Table) -> sqlite.Insert | postgresql.Insert:
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


def add_rows(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], *, replace: bool) -> None:
    """Insert rows; those that exist are replaced or left alone."""
    if rows:
        statement = upsert if replace else insert_missing
        connection.execute(statement(connection.dialect.name, table), list(rows))


def start(connection: Connection, *, write: bool) -> None:
    """Begin, in the database, what SQLAlchemy has begun; a writer takes SQLite's write lock at once.

    A deferred transaction that reads and then writes fails without waiting when another connection wrote in
    between; and Python's driver, left to itself, begins one only before the first write, so that reads before
    it stand outside. An engine that begins transactions by an event of its own is left to do so.
    """
    driver: Any = connection.connection.driver_connection
    if not driver.in_transaction:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def tune_connection(connection: Any, _record: object) -> None:
    """Settings of a new SQLite connection (a listener for SQLAlchemy's ``connect`` event)."""
    connection.isolation_level = None  # the driver begins nothing by itself: `begin` does
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "foreign_keys=ON", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def enable_wal(connection: Connection) -> None:
    """Let readers and the writer of a SQLite file go on beside each other; the file remembers it.

    Raises:
        StorageError: the file lies where a write-ahead log cannot be kept, such as a network share.
    """
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() != "wal":
        found = connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar_one()
        if found != "wal":
            raise StorageError(
                f"expected SQLite to keep a write-ahead log beside {connection.engine.url.database!r}, found "
                f"journal mode {found!r}; put the database on a local disk"
            )


def is_memory(url: URL) -> bool:
    """Whether a SQLite URL names a database without a file."""
    name = url.database or ""
    return name in ("", ":memory:") or name.startswith("file::memory:") or url.query.get("mode") == "memory"


_ADVICE: Iterable[tuple[str, str]] = (
    ("locked", f"another connection held the lock for over {BUSY_TIMEOUT_MS // 1000} s; find out which"),
    ("readonly", "make the file and its folder writable"),
    ("read-only", "make the file and its folder writable"),
    ("disk is full", "free some space; nothing of this call was stored"),
    ("unable to open", "check that the folder exists and may be entered"),
    ("not a database", "the path names a file of another kind, or an encrypted or damaged database"),
    ("malformed", "the file is damaged; restore it from a backup"),
)


def advice(message: str) -> str:
    """What to do about a driver's error message."""
    return next((text for needle, text in _ADVICE if needle in message.lower()), "the transaction was rolled back")
