"""Databases that are not what they were: tables made anew, commits lost in a failover, prepared statements forgotten.

What a process knows of a thread must not outlive the thread that it knew.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Table, create_engine, event, make_url, text

from agentmem_sql import SQLAlchemySaver, metadata
from tests.helpers.sql_cases import checkpoint, config, put

NewUrl = Callable[[str], str]
Sql = Callable[..., list[Any]]


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
        found = saver.get_tuple(config())
        assert found is not None
        put(saver, found.config, {"messages": messages(4)})
    assert newest(url) == messages(4)


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg"])
async def test_the_same_for_a_task(new_url: NewUrl, driver: str) -> None:
    url = new_url(driver)
    async with SQLAlchemySaver.from_url(url, cache_bytes=0) as saver:
        made = checkpoint({"messages": messages(3)})
        await saver.aput(config(), made, {"source": "loop", "step": 0}, made["channel_versions"])
        for _ in range(2):
            assert await saver.aget_tuple(config()) is not None
        alter(url)
        for _ in range(2):
            assert await saver.aget_tuple(config()) is not None
