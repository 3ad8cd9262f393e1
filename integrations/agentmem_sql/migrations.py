"""Which version of the tables a database has, and how it gets to the one that this code uses.

A database without our tables gets them all at once, and the row that says which version they are in the same
transaction. Several processes may start on one new database together: the first that gets the write lock does
the work, the others find it done.
"""

from __future__ import annotations

from sqlalchemy import Connection, func, insert, inspect, select

from agentmem.errors import StorageError
from agentmem_sql.tables import metadata, schema_versions

SCHEMA_VERSION = 1


def is_current(connection: Connection) -> bool:
    """Whether the database has the tables of this version.

    Raises:
        StorageError: a newer version made the database.
    """
    if not inspect(connection).has_table(schema_versions.name):
        return False
    version = connection.execute(select(func.max(schema_versions.c.version))).scalar_one()
    if version != SCHEMA_VERSION:
        raise StorageError(
            f"expected a checkpoint database of schema version {SCHEMA_VERSION}, found version {version}: "
            "another agentmem made it; upgrade agentmem-delta, or open another database"
        )
    return True


def migrate(connection: Connection) -> None:
    """Make the tables where they are missing, inside a transaction that holds the write lock.

    Raises:
        StorageError: a newer version made the database.
    """
    if not is_current(connection):
        metadata.create_all(connection)
        connection.execute(insert(schema_versions).values(version=SCHEMA_VERSION))
