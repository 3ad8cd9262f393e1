"""A database, and transactions on it. Work is always a function of a SQLAlchemy `Connection`.

A read is no transaction, where the driver lets us: each statement sees what is committed when it runs. A write is one
READ COMMITTED transaction (on SQLite one that takes the write lock at once), committed when the work returns and rolled
back when it raises; a single statement may commit itself instead.

Work may be run again as a whole, so it must have no effect but what it stores and returns. A write that lost against
other transactions is run again after a pause, and work that met a closed connection is run again at once.

SQLite lets one connection write. Left to its busy handler, waiting writers poll and an unlucky one starves, so the
writers of one process take a lock here, whichever saver they use; readers do not wait. A database in memory is one
connection, which its readers and writers take turns on.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from sqlalchemy import URL, Connection, Engine, inspect
from sqlalchemy.exc import DBAPIError, InvalidRequestError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from agentmem.errors import StorageError
from agentmem_sql import engines, schema
from agentmem_sql.engines import Source, make_engine, safe_url, source_of
from agentmem_sql.message_cache import ThreadCache
from agentmem_sql.protection import Protection
from agentmem_sql.schema import Tables, alone, migrate
from agentmem_sql.statements import change

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")
Work = Callable[[Connection], T]

THREADS = 16  # that do the work of tasks
# How often the work of a call is run again because its transaction lost, its connection was lost, or a statement
# prepared on its connection was no longer valid, which may be so on every connection of a pool.
_RETRIES, _RECONNECTS, _MOST_UNPREPARED = 6, 1, 32
_RETRY_BUDGET = 20.0  # seconds after which nothing is run again: a lock timeout may have taken most of them
_FIRST_PAUSE = 0.01  # seconds


class Database:
    """One database. Thread-safe."""

    def __init__(
        self,
        engine: Engine | AsyncEngine | URL | str,
        *,
        tables: Tables,
        engine_options: Mapping[str, Any] | None = None,
        must_exist: bool = False,
        protection: Protection,
        cache: ThreadCache,
    ) -> None:
        """Take a URL, or the caller's engine, which keeps its settings and is never disposed of.

        Before the first work tables are made or migrated and `protection` is settled, by one process and thread at a
        time, and again by the next call if that fails; on a settled database nobody waits for a writer. `cache` is
        cleared when a connection turns out to be lost, and in a forked process.
        """
        self.tables = tables
        self._make_threads()
        self._source = source_of(engine, engine_options)
        self._must_exist = must_exist
        self._protection = protection
        self._cache = cache
        self.backend = self._source.url.get_backend_name()
        self.url = safe_url(self._source.url)
        own, self._in_memory = self._source.engine, self._source.in_memory
        self._turn = _turn_of(self._source) if self.backend == "sqlite" else None
        engine = own or make_engine(self._source)
        self._transactions = _Transactions(engine, made_here=own is None)
        self._process = os.getpid()  # the one whose connections these are
        self._file: tuple[str, tuple[int, int]] | None = None  # that of SQLite, and which one it was at first
        self._ready = False
        self._closed = False

    def run(self, work: Work[T], *, write: bool = False, autocommit: bool = False) -> T:
        """Do work, a write in one transaction; with `autocommit` the write is a single statement and may commit itself.

        Raises:
            StorageError: the database cannot be opened or reports an error, or the saver is closed.
        """
        failures: dict[str, float] = {}
        while True:
            try:
                self.check_open()
                transactions = self._transactions
                if not self._ready:
                    self._in_turn(self._set_up, write=True)
                if self._file is not None and _identity(self._file[0]) != self._file[1]:
                    raise StorageError(
                        f"expected the SQLite file that was opened at {self._file[0]!r}, found "
                        f"{'another' if os.path.exists(self._file[0]) else 'none'}: it was deleted, moved or replaced "
                        "under the running saver, so that nothing stored now would be found again; make a new saver"
                    )
                if write and not (autocommit and transactions.autocommits):
                    return self._in_turn(partial(transactions.write, work), write=True)
                return self._in_turn(partial(transactions.read, work), write=write)
            except DBAPIError as error:
                pause = self._pause(error, failures)
            time.sleep(pause)

    def _pause(self, error: DBAPIError, failures: dict[str, float]) -> float:
        """How long to wait before the work is run again; raises if it is not.

        `failures` counts the failures of one call by kind, and holds the time of the first.
        """
        since = failures.setdefault("since", time.monotonic())
        kind = "lost" if error.connection_invalidated else "unprepared" if engines.is_unprepared(error) else ""
        number = failures[kind] = failures.get(kind, 0) + 1
        if kind == "lost":  # the pool replaces it, and all that are as old
            self._cache.forget_all()
            self._transactions.release()
            if number <= _RECONNECTS:
                return 0.0
        elif kind == "unprepared" and number <= _MOST_UNPREPARED:
            return 0.0
        elif engines.is_transient(error) and number <= _RETRIES and time.monotonic() - since <= _RETRY_BUDGET:
            return _FIRST_PAUSE * float(2**number) * random.uniform(0.5, 1.0)
        where, message = safe_url(self._source.url), " ".join(str(error.orig).split())
        raise StorageError(f"the database {where} answered: {message}; {engines.advice(error)}") from error

    def check_open(self) -> None:
        """Raise `StorageError` after `close`; called before anything else, also in a process that was forked."""
        if self._process != os.getpid():
            self._leave_inherited()
        if self._closed:
            raise StorageError(
                "this SQLAlchemySaver is closed, so that the call did nothing, also if it was made before and waited; "
                "close a saver when its calls have ended, and make a new one with from_url(...)"
            )

    def close(self) -> None:
        """Close every connection that was opened here; from anywhere, any number of times."""
        if self._process != os.getpid():
            self._leave_inherited()
        self._closed = True
        self.writing_threads.shutdown(wait=False)
        self.reading_threads.shutdown(wait=False)
        if self._source.engine is None:
            self._transactions.close()

    def _make_threads(self) -> None:
        """Threads for tasks, started when needed. Readers have their own, since all writers may wait for one lock."""
        self.writing_threads = ThreadPoolExecutor(THREADS, "agentmem-sql-write")
        self.reading_threads = ThreadPoolExecutor(THREADS, "agentmem-sql-read")

    def _set_up(self) -> None:
        """Prepare the database for the first work; doing it again does no harm."""
        if self._ready:  # while this caller waited for its turn
            return
        transactions = self._transactions
        if self._must_exist:
            self._check_exists()
        if self.backend in ("mysql", "mariadb"):
            transactions.read(engines.check_mysql)
        if self.backend == "sqlite" and self._source.engine is None and not self._in_memory:
            transactions.read(engines.enable_wal)
        if transactions.read(partial(schema.version_of, tables=self.tables)) != schema.MIGRATIONS[-1].number:
            with transactions.connection() as connection:
                migrate(connection, self.tables, transactions.write_on)
        protection = self._protection
        if not transactions.read(partial(protection.is_settled, tables=self.tables)):
            with transactions.connection() as connection:
                alone(connection, self.tables, transactions.write_on, partial(protection.settle, tables=self.tables))
        if self.backend == "sqlite" and os.name == "posix" and not self._in_memory:
            path = os.path.abspath(self._path)
            at_first = _identity(path)
            self._file = None if at_first is None else (path, at_first)
        self._ready = True

    def _in_turn(self, do: Callable[[], T], *, write: bool) -> T:
        if self._turn is None or not (write or self._in_memory):
            return do()
        with self._turn:
            return do()

    def _leave_inherited(self) -> None:
        """Leave the connections of the process that this one was forked from alone, or close those to files.

        The process inherits SQLite's list of its locks, but not the locks. While an inherited connection is open, a new
        one would not take a lock that the list says is held. A database in memory was copied with the process.
        """
        with _forked:
            if self._process == os.getpid():  # another thread was here first
                return
            self._make_threads()
            if self._turn is not None:
                self._turn = _turn_of(self._source)
            self._cache.after_fork()
            if self._source.engine is None and not self._in_memory:
                self._transactions.leave_inherited(close=self.backend == "sqlite")
            self._process = os.getpid()

    def _check_exists(self) -> None:
        threads, where = self.tables.threads, safe_url(self._source.url)
        path = Path(self._path)
        if self.backend == "sqlite" and not self._in_memory and not path.is_file():
            raise StorageError(
                f"expected a SQLite file at {str(path)!r}, found {'a folder' if path.is_dir() else 'nothing'} there; "
                "correct the path (sqlite:///relative.db, sqlite:////absolute/path.db)"
            )
        if not self._transactions.read(lambda database: inspect(database).has_table(threads.name, threads.schema)):
            if self._in_memory:
                raise StorageError("expected a SQLite file, found a database in memory, which only its process sees")
            raise StorageError(
                f"expected the table {threads.fullname!r} in the database {where}, found no such table: no threads "
                "were ever kept there, or under another table prefix or schema; correct the URL, or name these"
            )

    @property
    def _path(self) -> str:
        """Where a SQLite file is."""
        return str(self._source.url.database).removeprefix("file:").partition("?")[0]


def _identity(path: str) -> tuple[int, int] | None:
    """Which file there is at a path; takes about a microsecond."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_size else None  # one that was emptied is another


