"""Bytes of deleted rows in the files of a database: what is rewritten, and what is out of reach.

SQLite's file is rebuilt and its write-ahead log emptied. PostgreSQL (`VACUUM FULL`) and InnoDB (`OPTIMIZE TABLE`) write
the tables anew and drop the old files; nobody can use the tables meanwhile. Their own logs, and everything that was
copied before, are named in the receipt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, text
from sqlalchemy.exc import DBAPIError

from agentmem_sql.saver import SaverParts
from agentmem_sql.statements import change, fetch

_ALWAYS = (
    "backups, snapshots and exports of the database and the fact store: delete them, or let them expire",
    "copies of a memory's matrices that were taken out of the thread, and threads that started from them",
    "replies, logs and traces outside of the database",
    "blocks of the disk that the file system has freed: encrypt the disk",
)


class Purged(NamedTuple):
    """What was done, and what could not be reached."""

    done: list[str]
    not_reached: list[str]


def purge(parts: SaverParts, *, rewrite: bool) -> Purged:
    """Write the tables of a database anew without what was deleted.

    Args:
        parts: of the saver on the database.
        rewrite: on PostgreSQL and MySQL: write the tables anew, which locks them; else only mark the space as free.

    Raises:
        StorageError: the database reports an error.
    """
    database = parts.database
    if database.backend == "sqlite":
        purged = database.run(_sqlite, write=True)
    else:
        tables = _written(parts)
        work = _postgresql if database.backend == "postgresql" else _mysql
        # VACUUM and OPTIMIZE TABLE end transactions, and are none themselves.
        purged = database.run(lambda connection: work(connection, tables, rewrite), write=True, autocommit=True)
    return Purged(purged.done, [*purged.not_reached, *_ALWAYS])


def overwrite(connection: Connection) -> None:
    """Make SQLite overwrite what this connection deletes with zeros."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA secure_delete = ON").close()


def empty_log(parts: SaverParts) -> None:
    """Empty SQLite's write-ahead log after the last row of a deletion has gone."""
    if parts.database.backend == "sqlite":
        parts.database.run(_checkpoint, write=True)


def _written(parts: SaverParts) -> list[Table]:
    """The tables that a deletion takes rows from."""
    tables = parts.database.tables
    return [
        tables.blobs,
        tables.checkpoints,
        tables.writes,
        tables.threads,
        tables.audit,
        tables.subjects,
        tables.journal,
    ]


def _sqlite(connection: Connection) -> Purged:
    change(connection, "COMMIT", ())  # VACUUM is refused in a transaction, and the turn of this writer lasts
    change(connection, "VACUUM", ())
    done = ["SQLite: the file was rebuilt (VACUUM)"]
    if _checkpoint(connection):
        return Purged([*done, "SQLite: the write-ahead log was emptied"], [])
    return Purged(done, ["SQLite's write-ahead log, since somebody was reading; close all connections to the file"])


def _checkpoint(connection: Connection) -> bool:
    """Empty the write-ahead log, if there is one; gives whether nothing is left in it."""
    driver: Any = connection.connection.driver_connection
    if driver.in_transaction:
        change(connection, "COMMIT", ())
    [(busy, _, _)] = fetch(connection, "PRAGMA wal_checkpoint(TRUNCATE)", ())
    return not busy


def _postgresql(connection: Connection, tables: Sequence[Table], rewrite: bool) -> Purged:
    done, left = [], []
    for table in tables:
        name = connection.dialect.identifier_preparer.format_table(table)
        # Without the right VACUUM only warns.
        owner = text("SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass(:name)")
        if not connection.execute(owner, {"name": name}).scalar():
            left.append(f"PostgreSQL: table {name} belongs to another role; let its owner run VACUUM FULL {name}")
            continue
        try:
            connection.exec_driver_sql(f"VACUUM ({'FULL' if rewrite else 'ANALYZE'}) {name}")
        except DBAPIError as error:  # such as an engine of the caller's that is always in a transaction
            said = " ".join(str(error.orig).split())
            left.append(f"PostgreSQL: the tables were not vacuumed ({said}); run VACUUM FULL {name} and the others")
            break
    if rewrite and not left:
        done.append("PostgreSQL: the tables were written anew (VACUUM FULL)")
    elif not left:
        done.append("PostgreSQL: the tables were vacuumed")
        left.append("PostgreSQL: freed space in the tables' files, until it is used again; VACUUM FULL rewrites them")
    left.append("PostgreSQL's write-ahead log until its segments are recycled, archives of it, and replicas")
    return Purged(done, left)


def _mysql(connection: Connection, tables: Sequence[Table], rewrite: bool) -> Purged:
    done, left = [], []
    if rewrite:
        for table in tables:
            name = connection.dialect.identifier_preparer.format_table(table)
            try:
                rows: Sequence[Any] = connection.exec_driver_sql(f"OPTIMIZE TABLE {name}").all()
            except DBAPIError as error:
                rows = [(name, "optimize", "error", str(error.orig))]
            failed = [str(row[3]) for row in rows if str(row[2]).lower() == "error"]
            left += [f"MySQL: table {name} was not written anew: {message}" for message in failed]
        if not left:
            done.append("MySQL: the tables were written anew (OPTIMIZE TABLE)")
    else:
        left.append("MySQL: freed space in the tables' files, until it is used again; OPTIMIZE TABLE rewrites them")
    left.append("MySQL's redo and undo logs and its doublewrite buffer, until they are overwritten")
    if connection.exec_driver_sql("SELECT @@log_bin").scalar():
        left.append("MySQL's binary log, until it expires or PURGE BINARY LOGS removes it, and replicas")
    return Purged(done, left)
