"""Which version of the tables a database has, and how it gets to the one that this code uses.

Migrations are numbered and each is recorded in `schema_versions`, in the transaction that does it: one that
fails leaves the database where the one before it ended, and is taken up again by the next caller. Several
processes may start on one database together: the first takes a lock, the others find the work done.

MySQL commits when a table is made or changed, so there a migration that fails may have done a part of its work.
Every one of them must therefore do nothing where its work is done already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar, cast

from sqlalchemy import BigInteger, Connection, func, literal, select
from sqlalchemy.exc import DBAPIError

from agentmem.errors import StorageError
from agentmem_sql import db_errors
from agentmem_sql.schema import Tables
from agentmem_sql.statements import add_rows

T = TypeVar("T")

# How long a process waits for another one's migrations on MySQL, in seconds; elsewhere the database decides.
_LOCK_TIMEOUT = 300


# `transact(connection, work)` does work in one transaction; SQLite's holds the write lock from the start.
Transact = Callable[[Connection, Callable[[Connection], Any]], Any]


@dataclass(frozen=True)
class Migration:
    """One step: `upgrade(connection, tables)` brings tables of the number before it to `number`."""

    number: int
    description: str
    upgrade: Callable[[Connection, Tables], None]


# 1 was a development version.
MIGRATIONS: Sequence[Migration] = (
    Migration(
        2,
        "threads, blobs, checkpoints, writes, settings",
        lambda connection, tables: tables.metadata.create_all(connection),
    ),
    Migration(
        3,
        "audit, audit_chains, subjects, journal",  # `create_all` makes only those that are not there
        lambda connection, tables: tables.metadata.create_all(connection),
    ),
)


def is_current(connection: Connection, tables: Tables, migrations: Sequence[Migration] = MIGRATIONS) -> bool:
    """Whether the database has the tables of this version; one statement.

    Raises:
        StorageError: a newer version made the database, or one from before the first release.
    """
    return _version(connection, tables, migrations) == migrations[-1].number


def migrate(
    connection: Connection, tables: Tables, transact: Transact, migrations: Sequence[Migration] = MIGRATIONS
) -> None:
    """Do what is missing, each step in a transaction of its own.

    Args:
        connection: one that has no transaction under way.
        transact: how.

    Raises:
        StorageError: as `is_current`, or another process kept the lock for too long.
    """

    def next_step(connection: Connection) -> bool:
        """Do the next migration; gives whether there are more."""
        tables.schema_versions.create(connection, checkfirst=True)
        version = _version(connection, tables, migrations)
        following = next((migration for migration in migrations if migration.number > (version or 0)), None)
        if following is None:
            return False
        following.upgrade(connection, tables)
        add_rows(connection, tables.schema_versions, [{"version": following.number}], replace=False)
        return following is not migrations[-1]

    while alone(connection, tables, transact, next_step):
        pass


def alone(connection: Connection, tables: Tables, transact: Transact, work: Callable[[Connection], T]) -> T:
    """Do work in a transaction while no other connection, of any process, does so on the same tables.

    Raises:
        StorageError: another process kept the lock for too long.
    """
    schema = connection.schema_for_object(tables.schema_versions)
    spelled = f"{connection.engine.url.database}\0{schema}\0{tables.schema_versions.name}"
    number = int.from_bytes(sha256(spelled.encode()).digest()[:8], signed=True)

    def locked(connection: Connection) -> T:
        if connection.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(literal(number, BigInteger))))
        return work(connection)

    if connection.dialect.name in ("sqlite", "postgresql"):
        return cast(T, transact(connection, locked))
    # A lock that outlives the commits which MySQL makes of itself.
    name = f"agentmem-{number & (1 << 63) - 1}"
    if connection.execute(select(func.get_lock(name, _LOCK_TIMEOUT))).scalar() != 1:
        raise StorageError(
            f"expected the migrations of the checkpoint tables to end within {_LOCK_TIMEOUT} s, found the lock "
            f"{name!r} still held by another connection; see SHOW PROCESSLIST for what it does"
        )
    connection.rollback()
    try:
        return cast(T, transact(connection, locked))
    finally:
        try:
            connection.rollback()
            connection.execute(select(func.release_lock(name)))
            connection.rollback()
        except DBAPIError:
            connection.invalidate()  # the lock ends with the connection


def _version(connection: Connection, tables: Tables, migrations: Sequence[Migration]) -> int | None:
    """The number of the newest migration that was done; None where there are no tables."""
    versions = tables.schema_versions
    try:
        version: int | None = connection.execute(select(func.max(versions.c.version))).scalar()
    except DBAPIError as error:
        if db_errors.is_missing_table(error):
            return None
        raise
    if version is not None and version < migrations[0].number:
        raise StorageError(
            f"expected a checkpoint database of schema version {migrations[0].number} or later, found version "
            f"{version}, made by agentmem before its first release, whose threads cannot be carried over: "
            f"drop the tables whose names begin with {tables.prefix!r}, or open another database"
        )
    if version is not None and version > migrations[-1].number:
        raise StorageError(
            f"expected a checkpoint database of schema version {migrations[-1].number} at most, found version "
            f"{version}: a newer agentmem made it; upgrade agentmem-delta, or open another database"
        )
    return version
