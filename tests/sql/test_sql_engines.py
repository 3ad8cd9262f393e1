"""URLs and engines: what is understood and what refused, and what of the user's own engines is respected."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import NullPool, create_engine, event, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import Pool, SingletonThreadPool, StaticPool

from agentmem import ConsumedRecord, MemoryState, Message
from agentmem.errors import StorageError
from agentmem_sql import Retention, SQLAlchemySaver
from agentmem_sql.engines import source_of
from tests.helpers.sql_cases import BACKENDS, NewUrl, Sql, aput, config, finish, put, start_child

# URLs.


@pytest.mark.parametrize(
    ("url", "served_by"),
    [
        ("sqlite:///x.db", "sqlite+pysqlite:///x.db"),
        ("sqlite+aiosqlite:///x.db?timeout=3", "sqlite+pysqlite:///x.db?timeout=3"),
        ("postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgres://h/d", "postgresql+psycopg://h/d"),
        ("postgresql+psycopg_async://h/d", "postgresql+psycopg://h/d"),
        ("postgresql+asyncpg://h/d?target_session_attrs=any", "postgresql+psycopg://h/d?target_session_attrs=any"),
        ("mysql://h/d", "mysql+pymysql://h/d?charset=utf8mb4"),
        ("mysql+asyncmy://h/d?charset=utf8", "mysql+pymysql://h/d?charset=utf8"),
        ("mysql+aiomysql://h/d?charset=utf8", "mysql+pymysql://h/d?charset=utf8"),
        ("mariadb+pymysql://h/d", "mariadb+pymysql://h/d?charset=utf8mb4"),
        ("mariadb+asyncmy://h/d", "mariadb+pymysql://h/d?charset=utf8mb4"),
    ],
)
def test_a_url_names_the_database_and_the_synchronous_driver_follows(url: str, served_by: str) -> None:
    assert source_of(url).url.render_as_string(hide_password=False) == served_by


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("threads.db", "sqlite:///threads.db"),
        ("sqlite://threads.db", r"three slashes.*write 'sqlite:///threads\.db'"),
        ("sqlite://folder/threads.db", r"write 'sqlite:///folder"),
        ("postgresql://localhost:port/x", "cannot be read"),
        ("postgresql://user:p@ss@localhost/x", "write '@' in a password as '%40'"),
        ("sqlite:///threads%00.db", "no NUL"),
        ("sqlite:///threads.db?mode=ro", "'mode'.*uri=true"),
        ("sqlite:///threads.db?timeout=long", "cannot use the options.*could not convert"),
        ("mysql://localhost/x?connect_timeout=long", "cannot use the options.*invalid literal"),
        (None, "expected the URL of a database, or an engine of SQLAlchemy, found None"),
        (b"sqlite:///threads.db", "expected the URL of a database"),
        ("oracle://localhost/x", "sqlite, postgresql, mysql or mariadb"),
        ("sqlite+pysqlcipher:///x.db", r"sqlite or sqlite\+pysqlite.*pysqlcipher"),
        ("postgresql+psycopg2://localhost/x", r"postgresql or postgresql\+psycopg, found 'postgresql\+psycopg2'"),
        ("mariadb+mariadbconnector://localhost/x", r"mariadb\+pymysql"),
    ],
)
def test_urls_that_cannot_be_used_are_refused(bad: Any, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        SQLAlchemySaver.from_url(bad)


def with_arguments(**arguments: Any) -> dict[str, Any]:
    return {"connect_args": arguments}


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("postgresql+asyncpg://h/d", with_arguments(ssl=ssl.create_default_context()), "'ssl' of asyncpg.*sslmode="),
        ("postgresql+asyncpg://h/d?ssl=require", {}, "'ssl' of asyncpg.*sslmode="),
        ("postgresql+asyncpg://h/d", with_arguments(timeout=2.5), "'timeout' of asyncpg.*connect_timeout="),
        ("postgresql+asyncpg://h/d", with_arguments(command_timeout=1.5), "'command_timeout'.*-c statement_timeout"),
        ("postgresql+asyncpg://h/d", with_arguments(server_settings={"search_path": "a"}), "options='-c name=value"),
        ("postgresql+asyncpg://h/d", with_arguments(direct_tls=True), "'direct_tls' of asyncpg.*sslnegotiation"),
        ("postgresql+asyncpg://h/d?prepared_statement_cache_size=0", {}, "PgBouncer.*'prepare_threshold': None"),
        ("postgresql+asyncpg://h/d", with_arguments(statement_cache_size=0), "PgBouncer.*'prepare_threshold': None"),
        ("postgresql+asyncpg://h/d", with_arguments(prepared_statement_name_func=str), "PgBouncer.*prepare_threshold"),
        ("sqlite+aiosqlite:///x", with_arguments(iter_chunk_size=2), "'iter_chunk_size' of aiosqlite"),
        ("mysql+aiomysql://h/d?auth_plugin=x", {}, "'auth_plugin' of aiomysql.*auth_plugin_map"),
        ("postgresql://h/d", {"async_creator": print}, "'async_creator'.*write `creator`"),
    ],
)
def test_options_without_a_counterpart_are_refused_by_name(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StorageError, match=message):
        SQLAlchemySaver.from_url(url, engine_options=options)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("postgresql+asyncpg://h/d", with_arguments(connect_timeout=3, application_name="mine")),
        ("sqlite+aiosqlite:///x", with_arguments(timeout=1)),
        ("mysql+asyncmy://h/d", with_arguments(init_command="SELECT 1")),
        ("mysql+asyncmy://h/d", {"pool_size": 3}),
    ],
)
def test_other_options_are_passed_on(url: str, options: dict[str, Any]) -> None:
    assert source_of(url, options).options == options


def test_the_mariadb_spelling_works(mysql_url: str) -> None:
    with SQLAlchemySaver.from_url(make_url(mysql_url).set(drivername="mariadb")) as saver:
        put(saver, config(), {"x": 1})
        assert saver.get_tuple(config()) is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_database_that_must_exist(new_url: NewUrl, path: Path, backend: str) -> None:
    """Neither a file nor tables are made, and nothing is done before there are some."""
    database_url = new_url(backend)
    for _ in range(2):
        with (
            SQLAlchemySaver.from_url(database_url, must_exist=True) as saver,
            pytest.raises(StorageError, match=r"a SQLite file at .* found nothing there|found no such table"),
        ):
            saver.get_tuple(config())
    with SQLAlchemySaver.from_url(database_url) as saver:
        at = put(saver, config(), {"x": 1})
    with SQLAlchemySaver.from_url(database_url, must_exist=True) as saver:
        assert saver.get_tuple(at) is not None
    with (
        SQLAlchemySaver.from_url(database_url, must_exist=True, table_prefix="other_") as saver,
        pytest.raises(StorageError, match=r"'other_threads'.*found no such table"),
    ):
        saver.get_tuple(config())
    with (
        SQLAlchemySaver.from_url("sqlite://", must_exist=True) as saver,
        pytest.raises(StorageError, match="found a database in memory"),
    ):
        saver.setup()
    with (
        SQLAlchemySaver.from_url(f"sqlite:///{path.parent}", must_exist=True) as saver,
        pytest.raises(StorageError, match="found a folder"),
    ):
        saver.setup()


# Packages.


IMPORTING = """
import asyncio, sys
from agentmem.errors import MissingExtraError

