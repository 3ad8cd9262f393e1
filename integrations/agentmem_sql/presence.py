"""Whether a database and its checkpoint tables exist, found out without making either.

A saver makes what it needs, which is right for a graph and wrong for tools that look at what there is: a mistyped path
would leave an empty file behind.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import URL, Connection, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from agentmem.errors import StorageError
from agentmem_sql import faults
from agentmem_sql.drivers import drivers, is_memory, parse, spelled
from agentmem_sql.engines import Engines
from agentmem_sql.tables import DEFAULT_PREFIX, Tables


def check_present(url: str | URL, *, schema: str | None = None, table_prefix: str = DEFAULT_PREFIX) -> None:
    """Refuse a database that is not there or keeps no threads.

    Raises:
        StorageError: there is none, it has no such tables, or it cannot be reached.
        MissingExtraError: the database's driver is not installed.
    """
    parsed = parse(url)
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed)
    tables = Tables(prefix=table_prefix, schema=schema)
    where = spelled(parsed)

    def has_tables(connection: Connection) -> bool:
        return inspect(connection).has_table(tables.threads.name, schema=schema)

    engines = Engines(drivers(parsed), None, synchronous="FULL", options={"poolclass": NullPool})
    try:
        found = engines.sync().read(has_tables)
    except DBAPIError as error:
        message = " ".join(str(error.orig).split())
        raise StorageError(f"the database {where} answered: {message}; {faults.advice(error)}") from error
    if not found:
        raise StorageError(
            f"expected the table {tables.threads.fullname!r} in the database {where}, found no such table: no threads "
            "were ever kept there, or under another table prefix or schema; correct the URL, or name these"
        )


def _check_file(url: URL) -> None:
    if is_memory(url):
        raise StorageError("expected the URL of a SQLite file, found a database in memory, which only its process sees")
    name = str(url.database)
    path = Path(name.removeprefix("file:").partition("?")[0])
    if not path.is_file():
        raise StorageError(
            f"expected a SQLite file at {str(path)!r}, found {'a folder' if path.is_dir() else 'nothing'} there; "
            "correct the path (sqlite:///relative.db, sqlite:////absolute/path.db)"
        )
