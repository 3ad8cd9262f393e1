"""What a call is on the database: its statements and transactions, when it is run again, and who waits for whom."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, make_url, text

from agentmem.errors import ConfigError, StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.database import Database
from agentmem_sql.message_cache import ThreadCache
from agentmem_sql.protection import Protection
from agentmem_sql.schema import Tables
from tests.helpers.sql_cases import Sql, config, memory, put

PLAIN: Any = {"tables": Tables(), "protection": Protection(JsonPlusSerializer(), None), "cache": ThreadCache(0)}


@contextmanager
def before_each_statement(do: Callable[[Connection, Any, str], object]) -> Iterator[None]:
    """Have something done before every statement on our tables, of any engine: with connection, cursor and statement.

    What it returns, if it is text, is executed instead.
    """

    def listen(connection: Connection, cursor: Any, statement: str, parameters: Any, *_: object) -> tuple[str, Any]:
        instead = do(connection, cursor, statement) if "agentmem_" in statement else None
        return (instead, ()) if isinstance(instead, str) else (statement, parameters)

    event.listen(Engine, "before_cursor_execute", listen, retval=True)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", listen)


def test_calls_on_a_thread_that_is_known_take_few_statements(database_url: str) -> None:
    seen: list[str] = []

    def statements(call: Callable[[], Any]) -> int:
        seen.clear()
        call()
        return len(seen)

    with SQLAlchemySaver.from_url(database_url) as saver, before_each_statement(lambda *args: seen.append(args[2])):
        at = put(saver, config(), {"messages": ["long " * 20] * 50, "memory": memory(0)})
        values = {"messages": ["long " * 20] * 51, "memory": memory(1)}
        is_postgresql = database_url.startswith("postgresql")
        assert statements(lambda: put(saver, at, values)) <= (1 if is_postgresql else 4), seen
        assert statements(lambda: saver.put_writes(at, [("memory", memory(2)), ("x", 1)], "task")) <= (
            1 if is_postgresql else 4
        ), seen
        assert statements(lambda: saver.get_tuple(config())) <= 3, seen
        for number in range(20):
            put(saver, config(), {"n": number})
        assert statements(lambda: list(saver.list(config(), limit=20))) <= 3, seen


def test_a_listing_by_metadata_searches_once_and_reads_its_threads_together(database_url: str) -> None:
    seen: list[str] = []
    with SQLAlchemySaver.from_url(database_url, cache_bytes=0) as saver:
        for number in range(40):
            at = put(
                saver, config(f"{number % 5}"), {"messages": [f"{number} {'long ' * 20}"] * 2}, user=f"{number % 2}"
            )
            saver.put_writes(at, [("x", number)], "task")
        with before_each_statement(lambda *args: seen.append(args[2])):
            assert len(list(saver.list(None, filter={"user": "nobody"}))) == 0
            assert len(seen) == 1
            assert len(list(saver.list(None, filter={"user": "1"}))) == 20
            assert len(seen) == 1 + 4  # rows, pending writes, lists, and what is in them


def test_a_read_is_its_statement_alone(mysql_url: str) -> None:
    """Counted by the server: no BEGIN, no ROLLBACK, no ping."""
    with SQLAlchemySaver.from_url(mysql_url, engine_options={"pool_size": 1}) as saver:
        put(saver, config(), {"x": 1})
        saver.get_tuple(config())
        asked: list[int] = []

        def ask(connection: Connection, cursor: Any, _: str) -> None:
            cursor.execute("SHOW SESSION STATUS LIKE 'Questions'")
            asked.append(int(cursor.fetchone()[1]))

        with before_each_statement(ask):
            for _ in range(3):
                saver.get_tuple(config())
    # What is asked counts, too.
    assert asked[-1] - asked[0] == 2 * (len(asked) - 1)


def test_nothing_is_held_open_between_the_pages_of_a_listing(postgresql_url: str, look: Sql) -> None:
    open_ones = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
    with SQLAlchemySaver.from_url(postgresql_url) as saver:
        for number in range(3):
            put(saver, config(), {"x": number})
        for _ in saver.list(config()):
            assert look(postgresql_url, open_ones) == [(0,)]


@pytest.mark.parametrize("own_engine", [False, True])
def test_statements_of_a_write_see_what_was_committed_before_each(server_url: str, look: Sql, own_engine: bool) -> None:
    """READ COMMITTED, whatever the engine says: what a lock was waited for is seen once it is granted."""
    url = make_url(server_url)
    engine = create_engine(url, isolation_level="REPEATABLE READ")
    database = Database(engine if own_engine else url, **PLAIN)
    value = text("SELECT value FROM agentmem_settings WHERE LENGTH(name) = 1")

    def work(connection: Connection) -> list[bytes]:
        seen = [connection.execute(value).scalar_one()]
        look(url, "UPDATE agentmem_settings SET value = :new WHERE LENGTH(name) = 1", new=b"after")
        return [*seen, connection.execute(value).scalar_one()]

    database.run(lambda _: None)
    look(url, "INSERT INTO agentmem_settings VALUES (:name, :value)", name=b"n", value=b"before")
    assert [bytes(one) for one in database.run(work, write=True)] == [b"before", b"after"]
    database.close()
    engine.dispose()


def test_a_write_holds_the_lock_of_the_file_from_the_start(path: Path) -> None:
    """Even where the engine begins by itself: a write after a read would fail at once if another came between."""
    engine = create_engine(f"sqlite:///{path}")
    event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    locked = []

    def write_elsewhere(connection: Connection, _: Any, statement: str) -> None:
        if statement.startswith(("SELECT", "INSERT")):
            with closing(sqlite3.connect(path, timeout=0)) as other, pytest.raises(sqlite3.OperationalError) as error:
                other.execute("INSERT INTO agentmem_settings VALUES (x'00', x'00')")
            locked.append(str(error.value))

    with SQLAlchemySaver(engine) as saver:
        saver.setup()
        with before_each_statement(write_elsewhere):
            put(saver, config(), {"x": 1})
    assert set(locked) == {"database is locked"}
    engine.dispose()


def test_sixteen_threads_are_inside_at_once(database_url: str) -> None:
    """No lock of ours but for the writers of a SQLite file: every call waits until all sixteen have begun."""
    writes = not database_url.startswith("sqlite")
    everybody, inside = threading.Barrier(16, timeout=60), threading.local()

    def meet(*_: object) -> None:
        if not getattr(inside, "met", False):
            inside.met = True
            everybody.wait()

    with (
        SQLAlchemySaver.from_url(database_url, engine_options={"pool_size": 16}) as saver,
        ThreadPoolExecutor(16) as threads,
    ):
        put(saver, config(), {"x": 1})
        with before_each_statement(meet):
            list(threads.map(lambda n: put(saver, config(f"{n}")) if writes else saver.get_tuple(config()), range(16)))
        assert len(list(saver.list(None))) == (17 if writes else 1)


@pytest.mark.parametrize("options", [{}, {"pool_size": 1, "pool_timeout": 20}, {"poolclass": NullPool}], ids=str)
def test_more_threads_than_connections(path: Path, options: dict[str, Any]) -> None:
    """Nobody waits for a connection that no one uses, whoever set the pool up."""
    with (
        SQLAlchemySaver.from_url(f"sqlite:///{path}", engine_options=options) as saver,
        ThreadPoolExecutor(24) as threads,
    ):
        made = list(threads.map(lambda number: put(saver, config(f"{number}"), {"x": number}), range(48)))
        found = list(threads.map(saver.get_tuple, made))
        assert [one.checkpoint["channel_values"]["x"] for one in found if one is not None] == list(range(48))


def test_who_finds_no_connection_is_told(postgresql_url: str) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    with SQLAlchemySaver.from_url(postgresql_url, engine_options=options) as saver:
        saver.setup()
        with (
            before_each_statement(lambda *_: saver.get_tuple(config())),
            pytest.raises(StorageError, match="pool_size"),
        ):
            put(saver, config())


def test_options_for_the_engine_are_passed_on_but_for_the_isolation_level(url: str) -> None:
    with pytest.raises(StorageError, match=r"'isolation_level'.*leave it out"):
        SQLAlchemySaver.from_url(url, engine_options={"isolation_level": "SERIALIZABLE"})
    for wrong in ({"no_such_option": 1}, {"pool_size": "many"}):
        with pytest.raises(StorageError, match=r"cannot use the options of sqlite.*, or engine_options"):
            SQLAlchemySaver.from_url(url, engine_options=wrong)
    for bad in (5, ["pool_size"], {"connect_args": 5}):
        with pytest.raises(ConfigError, match="dicts as `engine_options`"):
            SQLAlchemySaver.from_url(url, engine_options=bad)  # type: ignore[arg-type]


# Errors that the server says to try again after.
LOST = {
    "40001": "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$",
    "40P01": "DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$",
    "1213": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213",
}


@pytest.mark.parametrize("code", LOST)
def test_a_write_that_lost_against_others_is_run_again(request: pytest.FixtureRequest, look: Sql, code: str) -> None:
    """As after a deadlock; and one that always loses is told in the end, and has stored nothing."""
    url = request.getfixturevalue("mysql_url" if code == "1213" else "postgresql_url")
    losses, most = 0, 2

    def lose(_connection: Connection, _cursor: Any, statement: str) -> str | None:
        nonlocal losses
        if "INTO agentmem_checkpoints" not in statement or losses == most:
            return None
        losses += 1
        return LOST[code]

    with SQLAlchemySaver.from_url(url) as saver:
        at = put(saver, config(), {"x": 1})
        with before_each_statement(lose):
            at = put(saver, at, {"x": ["long " * 99] * 2})
            assert losses == 2
            losses, most = 0, 1000
            with pytest.raises(StorageError, match="try again"):
                put(saver, at, {"x": ["longer " * 99] * 3})
            assert 3 < losses < 10
        assert len(list(saver.list(None))) == 2
    assert look(url, "SELECT count(*) FROM agentmem_blobs") == [(5,)]  # two of them witnesses


@pytest.mark.parametrize("write", [False, True])
def test_work_whose_connection_ends_is_run_once_more(
    server_url: str, look: Sql, sessions: Callable[..., int], write: bool
) -> None:
    """In the middle of a transaction, none of which is stored twice."""
    ends, most = 0, 1

    def end(*_: object) -> None:
        nonlocal ends
        if ends < most:
            ends += 1
            sessions(server_url, end=True)

    with SQLAlchemySaver.from_url(server_url) as saver:
        at = put(saver, config(), {"x": 1})
        call: Callable[[], Any] = (lambda: put(saver, at, {"x": 2})) if write else (lambda: saver.get_tuple(at))
        with before_each_statement(end):
            call()
            assert ends == 1
            ends, most = 0, 1000
            with pytest.raises(StorageError, match="lost twice"):
                call()
            assert 2 <= ends <= 4
        assert len(list(saver.list(config()))) == 1 + write


def test_locks_that_are_waited_for_too_long(server_url: str) -> None:
    set_timeout = "SET lock_timeout = '50ms'"
    if server_url.startswith("mysql"):
        set_timeout = "SET innodb_lock_wait_timeout = 0"

    with SQLAlchemySaver.from_url(server_url) as saver:
        put(saver, config(), {"x": 1})
        holder = create_engine(server_url, poolclass=NullPool)
        with holder.begin() as connection:
            connection.exec_driver_sql("SELECT * FROM agentmem_threads FOR UPDATE").all()
            impatient = before_each_statement(lambda _, cursor, __: cursor.execute(set_timeout))
            with impatient, pytest.raises(StorageError, match="lock_timeout"):
                saver.delete_thread("t")
        saver.delete_thread("t")
        assert list(saver.list(None)) == []
