"""Engines of the user's own: their pool, settings, listeners and event loop are respected, and they stay open."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.database import Database
from agentmem_sql.tables import Tables
from tests.helpers.sql_cases import config, put
from tests.helpers.sql_works import aput

Sql = Callable[..., list[Any]]
NewUrl = Callable[[str], str]


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


@pytest.mark.parametrize("options", [{}, {"pool_size": 1, "pool_timeout": 20}, {"poolclass": NullPool}], ids=str)
def test_more_threads_than_connections(path: Path, options: dict[str, Any]) -> None:
    """Nobody waits for a connection that no one uses, whoever set the pool up."""
    with SQLAlchemySaver.from_url(f"sqlite:///{path}", engine_options=options) as saver:
        with ThreadPoolExecutor(24) as threads:
            made = list(threads.map(lambda number: put(saver, config(f"{number}"), {"x": number}), range(48)))
            found = list(threads.map(saver.get_tuple, made))
        assert [one.checkpoint["channel_values"]["x"] for one in found if one is not None] == list(range(48))


async def test_an_async_engine_of_ones_own_stays_open(async_url: str) -> None:
    engine = create_async_engine(async_url)
    async with SQLAlchemySaver(engine) as saver:
        at = await aput(saver, "t", x=1)
        found = await asyncio.to_thread(saver.get_tuple, at)
        assert found is not None
    async with engine.connect() as connection:
        assert (await connection.exec_driver_sql("SELECT count(*) FROM agentmem_checkpoints")).scalar_one() == 1
    await engine.dispose()


@pytest.mark.parametrize("driver", ["sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg", "mysql+asyncmy"])
def test_an_async_engine_of_ones_own_belongs_to_a_loop(new_url: NewUrl, driver: str) -> None:
    engine = create_async_engine(new_url(driver))
    saver = SQLAlchemySaver(engine)

    async def use_and_dispose(thread: str) -> None:
        await aput(saver, thread, x=1)
        await engine.dispose()

    for thread in "ab":  # disposed of at the end of a loop, it serves the next one
        asyncio.run(use_and_dispose(thread))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(aput(saver, "c", x=1))
    if driver == "sqlite+aiosqlite":
        asyncio.run(aput(saver, "d", x=1))
    else:
        with pytest.raises(StorageError, match=r"another event loop.*NullPool"):
            asyncio.run(aput(saver, "d", x=1))
    loop.run_until_complete(engine.dispose())
    loop.close()
    saver.close()


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "mysql+asyncmy"])
def test_an_async_engine_without_a_pool_serves_every_loop(new_url: NewUrl, driver: str) -> None:
    saver = SQLAlchemySaver(create_async_engine(new_url(driver), poolclass=NullPool))
    for thread in "ab":
        asyncio.run(aput(saver, thread, x=1))
    assert len(list(saver.list(None))) == 2
    saver.close()


async def test_an_async_engine_of_ones_own_that_begins_by_itself(path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    _begin_by_event(engine.sync_engine)
    async with SQLAlchemySaver(engine) as saver:
        at = await asyncio.to_thread(put, saver, config(), {"x": 1})
        assert await saver.aget_tuple(at) is not None
        await saver.adelete_thread("t")
        assert await saver.aget_tuple(at) is None
    async with engine.connect() as connection:
        assert (await connection.exec_driver_sql("SELECT count(*) FROM agentmem_blobs")).scalar_one() == 0
    await engine.dispose()


def test_a_write_holds_the_lock_of_the_file_from_the_start(path: Path) -> None:
    """Even where the engine begins by itself: a write after a read would fail at once if another came between."""
    engine = create_engine(f"sqlite:///{path}")
    _begin_by_event(engine)
    database = Database(engine, tables=Tables())

    def work(connection: Connection) -> None:
        connection.exec_driver_sql("SELECT * FROM agentmem_threads").all()
        with (
            pytest.raises(sqlite3.OperationalError, match="locked"),
            closing(sqlite3.connect(path, timeout=0)) as other,
        ):
            other.execute("INSERT INTO agentmem_settings VALUES (x'00', x'00')")

    database.run(work, write=True)
    database.close()
    engine.dispose()


def _begin_by_event(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")


def test_an_engine_that_does_not_say_where_its_database_is_serves_its_own_mode() -> None:
    engine = create_engine("postgresql+psycopg://", creator=lambda: pytest.fail("not reached"))
    saver = SQLAlchemySaver(engine)
    with pytest.raises(StorageError, match="does not say where"):
        asyncio.run(saver.asetup())
    saver.close()


def test_listeners_for_cursors_see_what_is_stored_and_read(path: Path) -> None:
    """Statements on hot paths go past SQLAlchemy's execution, but not where a tracer listens to it."""
    engine = create_engine(f"sqlite:///{path}")
    seen: list[str] = []
    with SQLAlchemySaver(engine) as saver:
        put(saver, config(), {"x": 1})
        event.listen(engine, "before_cursor_execute", lambda *arguments: seen.append(arguments[2]))
        put(saver, config(), {"x": 2})
        saver.get_tuple(config())
    for wanted in ("INSERT INTO agentmem_blobs", "INSERT INTO agentmem_checkpoints", "SELECT agentmem_threads"):
        assert any(statement.startswith(wanted) for statement in seen), (wanted, seen)
    engine.dispose()


def test_rows_that_a_listener_for_begin_lets_through(postgresql_url: str) -> None:
    """Row-level security by ``SET LOCAL``, which lasts as long as a transaction: so reads must have one, too."""
    plain = make_url(postgresql_url)
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
    look(postgresql_url, "CREATE SCHEMA mine")
    look(postgresql_url, "CREATE SCHEMA mapped")
    with SQLAlchemySaver.from_url(postgresql_url, schema="mine", table_prefix="x_") as saver:
        put(saver, config(), {"x": 1})
    engine = create_engine(postgresql_url, execution_options={"schema_translate_map": {None: "mapped"}})
    with SQLAlchemySaver(engine) as saver:
        put(saver, config("a"), {"x": 1})
        asyncio.run(aput(saver, "b", x=1))  # the other mode's engine looks into the same schema
        assert len(list(saver.list(None))) == 2
    engine.dispose()
    found = look(
        postgresql_url, "SELECT schemaname, count(*) FROM pg_tables WHERE tablename LIKE '%threads' GROUP BY 1"
    )
    assert sorted(found) == [("mapped", 1), ("mine", 1)]
    with pytest.raises(StorageError, match="CREATE SCHEMA"), SQLAlchemySaver.from_url(postgresql_url, schema="no") as s:
        s.setup()


def test_an_engine_in_memory_serves_its_own_mode_only() -> None:
    engine = create_engine("sqlite:///:memory:", poolclass=StaticPool, connect_args={"check_same_thread": False})
    with SQLAlchemySaver(engine) as saver:
        at = put(saver, config(), {"x": 1})
        assert saver.get_tuple(at) is not None
        with pytest.raises(StorageError, match="in memory"):
            asyncio.run(saver.aget_tuple(at))
    engine.dispose()
    apart = create_engine("sqlite:///:memory:", poolclass=SingletonThreadPool)
    with pytest.raises(StorageError, match="StaticPool"):
        SQLAlchemySaver(apart)
