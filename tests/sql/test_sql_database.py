"""Opening, closing, schema versions, engines of one's own, faults, and what needs no database at all."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sql_cases import config, finish, put, start_child
from sqlalchemy import create_engine, event
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import Pool, SingletonThreadPool, StaticPool
from sqlalchemy.schema import CreateTable

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.dialects import insert_missing, upsert
from agentmem_sql.tables import blobs, metadata

Sql = Callable[..., list[Any]]


async def test_files_are_durable_and_have_a_log(saver: SQLAlchemySaver, path: Path, sql: Sql) -> None:
    settings = set()

    def look(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        for name in ("synchronous", "busy_timeout", "foreign_keys"):
            cursor.execute(f"PRAGMA {name}")
            settings.add((name, *cursor.fetchone()))
        cursor.close()

    event.listen(Pool, "checkout", look)
    try:
        at = put(saver, config(), {"x": 1})
        await saver.aget_tuple(at)
    finally:
        event.remove(Pool, "checkout", look)

    assert settings == {("synchronous", 2), ("busy_timeout", 30_000), ("foreign_keys", 1)}
    assert sql("PRAGMA journal_mode") == [("wal",)]
    assert Path(f"{path}-wal").exists()


@pytest.mark.parametrize("from_a_loop", [False, True])
@pytest.mark.parametrize("used", ["sync", "async", "both"])
def test_closing_releases_the_file(url: str, path: Path, used: str, from_a_loop: bool) -> None:
    async def use_async(saver: SQLAlchemySaver) -> None:
        await asyncio.gather(*(saver.aget_tuple(config()) for _ in range(8)))

    async def in_a_loop(saver: SQLAlchemySaver) -> None:
        if used != "sync":
            await use_async(saver)
        await saver.aclose()

    saver = SQLAlchemySaver.from_url(url)
    if used != "async":
        put(saver, config(), {"x": 1})
    if from_a_loop:
        asyncio.run(in_a_loop(saver))
    else:
        if used != "sync":
            asyncio.run(use_async(saver))
        saver.close()

    alone = sqlite3.connect(path, timeout=0)
    assert alone.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)  # only the sole connection may
    alone.close()
    with pytest.raises(StorageError, match="closed"):
        saver.setup()
    saver.close()


async def test_close_works_inside_a_running_loop(url: str, path: Path) -> None:
    saver = SQLAlchemySaver.from_url(url)
    await saver.aget_tuple(config())
    saver.close()
    assert not Path(f"{path}-wal").exists()


def test_a_newer_schema_is_refused_and_left_alone(saver: SQLAlchemySaver, url: str, sql: Sql) -> None:
    put(saver, config(), {"x": 1})
    sql("INSERT INTO agentmem_schema_versions VALUES (2)")
    with SQLAlchemySaver.from_url(url) as other:
        for call in (other.setup, lambda: other.get_tuple(config()), lambda: put(other, config("new"))):
            with pytest.raises(StorageError, match="version 1, found version 2"):
                call()
        with pytest.raises(StorageError, match="version 1, found version 2"):
            asyncio.run(other.asetup())
    assert sql("SELECT name FROM agentmem_threads") == [(b"t",)]


async def test_both_modes_see_one_database_in_memory() -> None:
    async with (
        SQLAlchemySaver.from_url("sqlite:///:memory:") as saver,
        SQLAlchemySaver.from_url("sqlite://") as other,
    ):
        at = put(saver, config(), {"x": 1})
        found = await saver.aget_tuple(at)
        assert found is not None
        assert found.checkpoint["channel_values"] == {"x": 1}
        assert await other.aget_tuple(at) is None


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


async def test_an_async_engine_of_ones_own_that_begins_by_itself(path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")

    @event.listens_for(engine.sync_engine, "connect")
    def _(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    async with SQLAlchemySaver(engine) as saver:
        at = await asyncio.to_thread(put, saver, config(), {"x": 1})
        assert await saver.aget_tuple(at) is not None
        await saver.adelete_thread("t")
        assert await saver.aget_tuple(at) is None
    async with engine.connect() as connection:
        assert (await connection.exec_driver_sql("SELECT count(*) FROM agentmem_blobs")).scalar_one() == 0
    await engine.dispose()


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


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("threads.db", "sqlite:///threads.db"),
        ("postgresql+psycopg://localhost/x", "expected a SQLite URL"),
        ("sqlite+pysqlcipher:///x.db", "pysqlcipher"),
        ("sqlite:///file::memory:?cache=shared&uri=true", "remove them"),
    ],
)
def test_urls_that_cannot_be_used_are_refused(bad: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        SQLAlchemySaver.from_url(bad)


async def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    with SQLAlchemySaver.from_url(f"sqlite:///{tmp_path}/missing/x.db") as saver:
        with pytest.raises(StorageError, match="folder exists"):
            saver.setup()
        with pytest.raises(StorageError, match="folder exists"):
            await saver.asetup()
    while any("_connection_worker_thread" in thread.name for thread in threading.enumerate()):
        await asyncio.sleep(0.001)  # the driver's thread reports to this loop when it ends
    (tmp_path / "x.db").write_bytes(b"no database" * 1000)
    with (
        SQLAlchemySaver.from_url(f"sqlite:///{tmp_path}/x.db") as saver,
        pytest.raises(StorageError, match="not a database"),
    ):
        saver.setup()


def test_a_read_only_database_can_be_read_and_refuses_writes(saver: SQLAlchemySaver, path: Path) -> None:
    at = put(saver, config(), {"x": 1})
    with SQLAlchemySaver.from_url(f"sqlite:///file:{path}?mode=ro&uri=true") as reader:
        assert reader.get_tuple(at) is not None
        with pytest.raises(StorageError, match="writable"):
            put(reader, config(), {"x": 2})


def test_a_full_database_keeps_what_it_had(path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}")
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count=60"))
    with SQLAlchemySaver(engine) as saver:
        at = put(saver, config(), {"x": 1})
        with pytest.raises(StorageError, match="free some space"):
            put(saver, at, {"x": b"x" * 400_000})
        assert [one.config for one in saver.list(None)] == [at]
        put(saver, at, {"x": 2})
    engine.dispose()


@pytest.mark.parametrize("dialect", [postgresql.dialect(), mysql.dialect()], ids=["postgresql", "mysql"])
def test_tables_fit_the_other_databases(dialect: Any) -> None:
    """No text, and no key over MySQL's 3,072 bytes or PostgreSQL's 2,704; there is no server in this test."""
    sizes = {"BIGINT": 8, "INTEGER": 4, "SMALLINT": 2, "BINARY(32)": 32, "VARBINARY(128)": 128}
    for table in metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))
        columns = {column.name: column.type.compile(mysql.dialect()) for column in table.columns}
        assert not any("CHAR" in kind or "TEXT" in kind for kind in columns.values())
        assert sum(sizes[columns[column.name]] for column in table.primary_key) <= 500


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "mysql"])
def test_inserts_speak_each_database(name: str) -> None:
    dialect = {"sqlite": sqlite.dialect(), "postgresql": postgresql.dialect(), "mysql": mysql.dialect()}[name]
    kept = str(insert_missing(name, blobs).compile(dialect=dialect))
    replaced = str(upsert(name, blobs).compile(dialect=dialect))
    if name == "mysql":
        assert kept.endswith("ON DUPLICATE KEY UPDATE thread = agentmem_blobs.thread")
        assert "IGNORE" not in kept
        assert "ON DUPLICATE KEY UPDATE kind = VALUES(kind), body = VALUES(body)" in replaced
    else:
        assert kept.endswith("ON CONFLICT DO NOTHING")
        assert "ON CONFLICT (thread, digest) DO UPDATE SET kind = excluded.kind, body = excluded.body" in replaced


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from agentmem.errors import MissingExtraError
try:
    from agentmem_sql import SQLAlchemySaver
    saver = SQLAlchemySaver.from_url("sqlite:///:memory:")
    saver.setup()
    import asyncio
    asyncio.run(saver.asetup())
except MissingExtraError as error:
    print(error.package, error.extra)
"""


def test_missing_packages_are_named_with_their_extra() -> None:
    names = ("sqlalchemy", "aiosqlite", "greenlet")
    children = [start_child(name, code=BLOCKED) for name in names]
    assert [finish(child) for child in children] == [f"{name} sql" for name in names]


def test_import_loads_no_torch_and_an_unclosed_saver_lets_the_process_end() -> None:
    code = """
import asyncio, sys
from agentmem_sql import SQLAlchemySaver
saver = SQLAlchemySaver.from_url("sqlite:///" + sys.argv[1])
asyncio.run(saver.asetup())
saver.setup()
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    assert finish(start_child(":memory:", code=code)) == "False False"
