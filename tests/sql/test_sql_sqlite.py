"""SQLite's files: settings, other processes, and files that are missing, damaged, read-only or full."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.pool import Pool

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.database import Database
from tests.helpers.sql_cases import TABLES, config, finish, names, put, start_child

Sql = Callable[..., list[Any]]
NewUrl = Callable[[str], str]


@pytest.mark.parametrize(("synchronous", "found"), [(None, 2), ("normal", 1), ("EXTRA", 3)])
async def test_files_are_durable_and_have_a_log(
    url: str, path: Path, sql: Sql, synchronous: str | None, found: int
) -> None:
    settings = set()

    def look(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        for name in ("synchronous", "busy_timeout"):
            cursor.execute(f"PRAGMA {name}")
            settings.add((name, *cursor.fetchone()))
        cursor.close()

    event.listen(Pool, "checkout", look)
    try:
        with SQLAlchemySaver.from_url(url, **({"synchronous": synchronous} if synchronous else {})) as saver:
            at = put(saver, config(), {"x": 1})
            await saver.aget_tuple(at)
            assert Path(f"{path}-wal").exists()
    finally:
        event.remove(Pool, "checkout", look)
    assert settings == {("synchronous", found), ("busy_timeout", 30_000)}
    assert sql("PRAGMA journal_mode") == [("wal",)]


def test_a_way_to_synchronise_that_sqlite_does_not_know_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match=r"OFF, NORMAL, FULL, EXTRA.*'fast'"):
        SQLAlchemySaver.from_url(url, synchronous="fast")


HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(0.5)
connection.execute("COMMIT")
connection.close()
"""


def test_a_writer_waits_for_another_process(saver: SQLAlchemySaver, path: Path) -> None:
    saver.setup()
    child = start_child(str(path), code=HOLD)
    assert child.stdout is not None
    assert child.stdout.readline() == "locked\n"
    begin = time.monotonic()
    put(saver, config(), {"x": 1})
    assert time.monotonic() - begin > 0.2
    finish(child)


def test_a_lock_that_never_comes_is_an_error(path: Path) -> None:
    url = f"sqlite:///{path}"
    database = Database(url, tables=TABLES, engine_options={"connect_args": {"timeout": 0.05}})
    database.run(names)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="find out which"):
        database.run(names, write=True)
    holder.close()
    database.close()


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


async def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    with SQLAlchemySaver.from_url(f"sqlite:///{tmp_path}/missing/x.db") as saver:
        with pytest.raises(StorageError, match="folder exists"):
            saver.setup()
        with pytest.raises(StorageError, match="folder exists"):
            await saver.asetup()
    (tmp_path / "x.db").write_bytes(b"no database" * 1000)
    with (
        SQLAlchemySaver.from_url(f"sqlite:///{tmp_path}/x.db") as saver,
        pytest.raises(StorageError, match="not a database"),
    ):
        saver.setup()


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_read_only_database_can_be_read_and_refuses_writes(
    saver: SQLAlchemySaver, path: Path, sql: Sql, journal: str
) -> None:
    at = put(saver, config(), {"x": 1})
    saver.close()
    sql(f"PRAGMA journal_mode={journal}")
    with SQLAlchemySaver.from_url(f"sqlite:///file:{path}?mode=ro&uri=true") as reader:
        assert reader.get_tuple(at) is not None
        with pytest.raises(StorageError, match="writable"):
            put(reader, config(), {"x": 2})
        assert asyncio.run(reader.aget_tuple(at)) is not None


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
