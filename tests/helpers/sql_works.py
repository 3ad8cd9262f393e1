"""Shared by the tests of the database: small works on one table, and a put for tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, insert, select, update

from agentmem_sql import SQLAlchemySaver
from agentmem_sql.database import Database
from agentmem_sql.tables import Tables
from tests.helpers.sql_cases import checkpoint, config

TABLES = Tables()
SERVERS = ("postgresql", "mysql")
BACKENDS = ("sqlite", *SERVERS)


def add(name: bytes, value: bytes = b"") -> Callable[[Connection], None]:
    def work(connection: Connection) -> None:
        connection.execute(insert(TABLES.settings), [{"name": name, "value": value}])

    return work


def change(name: bytes, value: bytes) -> Callable[[Connection], None]:
    def work(connection: Connection) -> None:
        connection.execute(update(TABLES.settings).where(TABLES.settings.c.name == name).values(value=value))

    return work


def names(connection: Connection) -> list[bytes]:
    return sorted(connection.execute(select(TABLES.settings.c.name)).scalars())


def value(connection: Connection, name: bytes) -> bytes:
    return connection.execute(select(TABLES.settings.c.value).where(TABLES.settings.c.name == name)).scalar_one()


def both(database: Database, work: Callable[[Connection], Any], *, write: bool = False) -> list[Any]:
    """What work gives in the synchronous mode and in the asynchronous one."""
    return [database.run(work, write=write), asyncio.run(database.arun(work, write=write))]


async def aput(saver: SQLAlchemySaver, thread: str, **values: Any) -> Any:
    made = checkpoint(values, saver.get_next_version(None, None))
    return await saver.aput(config(thread), made, {}, made["channel_versions"])
