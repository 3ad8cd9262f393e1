"""Fixtures for the SQL checkpointer: databases, savers on them, and plain SQL behind the saver's back.

Without more, a test runs on a SQLite file of its own (`url`, `path`, `saver`, `sql`). One that asks for `database_url`
(or `any_saver`, `ask`) runs on SQLite, PostgreSQL and MariaDB, in a database without a row. To make one on a server
takes up to a second, so the tests use the same one in turn. `new_url` gives databases that have no tables either.
Servers are named by AGENTMEM_TEST_POSTGRES and AGENTMEM_TEST_MYSQL.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, MetaData, NullPool, Table, create_engine, inspect, make_url, text
from sqlalchemy.exc import DBAPIError

from agentmem_sql import SQLAlchemySaver, metadata
from tests.helpers.sql_cases import BACKENDS, NewUrl, Sql
from tests.helpers.sql_chains import unaccounted

# The driver is named, since these URLs are also used to look behind the saver's back.
SERVERS = {
    "postgresql": os.environ.get("AGENTMEM_TEST_POSTGRES", "postgresql+psycopg://postgres@127.0.0.1:5432/test"),
    "mysql": os.environ.get("AGENTMEM_TEST_MYSQL", "mysql+pymysql://root@127.0.0.1:3306/test"),
}

Needs = Callable[[object, str], None]


def in_memory() -> str | None:
    """A folder whose files are in memory, where there is one with room: on a disk SQLite waits at every commit."""
    folder = "/dev/shm"
    return folder if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2**30 else None


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Instead of pytest's."""
    with TemporaryDirectory(prefix="agentmem-", dir=in_memory(), ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "threads.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def saver(url: str) -> Iterator[SQLAlchemySaver]:
    with SQLAlchemySaver.from_url(url) as opened:
        yield opened


@pytest.fixture
def sql(path: Path) -> Sql:
    """Run one statement on the file, behind the saver's back; gives the rows."""

    def run(statement: str, *parameters: object) -> list[Any]:
        connection = sqlite3.connect(path)
        try:
            with connection:
                return connection.execute(statement, parameters).fetchall()
        finally:
            connection.close()

    return run


@pytest.fixture(scope="session", autouse=True)
def without_root_certificates() -> Iterator[None]:
    """PyMySQL reads all that the system has for every connection (25 ms), and compares nothing with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl.SSLContext, "load_default_certs", lambda context, purpose=None: None)
        yield


class ServerDatabase:
    """A database on a server, which the tests of this process use one after the other."""

    def __init__(self, server: Connection) -> None:
        self._server = server
        self._name = f"agentmem_{uuid4().hex[:16]}"
        server.exec_driver_sql(f"CREATE DATABASE {self._name}")
        if server.dialect.name == "postgresql":  # a commit waits for no disk; only a crash of the server would lose it
            server.exec_driver_sql(f"ALTER DATABASE {self._name} SET synchronous_commit = off")
        at = server.engine.url.set(database=self._name)
        self._engine = create_engine(at, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self.url = at.render_as_string(hide_password=False)

    def empty(self, *, tables: bool = False) -> None:
        """Remove every row, and every table but the saver's own; with `tables` those as well."""
        self.end_sessions()
        with self._engine.connect() as connection:
            names = set(inspect(connection).get_table_names())
            usual = {table.name for table in metadata().sorted_tables}
            if tables or names != usual:
                for name in names:
                    Table(name, MetaData()).drop(connection)
            else:
                connection.exec_driver_sql("BEGIN")  # MariaDB waits for the disk at the end of each transaction
                for name in usual - {"agentmem_schema_versions"}:
                    connection.exec_driver_sql(f"DELETE FROM {name}")
                connection.exec_driver_sql("COMMIT")
            if self._engine.dialect.name == "postgresql":
                for schema in set(inspect(connection).get_schema_names()) - {"public", "information_schema"}:
                    connection.exec_driver_sql(f'DROP SCHEMA "{schema}" CASCADE')

    def sessions(self) -> list[int]:
        """The numbers of the connections to it."""
        statement = "SELECT id FROM information_schema.processlist WHERE db = :name"
        if self._engine.dialect.name == "postgresql":
            statement = "SELECT pid FROM pg_stat_activity WHERE datname = :name"
        return list(self._server.execute(text(statement), {"name": self._name}).scalars())

    def end_sessions(self) -> int:
        """End every connection to it; gives how many there were."""
        numbers = self.sessions()
        end = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}[self._engine.dialect.name]
        for number in numbers:
            try:
                self._server.exec_driver_sql(end.format(number))
            except DBAPIError as error:
                if "Unknown thread" not in str(error):
                    raise
        return len(numbers)

    def drop(self) -> None:
        self.end_sessions()
        self._server.exec_driver_sql(f"DROP DATABASE {self._name}")


@pytest.fixture(scope="session")
def server_database(needs: Needs) -> Iterator[Callable[[str], ServerDatabase]]:
    """`server_database("postgresql")` makes one; the test skips (fails in CI) where there is no server."""
    with ExitStack() as opened:

        @cache
        def connection(backend: str) -> Connection | str:
            engine = create_engine(SERVERS[backend], poolclass=NullPool, isolation_level="AUTOCOMMIT")
            try:
                return opened.enter_context(engine.connect())
            except (DBAPIError, ModuleNotFoundError) as error:
                return str(error).splitlines()[0]

        def make(backend: str) -> ServerDatabase:
            server = connection(backend)
            where = make_url(SERVERS[backend]).render_as_string(hide_password=True)
            needs(isinstance(server, Connection), f"the test server {where}: {server}")
            assert isinstance(server, Connection)
            database = ServerDatabase(server)
            opened.callback(database.drop)
            return database

        yield make


