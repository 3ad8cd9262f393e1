"""The engines behind a saver: one synchronous, and one asynchronous for every event loop.

Both come from one URL, or from the one engine that was given. An engine that was given keeps its pool, settings
and listeners and is never disposed of; the driver of the other mode gets an engine of ours from the same URL, with
the same execution options. Engines are made when first needed, and so is a missing driver found out. A process that
is forked makes its own (see ``forks``).
"""

from __future__ import annotations

import asyncio
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from weakref import ref

from sqlalchemy import URL, Engine, ExceptionContext, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, Pool

from agentmem.errors import MissingExtraError, StorageError
from agentmem_sql import forks
from agentmem_sql.drivers import Drivers
from agentmem_sql.idle import Idle
from agentmem_sql.loops import LoopEngines
from agentmem_sql.prepared import DIRECT
from agentmem_sql.transactions import Transactions, given, own

E = TypeVar("E", Engine, AsyncEngine)

# How long a writer waits for the lock of a SQLite file that another process holds, in seconds.
BUSY_TIMEOUT = 30

# Connections of one engine. Whoever finds all of them in use waits for one, which is sooner done than opening
# another: it takes milliseconds, on PostgreSQL a process of the server, and servers allow few (100 by default).
POOL_SIZE = 16

SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")

# What transactions here depend on.
_FIXED = ("isolation_level", "skip_autocommit_rollback")