class Blocked:
    names = ["sqlalchemy"]

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import agentmem_sql
except MissingExtraError as error:
    print(error.package, error.extra)
Blocked.names = ["greenlet", "aiosqlite", "asyncpg", "asyncmy", "psycopg", "pymysql"]
from agentmem_sql import SQLAlchemySaver
for url in ("postgresql+asyncpg://h/d", "mariadb://h/d"):  # no server is asked, since the driver is needed first
    try:
        asyncio.run(SQLAlchemySaver.from_url(url).asetup())
    except MissingExtraError as error:
        print(error.package, error.extra)
saver = SQLAlchemySaver.from_url(sys.argv[1].replace("sqlite", "sqlite+aiosqlite", 1))
saver.setup()
asyncio.run(saver.asetup())
print([step.consumed for step in saver.memory_history("t") if step.state.matrices.all()])
print([name for name in ("torch", "transformers", "agentmem.engine", "langgraph.graph") if name in sys.modules])
"""


def test_importing_and_leaving_a_process(url: str) -> None:
    """Missing packages are named with their extra, reading memories loads no model, and an open saver lets it end."""
    record = ConsumedRecord.empty().extend([Message("user", "one")])
    memory = MemoryState.from_matrices(np.ones((1, 1, 2, 2)), record, model_fingerprint="a", adapter_fingerprint="b")
    with SQLAlchemySaver.from_url(url) as saver:
        put(saver, config(), {"memory": memory.to_dict()})
    assert finish(start_child(url, code=IMPORTING)).splitlines() == [
        "sqlalchemy sql",
        "psycopg postgres",
        "pymysql mysql",
        "[1]",
        "[]",
    ]


# Engines of the user's own.


def test_an_engine_of_ones_own_stays_open(path: Path, sql: Sql) -> None:
    engine = create_engine(f"sqlite:///{path}")  # the driver's legacy transactions, no write-ahead log
    with SQLAlchemySaver(engine) as saver:
        at = put(saver, config(), {"x": 1})
        assert asyncio.run(saver.aget_tuple(at)) is not None
        saver.delete_thread("t")
        assert saver.get_tuple(at) is None
        put(saver, config(), {"x": 1})
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM agentmem_checkpoints").scalar_one() == 1
    engine.dispose()
    assert sql("PRAGMA journal_mode") == [("delete",)]


def test_an_engine_of_ones_own_keeps_its_pool_and_settings(database_url: str) -> None:
    engine = create_engine(database_url, isolation_level="SERIALIZABLE", pool_size=2, max_overflow=0)
    opened: list[object] = []
    event.listen(engine, "connect", lambda connection, _: opened.append(connection))
    with SQLAlchemySaver(engine) as saver, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: put(saver, config(f"{number}"), {"x": number}), range(8)))
        assert len(list(saver.list(None))) == 8
    assert len(opened) <= 2
    with engine.connect() as connection:
        if engine.dialect.name != "sqlite":
            assert connection.get_isolation_level() == "SERIALIZABLE"
        assert connection.exec_driver_sql("SELECT count(*) FROM agentmem_checkpoints").scalar_one() == 8
    assert len(opened) <= 2
    engine.dispose()


@pytest.mark.parametrize("name", ["before_cursor_execute", "do_execute"])
def test_listeners_see_what_is_stored_and_read(path: Path, name: str) -> None:
    """Statements on hot paths go past SQLAlchemy's execution, but not where a tracer listens to it."""
    engine = create_engine(f"sqlite:///{path}")
    seen: list[str] = []
    if name == "do_execute":
        for each in (name, "do_executemany"):
            event.listen(engine, each, lambda _cursor, statement, *_: seen.append(statement))
    with SQLAlchemySaver(engine) as saver:
        put(saver, config(), {"x": 1})
        if name != "do_execute":
            event.listen(engine, name, lambda *arguments: seen.append(arguments[2]))
        seen.clear()
        put(saver, config(), {"x": 2})
        saver.get_tuple(config())
    for wanted in ("INSERT INTO agentmem_blobs", "INSERT INTO agentmem_checkpoints", "SELECT agentmem_threads"):
        assert any(statement.startswith(wanted) for statement in seen), (wanted, seen)
    engine.dispose()


