"""What servers do to us: connections ended or cut, no server, no rights, no writes, locks, limits, a lost commit.

What a process knows of a thread must not outlive the thread that it knew.
"""

from __future__ import annotations

import asyncio
import gc
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
from langgraph.checkpoint.serde.types import INTERRUPT
from sqlalchemy import Table, create_engine, make_url
from sqlalchemy.exc import DBAPIError

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver, metadata
from agentmem_sql.engines import advice, check_mysql
from tests.helpers.sql_cases import BACKENDS, NewUrl, Sql, aput, config, get, put, read
from tests.helpers.sql_chains import unaccounted
from tests.helpers.sql_processes import pending, question, values


async def test_connections_that_the_server_ended_are_replaced(server_url: str, sessions: Callable[..., int]) -> None:
    """Idle ones: the next calls of many threads and tasks succeed, and nothing is lost. Closing leaves none."""
    async with SQLAlchemySaver.from_url(server_url) as saver:
        with ThreadPoolExecutor(8) as threads:
            for run in range(2):
                list(threads.map(lambda n, run=run: put(saver, config(f"{run} {n}"), {"x": 1}), range(12)))  # type: ignore[misc]
                assert sessions(server_url, end=True) >= 1
                await asyncio.gather(*(aput(saver, f"{run} task {number}", x=1) for number in range(12)))
                assert sessions(server_url, end=True) >= 1
        assert len(list(saver.list(None))) == 48
    ends = time.monotonic() + 30  # a server takes its time to notice that a client has left
    while sessions(server_url) and time.monotonic() < ends:
        await asyncio.sleep(0.05)
    assert sessions(server_url) == 0


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql"])
def test_servers_that_are_not_there(driver: str) -> None:
    with SQLAlchemySaver.from_url(f"{driver}://u:secret@127.0.0.1:1/x") as saver:
        with pytest.raises(StorageError, match="host and port") as sync:
            saver.setup()
        with pytest.raises(StorageError, match="host and port") as asynchronous:
            asyncio.run(saver.asetup())
    for error in (sync, asynchronous):
        assert "127.0.0.1:1" in str(error.value)
        assert "secret" not in str(error.value)


def test_urls_that_the_server_or_the_driver_refuses(server_url: str) -> None:
    url = make_url(server_url)
    wrong = {
        "user name and password": url.set(username="agentmem_nobody", password="secret"),
        "CREATE DATABASE": url.set(database="agentmem_missing"),
        "no_such_option": url.update_query_dict({"no_such_option": "1"}),
    }
    for message, bad in wrong.items():
        with SQLAlchemySaver.from_url(bad) as saver, pytest.raises(StorageError, match=message) as error:
            saver.setup()
        assert "secret" not in str(error.value)


