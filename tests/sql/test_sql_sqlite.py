"""SQLite's files and databases in memory: settings, closing, and files that are missing, damaged or read-only."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import Sql, config, put


def test_files_are_durable_and_have_a_log(url: str, path: Path, sql: Sql) -> None:
    settings = set()

    def look(connection: Any, *_: object) -> None:
        for name in ("synchronous", "busy_timeout"):
            with closing(connection.cursor()) as cursor:
                settings.add((name, *cursor.execute(f"PRAGMA {name}").fetchone()))

    event.listen(Pool, "checkout", look)
    try:
        with SQLAlchemySaver.from_url(url) as saver:
            put(saver, config(), {"x": 1})
            assert Path(f"{path}-wal").exists()
    finally:
        event.remove(Pool, "checkout", look)
    assert settings == {("synchronous", 2), ("busy_timeout", 30_000)}
    assert sql("PRAGMA journal_mode") == [("wal",)]


def test_a_lock_that_never_comes_is_an_error(url: str, path: Path) -> None:
    options = {"connect_args": {"timeout": 0.05}}
    with (
        SQLAlchemySaver.from_url(url, engine_options=options) as saver,
        closing(sqlite3.connect(path, isolation_level=None)) as holder,
    ):
        saver.setup()
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="find out which"):
            put(saver, config(), {"x": 1})


@pytest.mark.parametrize("closed_by", ["close", "close in a loop", "aclose"])
async def test_closing_releases_the_file(url: str, path: Path, closed_by: str) -> None:
    saver = SQLAlchemySaver.from_url(url)
    put(saver, config(), {"x": 1})
    await asyncio.gather(*(saver.aget_tuple(config()) for _ in range(8)))
    if closed_by == "aclose":
        await saver.aclose()
    elif closed_by == "close":
        await asyncio.to_thread(saver.close)
    else:
        saver.close()
    assert not Path(f"{path}-wal").exists()
    with closing(sqlite3.connect(path, timeout=0)) as alone:  # only the sole connection may
        assert alone.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
    with pytest.raises(StorageError, match="closed"):
        saver.setup()
    with pytest.raises(StorageError, match="closed"):
        await saver.asetup()
    saver.close()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere open files cannot be moved")
@pytest.mark.parametrize("how", ["moved", "replaced", "emptied"])
def test_a_file_that_was_taken_away_under_a_saver_is_noticed(url: str, path: Path, how: str) -> None:
    """Turns would go on into a file that nobody can find."""
    with SQLAlchemySaver.from_url(url) as saver:
        at = put(saver, config(), {"x": 1})
        if how == "emptied":
            os.truncate(path, 0)
        else:
            path.rename(path.with_suffix(".moved"))
        if how == "replaced":
            path.write_bytes(b"no database")
        found = "none" if how == "moved" else "another"
        for call in (lambda: put(saver, at, {"x": 2}), lambda: saver.get_tuple(at), lambda: list(saver.list(None))):
            with pytest.raises(StorageError, match=rf"opened at .*found {found}: it was deleted, moved or replaced"):
                call()
        path.unlink(missing_ok=True)
        with SQLAlchemySaver.from_url(url) as again:
            assert again.get_tuple(at) is None


async def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    async with SQLAlchemySaver.from_url(f"sqlite:///{tmp_path}/missing/x.db") as saver:
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
def test_a_read_only_file_can_be_read(saver: SQLAlchemySaver, path: Path, sql: Sql, journal: str) -> None:
    at = put(saver, config(), {"x": 1})
    saver.close()
    sql(f"PRAGMA journal_mode={journal}")
    with SQLAlchemySaver.from_url(f"sqlite:///file:{path}?mode=ro&uri=true") as reader:
        assert reader.get_tuple(at) is not None
        with pytest.raises(StorageError, match="writable"):
            put(reader, config(), {"x": 2})