_forked = threading.Lock()
_left_alone: list[Connection] = []


# Transactions.


class _Transactions:
    """Reads and writes on one engine.

    An engine made here leaves the driver in its autocommit mode, and transactions are statements of ours: changing
    SQLAlchemy's isolation level for each use costs more than a read. The caller's engine is used through SQLAlchemy
    alone, so its settings and listeners stay in effect.
    """

    def __init__(self, engine: Engine, *, made_here: bool) -> None:
        self.engine = self.reader = self.writer = engine
        self._made_here = made_here
        self._backend = engine.dialect.name
        # Connections stay checked out between two uses unless somebody waits for one, or the pool is set up to look
        # at them first: a checkout takes a sixth of the time of a put.
        pool: Any = engine.pool
        self._keeps = made_here and type(pool) is QueuePool and pool._recycle == -1 and not pool._pre_ping
        self._idle: list[Connection] = []
        self._waiting = 0  # threads that wait for the pool
        self._lock = threading.Lock()
        # Whether the statements of a read commit themselves. A listener for `begin` may make a setting for the
        # transaction that decides which rows are visible.
        self.autocommits = self._backend == "postgresql" and (made_here or not engine.dispatch.begin)
        if self._backend == "postgresql" and not made_here:
            self.writer = engine.execution_options(isolation_level="READ COMMITTED")
            if self.autocommits:
                self.reader = engine.execution_options(isolation_level="AUTOCOMMIT")

    def read(self, work: Work[T]) -> T:
        """Do work that changes nothing, or is a single statement that commits itself."""
        return self._on_connection(self.reader, self._read_on, work)

    def write(self, work: Work[T]) -> T:
        """Do work in one transaction, on a connection of its own."""
        return self._on_connection(self.writer, self.write_on, work)

    def connection(self) -> Connection:
        """A connection for several writes; no other may be in use meanwhile."""
        self.release()
        return connect(self.writer)

    def _on_connection(self, engine: Engine, do: Callable[[Connection, Work[T]], T], work: Work[T]) -> T:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
            self._waiting += connection is None
        if connection is None:
            try:
                connection = connect(engine)
            finally:
                with self._lock:
                    self._waiting -= 1
        try:
            result = do(connection, work)
            if self._made_here and connection.in_transaction():  # SQLAlchemy's, which is none of the database
                connection.rollback()
        except BaseException:
            connection.close()
            raise
        with self._lock:
            keep = self._keeps and not self._waiting
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()
        return result

    def release(self) -> None:
        """Give the idle connections back to the pool."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close the engine's connections: those that are idle now, others after their use."""
        self._keeps = False
        self.release()
        self.engine.dispose()

    def leave_inherited(self, *, close: bool) -> None:
        """Leave alone, or close, the connections of the process that this one was forked from."""
        self._lock, self._waiting = threading.Lock(), 0
        inherited, self._idle = self._idle, []
        if close:
            for connection in inherited:
                connection.invalidate()
        else:  # collected as garbage, they would be given to a pool whose lock a thread of that process may hold
            _left_alone.extend(inherited)
        self.engine.dispose(close=close)

    def _read_on(self, connection: Connection, work: Work[T]) -> T:
        if not self._made_here:  # listeners and pools of the owner expect that SQLAlchemy knows of it
            connection.begin()  # closing the connection rolls it back
        try:
            return work(connection)
        except (DBAPIError, InvalidRequestError) as error:
            _leave_unusable(connection, error)
            raise

    def write_on(self, connection: Connection, work: Work[T]) -> T:
        """Do work in one transaction on a connection of `writer` that has none open."""
        try:
            if not self._made_here:
                with connection.begin():
                    self._begin(connection)
                    return work(connection)
            driver: Any = connection.connection.driver_connection
            if self._backend == "sqlite" and driver.in_transaction:
                _execute(connection, "ROLLBACK")
            _execute(connection, _BEGIN[self._backend])
            result = work(connection)
            if self._backend != "sqlite" or driver.in_transaction:  # else the work ended it
                _execute(connection, "COMMIT")
            return result
        except BaseException as error:
            _roll_back(connection)
            _leave_unusable(connection, error)
            raise

    def _begin(self, connection: Connection) -> None:
        """Begin, on the database, the transaction that SQLAlchemy thinks has begun."""
        driver: Any = connection.connection.driver_connection
        if self._backend == "sqlite" and driver.in_transaction:  # begun by a listener, and not for writing
            change(connection, "ROLLBACK", ())
        elif self._backend in ("mysql", "mariadb"):
            change(connection, "SET TRANSACTION ISOLATION LEVEL READ COMMITTED", ())
        if self._backend != "postgresql":
            change(connection, _BEGIN[self._backend], ())


