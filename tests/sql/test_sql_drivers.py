"""URLs, drivers that are missing, event loops, and what closing leaves behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import make_url

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.drivers import drivers, parse
from tests.helpers.sql_cases import config, finish, put, start_child
from tests.helpers.sql_works import aput

Sql = Callable[..., list[Any]]
NewUrl = Callable[[str], str]


SESSIONS = {
    "postgresql": """
        SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
    """,
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND id <> connection_id()",
}


def assert_no_sessions(look: Sql, url: str) -> None:
    """The server has seen every connection to this database end (it may take it a moment)."""
    backend = make_url(url).get_backend_name()
    if backend != "sqlite":
        ends = time.monotonic() + 5
        while look(url, SESSIONS[backend]) != [(0,)]:
            assert time.monotonic() < ends, look(url, SESSIONS[backend])
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("url", "sync", "asynchronous"),
    [
        ("sqlite:///x.db", "sqlite+pysqlite:///x.db", "sqlite+aiosqlite:///x.db"),
        ("sqlite+aiosqlite:///x.db", "sqlite+pysqlite:///x.db", "sqlite+aiosqlite:///x.db"),
        ("postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgres://h/d", "postgresql+psycopg://h/d", "postgresql+psycopg://h/d"),
        ("postgresql+psycopg_async://h/d", "postgresql+psycopg://h/d", "postgresql+psycopg://h/d"),
        (
            "postgresql+asyncpg://h/d?ssl=require",
            "postgresql+psycopg://h/d?sslmode=require",
            "postgresql+asyncpg://h/d?ssl=require",
        ),
        ("mysql://h/d", "mysql+pymysql://h/d?charset=utf8mb4", "mysql+asyncmy://h/d?charset=utf8mb4"),
        ("mysql+asyncmy://h/d?charset=utf8", "mysql+pymysql://h/d?charset=utf8", "mysql+asyncmy://h/d?charset=utf8"),
        ("mariadb+pymysql://h/d", "mariadb+pymysql://h/d?charset=utf8mb4", "mariadb+asyncmy://h/d?charset=utf8mb4"),
    ],
)
def test_a_url_names_the_database_and_both_drivers_follow(url: str, sync: str, asynchronous: str) -> None:
    found = drivers(parse(url))
    assert found.sync.render_as_string(hide_password=False) == sync
    assert found.asynchronous.render_as_string(hide_password=False) == asynchronous


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("threads.db", "sqlite:///threads.db"),
        ("postgresql://localhost:port/x", "cannot be read"),
        ("oracle://localhost/x", "sqlite, postgresql, mysql or mariadb"),
        ("sqlite+pysqlcipher:///x.db", r"sqlite\+pysqlite or sqlite\+aiosqlite.*pysqlcipher"),
        ("postgresql+psycopg2://localhost/x", r"postgresql\+psycopg or postgresql\+asyncpg.*no asynchronous mode"),
        ("mysql+aiomysql://localhost/x", r"mysql\+pymysql or mysql\+asyncmy.*aiomysql fails on bytes"),
        ("mariadb+mariadbconnector://localhost/x", r"mariadb\+pymysql"),
        ("sqlite:///file::memory:?cache=shared&uri=true", "remove them"),
    ],
)
def test_urls_that_cannot_be_used_are_refused(bad: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        SQLAlchemySaver.from_url(bad)


async def test_both_modes_see_one_database(async_url: str) -> None:
    async with SQLAlchemySaver.from_url(async_url) as saver:
        made = await aput(saver, "a", x="\0 \N{PARTY POPPER}", y=bytes(range(256)) * 300)
        put(saver, config("b"), {"x": 1})
        found = await asyncio.to_thread(saver.get_tuple, made)
        assert found is not None
        assert found.checkpoint["channel_values"] == {
            "x": "\0 \N{PARTY POPPER}",
            "y": bytes(range(256)) * 300,
        }
        assert [one.config["configurable"]["thread_id"] async for one in saver.alist(config("b"))] == ["b"]


def test_the_mariadb_spelling_works(new_url: NewUrl) -> None:
    url = make_url(new_url("mysql")).set(drivername="mariadb")
    with SQLAlchemySaver.from_url(url) as saver:
        asyncio.run(aput(saver, "t", x=1))
        assert saver.get_tuple(config()) is not None


def test_one_saver_in_several_loops_and_threads(async_url: str, look: Sql) -> None:
    """Loops one after the other and at the same time, with the synchronous mode beside them."""

    async def talk(number: int) -> None:
        await asyncio.gather(*(aput(saver, f"{number}.{task}", x=number) for task in range(3)))
        put(saver, config(f"{number}.sync"), {"x": number})

    with SQLAlchemySaver.from_url(async_url) as saver:
        for number in range(3):
            asyncio.run(talk(number))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: asyncio.run(talk(number)), range(3, 7)))
        assert len(list(saver.list(None))) == 7 * 4
    assert_no_sessions(look, async_url)


def test_a_loop_that_ends_takes_its_connections_along(async_url: str, look: Sql) -> None:
    saver = SQLAlchemySaver.from_url(async_url)
    asyncio.run(aput(saver, "t", x=1))
    assert_no_sessions(look, async_url)
    saver.close()


def test_loops_that_were_only_closed_leave_nothing(async_url: str, look: Sql) -> None:
    """Without ``shutdown_asyncgens`` nobody tells us; the connections go when the next loop comes, or at close."""
    with SQLAlchemySaver.from_url(async_url) as saver:
        for thread in "ab":
            loop = asyncio.new_event_loop()
            loop.run_until_complete(aput(saver, thread, x=1))
            loop.close()
        asyncio.run(aput(saver, "c", x=1))
        assert_no_sessions(look, async_url)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(aput(saver, "d", x=1))
        loop.close()
    gc.collect()
    assert_no_sessions(look, async_url)


@pytest.mark.parametrize("state", ["paused", "running elsewhere", "running here"])
def test_close_reaches_every_loop(async_url: str, look: Sql, state: str) -> None:
    saver = SQLAlchemySaver.from_url(async_url)
    loop = asyncio.new_event_loop()
    if state == "running elsewhere":
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        asyncio.run_coroutine_threadsafe(aput(saver, "t", x=1), loop).result()
        saver.close()
        assert_no_sessions(look, async_url)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
    elif state == "running here":

        async def use_and_close() -> None:
            await aput(saver, "t", x=1)
            begin = time.monotonic()
            saver.close()
            assert time.monotonic() - begin < 2

        loop.run_until_complete(use_and_close())
        loop.run_until_complete(asyncio.sleep(0.01))
    else:
        loop.run_until_complete(aput(saver, "t", x=1))
        saver.close()
    assert_no_sessions(look, async_url)
    loop.close()
    gc.collect()


BLOCKED = """
import asyncio, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from agentmem.errors import MissingExtraError
for case in sys.argv[2:]:
    try:
        from agentmem_sql import SQLAlchemySaver
        mode, url = case.split()
        saver = SQLAlchemySaver.from_url(url)
        saver.setup() if mode == "sync" else asyncio.run(saver.asetup())
    except MissingExtraError as error:
        print(error.package, error.extra, end=";")
"""


def test_missing_packages_are_named_with_their_extra() -> None:
    """The imports are blocked; no server is asked, since the driver is needed first."""
    drivers = {
        "aiosqlite sql": "async sqlite://",
        "psycopg postgres": "sync postgresql://h/d",
        "asyncpg postgres": "async postgresql+asyncpg://h/d",
        "pymysql mysql": "sync mysql://h/d",
        "asyncmy mysql": "async mariadb://h/d",
    }
    children = [
        start_child("sqlalchemy", "sync sqlite://", code=BLOCKED),
        start_child("greenlet", "sync sqlite://", code=BLOCKED),
        start_child("aiosqlite psycopg asyncpg pymysql asyncmy", *drivers.values(), code=BLOCKED),
    ]
    expected = ["sqlalchemy sql;", "greenlet sql;", "".join(f"{one};" for one in drivers)]
    assert [finish(child) for child in children] == expected


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
