"""What servers do to us: connections ended or cut, no server, no rights, no writes, locks, limits, a lost commit.

What a process knows of a thread must not outlive the thread that it knew.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, Table, create_engine, event, make_url, select, text
from sqlalchemy.exc import DBAPIError

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver, metadata
from agentmem_sql.database import Database
from agentmem_sql.db_errors import advice
from agentmem_sql.statements import check_mysql
from tests.helpers.sql_cases import SERVERS, TABLES, add, aput, change, config, names, put, value
from tests.helpers.sql_chains import unaccounted
from tests.helpers.sql_fault_child import INTERRUPT, Async, Sync, pending, question, values
from tests.helpers.sql_proxy import Proxy, proxy

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


@pytest.mark.parametrize("backend", SERVERS)
async def test_connections_that_the_server_ended_are_replaced(new_url: NewUrl, look: Sql, backend: str) -> None:
    """Idle ones: the next call of any kind succeeds, in both modes, and nothing is lost."""
    url = new_url(backend)
    async with SQLAlchemySaver.from_url(url) as saver:
        for run in range(2):
            put(saver, config(f"{run} sync"), {"x": 1})
            await asyncio.gather(*(aput(saver, f"{run} {number}", x=1) for number in range(3)))
            assert end_all(look, url) >= 1
        assert len(list(saver.list(None))) == 8
        assert len([one async for one in saver.alist(None)]) == 8


@pytest.mark.parametrize("driver", SERVERS)
def test_connections_of_many_threads_that_the_server_ended(new_url: NewUrl, look: Sql, driver: str) -> None:
    url = new_url(driver)
    with SQLAlchemySaver.from_url(url) as saver, ThreadPoolExecutor(8) as threads:
        for run in range(3):
            made = [threads.submit(put, saver, config(f"{run} {number}"), {"x": 1}) for number in range(24)]
            assert all(one.result() for one in made)
            assert end_all(look, url) >= 1
            put(saver, config(f"{run} alone"), {"x": 1})
        assert len(list(saver.list(None))) == 3 * 25


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("backend", SERVERS)
def test_work_whose_connection_ends_is_run_once_more(new_url: NewUrl, look: Sql, backend: str, write: bool) -> None:
    url = new_url(backend)
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


def test_values_larger_than_the_server_takes(mysql_url: str, look: Sql) -> None:
    (limit,) = look(mysql_url, "SELECT @@max_allowed_packet")[0]
    database = Database(mysql_url, tables=TABLES)
    with pytest.raises(StorageError, match="max_allowed_packet"):
        database.run(add(b"large", bytes(limit + 1)), write=True)
    assert database.run(names) == []
    database.close()


@pytest.mark.parametrize("backend", SERVERS)
def test_locks_that_are_waited_for_too_long(new_url: NewUrl, backend: str) -> None:
    set_timeout = {"postgresql": "SET lock_timeout = '50ms'", "mysql": "SET innodb_lock_wait_timeout = 0"}[backend]
    url = new_url(backend)
    database, other = Database(url, tables=TABLES), Database(url, tables=TABLES)
    database.run(add(b"a"), write=True)

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


# A line to the server that is cut: the call that meets it succeeds all the same, and is done once.

MODES = (
    ("sync", "postgresql+psycopg"),
    ("async", "postgresql+psycopg"),
    ("sync", "mysql+pymysql"),
)
PORTS = {"postgresql": 5432, "mysql": 3306}


@pytest.fixture(params=MODES, ids=" ".join)
def mode(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def server_url(mode: tuple[str, str], new_url: NewUrl) -> str:
    return new_url(mode[1])


@pytest.fixture
def line(server_url: str) -> Iterator[Proxy]:
    """The line to the server."""
    url = make_url(server_url)
    with proxy((url.host or "127.0.0.1", url.port or PORTS[url.get_backend_name()])) as opened:
        yield opened


@pytest.fixture
def saver_on_line(mode: tuple[str, str], server_url: str, line: Proxy) -> Iterator[Sync]:
    made = SQLAlchemySaver.from_url(make_url(server_url).set(host="127.0.0.1", port=line.port))
    opened = Async(made) if mode[0] == "async" else Sync(made)
    yield opened
    opened.close()


def converse(saver: Sync, step: int) -> None:
    """Store, replace, read, and delete; what is read at the end is what was stored, once."""
    at = saver.put(config(), step)
    saver.call("put_writes", at, pending(step), "task")
    for number in range(2):
        saver.call("put_writes", at, [(INTERRUPT, question(step, number))], "asking")
    saver.put(config(f"new {step}"), step)
    saver.call("delete_thread", f"new {step}")
    found = saver.call("get_tuple", at)
    assert found.checkpoint["channel_values"] == values(step)
    assert found.pending_writes == [
        ("asking", INTERRUPT, question(step, 1)),
        *(("task", channel, value) for channel, value in pending(step)),
    ]


def cut(saver: Sync, line: Proxy, look: Sql, every: int) -> None:
    """Converse, and again, with the line cut at one message after the other, by steps of ``every``.

    Before the message reaches the server or, every other time, after it did, so that only the answer is lost.
    """
    for step in range(3):  # until everything is prepared and cached
        line.messages = 0
        converse(saver, step)
    numbers = range(0, line.messages, every)
    cuts = 0
    for step, number in enumerate(numbers, start=3):
        line.messages, line.cut_at, line.after = 0, number, not line.after
        converse(saver, step)
        cuts += line.cut_at is None
    line.cut_at = None
    assert cuts > len(numbers) - 3  # a new connection prepares a statement again: the last messages may not come
    assert look("SELECT count(*) FROM agentmem_threads") == [(1,)]
    assert look("SELECT count(*) FROM agentmem_checkpoints") == [(3 + len(numbers),)]
    assert unaccounted(look) == (set(), set())


def test_a_line_that_is_cut_in_the_middle_of_calls(
    saver_on_line: Sync, line: Proxy, look: Sql, server_url: str
) -> None:
    cut(saver_on_line, line, partial(look, server_url), every=11)


@pytest.mark.slow
def test_a_line_that_is_cut_at_every_message(saver_on_line: Sync, line: Proxy, look: Sql, server_url: str) -> None:
    cut(saver_on_line, line, partial(look, server_url), every=1)


# Databases that are not what they were.


def messages(count: int, of: str = "a") -> list[str]:
    """Too long to be stored in their list."""
    return [f"{of} {number} ".ljust(300, ".") for number in range(count)]


def newest(url: str) -> list[str]:
    """What a process that knows nothing reads."""
    with SQLAlchemySaver.from_url(url) as fresh:
        found = fresh.get_tuple(config())
        assert found is not None
        values: list[str] = found.checkpoint["channel_values"]["messages"]
        return values


def test_tables_that_are_made_anew_under_a_saver(database_url: str) -> None:
    with SQLAlchemySaver.from_url(database_url) as saver:
        at = put(saver, config(), {"messages": messages(30)})
        engine = create_engine(database_url)
        metadata().drop_all(engine)
        engine.dispose()
        with SQLAlchemySaver.from_url(database_url) as other:
            put(other, config(), {"messages": messages(1, "b")})
        put(saver, at, {"messages": messages(31)})
    assert newest(database_url) == messages(31)


def test_a_server_that_has_lost_the_last_commit(new_url: NewUrl, look: Sql) -> None:
    url = new_url("postgresql")
    with SQLAlchemySaver.from_url(url) as saver:
        at = put(saver, config(), {"messages": messages(2)})
        before = look(url, "SELECT digest FROM agentmem_blobs")
        put(saver, at, {"messages": messages(30)})
        # What a replica that takes over has: all but the last commit. The connections to the primary are gone.
        look(url, "DELETE FROM agentmem_checkpoints WHERE id > :id", id=at["configurable"]["checkpoint_id"].encode())
        kept = ", ".join(f"'\\x{bytes(digest).hex()}'" for (digest,) in before)
        look(url, f"DELETE FROM agentmem_blobs WHERE digest NOT IN ({kept})")
        look(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                  "AND datname = current_database()")  # fmt: skip
        put(saver, at, {"messages": messages(5)})
    assert newest(url) == messages(5)


@pytest.mark.parametrize("prefix", ["agentmem_list_", "list_agentmem_list"])
def test_any_name_of_the_tables(database_url: str, prefix: str) -> None:
    for count in (41, 42):
        with SQLAlchemySaver.from_url(database_url, table_prefix=prefix) as saver:
            put(saver, config(), {"messages": messages(count)})
        with SQLAlchemySaver.from_url(database_url, table_prefix=prefix) as saver:
            found = saver.get_tuple(config())
            assert found is not None
            assert found.checkpoint["channel_values"]["messages"] == messages(count)


def test_closed_savers_leave_nothing_behind(database_url: str) -> None:
    def tables() -> int:
        gc.collect()
        return sum(type(one) is Table for one in gc.get_objects())

    def use() -> None:
        with SQLAlchemySaver.from_url(database_url) as saver:
            at = put(saver, config(), {"x": 1})
            saver.put_writes(at, [("x", 2)], "task")
            saver.get_tuple(config())

    use()
    before = tables()
    for _ in range(5):
        use()
    assert tables() <= before


def test_an_engine_of_ones_own_executes_every_statement_itself(database_url: str) -> None:
    engine = create_engine(database_url)
    seen: list[str] = []

    def listen(_cursor: object, statement: str, *_: object) -> None:
        seen.append(statement.split()[0])

    event.listen(engine, "do_execute", listen)
    event.listen(engine, "do_executemany", listen)
    with SQLAlchemySaver(engine) as saver:
        put(saver, config(), {"x": 1})
        seen.clear()
        put(saver, config(), {"x": 2})
        saver.get_tuple(config())
    assert {"INSERT", "SELECT"} <= set(seen) or {"WITH", "SELECT"} <= set(seen)
    engine.dispose()


ALTER = (
    "ALTER TABLE agentmem_threads ALTER COLUMN epoch TYPE numeric(18)",
    "ALTER TABLE agentmem_blobs ALTER COLUMN kind TYPE bigint",
)


def alter(url: str) -> None:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        for statement in ALTER:
            connection.execute(text(statement))
    engine.dispose()


def test_columns_that_are_altered_under_prepared_statements(new_url: NewUrl) -> None:
    url = new_url("postgresql")
    with SQLAlchemySaver.from_url(url, cache_bytes=0) as saver:
        put(saver, config(), {"messages": messages(3)})
        saver.get_tuple(config())
        alter(url)
        found = asyncio.run(saver.aget_tuple(config()))
        assert found is not None
        put(saver, found.config, {"messages": messages(4)})
    assert newest(url) == messages(4)


# Modes of MySQL and MariaDB.


def in_mode(statement: str) -> dict[str, Any]:
    return {"connect_args": {"init_command": statement}}


def test_text_is_data_where_backslashes_are_no_escapes(mysql_url: str) -> None:
    mode = in_mode("SET SESSION sql_mode = 'NO_BACKSLASH_ESCAPES'")
    odd = [r"\' OR 1=1 -- ", "\\", "'", "\\'", "%s", "x\\\\'; DROP TABLE agentmem_threads; -- ", "\x00\x1a\n"]
    for options in (mode, {}):
        with SQLAlchemySaver.from_url(mysql_url, engine_options=options) as saver:
            for thread in odd:
                at = put(saver, config(thread), {"x": thread, "y": thread.encode()}, note=thread.strip("\0"))
                saver.put_writes(at, [(thread, thread)], thread, thread)
                found = saver.get_tuple(at)
                assert found is not None
                assert found.checkpoint["channel_values"] == {"x": thread, "y": thread.encode()}
                assert found.pending_writes == [(thread, thread, thread)]
                assert [one.metadata["note"] for one in saver.list(None, filter={"note": thread.strip("\0")})]  # type: ignore[typeddict-item]
    with SQLAlchemySaver.from_url(mysql_url, engine_options=mode) as saver:
        saver.delete_thread(odd[0])
        assert {one.config["configurable"]["thread_id"] for one in saver.list(None)} == set(odd[1:])


def test_a_server_whose_sql_means_something_else_is_refused(mysql_url: str) -> None:
    with (
        SQLAlchemySaver.from_url(mysql_url, engine_options=in_mode("SET SESSION sql_mode = 'ORACLE'")) as saver,
        pytest.raises(StorageError, match=r"sql_mode.*ORACLE.*init_command"),
    ):
        saver.setup()


@pytest.mark.parametrize(
    ("log", "log_format", "refused"), [(1, "STATEMENT", True), (0, "STATEMENT", False), (1, "ROW", False)]
)
def test_a_server_that_would_log_statements_is_refused(log: int, log_format: str, refused: bool) -> None:
    """Its setting cannot be changed in a test, so what it answers is made up."""

    class Answering:
        def exec_driver_sql(self, _statement: str) -> Any:
            return self

        def one(self) -> tuple[int, str, str]:
            return log, log_format, "STRICT_TRANS_TABLES"

    connection: Any = Answering()
    if refused:
        with pytest.raises(StorageError, match=r"binlog_format=STATEMENT.*ROW or MIXED"):
            check_mysql(connection)
    else:
        check_mysql(connection)


def test_a_pooler_that_mixes_up_prepared_statements_is_explained() -> None:
    class DuplicatePreparedStatement(Exception):
        sqlstate = "42P05"

    error = DBAPIError("INSERT", {}, DuplicatePreparedStatement('prepared statement "_pg3_0" already exists'))
    assert "'prepare_threshold': None" in advice(error)