# SQLite takes the write lock at once, waiting for it. A deferred transaction that reads and then writes fails without
# waiting if another connection wrote in between.
_BEGIN = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "BEGIN ISOLATION LEVEL READ COMMITTED",
    "mysql": "START TRANSACTION",
    "mariadb": "START TRANSACTION",
}


def connect(engine: Engine) -> Connection:
    """A connection from the pool; `StorageError` if the driver cannot use the URL or options, or none comes free."""
    try:
        return engine.connect()
    except PoolTimeout as error:
        raise StorageError(
            f"every connection of the pool was in use for too long: {error}; use fewer threads or tasks at once, "
            "or pass engine_options={'pool_size': ...}"
        ) from error
    except SQLAlchemyError:
        raise
    except Exception as error:
        # What drivers raise before they reach a server: an unknown host or option, a missing package.
        raise StorageError(
            f"cannot connect to {safe_url(engine.url)}: {type(error).__name__}: {error}; correct the URL or its options"
        ) from error


def _roll_back(connection: Connection) -> None:
    """End the database's transaction even if SQLAlchemy knows of none."""
    if connection.closed or connection.invalidated:
        return
    try:
        driver: Any = connection.connection.dbapi_connection
        driver.rollback()
    except BaseException as error:
        connection.invalidate()
        if not isinstance(error, Exception):  # otherwise the caller gets the error that led here
            raise


def _leave_unusable(connection: Connection, error: BaseException) -> None:
    """Close a connection whose state SQLAlchemy has wrong, or whose prepared statements are invalid."""
    stale = isinstance(error, DBAPIError) and engines.is_unprepared(error)
    if isinstance(error, InvalidRequestError) or (stale and not connection.invalidated):
        connection.invalidate()


def _execute(connection: Connection, statement: str) -> None:
    """Begin or end a transaction, of which SQLAlchemy need not know."""
    if connection.dialect.name != "sqlite":
        change(connection, statement, ())
        return
    driver: Any = connection.connection.driver_connection
    try:
        driver.execute(statement)
    except sqlite3.Error as error:
        connection._handle_dbapi_exception(error, statement, None, None, None)


# The turns of SQLite's writers.

_turns: WeakValueDictionary[tuple[int, object], threading.Lock] = WeakValueDictionary()  # by process and database
_turns_mutex = threading.Lock()


def _turn_of(source: Source) -> threading.Lock:
    """The lock that the writers of a SQLite database take, shared by all its users in this process."""
    key: object = object() if source.in_memory else Path(str(source.url.database)).resolve()
    with _turns_mutex:
        return _turns.setdefault((os.getpid(), key), threading.Lock())