def test_a_user_without_rights_is_told_which(new_url: NewUrl, look: Sql) -> None:
    url = make_url(new_url("postgresql"))
    role = f"agentmem_guest_{url.database}"
    look(url, f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 1")
    try:
        with SQLAlchemySaver.from_url(url.set(username=role)) as saver:
            with pytest.raises(StorageError, match="grant CREATE on the schema"):
                saver.setup()
            look(url, f"GRANT CREATE ON SCHEMA public TO {role}")
            put(saver, config(), {"x": 1})
            with (
                SQLAlchemySaver.from_url(url.set(username=role)) as other,
                pytest.raises(StorageError, match="max_connections"),
            ):
                other.setup()
    finally:
        look(url, f"DROP OWNED BY {role}")
        look(url, f"DROP ROLE {role}")


def test_values_larger_than_the_server_takes(mysql_url: str, look: Sql) -> None:
    """Values of channels are stored in parts, metadata is not."""
    (limit,) = look(mysql_url, "SELECT @@max_allowed_packet")[0]
    with SQLAlchemySaver.from_url(mysql_url) as saver:
        with pytest.raises(StorageError, match="max_allowed_packet"):
            put(saver, config(), {"x": 1}, note="x" * limit)
        assert list(saver.list(None)) == []


# A line to the server that is cut: the call that meets it succeeds all the same, and is done once.


class Proxy:
    """Forwards connections to a server.

    A message is what a client sends before it waits for an answer. They are counted from 0 over all connections.

    Attributes:
        port: on 127.0.0.1.
        messages: how many there were.
        cut_at: the message at which its connection is cut, once; None for none.
        after: whether the server still gets that message, and only its answer is lost.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self.messages = 0
        self.cut_at: int | None = None
        self.after = False
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Stop listening, and wait until both ends have closed every connection."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._forward, args=(client,)))
                self._threads[-1].start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server, suppress(OSError):
            asking = cutting = False
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(2**16)
                    if source is client and not asking:
                        cutting = self.messages == self.cut_at
                        self.messages += 1
                    asking = source is client
                    if not data or (cutting and (source is server or not self.after)):
                        self.cut_at = None if cutting else self.cut_at
                        return
                    (server if asking else client).sendall(data)


@pytest.fixture
def line(server_url: str) -> Iterator[Proxy]:
    """The line to the server."""
    url = make_url(server_url)
    opened = Proxy((url.host or "127.0.0.1", url.port or {"postgresql": 5432, "mysql": 3306}[url.get_backend_name()]))
    yield opened
    opened.close()


def converse(saver: SQLAlchemySaver, step: int) -> None:
    """Store, replace, read, and delete; what is read at the end is what was stored, once."""
    at = put(saver, config(), values(step))
    saver.put_writes(at, pending(step), "task")
    for number in range(2):
        saver.put_writes(at, [(INTERRUPT, question(step, number))], "asking")
    put(saver, config(f"new {step}"), values(step))
    saver.delete_thread(f"new {step}")
    found = get(saver, at)
    assert found.checkpoint["channel_values"] == values(step)
    assert found.pending_writes == [
        ("asking", INTERRUPT, question(step, 1)),
        *(("task", channel, value) for channel, value in pending(step)),
    ]


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_line_that_is_cut_in_the_middle_of_calls(server_url: str, line: Proxy, look: Sql, every: int) -> None:
    """Converse, and again, with the line cut at one message after the other.

    Before the message reaches the server or, every other time, after it did, so that only the answer is lost.
    """
    with SQLAlchemySaver.from_url(make_url(server_url).set(host="127.0.0.1", port=line.port)) as saver:
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
    ask = partial(look, server_url)
    assert cuts > len(numbers) - 3  # a new connection prepares a statement again: the last messages may not come
    assert ask("SELECT count(*) FROM agentmem_threads") == [(1,)]
    assert ask("SELECT count(*) FROM agentmem_checkpoints") == [(3 + len(numbers),)]
    assert unaccounted(ask) == (set(), set())


# Databases that are not what they were.


def messages(count: int, of: str = "a") -> list[str]:
    """Too long to be stored in their list."""
    return [f"{of} {number} ".ljust(300, ".") for number in range(count)]


def newest(url: str) -> list[str]:
    """What a process that knows nothing reads."""
    with SQLAlchemySaver.from_url(url) as fresh:
        found: list[str] = read(fresh, config())["messages"]
        return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_that_are_made_anew_under_a_saver(new_url: NewUrl, backend: str) -> None:
    database_url = new_url(backend)
    with SQLAlchemySaver.from_url(database_url) as saver:
        at = put(saver, config(), {"messages": messages(30)})
        engine = create_engine(database_url)
        metadata().drop_all(engine)
        engine.dispose()
        with SQLAlchemySaver.from_url(database_url) as other:
            put(other, config(), {"messages": messages(1, "b")})
        put(saver, at, {"messages": messages(31)})
    assert newest(database_url) == messages(31)


def test_a_server_that_has_lost_the_last_commit(postgresql_url: str, look: Sql, sessions: Callable[..., int]) -> None:
    url = postgresql_url
    with SQLAlchemySaver.from_url(url) as saver:
        at = put(saver, config(), {"messages": messages(2)})
        before = look(url, "SELECT digest FROM agentmem_blobs")
        put(saver, at, {"messages": messages(30)})
        # What a replica that takes over has: all but the last commit. The connections to the primary are gone.
        look(url, "DELETE FROM agentmem_checkpoints WHERE id > :id", id=at["configurable"]["checkpoint_id"].encode())
        kept = ", ".join(f"'\\x{bytes(digest).hex()}'" for (digest,) in before)
        look(url, f"DELETE FROM agentmem_blobs WHERE digest NOT IN ({kept})")
        sessions(url, end=True)
        put(saver, at, {"messages": messages(5)})
    assert newest(url) == messages(5)


def test_closed_savers_leave_nothing_behind(url: str) -> None:
    def tables() -> int:
        gc.collect()
        return sum(type(one) is Table for one in gc.get_objects())

    def use() -> None:
        with SQLAlchemySaver.from_url(url) as saver:
            at = put(saver, config(), {"x": 1})
            saver.put_writes(at, [("x", 2)], "task")
            saver.get_tuple(config())

    use()
    before = tables()
    for _ in range(5):
        use()
    assert tables() <= before


def test_columns_that_are_altered_under_prepared_statements(new_url: NewUrl, look: Sql) -> None:
    url = new_url("postgresql")
    with SQLAlchemySaver.from_url(url, cache_bytes=0) as saver:
        put(saver, config(), {"messages": messages(3)})
        saver.get_tuple(config())
        look(url, "ALTER TABLE agentmem_threads ALTER COLUMN epoch TYPE numeric(18)")
        look(url, "ALTER TABLE agentmem_blobs ALTER COLUMN kind TYPE bigint")
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
                found = get(saver, at)
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


def test_a_server_that_would_log_statements_is_refused() -> None:
    """Its setting cannot be changed in a test, so what it answers is made up."""

    def answering(log: int, log_format: str) -> Any:
        connection = Mock()
        connection.exec_driver_sql.return_value.one.return_value = (log, log_format, "STRICT_TRANS_TABLES")
        return connection

    check_mysql(answering(0, "STATEMENT"))
    check_mysql(answering(1, "ROW"))
    with pytest.raises(StorageError, match=r"binlog_format=STATEMENT.*ROW or MIXED"):
        check_mysql(answering(1, "STATEMENT"))


def test_a_pooler_that_mixes_up_prepared_statements_is_explained() -> None:
    class DuplicatePreparedStatement(Exception):
        sqlstate = "42P05"

    error = DBAPIError("INSERT", {}, DuplicatePreparedStatement('prepared statement "_pg3_0" already exists'))
    assert "'prepare_threshold': None" in advice(error)
