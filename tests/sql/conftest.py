"""Fixtures for the SQL checkpointer: a database of its own for every test, savers on it, and plain SQL.

Without more, a test runs on a SQLite file (`url`, `path`, `saver`, `sql`). One that asks for
`database_url` (or `any_saver`, `ask`) runs on SQLite, PostgreSQL and MariaDB, each time in a database that
is empty and its own. `new_url` makes a database when called, `look` asks one something behind the saver's back.
Servers are named by AGENTMEM_TEST_POSTGRES and AGENTMEM_TEST_MYSQL.
"""

from __future__ import annotations

import os
import sqlite3
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import URL, Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_chains import empty, plain_sql, shared_database, unaccounted

BACKENDS = ("sqlite", "postgresql", "mysql")

# The sync driver is named, since these URLs are also used to look behind the saver's back.
SERVERS = {
    "postgresql": os.environ.get("AGENTMEM_TEST_POSTGRES", "postgresql+psycopg://postgres@127.0.0.1:5432/test"),
    "mysql": os.environ.get("AGENTMEM_TEST_MYSQL", "mysql+pymysql://root@127.0.0.1:3306/test"),
}
_DROP = {"postgresql": "DROP DATABASE IF EXISTS {} WITH (FORCE)", "mysql": "DROP DATABASE IF EXISTS {}"}

Needs = Callable[[object, str], None]
NewUrl = Callable[[str], str]
Sql = Callable[..., list[Any]]


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


@contextmanager
def _server(backend: str) -> Iterator[Connection]:
    engine = create_engine(SERVERS[backend], poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection


@pytest.fixture(scope="session")
def servers(needs: Needs) -> Iterator[Callable[[str], Connection]]:
    """The connection to a server on which databases are made; the test skips (fails in CI) where there is none."""
    found: dict[str, Connection | str] = {}
    with ExitStack() as opened:

        def server(backend: str) -> Connection:
            if backend not in found:
                try:
                    found[backend] = opened.enter_context(_server(backend))
                except (DBAPIError, ModuleNotFoundError) as error:
                    found[backend] = str(error).splitlines()[0]
            connection = found[backend]
            where = make_url(SERVERS[backend]).render_as_string(hide_password=True)
            needs(isinstance(connection, Connection), f"the test server {where}: {connection}")
            assert isinstance(connection, Connection)
            return connection

        yield server


@pytest.fixture
def new_url(tmp_path: Path, servers: Callable[[str], Connection]) -> Iterator[NewUrl]:
    """`new_url("postgresql")` makes an empty database and gives its URL; it is dropped after the test.

    `new_url("postgresql+asyncpg")` gives the URL with that driver's name.
    """
    made: list[tuple[str, str]] = []

    def new(driver: str) -> str:
        backend = driver.split("+")[0]
        name = f"agentmem_{uuid4().hex[:16]}"
        if backend == "sqlite":
            return f"{driver}:///{tmp_path / name}.db"
        servers(backend).exec_driver_sql(f"CREATE DATABASE {name}")
        made.append((backend, name))
        at = make_url(SERVERS[backend]).set(database=name)
        return _text(at if driver == backend else at.set(drivername=driver))

    yield new
    for backend, name in made:
        server = servers(backend)
        if backend == "mysql":
            _kill_mysql(server, name)
        server.exec_driver_sql(_DROP[backend].format(name))


def _kill_mysql(server: Connection, name: str) -> None:
    """End what a test left open: DROP DATABASE would wait for its transactions."""
    for (number,) in server.execute(text("SELECT id FROM information_schema.processlist WHERE db = :db"), {"db": name}):
        try:
            server.exec_driver_sql(f"KILL {number}")
        except DBAPIError as error:
            if "Unknown thread" not in str(error):
                raise


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, new_url: NewUrl) -> str:
    """An empty database on each of the three, by its synchronous driver."""
    return new_url(request.param)


@pytest.fixture
def postgresql_url(new_url: NewUrl) -> str:
    return new_url("postgresql")


@pytest.fixture
def mysql_url(new_url: NewUrl) -> str:
    return new_url("mysql")


@pytest.fixture
def any_saver(database_url: str) -> Iterator[SQLAlchemySaver]:
    """A saver on each of the three databases."""
    with SQLAlchemySaver.from_url(database_url) as opened:
        yield opened


@pytest.fixture
def look() -> Sql:
    """`look(url, statement, **parameters)` runs one statement behind the saver's back; gives the rows.

    Parameters are written `:name`.
    """

    def run(url: str, statement: str, **parameters: object) -> list[Any]:
        at = make_url(url)
        server = SERVERS.get(at.get_backend_name(), "sqlite://")
        engine = create_engine(at.set(drivername=make_url(server).drivername), poolclass=NullPool)
        with engine.begin() as connection:
            result = connection.execute(text(statement), parameters)
            return [tuple(row) for row in result] if result.returns_rows else []

    return run


@pytest.fixture
def ask(look: Sql, database_url: str) -> Sql:
    """`look` on `database_url`: `ask(statement, **parameters)`."""
    return partial(look, database_url)


# The same for files with many tests: a database for the whole file, emptied after every test.


@pytest.fixture(scope="module", params=BACKENDS)
def shared_url(
    request: pytest.FixtureRequest, servers: Callable[[str], Connection], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database on each of the three, which the tests of a file share."""
    with shared_database(request.param, servers, tmp_path_factory.mktemp("shared")) as url:
        yield url


@pytest.fixture(scope="module")
def shared_ask(shared_url: str) -> Iterator[Sql]:
    """`ask` on `shared_url`, by one connection."""
    with plain_sql(shared_url) as run:
        yield run


@pytest.fixture
def swept_saver(shared_url: str, shared_ask: Sql) -> Iterator[SQLAlchemySaver]:
    """A saver on `shared_url`; at the end no content may be missing and none left over."""
    with SQLAlchemySaver.from_url(shared_url) as saver:
        saver.setup()
        yield saver
        assert unaccounted(shared_ask) == (set(), set())
        empty(saver, shared_ask)


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)