class Engines:
    """Transactions on the engine that a caller needs. Thread-safe."""

    def __init__(
        self,
        drivers: Drivers,
        engine: Engine | AsyncEngine | None,
        *,
        synchronous: str,
        options: Mapping[str, Any] | None,
    ) -> None:
        """Make no engine yet.

        Args:
            engine: the caller's, or None where ``drivers`` has it all.
            synchronous: how SQLite's files are synchronised, one of ``SYNCHRONOUS``.
            options: more arguments for ``create_engine``, which win over those chosen here.

        Raises:
            StorageError: ``synchronous`` is none of those, or ``options`` holds one that cannot be chosen.
        """
        if synchronous.upper() not in SYNCHRONOUS:
            raise StorageError(
                f"expected `synchronous` to be one of {', '.join(SYNCHRONOUS)} (what SQLite knows), "
                f"found {synchronous!r}"
            )
        fixed = [name for name in _FIXED if name in (options or {})]
        if fixed:
            raise StorageError(
                f"expected engine_options without {fixed[0]!r}, which is not free: writes are READ COMMITTED "
                "transactions and reads have none; leave it out"
            )
        self._drivers = drivers
        self._given = engine
        self._synchronous = synchronous.upper()
        self._options = dict(options or {})
        self._inherited = {} if engine is None else dict(engine.get_execution_options())
        self._inherited.pop("isolation_level", None)
        self._making = threading.Lock()
        self._own: Engine | None = None
        # Who sets the pool up has reasons to see every connection come and go.
        set_up = any("pool" in name or name == "max_overflow" for name in self._options)
        self._idle = None if set_up else Idle()
        self._sync = given(engine) if isinstance(engine, Engine) else None
        self._loops: LoopEngines | _GivenLoop = (
            _GivenLoop(engine) if isinstance(engine, AsyncEngine) else LoopEngines(self._make_async)
        )
        database = drivers.sync.database
        self._file = Path(database).resolve() if drivers.backend.name == "sqlite" and database else None
        self._foreign: Pool | None = None  # the given engine's, with connections of the process that was forked
        forks.watch(self)

    def sync(self) -> Transactions:
        """Transactions for a thread.

        Raises:
            MissingExtraError: the synchronous driver is not installed.
            StorageError: this process was forked and cannot use what it inherited.
        """
        self._check_fork()
        if self._sync is None:
            with self._making:
                if self._sync is None:
                    self._own = self._make_sync()
                    self._sync = own(self._own, self._idle)
        return self._sync

    async def asynchronous(self) -> Transactions:
        """Transactions for a task, to be run in a greenlet.

        Raises:
            MissingExtraError: the asynchronous driver is not installed.
            StorageError: the engine that was given belongs to another event loop, or as ``sync``.
        """
        self._check_fork()
        return await self._loops.current()

    def forked(self) -> None:
        """Give up the engines of the process that this one was forked from."""
        self._making = threading.Lock()
        if self._own is not None:
            forks.leave(self._own, idle=self._idle)
            self._own = self._sync = None
            self._idle = None if self._idle is None else Idle()
        self._loops.forked()
        if self._given is not None and forks.holds_connections(self._given.pool):
            self._foreign = self._given.pool

    def _check_fork(self) -> None:
        forks.check(self._file)
        if self._foreign is not None and self._given is not None:
            if self._given.pool is self._foreign:
                raise StorageError(
                    "this process was forked, and the engine given to SQLAlchemySaver holds connections of the process "
                    "that it was forked from; call engine.dispose(close=False) once in the forked process, before "
                    "anything uses the engine there"
                )
            self._foreign = None

    def close(self) -> None:
        """Dispose of the engines made here; from anywhere."""
        self._loops.close()
        if self._idle is not None:
            self._idle.close()
        if self._own is not None:
            self._own.dispose()

    async def aclose(self) -> None:
        """``close`` for a task."""
        await self._loops.aclose()
        if self._idle is not None:
            await asyncio.to_thread(self._idle.close)
        if self._own is not None:
            await asyncio.to_thread(self._own.dispose)

    def _make_sync(self) -> Engine:
        engine = self._make(create_engine, self._drivers.sync)
        self._settle(engine)
        return engine

    def _make_async(self) -> AsyncEngine:
        engine = self._make(create_async_engine, self._drivers.asynchronous)
        self._settle(engine.sync_engine)
        return engine

    def _make(self, create: Callable[..., E], url: URL) -> E:
        if self._given is not None and not (url.host or url.database or url.query):
            raise StorageError(
                "the URL of the engine given to SQLAlchemySaver does not say where the database is (it may have a "
                "`creator`), so no engine can be made for the other mode (synchronous or asynchronous); pass a full "
                "URL to create_engine, or call the engine's own mode"
            )
        try:
            return create(url, **self._arguments(url))
        except ImportError as error:  # not only ModuleNotFoundError: psycopg without its library says this
            package = error.name or url.get_driver_name()
            raise MissingExtraError(package, self._drivers.backend.extra) from error

    def _settle(self, engine: Engine) -> None:
        # Who asked for a log of statements gets all of them.
        engine.update_execution_options(**{DIRECT: not self._options.get("echo"), **self._inherited})
        if self._drivers.backend.name == "sqlite":
            event.listen(engine, "connect", self._tune_sqlite)
            event.listen(engine, "handle_error", _keep_connection)
        elif self._drivers.backend.name == "mysql":
            event.listen(engine, "connect", _tune_mysql)

    def _arguments(self, url: URL) -> dict[str, Any]:
        chosen: dict[str, Any] = {"hide_parameters": True, "skip_autocommit_rollback": True}
        if not {"pool", "poolclass"} & self._options.keys():
            chosen |= {"pool_size": POOL_SIZE, "max_overflow": 0}
        match self._drivers.backend.name:
            case "sqlite":
                chosen["connect_args"] = {"isolation_level": None}
                chosen["pool_reset_on_return"] = None  # `transactions` ends what it begins, and nobody else begins any
                if "timeout" not in url.query:
                    chosen["connect_args"]["timeout"] = BUSY_TIMEOUT
            case "postgresql":
                chosen["isolation_level"] = "READ COMMITTED"
                if url.get_driver_name() == "psycopg":
                    chosen["use_native_hstore"] = False  # or the first connection asks for it
                    # The statements of the hot paths are few and fixed: planned once, when first used.
                    if "prepare_threshold" not in url.query:
                        chosen["connect_args"] = {"prepare_threshold": 0}
            case _:
                chosen["isolation_level"] = "READ COMMITTED"
        if "connect_args" in self._options:
            chosen["connect_args"] = chosen.get("connect_args", {}) | self._options["connect_args"]
        return chosen | {name: value for name, value in self._options.items() if name != "connect_args"}

    def _tune_sqlite(self, connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA synchronous={self._synchronous}")
        cursor.close()


def _keep_connection(context: ExceptionContext) -> None:
    """Keep the connection to a file when its user is interrupted or cancelled, so that it can be rolled back.

    SQLAlchemy would close it, and SQLite takes back nothing of a closed connection while something still refers to
    one of its cursors: the traceback of the interruption does, and the file would stay locked.
    """
    if not isinstance(context.original_exception, Exception):
        context.is_disconnect = False


def _tune_mysql(connection: Any, _record: object) -> None:
    connection.autocommit(True)
    cursor = connection.cursor()
    # Otherwise a server may cut values that are too long.
    cursor.execute("SET SESSION sql_mode = CONCAT(@@SESSION.sql_mode, ',STRICT_TRANS_TABLES')")
    cursor.close()


class _GivenLoop:
    """An asynchronous engine of the caller's, which serves the event loop that its connections belong to.

    aiosqlite's serve every loop, and so does an engine whose pool keeps none (``NullPool``). When the owner has
    disposed of the engine, another loop may take it over.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._transactions = given(engine.sync_engine)
        self._bound = engine.driver != "aiosqlite" and not isinstance(engine.pool, NullPool)
        self._owner: tuple[ref[AbstractEventLoop], object] | None = None

    async def current(self) -> Transactions:
        """Transactions on the engine, if the running loop may use it.

        Raises:
            StorageError: another loop used it before.
        """
        if self._bound:
            loop, pool = asyncio.get_running_loop(), self._engine.pool
            if self._owner is None or self._owner[1] is not pool:
                self._owner = (ref(loop), pool)
            elif self._owner[0]() is not loop:
                raise StorageError(
                    "the AsyncEngine given to SQLAlchemySaver holds connections of another event loop, and its driver "
                    f"{self._engine.driver} cannot use them in this one; pass the URL instead of an engine, create the "
                    "engine with poolclass=NullPool, or await engine.dispose() at the end of each loop"
                )
        return self._transactions

    def forked(self) -> None:
        """The engine is not ours to give up."""

    def close(self) -> None:
        """The engine is not ours to close."""

    async def aclose(self) -> None:
        """The engine is not ours to close."""
