"""Where statements differ by database: insert-or-ignore, upsert, and SQLite's write-ahead log.

Statements elsewhere are plain SQLAlchemy Core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.dml import Insert

from agentmem.errors import StorageError
from agentmem_sql import faults
from agentmem_sql.prepared import kept


def add_rows(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], *, replace: bool) -> None:
    """Insert rows; those that exist are replaced or left alone."""
    if rows:
        # Made anew, a statement would cost more than running it.
        dialect, make = connection.dialect.name, upsert if replace else insert_missing
        statement = kept(table, ("insert", dialect, replace), lambda: make(dialect, table))
        connection.execute(statement, list(rows))


def insert_missing(dialect: str, table: Table) -> Insert:
    """INSERT that leaves a row alone whose primary key (or unique key) is there already."""
    if dialect in ("mysql", "mariadb"):
        # Not INSERT IGNORE: that also cuts over-long values short without an error.
        first = next(iter(table.primary_key))
        return mysql.insert(table).on_duplicate_key_update({first.name: first})
    return _insert(dialect, table).on_conflict_do_nothing()


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


def enable_wal(connection: Connection) -> None:
    """Let readers and the writer of a SQLite file go on beside each other; the file remembers it.

    A file that cannot be written stays as it is.

    Raises:
        StorageError: the file lies where a write-ahead log cannot be kept, such as a network share.
    """
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal":
        return
    try:
        found = connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar_one()
    except DBAPIError as error:
        if faults.is_read_only(error):
            return
        raise
    if found != "wal":
        raise StorageError(
            f"expected SQLite to keep a write-ahead log beside {connection.engine.url.database!r}, found "
            f"journal mode {found!r}; put the database on a local disk"
        )
