"""A database, and transactions on it from threads and from tasks.

Work is always a function of a synchronous SQLAlchemy ``Connection``. ``run`` calls it on the synchronous driver,
``arun`` on the asynchronous one, in a greenlet: what it does is written once. A write is one transaction, committed
when the function returns and rolled back when it raises; a read has none (see ``transactions``). Work may be run
more than once (see ``retries``), so it must leave nothing behind but what it stores and returns.

Threads and tasks of any event loop use one object together. Servers see to their own locks. On a SQLite file the
writers of a process take turns (see ``gate``) and readers go on beside them. A database in memory is shared by both
drivers through SQLite's ``memdb`` file system, lives until ``close`` and has no write-ahead log, so there readers
take turns too.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool, StaticPool
from sqlalchemy.util import greenlet_spawn

from agentmem.errors import StorageError
from agentmem_sql import dialects, faults, inflight
from agentmem_sql.drivers import drivers, is_memory, parse, spelled
from agentmem_sql.engines import Engines
from agentmem_sql.gate import Gate, gate_of
from agentmem_sql.migrations import MIGRATIONS, Migration, alone, is_current, migrate
from agentmem_sql.retries import Retries
from agentmem_sql.tables import Tables
from agentmem_sql.transactions import Transactions, Work, connect

T = TypeVar("T")

_gates: WeakKeyDictionary[Pool, Gate] = WeakKeyDictionary()


class Database:
    """One database by both of its drivers. Thread-safe, and tied to no event loop."""

    def __init__(
        self,
        engine: Engine | AsyncEngine | URL | str,
        *,
        tables: Tables,
        synchronous: str = "FULL",
        engine_options: Mapping[str, Any] | None = None,
        prepare: Callable[[Connection], None] | None = None,
        is_prepared: Callable[[Connection], bool] | None = None,
        on_lost: Callable[[], None] | None = None,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> None:
        """Take a URL, or an engine of the caller's, which keeps its settings and is never disposed of.

        Args:
            engine: the database, with or without a driver; the other mode takes the sibling driver.
            tables: the tables that are made, or brought up to date, before the first work.
            synchronous: how SQLite's files are synchronised: OFF, NORMAL, FULL or EXTRA.
            engine_options: more arguments for ``create_engine``, for the engines made here.
            prepare: called in a write transaction once the tables are there, before the first work, by one process
                and one thread at a time; where the database takes no writes, as a read. If it raises, the next call
                begins with it again. First calls that come at the same time may each call it.
            is_prepared: asked before, as a read, whether ``prepare`` is needed at all: who only reads waits for no
                writer then.
            on_lost: called when a connection turns out to be lost, before anything is run again.
            migrations: what makes the tables.

        Raises:
            StorageError: the URL cannot be read or names a database that cannot be used here.
        """
        self.tables = tables
        self._given = None if isinstance(engine, str | URL) else engine
        self._url = parse(engine.url if isinstance(engine, Engine | AsyncEngine) else engine)
        self._in_memory = is_memory(self._url)
        engine_pool = None if self._given is None else self._given.pool
        self._anchor: sqlite3.Connection | None = None
        if self._in_memory:
            self._take_memory()
        pair = drivers(self._url)
        self.backend = pair.backend.name
        self._engines = Engines(pair, self._given, synchronous=synchronous, options=engine_options)
        self._one_connection = self._in_memory or (engine_pool is not None and isinstance(engine_pool, StaticPool))
        self._gate = _gate(self._url, engine_pool, in_memory=self._in_memory)
        self._prepare = prepare
        self._is_prepared = is_prepared
        self._on_lost = on_lost
        self._migrations = migrations
        self._ready = False
        self._closed = False

    def run(self, work: Work[T], *, write: bool = False, single: bool = False) -> T:
        """Do ``work`` in this thread, a write in one transaction; ``single``: the write is one statement.

        Raises:
            StorageError: the database could not be opened or did not take it, or the saver is closed.
            MissingExtraError: the synchronous driver is not installed.
        """
        began, retries = time.monotonic(), None
        while True:
            try:
                self._check_usable(Engine)
                transactions = self._engines.sync()
                if not self._ready:
                    self._in_turn(partial(self._set_up, transactions), write=True)
                return self._in_turn(partial(transactions.way(write=write, single=single), work), write=write)
            except DBAPIError as error:
                retries = retries or Retries(began)
                pause = self._pause(retries, error)
            time.sleep(pause)

    async def arun(self, work: Work[T], *, write: bool = False, single: bool = False) -> T:
        """Do ``work`` in this task, a write in one transaction; ``single``: the write is one statement.

        A task that is cancelled while it waits for its turn does nothing. One that is cancelled later ends
        when its transaction has: cut off in the middle of a statement, the driver's connection would keep the
        database locked for as long as anything holds the exception.

        Raises:
            StorageError: as ``run``; or the engine that was given belongs to another event loop.
            MissingExtraError: the asynchronous driver is not installed.
        """
        began, retries = time.monotonic(), None
        while True:
            try:
                self._check_usable(AsyncEngine)
                transactions = await self._engines.asynchronous()
                if not self._ready:
                    await self._ain_turn(partial(self._set_up, transactions), write=True)
                way = transactions.way(write=write, single=single)
                return await self._ain_turn(partial(way, work), write=write, single=single)
            except DBAPIError as error:
                retries = retries or Retries(began)
                pause = self._pause(retries, error)
            await asyncio.sleep(pause)

    def close(self) -> None:
        """Close every connection that this object opened; from anywhere, any number of times."""
        self._closed = True
        self._engines.close()
        self._drop_memory()

    async def aclose(self) -> None:
        """``close`` for a task."""
        self._closed = True
        await self._engines.aclose()
        self._drop_memory()

    def _set_up(self, transactions: Transactions) -> None:
        """See to the tables and to ``prepare``; doing it again does no harm."""
        if self._ready:  # while this caller waited for its turn
            return
        if self.backend == "sqlite" and self._given is None and not self._in_memory:
            transactions.read(dialects.enable_wal)
        if not transactions.read(lambda connection: is_current(connection, self.tables, self._migrations)):
            with connect(transactions.writer) as connection:
                migrate(connection, self.tables, transactions.write_on, self._migrations)
        if self._prepare is not None and not (self._is_prepared and transactions.read(self._is_prepared)):
            try:
                with connect(transactions.writer) as connection:
                    alone(connection, self.tables, transactions.write_on, self._prepare)
            except DBAPIError as error:
                if not faults.is_read_only(error):
                    raise
                transactions.read(self._prepare)
        self._ready = True

    def _in_turn(self, do: Callable[[], T], *, write: bool) -> T:
        if self._gate is None:
            if write:
                inflight.check_free()
            return do()
        if self._given is not None:
            do = partial(self._alone, do)
        return self._gate.run(do) if write or self._one_connection else do()

    async def _ain_turn(self, do: Callable[[], T], *, write: bool, single: bool = False) -> T:
        if self._gate is None:
            with inflight.writing() if write and not single else nullcontext():
                return await _whole(do)
        whole = partial(_whole, partial(self._alone, do))
        return await (self._gate.arun(whole) if write or self._one_connection else whole())

    def _alone(self, do: Callable[[], T]) -> T:
        """Do something unless the only connection there is is in a transaction of the caller's."""
        if self._given is not None and isinstance(self._given.pool, StaticPool):
            record = vars(self._given.pool).get("connection")  # what there is before the first use is nothing
            driver = None if record is None else record.driver_connection
            if getattr(driver, "in_transaction", False):
                raise StorageError(
                    "the engine given to SQLAlchemySaver has one connection (StaticPool), and a transaction of yours "
                    "is open on it, which the saver would end; commit first, or give the saver an engine of its own"
                )
        return do()

    def _check_usable(self, mode: type[Engine] | type[AsyncEngine]) -> None:
        if self._closed:
            raise StorageError("this SQLAlchemySaver is closed; make a new one with from_url(...)")
        if self._in_memory and self._given is not None and not isinstance(self._given, mode):
            raise StorageError(
                "the engine given to SQLAlchemySaver holds its database in memory, where the driver of the "
                "other mode (synchronous or asynchronous) cannot see it; call the engine's own mode, "
                "or use a file or SQLAlchemySaver.from_url('sqlite:///:memory:')"
            )

    def _take_memory(self) -> None:
        """Name a database in memory so that every connection sees it, and hold it open."""
        if self._given is not None:
            if not isinstance(self._given.pool, StaticPool):
                raise StorageError(
                    f"expected an in-memory engine with poolclass=StaticPool, found {type(self._given.pool).__name__}, "
                    "which gives every thread a database of its own; use StaticPool, a file, "
                    "or SQLAlchemySaver.from_url('sqlite:///:memory:')"
                )
            return
        if self._url.query:
            raise StorageError(
                "expected 'sqlite:///:memory:' for a database in memory, "
                f"found the options {dict(self._url.query)}; "
                "remove them, or pass an engine of your own"
            )
        name = f"file:/agentmem-{uuid4().hex}?vfs=memdb"
        self._anchor = sqlite3.connect(name, uri=True, check_same_thread=False)
        self._url = self._url.set(database=name.split("?")[0], query={"vfs": "memdb", "uri": "true"})

    def _drop_memory(self) -> None:
        if self._anchor is not None:
            self._anchor.close()

    def _pause(self, retries: Retries, error: DBAPIError) -> float:
        """How long to wait before the work is run again; raises where it is not."""
        if error.connection_invalidated and self._on_lost is not None:
            self._on_lost()
        pause = retries.pause(error)
        if pause is not None:
            return pause
        where = spelled(self._url)
        message = " ".join(str(error.orig).split())
        raise StorageError(f"the database {where} answered: {message}; {faults.advice(error)}") from error


def _gate(url: URL, pool: Pool | None, *, in_memory: bool) -> Gate | None:
    if url.get_backend_name() != "sqlite":
        return None
    if isinstance(pool, StaticPool):  # whoever uses it uses one connection, and no two at once
        return _gates.setdefault(pool, Gate())
    return Gate() if in_memory else gate_of(str(url.database))


async def _whole(work: Callable[[], T]) -> T:
    """Do work that is not to be cut short, in a greenlet; a cancellation is passed on when it has ended."""
    task = asyncio.create_task(greenlet_spawn(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):  # another one
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen; the caller asked for the cancellation and gets that
        raise
