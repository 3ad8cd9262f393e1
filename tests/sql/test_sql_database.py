"""Transactions: what a write and a read are, on each database; pools, retries, and inserts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, NullPool, create_engine, make_url, text
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.schema import CreateTable

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.database import Database
from agentmem_sql.statements import add_rows, insert_missing, upsert
from tests.helpers.sql_cases import BACKENDS, SERVERS, TABLES, add, change, config, names, put, value

Sql = Callable[..., list[Any]]
NewUrl = Callable[[str], str]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url, tables=TABLES)
    yield opened
    opened.close()


def test_a_write_is_stored_whole_or_not_at_all(database: Database) -> None:
    """An exception of the work comes out as it is, and nothing of the work stays."""

    def fail(connection: Connection) -> None:
        add(b"lost")(connection)
        raise LookupError("mine")

    for _ in range(2):  # the connection that went back to the pool is fit for use
        with pytest.raises(LookupError, match="mine"):
            database.run(fail, write=True)
    database.run(add(b"kept"), write=True)
    assert database.run(names) == [b"kept"]


def test_a_statement_that_fails_stores_nothing(database: Database) -> None:
    def twice(connection: Connection) -> None:
        add(b"a")(connection)
        add(b"a")(connection)

    for _ in range(2):
        with pytest.raises(StorageError, match=r"(?i)unique|duplicate"):
            database.run(twice, write=True)
    assert database.run(names) == []


@pytest.mark.parametrize("own_engine", [False, True])
@pytest.mark.parametrize("backend", SERVERS)
def test_statements_of_a_write_see_what_was_committed_before_each(
    new_url: NewUrl, look: Sql, backend: str, own_engine: bool
) -> None:
    """READ COMMITTED, whatever the engine says: what a lock was waited for is seen once it is granted."""
    url = make_url(new_url(backend))
    if backend == "postgresql":
        look(url, f"ALTER DATABASE {url.database} SET default_transaction_isolation = 'repeatable read'")
    other = Database(url, tables=TABLES)
    other.run(add(b"n", b"before"), write=True)
    engine = create_engine(url, isolation_level="REPEATABLE READ")
    database = Database(engine if own_engine else url, tables=TABLES)

    def work(connection: Connection) -> list[bytes]:
        seen = [value(connection, b"n")]
        with ThreadPoolExecutor(1) as thread:
            thread.submit(other.run, change(b"n", b"after"), write=True).result()
        return [*seen, value(connection, b"n")]

    assert database.run(work, write=True) == [b"before", b"after"]
    database.close()
    other.close()
    engine.dispose()


def test_a_read_is_one_statement(mysql_url: str) -> None:
    """Counted by the server: no BEGIN, no ROLLBACK, no ping."""

    def questions(connection: Connection) -> int:
        return int(connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Questions'").one()[1])

    database = Database(mysql_url, tables=TABLES, engine_options={"pool_size": 1})
    first = database.run(questions)
    assert [database.run(questions) for _ in range(3)] == [first + 1, first + 2, first + 3]
    database.close()


def test_a_read_holds_no_transaction(postgresql_url: str) -> None:
    database = Database(postgresql_url, tables=TABLES)

    def transaction(connection: Connection) -> bool:
        statement = "SELECT pg_current_xact_id_if_assigned() IS NULL, now() FROM pg_sleep(0.001)"
        return bool(connection.exec_driver_sql(statement).one()[1] == connection.exec_driver_sql(statement).one()[1])

    for _ in range(2):  # a write in between leaves no mode behind
        assert not database.run(transaction)
        assert database.run(transaction, write=True)
    database.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_threads_are_inside_at_once(new_url: NewUrl, backend: str) -> None:
    """No lock of ours but for the writers of a SQLite file: every work waits until all sixteen have begun."""
    database = Database(new_url(backend), tables=TABLES)
    everybody = threading.Barrier(16, timeout=30)

    def run(number: int) -> None:
        def work(connection: Connection) -> None:
            names(connection)
            everybody.wait()
            if backend != "sqlite":
                add(b"%d" % number)(connection)

        database.run(work, write=backend != "sqlite")

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(run, range(16)))
    assert len(database.run(names)) == (0 if backend == "sqlite" else 16)
    database.close()


@pytest.mark.parametrize("backend", SERVERS)
def test_who_finds_no_connection_is_told(new_url: NewUrl, backend: str) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    database = Database(new_url(backend), tables=TABLES, engine_options=options)
    with pytest.raises(StorageError, match="pool_size"):
        database.run(lambda _: database.run(names))
    database.close()


def test_options_for_the_engine_are_passed_on_but_for_the_isolation_level(url: str) -> None:
    with pytest.raises(StorageError, match=r"'isolation_level'.*leave it out"):
        SQLAlchemySaver.from_url(url, engine_options={"isolation_level": "SERIALIZABLE"})
    with pytest.raises(TypeError, match="no_such_option"):
        SQLAlchemySaver.from_url(url, engine_options={"no_such_option": 1}).setup()
    for options in ({"poolclass": NullPool}, {"pool_size": 1, "echo": False}):
        with SQLAlchemySaver.from_url(url, engine_options=options) as saver:
            put(saver, config(), {"x": 1})


@pytest.mark.parametrize("backend", SERVERS)
def test_deadlocks_are_run_again(new_url: NewUrl, backend: str) -> None:
    database = Database(new_url(backend), tables=TABLES)
    for name in (b"a", b"b"):
        database.run(add(name), write=True)
    both_have_one = threading.Barrier(2)
    runs = []

    def cross(first: bytes, second: bytes) -> None:
        def work(connection: Connection) -> None:
            runs.append(first)
            change(first, first)(connection)
            if len(runs) <= 2:
                both_have_one.wait(10)
            change(second, first)(connection)

        database.run(work, write=True)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(cross, (b"a", b"b"), (b"b", b"a")))
    assert len(runs) == 3
    assert database.run(lambda c: value(c, b"a")) == database.run(lambda c: value(c, b"b"))
    database.close()


@pytest.mark.parametrize(
    ("backend", "lost"),
    [
        ("postgresql", "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"),
        ("mysql", "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213"),
    ],
)
def test_who_always_loses_is_told_in_the_end(new_url: NewUrl, backend: str, lost: str) -> None:
    database = Database(new_url(backend), tables=TABLES)
    runs = []

    def work(connection: Connection) -> None:
        runs.append(1)
        add(b"%d" % len(runs))(connection)
        if always or len(runs) < 3:
            connection.exec_driver_sql(lost)

    always = True
    with pytest.raises(StorageError, match="try again"):
        database.run(work, write=True)
    assert 3 < len(runs) < 10
    assert database.run(names) == []
    always = False
    runs.clear()
    database.run(work, write=True)
    assert database.run(names) == [b"3"]
    database.close()


@pytest.mark.parametrize("dialect", [postgresql.dialect(), mysql.dialect()], ids=["postgresql", "mysql"])
def test_tables_fit_the_other_databases(dialect: Any) -> None:
    """No text, and no key over MySQL's 3,072 bytes or PostgreSQL's 2,704; there is no server in this test."""
    sizes = {"BIGINT": 8, "INTEGER": 4, "SMALLINT": 2, "BINARY(32)": 32, "VARBINARY(128)": 128}
    for table in TABLES.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))
        columns = {column.name: column.type.compile(mysql.dialect()) for column in table.columns}
        assert not any("CHAR" in kind or "TEXT" in kind for kind in columns.values())
        assert sum(sizes[columns[column.name]] for column in table.primary_key) <= 600


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "mysql"])
def test_inserts_speak_each_database(name: str) -> None:
    dialect = {"sqlite": sqlite.dialect(), "postgresql": postgresql.dialect(), "mysql": mysql.dialect()}[name]
    kept = str(insert_missing(name, TABLES.blobs).compile(dialect=dialect))
    replaced = str(upsert(name, TABLES.blobs).compile(dialect=dialect))
    if name == "mysql":
        assert kept.endswith("ON DUPLICATE KEY UPDATE thread = agentmem_blobs.thread")
        assert "IGNORE" not in kept
        assert "ON DUPLICATE KEY UPDATE kind = VALUES(kind), body = VALUES(body)" in replaced
    else:
        assert kept.endswith("ON CONFLICT DO NOTHING")
        assert "ON CONFLICT (thread, digest) DO UPDATE SET kind = excluded.kind, body = excluded.body" in replaced


def test_rows_are_added_kept_and_replaced(database: Database) -> None:
    def work(connection: Connection, text: bytes, *, replace: bool) -> None:
        rows = [{"name": b"%d" % number, "value": text} for number in range(1200)]
        add_rows(connection, TABLES.settings, rows, replace=replace)

    for text_, replace, expected in ((b"a", False, b"a"), (b"b", False, b"a"), (b"c", True, b"c")):
        database.run(lambda c, t=text_, r=replace: work(c, t, replace=r), write=True)  # type: ignore[misc]
        assert database.run(lambda connection: value(connection, b"1199")) == expected
    assert len(database.run(names)) == 1200


def test_values_too_long_for_a_column_are_refused_even_where_the_server_would_cut_them(mysql_url: str) -> None:
    lax = {"connect_args": {"init_command": "SET SESSION sql_mode = ''"}}
    database = Database(mysql_url, tables=TABLES, engine_options=lax)
    with pytest.raises(StorageError, match="too long"):
        database.run(add(b"x" * 200), write=True)
    database.close()


def test_text_statement_errors_hide_what_was_bound(database: Database) -> None:
    def work(connection: Connection) -> None:
        connection.execute(text("INSERT INTO agentmem_nowhere VALUES (:x)"), {"x": "a secret"})

    with pytest.raises(StorageError) as error:
        database.run(work, write=True)
    assert "a secret" not in f"{error.value} {error.value.__cause__}"