@pytest.fixture(scope="session")
def usual_database(server_database: Callable[[str], ServerDatabase]) -> Callable[[str], ServerDatabase]:
    """The one on each server that most tests use."""
    return cache(server_database)


@pytest.fixture
def new_url(
    tmp_path: Path, server_database: Callable[[str], ServerDatabase], usual_database: Callable[[str], ServerDatabase]
) -> Iterator[NewUrl]:
    """`new_url("postgresql")` gives the URL of a database without tables, another one every time it is called."""
    used: dict[str, ServerDatabase] = {}

    def new(backend: str) -> str:
        if backend == "sqlite":
            return f"sqlite:///{tmp_path / uuid4().hex[:16]}.db"
        database = (server_database if backend in used else usual_database)(backend)
        used.setdefault(backend, database).empty(tables=True)
        return database.url

    yield new
    for database in used.values():
        database.empty(tables=True)


@contextmanager
def _empty_database(backend: str, folder: Path, usual_database: Callable[[str], ServerDatabase]) -> Iterator[str]:
    if backend == "sqlite":
        yield f"sqlite:///{folder / uuid4().hex[:16]}.db"
        return
    yield usual_database(backend).url
    usual_database(backend).empty()


def _url_on(*backends: str) -> Any:
    """A fixture: the URL of a database without a row on each of these in turn; tables may be there."""

    @pytest.fixture(params=backends if len(backends) > 1 else None)
    def empty_url(
        request: pytest.FixtureRequest, tmp_path: Path, usual_database: Callable[[str], ServerDatabase]
    ) -> Iterator[str]:
        with _empty_database(getattr(request, "param", backends[0]), tmp_path, usual_database) as url:
            yield url

    return empty_url


database_url, server_url = _url_on(*BACKENDS), _url_on("postgresql", "mysql")
postgresql_url, mysql_url = _url_on("postgresql"), _url_on("mysql")


# For what is decided above the database, and so is the same on each of them.
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
shared_on_sqlite = pytest.mark.parametrize("shared_url", ["sqlite"], indirect=True)


@pytest.fixture
def any_saver(database_url: str) -> Iterator[SQLAlchemySaver]:
    """A saver on each of the three databases."""
    with SQLAlchemySaver.from_url(database_url) as opened:
        yield opened


def _engine(url: str, **options: Any) -> Engine:
    """An engine for looking, whichever driver the URL names."""
    at = make_url(url)
    server = SERVERS.get(at.get_backend_name(), "sqlite://")
    return create_engine(at.set(drivername=make_url(server).drivername), **options)


def _run(connection: Connection, statement: str, parameters: dict[str, Any]) -> list[Any]:
    result = connection.execute(text(statement), parameters)
    return [tuple(row) for row in result] if result.returns_rows else []


@pytest.fixture
def sessions(usual_database: Callable[[str], ServerDatabase]) -> Callable[[str], int]:
    """`sessions(url)` is how many connections to the database there are; with `end=True` the server ends them."""

    def count(url: str, *, end: bool = False) -> int:
        database = usual_database(make_url(url).get_backend_name())
        return database.end_sessions() if end else len(database.sessions())

    return count


@pytest.fixture
def look() -> Sql:
    """`look(url, statement, **parameters)` runs one statement behind the saver's back; gives the rows.

    Parameters are written `:name`.
    """

    def run(url: str, statement: str, **parameters: object) -> list[Any]:
        with _engine(url, poolclass=NullPool).begin() as connection:
            return _run(connection, statement, parameters)

    return run


@pytest.fixture
def ask(look: Sql, database_url: str) -> Sql:
    """`look` on `database_url`: `ask(statement, **parameters)`."""
    return partial(look, database_url)


# The same for files with many tests, which on SQLite share a file, too.


@pytest.fixture(scope="module", params=BACKENDS)
def shared_url(request: pytest.FixtureRequest, usual_database: Callable[[str], ServerDatabase]) -> Iterator[str]:
    """A database on each of the three, which the tests of a file share."""
    with (
        TemporaryDirectory(prefix="agentmem-", dir=in_memory()) as folder,
        _empty_database(request.param, Path(folder), usual_database) as url,
    ):
        yield url


@pytest.fixture(scope="module")
def shared_ask(shared_url: str) -> Iterator[Sql]:
    """`ask` on `shared_url`."""
    engine = _engine(shared_url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)

    def run(statement: str, **parameters: object) -> list[Any]:
        with engine.connect() as connection:
            return _run(connection, statement, parameters)

    yield run
    engine.dispose()


@pytest.fixture
def swept_saver(shared_url: str, shared_ask: Sql) -> Iterator[SQLAlchemySaver]:
    """A saver on `shared_url`; at the end no content may be missing and none left over."""
    with SQLAlchemySaver.from_url(shared_url) as saver:
        saver.setup()
        yield saver
        assert unaccounted(shared_ask) == (set(), set())
        for (name,) in shared_ask("SELECT name FROM agentmem_threads"):  # also those without a checkpoint
            saver.delete_thread(bytes(name).decode())
