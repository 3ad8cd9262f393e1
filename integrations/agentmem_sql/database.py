"""The engines behind a saver, and transactions on them from threads and from tasks.

Work is always a function of a synchronous SQLAlchemy ``Connection``. ``run`` calls it on the synchronous
engine, ``arun`` on the asynchronous one by ``run_sync``: what it does is written once. It is one transaction,
committed when the function returns and rolled back when it raises. Both engines come from one URL (or from
the one engine that was given) and are made when first needed.

On a SQLite file the writers of a process take turns (see ``gate``) and readers go on beside them. A database
in memory is shared by both engines through SQLite's ``memdb`` file system, lives until ``close`` and has no
write-ahead log, so there readers take turns too.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, StaticPool
from sqlalchemy.util import queue

from agentmem.errors import MissingExtraError, StorageError
from agentmem_sql import dialects, migrations
from agentmem_sql.gate import Gate, gate_of

T = TypeVar("T")
Work = Callable[[Connection], T]

# Idle connections kept per engine. There is no upper limit to those in use, so that nobody waits for one: a
# wait in the pool would tie an asyncio pool to the loop of its first waiter.
_POOL_SIZE = 5


class _AnyLoopPool(AsyncAdaptedQueuePool):
    """The asyncio pool with the thread-safe queue, so that loops in several threads may share it."""

    _queue_class: type[queue.QueueCommon[ConnectionPoolEntry]] = queue.Queue


class Database:
    """Two engines for one database. Thread-safe, and tied to no event loop."""

    def __init__(self, engine: Engine | AsyncEngine | URL | str) -> None:
        """Take a URL, or an engine of the caller's, which keeps its settings and is never disposed of.

        Raises:
            StorageError: the URL cannot be read or names a database that cannot be used here.
        """
        self._given = None if isinstance(engine, str | URL) else engine
        self._sync = engine if isinstance(engine, Engine) else None
        self._async = engine if isinstance(engine, AsyncEngine) else None
        self._url = engine.url if isinstance(engine, Engine | AsyncEngine) else _parse(engine)
        self._drivers = dialects.drivers(self._url)
        self._in_memory = dialects.is_memory(self._url)
        self._anchor: sqlite3.Connection | None = None
        if self._in_memory:
            self._take_memory()
        self._gate = Gate() if self._in_memory else gate_of(str(self._url.database))
        self._making = threading.Lock()
        self._ready = False
        self._closed = False

    def run(self, work: Work[T], *, write: bool = False) -> T:
        """Do ``work`` in one transaction, in this thread.

        Raises:
            StorageError: the database could not be opened or did not take it, or the saver is closed.
        """
        with self._typed_errors():
            if not self._ready:
                with self._gate.hold(), self._sync_engine().connect() as connection:
                    self._prepare(connection)
            with self._turn(write=write), self._sync_engine().connect() as connection:
                return _transaction(connection, work, write)

    async def arun(self, work: Work[T], *, write: bool = False) -> T:
        """Do ``work`` in one transaction, in this task.

        A task that is cancelled while it waits for its turn does nothing. One that is cancelled later ends
        when its transaction has: cut off in the middle of a statement, the driver's connection would keep the
        database locked for as long as anything holds the exception.

        Raises:
            StorageError: as ``run``.
            MissingExtraError: the asynchronous driver is not installed.
        """
        with self._typed_errors():
            if not self._ready:
                async with self._gate.ahold():
                    await _whole(self._connected(self._prepare))
            async with self._aturn(write=write):
                return await _whole(self._connected(partial(_transaction, work=work, write=write)))

    async def _connected(self, act: Work[T]) -> T:
        async with self._async_engine().connect() as connection:
            return await connection.run_sync(act)

    def close(self) -> None:
        """Close every connection that this object opened; from anywhere, any number of times."""
        self._closed = True
        made = None if self._async is self._given else self._async
        if made is not None:
            # Closing needs some loop, not the one that opened; the caller's thread may have a running one.
            with ThreadPoolExecutor(max_workers=1) as thread:
                thread.submit(asyncio.run, made.dispose()).result()
        self._close_sync()

    async def aclose(self) -> None:
        """``close`` for a task."""
        self._closed = True
        if self._async is not None and self._async is not self._given:
            await self._async.dispose()
        await asyncio.to_thread(self._close_sync)

    def _close_sync(self) -> None:
        if self._sync is not None and self._sync is not self._given:
            self._sync.dispose()
        if self._anchor is not None:
            self._anchor.close()

    def _prepare(self, connection: Connection) -> None:
        """See to the tables before the first transaction; doing it again does no harm."""
        if self._given is None and not self._in_memory:
            dialects.enable_wal(connection)
            connection.rollback()
        if not _transaction(connection, migrations.is_current, False):
            _transaction(connection, migrations.migrate, True)
        self._ready = True

    def _turn(self, *, write: bool) -> AbstractContextManager[None]:
        return self._gate.hold() if write or self._in_memory else nullcontext()

    def _aturn(self, *, write: bool) -> AbstractAsyncContextManager[None]:
        return self._gate.ahold() if write or self._in_memory else nullcontext()

    def _sync_engine(self) -> Engine:
        with self._making:
            self._check_usable(self._sync)
            if self._sync is None:
                url = self._url.set(drivername=self._drivers.sync)
                self._sync = create_engine(url, pool_size=_POOL_SIZE, max_overflow=-1, hide_parameters=True)
                event.listen(self._sync, "connect", dialects.tune_connection)
            return self._sync

    def _async_engine(self) -> AsyncEngine:
        with self._making:
            self._check_usable(self._async)
            if self._async is None:
                url = self._url.set(drivername=self._drivers.asynchronous)
                try:
                    self._async = create_async_engine(
                        url,
                        poolclass=_AnyLoopPool,
                        pool_size=_POOL_SIZE,
                        max_overflow=-1,
                        hide_parameters=True,
                    )
                except ModuleNotFoundError as error:
                    raise MissingExtraError(error.name or "aiosqlite", self._drivers.extra) from error
                event.listen(self._async.sync_engine, "connect", dialects.tune_connection)
            return self._async

    def _check_usable(self, engine: Engine | AsyncEngine | None) -> None:
        if self._closed:
            raise StorageError("this SQLAlchemySaver is closed; make a new one with from_url(...)")
        if engine is None and self._in_memory and self._given is not None:
            raise StorageError(
                "the engine given to SQLAlchemySaver holds its database in memory, where the driver of the "
                "other mode (synchronous or asynchronous) cannot see it; call the engine's own mode, "
                "or use a file or SQLAlchemySaver.from_url('sqlite:///:memory:')"
            )

    def _take_memory(self) -> None:
        """Name a database in memory so that both engines see it, and hold it open."""
        if self._given is not None:
            pool = (self._given.sync_engine if isinstance(self._given, AsyncEngine) else self._given).pool
            if not isinstance(pool, StaticPool):
                raise StorageError(
                    f"expected an in-memory engine with poolclass=StaticPool, found {type(pool).__name__}, "
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

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            message = str(error.orig)
            where = self._url.render_as_string(hide_password=True)
            advice = dialects.advice(message)
            raise StorageError(f"the database {where} answered: {message}; {advice}") from error


def _transaction(connection: Connection, work: Work[T], write: bool) -> T:
    with connection.begin():
        dialects.start(connection, write=write)
        return work(connection)


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Await work that is not to be cut short; a cancellation is passed on when it has ended."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen; the caller asked for the cancellation and gets that
        raise


def _parse(url: URL | str) -> URL:
    try:
        return make_url(url)
    except ArgumentError as error:
        raise StorageError(
            "expected a database URL such as 'sqlite:///threads.db' (three slashes, then the path), "
            f"found one that cannot be read: {error}"
        ) from error
