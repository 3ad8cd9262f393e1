"""Giving the space that deleted rows took back, by the means of each database."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import Connection

from agentmem.errors import StorageError
from agentmem_sql.sizes import database_size, names
from agentmem_sql.tables import Tables


class Compaction(NamedTuple):
    """Bytes that the database says it took before and takes after (see ``StorageReport.database_bytes``)."""

    before: int
    after: int

    @property
    def freed(self) -> int:
        """The difference."""
        return self.before - self.after


def compact(connection: Connection, tables: Tables) -> Compaction:
    """Compact the database of these tables.

    SQLite writes the file anew without its free pages, and needs a write transaction to stand in: so the writers of
    this process wait their turn instead of finding the file locked.

    Raises:
        StorageError: the database refused.
    """
    before = database_size(connection, tables).total
    _WAYS[connection.dialect.name](connection, tables)
    return Compaction(before, database_size(connection, tables).total)


def _sqlite(connection: Connection, _tables: Tables) -> None:
    connection.exec_driver_sql("ROLLBACK")  # VACUUM refuses to be part of a transaction
    connection.exec_driver_sql("VACUUM")
    # The new file is in the write-ahead log so far. A reader may hold this up; the next writer goes on with it.
    connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").close()


def _postgresql(connection: Connection, tables: Tables) -> None:
    connection.rollback()
    connection.execution_options(isolation_level="AUTOCOMMIT")  # the same refusal
    for name in names(connection, tables):
        connection.exec_driver_sql(f"VACUUM (ANALYZE) {name}")


def _mysql(connection: Connection, tables: Tables) -> None:
    # Rebuilds each table; writers are let in while it does.
    listed = ", ".join(names(connection, tables))
    for row in connection.exec_driver_sql(f"OPTIMIZE TABLE {listed}").mappings().all():
        if row["Msg_type"].lower() == "error":
            raise StorageError(
                f"expected to optimize the table {row['Table']}, the database answered: {row['Msg_text']}; "
                "nothing was lost, grant the user SELECT and INSERT on it, or leave the space to later rows"
            )


_WAYS: dict[str, Callable[[Connection, Tables], None]] = {
    "sqlite": _sqlite,
    "postgresql": _postgresql,
    "mysql": _mysql,
    "mariadb": _mysql,
}
