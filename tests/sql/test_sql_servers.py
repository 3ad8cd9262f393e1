"""What servers do to us: connections ended, no server, no rights, no writes, locks, limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, make_url, select

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.database import Database
from tests.helpers.sql_cases import checkpoint, config, put
from tests.helpers.sql_works import SERVERS, TABLES, add, both, change, names, value

Sql = Callable[..., list[Any]]
NewUrl = Callable[[str], str]


END_ALL = {
    "postgresql": "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "mysql": "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()",
}


def end_all(look: Sql, url: str) -> int:
    """Have the server end every connection to the database; gives how many there were."""
    backend = make_url(url).get_backend_name()
    found = look(url, END_ALL[backend])
    if backend == "mysql":
        for (number,) in found:
            look(url, f"KILL {number}")
    return len(found)


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg", "mysql+asyncmy"])
async def test_connections_that_the_server_ended_are_replaced(new_url: NewUrl, look: Sql, driver: str) -> None:
    """Idle ones: the next call of any kind succeeds, in both modes, and nothing is lost."""
    url = new_url(driver)

    async def aput(thread: str) -> Any:
        made = checkpoint({"x": 1}, saver.get_next_version(None, None))
        return await saver.aput(config(thread), made, {}, made["channel_versions"])

    async with SQLAlchemySaver.from_url(url) as saver:
        put(saver, config("0"), {"x": 1})
        await asyncio.gather(*(aput(f"{number}") for number in (1, 2, 3)))
        assert end_all(look, url) >= 2
        put(saver, config("4"), {"x": 1})
        await asyncio.gather(*(aput(f"{number}") for number in (5, 6, 7)))
        assert end_all(look, url) >= 2
        assert len(list(saver.list(None))) == 8
        assert len([one async for one in saver.alist(None)]) == 8


@pytest.mark.parametrize("driver", SERVERS)
def test_connections_of_many_threads_that_the_server_ended(new_url: NewUrl, look: Sql, driver: str) -> None:
    """The connection that a saver keeps for its next call is ended with those in its pool, and no call fails."""
    url = new_url(driver)
    with SQLAlchemySaver.from_url(url) as saver, ThreadPoolExecutor(8) as threads:
        for run in range(3):
            made = [threads.submit(put, saver, config(f"{run} {number}"), {"x": 1}) for number in range(24)]
            assert all(one.result() for one in made)
            assert end_all(look, url) >= 1
            put(saver, config(f"{run} alone"), {"x": 1})
        assert len(list(saver.list(None))) == 3 * 25


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg", "mysql+asyncmy"])
def test_work_whose_connection_ends_is_run_once_more(new_url: NewUrl, look: Sql, driver: str, write: bool) -> None:
    url = new_url(driver)
    database = Database(url, tables=TABLES)
    database.run(names)
    runs: list[int] = []

    def work(connection: Connection) -> None:
        runs.append(1)
        if write:
            add(b"row")(connection)
        if always or len(runs) == 1:
            with ThreadPoolExecutor(1) as thread:
                thread.submit(end_all, look, url).result()
        connection.execute(select(TABLES.settings.c.name)).all()

    always = False
    database.run(work, write=write)
    assert len(runs) == 2
    database.run(lambda connection: connection.execute(TABLES.settings.delete()), write=True)
    runs.clear()
    asyncio.run(database.arun(work, write=write))
    assert len(runs) == 2
    assert database.run(names) == ([b"row"] if write else [])
    database.run(lambda connection: connection.execute(TABLES.settings.delete()), write=True)
    always = True
    runs.clear()
    with pytest.raises(StorageError, match="lost twice"):
        database.run(work, write=write)
    assert len(runs) == 2
    assert database.run(names) == []
    database.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://u:secret@127.0.0.1:1/x", "host and port"),
        ("postgresql+asyncpg://u:secret@127.0.0.1:1/x", "host and port"),
        ("mysql://u:secret@127.0.0.1:1/x", "host and port"),
    ],
)
def test_servers_that_are_not_there(url: str, message: str) -> None:
    with SQLAlchemySaver.from_url(url) as saver:
        with pytest.raises(StorageError, match=message) as sync:
            saver.setup()
        with pytest.raises(StorageError, match=message) as asynchronous:
            asyncio.run(saver.asetup())
    for error in (sync, asynchronous):
        assert "127.0.0.1:1" in str(error.value)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg", "mysql+pymysql"])
def test_urls_that_the_server_or_the_driver_refuses(new_url: NewUrl, driver: str) -> None:
    url = make_url(new_url(driver))
    wrong = {
        "user name and password": url.set(username="agentmem_nobody", password="secret"),
        "CREATE DATABASE": url.set(database="agentmem_missing"),
        "no_such_option": url.update_query_dict({"no_such_option": "1"}),
    }
    for message, bad in wrong.items():
        with SQLAlchemySaver.from_url(bad) as saver:
            with pytest.raises(StorageError, match=message) as sync:
                saver.setup()
            with pytest.raises(StorageError, match=message) as asynchronous:
                asyncio.run(saver.asetup())
        assert "secret" not in f"{sync.value}{asynchronous.value}"


def test_a_server_that_takes_no_writes_can_be_read(postgresql_url: str, look: Sql) -> None:
    with SQLAlchemySaver.from_url(postgresql_url) as saver:
        at = put(saver, config(), {"x": 1})
    name = make_url(postgresql_url).database
    look(postgresql_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with SQLAlchemySaver.from_url(postgresql_url) as saver:
        assert saver.get_tuple(at) is not None
        with pytest.raises(StorageError, match="primary server"):
            put(saver, at, {"x": 2})
        assert asyncio.run(saver.aget_tuple(at)) is not None


def test_a_user_without_rights_is_told_which(new_url: NewUrl, look: Sql) -> None:
    url = new_url("postgresql")
    role = f"agentmem_guest_{make_url(url).database}"
    look(url, f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 1")
    try:
        database = Database(make_url(url).set(username=role), tables=TABLES)
        with pytest.raises(StorageError, match="grant CREATE on the schema"):
            database.run(names)
        look(url, f"GRANT CREATE ON SCHEMA public TO {role}")
        with pytest.raises(StorageError, match="max_connections"):
            database.run(lambda _: database.run(names))
        database.close()
    finally:
        look(url, f"DROP OWNED BY {role}")
        look(url, f"DROP ROLE {role}")


@pytest.mark.parametrize("driver", ["mysql+pymysql", "mysql+asyncmy"])
def test_values_larger_than_the_server_takes(mysql_url: str, look: Sql, driver: str) -> None:
    (limit,) = look(mysql_url, "SELECT @@max_allowed_packet")[0]
    database = Database(mysql_url, tables=TABLES)
    work = add(b"large", bytes(limit + 1))
    with pytest.raises(StorageError, match="max_allowed_packet"):
        database.run(work, write=True) if driver == "mysql+pymysql" else asyncio.run(database.arun(work, write=True))
    assert both(database, names) == [[], []]
    database.close()


@pytest.mark.parametrize("backend", SERVERS)
def test_locks_that_are_waited_for_too_long(new_url: NewUrl, backend: str) -> None:
    set_timeout = {"postgresql": "SET lock_timeout = '50ms'", "mysql": "SET innodb_lock_wait_timeout = 0"}[backend]
    database = Database(new_url(backend), tables=TABLES)
    database.run(add(b"a"), write=True)
    other = Database(database._url, tables=TABLES)

    def wait(connection: Connection) -> None:
        connection.exec_driver_sql(set_timeout)
        change(b"a", b"2")(connection)

    def hold(connection: Connection) -> None:
        change(b"a", b"1")(connection)
        with pytest.raises(StorageError, match="lock_timeout"), ThreadPoolExecutor(1) as thread:
            thread.submit(other.run, wait, write=True).result()

    database.run(hold, write=True)
    assert database.run(lambda connection: value(connection, b"a")) == b"1"
    database.close()
    other.close()
