"""Versions of the tables: how they come about, several processes at once, failures, and Alembic."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata, produce_migrations, render_python_code
from alembic.migration import MigrationContext
from alembic.operations import Operations
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from sqlalchemy import Connection, NullPool, create_engine, inspect

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.database import Database
from agentmem_sql.migrations import MIGRATIONS, Migration
from agentmem_sql.protection import Protection
from agentmem_sql.schema import Tables, metadata
from agentmem_sql.statements import add_rows
from tests.helpers.sql_cases import config, finish, put, start_child

Sql = Callable[..., list[Any]]
NewUrl = Callable[[str], str]

CURRENT = MIGRATIONS[-1].number

START = """
import os, sys, traceback
from agentmem_sql import SQLAlchemySaver

def start(url):
    ready, go = os.pipe()
    children = []
    for _ in range(6):
        child = os.fork()
        if not child:
            os.close(go)
            os.read(ready, 1)  # until the parent closes its end
            with SQLAlchemySaver.from_url(url) as saver:
                saver.setup()
            os._exit(0)
        children.append(child)
    os.close(go)
    return [os.waitpid(child, 0)[1] for child in children]

print([start(url) for url in sys.argv[1:]])
"""


def test_six_processes_that_start_together_make_the_tables_once(new_url: NewUrl, look: Sql) -> None:
    """The processes are forks of one that has imported all but opened nothing, so that they start at one moment."""
    urls = [new_url(backend) for backend in ("sqlite", "postgresql", "mysql")]
    assert finish(start_child(*urls, code=START)) == str([[0] * 6] * 3)
    for url in urls:
        assert look(url, "SELECT version FROM agentmem_schema_versions") == [(CURRENT,)]


def test_a_migration_that_fails_is_taken_up_again(database_url: str, ask: Sql) -> None:
    """What was done before it stays, nothing of it is seen as done, and the next call begins with it."""
    fails = [True]

    def add(connection: Connection, tables: Tables) -> None:
        name = f"{tables.prefix}extra"
        if not inspect(connection).has_table(name):
            connection.exec_driver_sql(f"CREATE TABLE {name} (x INTEGER)")
        if fails:
            raise RuntimeError("half-way")

    more = (*MIGRATIONS, Migration(CURRENT + 1, "one more table", add))
    with SQLAlchemySaver.from_url(database_url) as saver:
        put(saver, config(), {"x": 1})
    database = Database(database_url, tables=Tables(), migrations=more)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half-way"):
            database.run(lambda _: None)
    assert ask("SELECT version FROM agentmem_schema_versions") == [(CURRENT,)]
    with SQLAlchemySaver.from_url(database_url) as saver:
        assert saver.get_tuple(config()) is not None

    fails.clear()
    database.run(lambda _: None)
    database.close()
    assert sorted(ask("SELECT version FROM agentmem_schema_versions")) == [(CURRENT,), (CURRENT + 1,)]
    assert ask("SELECT * FROM agentmem_extra") == []


def test_several_migrations_are_done_in_their_order(database_url: str, ask: Sql) -> None:
    done = []
    more = tuple(
        Migration(CURRENT + number, "", lambda _connection, _tables, number=number: done.append(number))  # type: ignore[misc]
        for number in (1, 2, 5)
    )
    for _ in range(2):
        database = Database(database_url, tables=Tables(), migrations=(*MIGRATIONS, *more))
        database.run(lambda _: None)
        database.close()
    assert done == [1, 2, 5]
    assert len(ask("SELECT version FROM agentmem_schema_versions")) == 4


@pytest.mark.parametrize(("version", "message"), [(CURRENT + 1, "upgrade agentmem-delta"), (1, "drop the tables")])
def test_other_versions_are_refused_and_left_alone(database_url: str, ask: Sql, version: int, message: str) -> None:
    with SQLAlchemySaver.from_url(database_url) as saver:
        put(saver, config(), {"x": 1})
    if version == 1:
        ask("DELETE FROM agentmem_schema_versions")
    ask("INSERT INTO agentmem_schema_versions VALUES (:version)", version=version)
    with SQLAlchemySaver.from_url(database_url) as other:
        for call in (other.setup, lambda: other.get_tuple(config()), lambda: put(other, config("new"))):
            with pytest.raises(StorageError, match=f"found version {version}.*{message}"):
                call()
        with pytest.raises(StorageError, match=message):
            asyncio.run(other.asetup())
    assert ask("SELECT name FROM agentmem_threads") == [(b"t",)]


def test_protection_is_settled_after_the_tables_and_until_it_succeeds(database_url: str, ask: Sql) -> None:
    calls = []

    class Failing(Protection):
        def settle(self, connection: Connection, tables: Tables) -> None:
            calls.append(1)
            add_rows(connection, tables.settings, [{"name": b"n", "value": b"%d" % len(calls)}], replace=False)
            if len(calls) < 3:
                raise LookupError("not yet")

    database = Database(database_url, tables=Tables(), protection=Failing(JsonPlusSerializer(), None))
    with pytest.raises(LookupError):
        database.run(lambda _: pytest.fail("this comes first"))
    with pytest.raises(LookupError):
        database.run(lambda _: pytest.fail("this comes first"))
    for _ in range(2):
        database.run(lambda connection: connection.exec_driver_sql("SELECT 1").all())
    database.close()
    assert len(calls) == 3
    assert ask("SELECT value FROM agentmem_settings") == [(b"3",)]


def test_two_prefixes_live_beside_each_other(database_url: str) -> None:
    with (
        SQLAlchemySaver.from_url(database_url, table_prefix="a_") as one,
        SQLAlchemySaver.from_url(database_url, table_prefix="b_") as two,
    ):
        at = put(one, config(), {"x": 1})
        assert two.get_tuple(at) is None
        put(two, config(), {"x": 2})
        assert len(list(one.list(None))) == 1


@pytest.fixture
def context(database_url: str) -> Any:
    """Alembic's view of the database."""
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.connect() as connection:
        yield MigrationContext.configure(connection, opts={"compare_type": True, "target_metadata": metadata()})


def test_alembic_finds_the_tables_as_the_metadata_says(database_url: str, context: MigrationContext) -> None:
    with SQLAlchemySaver.from_url(database_url) as saver:
        saver.setup()
    assert compare_metadata(context, metadata()) == []


def test_alembic_can_make_the_tables_itself(database_url: str, context: MigrationContext, ask: Sql) -> None:
    """Autogenerated for an empty database, what it renders runs and makes the same tables."""
    upgrade = produce_migrations(context, metadata()).upgrade_ops
    assert upgrade is not None
    code = "def upgrade():\n    " + render_python_code(upgrade, migration_context=context).replace("\n", "\n    ")
    names: dict[str, Any] = {"sa": sqlalchemy, "op": Operations(context)}
    exec(_with_imports(code), names)
    names["upgrade"]()
    assert compare_metadata(context, metadata()) == []
    assert context.connection is not None
    context.connection.commit()
    ask("INSERT INTO agentmem_schema_versions VALUES (:version)", version=CURRENT)
    with SQLAlchemySaver.from_url(database_url) as saver:
        at = put(saver, config(), {"x": b"x" * 100_000})
        assert saver.get_tuple(at) is not None


def _with_imports(code: str) -> str:
    return "from sqlalchemy.dialects import mysql\n" + code


def test_the_metadata_can_be_given_a_schema_and_a_prefix() -> None:
    names = {table.fullname for table in metadata(prefix="x_", schema="s").sorted_tables}
    assert "s.x_threads" in names
    assert all(name.startswith("s.x_") for name in names)
