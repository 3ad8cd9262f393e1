"""One asynchronous engine for every event loop that asks.

A driver's asynchronous connection belongs to the loop that opened it, so every loop gets a pool of its own. It is
closed in its loop when that loop ends: ``asyncio.run`` (like everything that ends a loop with
``shutdown_asyncgens``) closes the asynchronous generators that are under way, and one of them holds the pool. A
loop that was closed without that leaves sockets that nobody can close in the orderly way; they are dropped when
the next loop asks, or at ``close``.
"""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeout
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from agentmem_sql import forks
from agentmem_sql.transactions import Transactions, own

# How long `close` waits for a loop in another thread to close its connections, in seconds.
_PATIENCE = 5.0

# Drivers whose connections can be closed from any loop: all they need is a thread, or nothing.
_CLOSE_ANYWHERE = {"aiosqlite", "psycopg"}

_Guard = AsyncGenerator[None, None]


@dataclass(eq=False)
class _Pool:
    """The engine of one loop, the driver's connections that it opened, and the generator that ends with the loop."""

    engine: AsyncEngine
    transactions: Transactions
    opened: WeakSet[Any] = field(default_factory=WeakSet)
    guard: _Guard | None = None

    def remember(self, _: object, record: ConnectionPoolEntry) -> None:
        self.opened.add(record.driver_connection)


class LoopEngines:
    """Engines by event loop. Thread-safe: a loop touches no entry but its own, and whoever pops one closes it."""

    def __init__(self, make: Callable[[], AsyncEngine]) -> None:
        self._make = make
        self._pools: dict[AbstractEventLoop, _Pool] = {}

    async def current(self) -> Transactions:
        """Transactions on the engine of the running loop."""
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            self._drop_ended()
            # In a thread: for SQLite this looks for the file, and SQLAlchemy may import a driver.
            engine = await asyncio.to_thread(self._make)
            if loop in self._pools:  # another task was faster
                await engine.dispose()
                return self._pools[loop].transactions
            pool = self._pools[loop] = _Pool(engine, own(engine.sync_engine))
            event.listen(engine.sync_engine, "connect", pool.remember)
            pool.guard = _until_the_loop_ends(loop, self._pools)
            await anext(pool.guard)
        return pool.transactions

    def forked(self) -> None:
        """Give up all pools: their loops are those of the process that this one was forked from."""
        for pool in self._pools.values():
            forks.leave(pool.engine.sync_engine, pool.opened, keep=pool)
        self._pools.clear()

    async def aclose(self) -> None:
        """Close what the running loop has open here, and the rest from a thread."""
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            await pool.engine.dispose()
            _end(pool.guard)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Close every connection; from any thread, inside a running loop or not."""
        self._drop(list(self._pools))

    def _drop_ended(self) -> None:
        self._drop([loop for loop in list(self._pools) if loop.is_closed()])

    def _drop(self, loops: list[AbstractEventLoop]) -> None:
        for loop in loops:
            pool = self._pools.pop(loop, None)
            if pool is not None:
                _end(pool.guard)
                _close(loop, pool)


async def _until_the_loop_ends(loop: AbstractEventLoop, pools: dict[AbstractEventLoop, _Pool]) -> _Guard:
    try:
        yield
    finally:
        pool = pools.pop(loop, None)
        if pool is not None:
            await pool.engine.dispose()


def _end(guard: _Guard | None) -> None:
    """Finish a guard whose pool was taken from it: there is nothing that it would wait for."""
    if guard is not None:
        with suppress(StopIteration):
            guard.aclose().send(None)


def _close(loop: AbstractEventLoop, pool: _Pool) -> None:
    """Close a pool from outside its loop."""
    if pool.engine.driver in _CLOSE_ANYWHERE:
        _in_a_thread(asyncio.run, pool.engine.dispose())
    elif loop.is_closed():
        for connection in list(pool.opened):
            _drop_socket(connection)
    elif loop.is_running():
        _close_running(loop, pool)
    else:
        _in_a_thread(loop.run_until_complete, pool.engine.dispose())


def _close_running(loop: AbstractEventLoop, pool: _Pool) -> None:
    if loop is _running_loop():  # it goes on only when we return
        _terminate(pool)
        return
    disposing = asyncio.run_coroutine_threadsafe(pool.engine.dispose(), loop)
    try:
        disposing.result(_PATIENCE)
    except WaitTimeout:
        disposing.cancel()
        loop.call_soon_threadsafe(_terminate, pool)


def _terminate(pool: _Pool) -> None:
    """Close without a farewell to the server; for the thread of the pool's loop."""
    for connection in list(pool.opened):
        _terminate_one(connection)


def _terminate_one(connection: Any) -> None:
    (getattr(connection, "terminate", None) or connection.close)()  # of asyncpg, of asyncmy


def _drop_socket(connection: Any) -> None:
    """Close the socket of a connection whose loop is closed.

    The transport cannot do it without its loop, and says so as a ResourceWarning when it is destroyed. Where the
    transport is of another make, that warning remains.
    """
    transport = getattr(connection, "_transport", None)
    socket = getattr(transport, "_sock", None)
    if socket is not None:
        socket.close()
        transport._sock = None  # type: ignore[union-attr]
    with suppress(RuntimeError):  # Event loop is closed
        _terminate_one(connection)


def _in_a_thread(run: Callable[[Coroutine[Any, Any, None]], None], work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end in a thread, since this one may have a running loop."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(run, work).result()


def _running_loop() -> AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