def test_rows_that_a_listener_for_begin_lets_through(new_url: NewUrl) -> None:
    """Row-level security by ``SET LOCAL``, which lasts as long as a transaction: so reads must have one, too."""
    plain = make_url(new_url("postgresql"))
    role = f"agentmem_tenant_{plain.database}"
    with SQLAlchemySaver.from_url(plain) as saver:
        put(saver, config(), {"x": 1})
    owner = create_engine(plain, poolclass=NullPool)
    with owner.begin() as connection:
        for statement in (
            f"CREATE ROLE {role} LOGIN",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}",
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}",
            "ALTER TABLE agentmem_threads ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY tenant ON agentmem_threads USING (current_setting('app.tenant', true) = 'me')",
        ):
            connection.exec_driver_sql(statement)
    try:
        engine = create_engine(plain.set(username=role))
        with SQLAlchemySaver(engine) as saver:
            assert saver.get_tuple(config()) is None
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("SET LOCAL app.tenant = 'me'"))
        with SQLAlchemySaver(engine) as saver:
            assert saver.get_tuple(config()) is not None
            put(saver, config("other"), {"x": 2})
            assert len(list(saver.list(None))) == 2
        engine.dispose()
    finally:
        with owner.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")


def test_a_schema_of_ones_own(postgresql_url: str, look: Sql) -> None:
    look(postgresql_url, 'CREATE SCHEMA "Odd one"; CREATE SCHEMA mapped')
    with SQLAlchemySaver.from_url(postgresql_url, schema="Odd one", table_prefix='my "own"_') as saver:
        put(saver, put(saver, config(), {"x": 1}), {"x": 2})
        assert saver.storage_report().checkpoints == 2
        assert saver.retain(Retention(max_checkpoints=1)).removed == 1
    engine = create_engine(postgresql_url, execution_options={"schema_translate_map": {None: "mapped"}})
    with SQLAlchemySaver(engine) as saver:
        put(saver, config("a"), {"x": 1})
        asyncio.run(aput(saver, "b", x=1))
        assert len(list(saver.list(None))) == 2
    engine.dispose()
    found = look(postgresql_url, "SELECT schemaname FROM pg_tables WHERE tablename LIKE '%threads'")
    assert {("mapped",), ("Odd one",)} <= {*found}
    assert look(postgresql_url, "SELECT count(*) FROM mapped.agentmem_checkpoints") == [(2,)]
    with pytest.raises(StorageError, match="CREATE SCHEMA"), SQLAlchemySaver.from_url(postgresql_url, schema="no") as s:
        s.setup()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///file::memory:?cache=shared&uri=true"])
def test_a_database_in_memory_lives_as_long_as_its_saver(url: str) -> None:
    with (
        SQLAlchemySaver.from_url(url) as saver,
        SQLAlchemySaver.from_url("sqlite://") as other,
        ThreadPoolExecutor(4) as pool,
    ):
        at = put(saver, config(), {"x": 1})
        found = [*pool.map(lambda _: saver.get_tuple(at), range(8)), asyncio.run(saver.aget_tuple(at))]
        assert all(one is not None for one in found)
        assert other.get_tuple(at) is None


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///{path}"])
@pytest.mark.parametrize("pool", [StaticPool, SingletonThreadPool])
def test_an_engine_without_a_connection_for_each_thread_is_refused(path: Path, url: str, pool: type[Pool]) -> None:
    """A transaction of the caller's would be the saver's, or every thread would see another database."""
    engine = create_engine(url.format(path=path), poolclass=pool, connect_args={"check_same_thread": False})
    if "path" in url and pool is SingletonThreadPool:
        with SQLAlchemySaver(engine) as saver:
            put(saver, config(), {"x": 1})
    else:
        with pytest.raises(StorageError, match=r"StaticPool.*from_url\('sqlite:///:memory:'\)"):
            SQLAlchemySaver(engine)
    engine.dispose()


# Asynchronous engines, which are taken for their URL and options.


@pytest.fixture
def async_drivers(needs: Callable[[object, str], None]) -> None:
    for driver in ("aiosqlite", "asyncmy", "asyncpg"):
        needs(find_spec(driver), f"{driver}, which is part of the dependency group `dev`")


@pytest.mark.usefixtures("async_drivers")
@pytest.mark.parametrize("driver", ["sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg", "mysql+asyncmy"])
async def test_an_async_engine_of_ones_own(request: pytest.FixtureRequest, path: Path, look: Sql, driver: str) -> None:
    """Any loop and any thread may use the saver, and the engine itself is left alone."""
    backend = driver.partition("+")[0]
    url = f"sqlite:///{path}" if backend == "sqlite" else request.getfixturevalue(f"{backend}_url")
    engine = create_async_engine(make_url(url).set(drivername=driver))
    async with SQLAlchemySaver(engine) as saver:
        at = await aput(saver, "t", x=1)
        assert saver.get_tuple(at) is not None
        assert await asyncio.to_thread(lambda: asyncio.run(saver.aget_tuple(at))) is not None
    assert engine.pool.checkedin() == engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert look(url, "SELECT count(*) FROM agentmem_checkpoints") == [(1,)]


@pytest.mark.usefixtures("async_drivers")
def test_the_options_of_an_async_engine_are_taken_over() -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://u:p@h/d?target_session_attrs=any",
        connect_args={"connect_timeout": 3, "prepare_threshold": None},
        pool_size=3,
        max_overflow=2,
        pool_timeout=7,
        pool_recycle=60,
        pool_pre_ping=True,
        execution_options={"schema_translate_map": {None: "mine"}, "isolation_level": "SERIALIZABLE"},
    )
    source = source_of(engine)
    assert source.url.render_as_string(hide_password=False) == "postgresql+psycopg://u:p@h/d?target_session_attrs=any"
    assert source.options == {
        "connect_args": {"connect_timeout": 3, "prepare_threshold": None},
        "echo": None,
        "pool_size": 3,
        "max_overflow": 2,
        "pool_timeout": 7,
        "pool_recycle": 60,
        "pool_pre_ping": True,
        "execution_options": {"schema_translate_map": {None: "mine"}},
    }
    without_pool = create_async_engine("postgresql+asyncpg://h/d", poolclass=NullPool)
    assert source_of(without_pool).options["poolclass"] is NullPool


@pytest.mark.usefixtures("async_drivers")
def test_async_engines_that_cannot_be_taken_over() -> None:
    for engine, message in (
        (create_async_engine("postgresql+asyncpg://", async_creator=print), "function of yours"),
        (create_async_engine("sqlite+aiosqlite://"), "in memory"),
        (create_async_engine("sqlite+aiosqlite:///:memory:", poolclass=StaticPool), "in memory"),
        (create_async_engine("postgresql+asyncpg://h/d", connect_args={"ssl": True}), "'ssl' of asyncpg"),
    ):
        with pytest.raises(StorageError, match=message):
            SQLAlchemySaver(engine)
