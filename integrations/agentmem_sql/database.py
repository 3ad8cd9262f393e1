"""A database, and transactions on it: work is always a function of a SQLAlchemy `Connection`.

A read is promised no transaction, so none is begun where the driver lets us: every statement is sent alone and sees
what is committed when it runs. A write is one transaction of isolation READ COMMITTED (on SQLite, which has but one
isolation, one that takes the write lock at once), committed when the work returns and rolled back when it raises; one
that is a single statement is a transaction by itself where the driver's mode allows it.

Work may be run again as a whole, so it must leave nothing behind but what it stores and returns: a write that lost
against other transactions is run again after a pause, and whatever met a connection that had been closed once, at
once.

Servers see to their own locks. SQLite lets one connection write; left to its busy handler, waiting writers poll and
the unlucky one starves, so the writers of one process queue here, whichever saver they use, and readers go on beside
them. A database in memory is shared through SQLite's `memdb` file system, lives until `close` and has no write-ahead
log, so there readers queue too.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4
from weakref import WeakSet, WeakValueDictionary

from sqlalchemy import URL, Connection, Engine, inspect
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import Pool, QueuePool, StaticPool

from agentmem.errors import StorageError
from agentmem_sql import db_errors
from agentmem_sql.engines import SYNCHRONOUS, Source, make_engine, safe_url, source_of
from agentmem_sql.message_cache import ThreadCache
from agentmem_sql.migrations import MIGRATIONS, Migration, alone, is_current, migrate
from agentmem_sql.protection import Protection
from agentmem_sql.schema import Tables
from agentmem_sql.statements import change, check_mysql, enable_wal

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")
Work = Callable[[Connection], T]

# Threads that do the work of tasks.
THREADS = 16
# How long a writer in the queue goes without looking for itself, in seconds.
_PATIENCE = 1.0
# How often the work of a call is run again because its transaction lost, its connection was lost, or a statement
# prepared on its connection was no good any more, which every connection of a pool may have.
_RETRIES, _RECONNECTS, _MOST_UNPREPARED = 6, 1, 32
# Beyond this nobody waits for a turn that may not come: a lock timeout may have taken most of it, in seconds.
_RETRY_BUDGET = 20.0
_FIRST_PAUSE = 0.01


class Database:
    """One database. Thread-safe."""

    def __init__(
        self,
        engine: Engine | AsyncEngine | URL | str,
        *,
        tables: Tables,
        synchronous: str = "FULL",
        engine_options: Mapping[str, Any] | None = None,
        must_exist: bool = False,
        protection: Protection | None = None,
        cache: ThreadCache | None = None,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> None:
        """Take a URL, or an engine of the caller's, which keeps its settings and is never disposed of.

        Args:
            engine: the database; an asynchronous engine is taken for its URL and options.
            tables: the tables that are made, or brought up to date, before the first work.
            synchronous: how SQLite's files are synchronised: OFF, NORMAL, FULL or EXTRA.
            engine_options: more arguments for `create_engine`, for an engine made here.
            must_exist: make neither file nor tables, and refuse a database that has none.
            protection: settled once the tables are there, before the first work, by one process and one thread at a
                time; where that fails the next call begins with it again. Who only reads a database that is settled
                waits for no writer.
            cache: forgets everything when a connection turns out to be lost, and in a process that was forked.
            migrations: what makes the tables.

        Raises:
            StorageError: the URL or the engine cannot be used.
        """
        if synchronous.upper() not in SYNCHRONOUS:
            raise StorageError(
                f"expected `synchronous` to be one of {', '.join(SYNCHRONOUS)} (what SQLite knows), "
                f"found {synchronous!r}"
            )
        self.tables = tables
        self._make_threads()
        self._synchronous = synchronous.upper()
        self._source = source_of(engine, engine_options)
        self._must_exist = must_exist
        self._protection = protection
        self._cache = cache
        self._migrations = migrations
        self._anchor: sqlite3.Connection | None = None
        if self._source.in_memory:
            self._take_memory()
        self.backend = self._source.url.get_backend_name()
        own = self._source.engine
        self._one_connection = self._source.in_memory or (own is not None and isinstance(own.pool, StaticPool))
        self._queue = _queue_of(self._source) if self.backend == "sqlite" else None
        self._transactions = None if own is None else _Transactions(own, made_here=False)
        if own is not None and self.backend == "sqlite" and self._one_connection:
            _check_shared(own)
        self._making = threading.Lock()
        self._inherited = False  # whether the connections are those of the process that this one was forked from
        self._file: tuple[str, tuple[int, int]] | None = None  # that of SQLite, and which one it was at first
        self._ready = False
        self._closed = False
        _databases.add(self)

    def run(self, work: Work[T], *, write: bool = False, autocommit: bool = False) -> T:
        """Do work, a write in one transaction; with `autocommit` the write is one statement, and may be one itself.

        Raises:
            StorageError: the database could not be opened or did not take it, or the saver is closed.
            MissingExtraError: the driver is not installed.
        """
        failures: dict[str, float] = {}
        while True:
            try:
                self.check_open()
                transactions = self._transactions or self._connect()
                if not self._ready:
                    self._in_turn(partial(self._set_up, transactions), write=True)
                if self._file is not None and _identity(self._file[0]) != self._file[1]:
                    raise StorageError(
                        f"expected the SQLite file that was opened at {self._file[0]!r}, found "
                        f"{'another' if os.path.exists(self._file[0]) else 'none'}: it was deleted, moved or replaced "
                        "under the running saver, and what is stored in it would not be found again; close the saver "
                        "and make a new one"
                    )
                if write and not (autocommit and transactions.autocommits):
                    return self._in_turn(partial(transactions.write, work), write=True)
                return self._in_turn(partial(transactions.read, work), write=write)
            except DBAPIError as error:
                pause = self._pause(error, failures)
            time.sleep(pause)

    def _pause(self, error: DBAPIError, failures: dict[str, float]) -> float:
        """How long to wait before the work is run again; raises where it is not.

        `failures` counts the failures of one call by what to do about them, and says when the first one was.
        """
        since = failures.setdefault("since", time.monotonic())
        kind = "lost" if error.connection_invalidated else "unprepared" if db_errors.is_unprepared(error) else ""
        number = failures[kind] = failures.get(kind, 0) + 1
        if kind == "lost":  # the pool has dropped that connection, and all that are as old
            if self._cache is not None:
                self._cache.forget_all()
            if self._transactions is not None:
                self._transactions.release()
            if number <= _RECONNECTS:
                return 0.0
        elif kind == "unprepared" and number <= _MOST_UNPREPARED:
            return 0.0
        elif db_errors.is_transient(error) and number <= _RETRIES and time.monotonic() - since <= _RETRY_BUDGET:
            return _FIRST_PAUSE * float(2**number) * random.uniform(0.5, 1.0)
        where, message = safe_url(self._source.url), " ".join(str(error.orig).split())
        raise StorageError(f"the database {where} answered: {message}; {db_errors.advice(error)}") from error

    def check_open(self) -> None:
        """Refuse a call after `close`.

        Raises:
            StorageError: it is closed.
        """
        if self._closed:
            raise StorageError(
                "this SQLAlchemySaver is closed, so that the call did nothing, also if it was made before and waited; "
                "close a saver when its calls have ended, and make a new one with from_url(...)"
            )

    def close(self) -> None:
        """Close every connection that was opened here; from anywhere, any number of times."""
        self._closed = True
        self.writing_threads.shutdown(wait=False)
        self.reading_threads.shutdown(wait=False)
        if self._source.engine is None and self._transactions is not None:
            self._transactions.close()
        if self._anchor is not None:
            self._anchor.close()

    def after_fork(self) -> None:
        """Forget, in a process that was just forked, what belongs to the threads of the other one."""
        self._make_threads()
        self._making = threading.Lock()
        self._inherited = True
        if self._queue is not None:
            self._queue = _queue_of(self._source)
        if self._cache is not None:
            self._cache.after_fork()

    def _make_threads(self) -> None:
        """Threads for tasks, started when first needed. Readers have their own: writers may all wait for one lock."""
        self.writing_threads = ThreadPoolExecutor(THREADS, "agentmem-sql-write")
        self.reading_threads = ThreadPoolExecutor(THREADS, "agentmem-sql-read")

    def _connect(self) -> _Transactions:
        with self._making:
            if self._transactions is None:
                self._transactions = _Transactions(make_engine(self._source, self._synchronous), made_here=True)
            return self._transactions

    def _set_up(self, transactions: _Transactions) -> None:
        """See to the tables and to `prepare`; doing it again does no harm."""
        if self._ready:  # while this caller waited for its turn
            return
        if self._must_exist:
            self._check_exists(transactions)
        if self.backend in ("mysql", "mariadb"):
            transactions.read(check_mysql)
        if self.backend == "sqlite" and self._source.engine is None and not self._source.in_memory:
            transactions.read(enable_wal)
        if not transactions.read(lambda connection: is_current(connection, self.tables, self._migrations)):
            with connect(transactions.writer) as connection:
                migrate(connection, self.tables, transactions.write_on, self._migrations)
        protection = self._protection
        if protection is not None and not transactions.read(partial(protection.is_settled, tables=self.tables)):
            with connect(transactions.writer) as connection:
                alone(connection, self.tables, transactions.write_on, partial(protection.settle, tables=self.tables))
        if self.backend == "sqlite" and os.name == "posix" and not self._source.in_memory:
            path = os.path.abspath(self._path)
            at_first = _identity(path)
            self._file = None if at_first is None else (path, at_first)
        self._ready = True

    def _in_turn(self, do: Callable[[], T], *, write: bool) -> T:
        if self._inherited:
            self._leave_inherited()
        if self._queue is None or not (write or self._one_connection):
            return do()
        if self._one_connection and self._source.engine is not None:
            do = partial(self._unless_busy, self._source.engine.pool, do)
        return self._queue.run(do)

    def _unless_busy(self, pool: Pool, do: Callable[[], T]) -> T:
        """Do something unless the only connection there is is in a transaction of the caller's."""
        record = vars(pool).get("connection")  # what there is before the first use is nothing
        driver = None if record is None else record.driver_connection
        if getattr(driver, "in_transaction", False):
            raise StorageError(
                "the engine given to SQLAlchemySaver has one connection (StaticPool), and a transaction of yours "
                "is open on it, which the saver would end; commit first, or give the saver an engine of its own"
            )
        return do()

    def _leave_inherited(self) -> None:
        """Leave the connections of the other process alone (SQLAlchemy's recipe), or close them where they are files.

        SQLite's notes of a file's locks are inherited, the locks are not: as long as an inherited connection is
        open, a new one would take no lock that those notes say is held.
        """
        with self._making:
            if self._inherited and self._source.engine is None and self._transactions is not None:
                self._transactions.leave_inherited(close=self.backend == "sqlite")
            self._inherited = False

    def _check_exists(self, transactions: _Transactions) -> None:
        threads, where = self.tables.threads, safe_url(self._source.url)

        def has_tables(connection: Connection) -> bool:
            return inspect(connection).has_table(threads.name, schema=threads.schema)

        if self.backend == "sqlite" and not self._source.in_memory:
            path = Path(self._path)
            if not path.is_file():
                raise StorageError(
                    f"expected a SQLite file at {str(path)!r}, found {'a folder' if path.is_dir() else 'nothing'} "
                    "there; correct the path (sqlite:///relative.db, sqlite:////absolute/path.db)"
                )
        if not transactions.read(has_tables):
            raise StorageError(
                f"expected the table {threads.fullname!r} in the database {where}, found no such table: no threads "
                "were ever kept there, or under another table prefix or schema; correct the URL, or name these"
            )

    @property
    def _path(self) -> str:
        """Where a SQLite file is."""
        return str(self._source.url.database).removeprefix("file:").partition("?")[0]

    def _take_memory(self) -> None:
        """Name a database in memory so that every connection sees it, and hold it open."""
        engine, url = self._source.engine, self._source.url
        if engine is not None:
            if not isinstance(engine.pool, StaticPool):
                raise StorageError(
                    f"expected an in-memory engine with poolclass=StaticPool, found {type(engine.pool).__name__}, "
                    "which gives every thread a database of its own; use StaticPool, a file, "
                    "or SQLAlchemySaver.from_url('sqlite:///:memory:')"
                )
            return
        if self._must_exist:
            raise StorageError(
                "expected the URL of a SQLite file, found a database in memory, which only its process sees"
            )
        if url.query:
            raise StorageError(
                "expected 'sqlite:///:memory:' for a database in memory, "
                f"found the options {dict(url.query)}; "
                "remove them, or pass an engine of your own"
            )
        name = f"file:/agentmem-{uuid4().hex}?vfs=memdb"
        self._anchor = sqlite3.connect(name, uri=True, check_same_thread=False)
        named = url.set(database=name.split("?")[0], query={"vfs": "memdb", "uri": "true"})
        self._source = Source(named, self._source.options)


def _check_shared(engine: Engine) -> None:
    """Refuse the one connection of an engine if other threads cannot use it: graphs and tasks do.

    Raises:
        StorageError: they cannot.
    """
    pool: Any = engine.pool
    if "connection" not in vars(pool):
        engine.raw_connection().close()
    try:
        with ThreadPoolExecutor(1) as other:
            other.submit(pool.connection.driver_connection.cursor).result()
    except sqlite3.ProgrammingError as error:
        raise StorageError(
            "expected an engine whose one connection (StaticPool) every thread may use, found one for the thread that "
            "opened it; write create_engine(..., poolclass=StaticPool, connect_args={'check_same_thread': False}), or "
            "SQLAlchemySaver.from_url('sqlite:///:memory:')"
        ) from error


def _identity(path: str) -> tuple[int, int] | None:
    """Which file there is at a path; takes about a microsecond."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


_databases: WeakSet[Database] = WeakSet()
_left_alone: list[Connection] = []


def _after_fork() -> None:
    global _queues_mutex, _queues
    _queues_mutex, _queues = threading.Lock(), WeakValueDictionary()  # those who wait are threads of the other process
    for database in list(_databases):
        database.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# Transactions.


class _Transactions:
    """Reads and writes on one engine.

    On an engine that was made here the driver's mode says whether a statement commits itself, since changing
    SQLAlchemy's isolation level for each use costs more than a read. On one of the caller's the mode is SQLAlchemy's:
    its settings and listeners go on.
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
        # Whether a statement of a read commits itself. A listener for `begin` may set what the rows that one sees
        # depend on, for as long as the transaction lasts.
        self.autocommits = self._backend == "postgresql" and (made_here or not engine.dispatch.begin)
        if self._backend == "postgresql" and not made_here:
            self.writer = engine.execution_options(isolation_level="READ COMMITTED")
            if self.autocommits:
                self.reader = engine.execution_options(isolation_level="AUTOCOMMIT")

    def read(self, work: Work[T]) -> T:
        """Do work that changes nothing, or is one statement that commits itself."""
        return self._on_connection(self.reader, self._read_on, work)

    def write(self, work: Work[T]) -> T:
        """Do work in one transaction, on a connection of its own."""
        return self._on_connection(self.writer, self.write_on, work)

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
        except BaseException:
            connection.close()
            raise
        with self._lock:
            keep = self._keeps and not self._waiting and not connection.in_transaction()
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
        elif self.autocommits:
            _set_autocommit(connection, True)
        try:
            return work(connection)
        except (DBAPIError, InvalidRequestError) as error:
            _leave_unusable(connection, error)
            raise

    def write_on(self, connection: Connection, work: Work[T]) -> T:
        """Do work in one transaction on a connection of `writer` that has none open."""
        try:
            if self._made_here and self._backend == "sqlite":  # of which SQLAlchemy need not know
                driver: Any = connection.connection.driver_connection
                if driver.in_transaction:
                    _execute(connection, driver, "ROLLBACK")
                _execute(connection, driver, "BEGIN IMMEDIATE")
                result = work(connection)
                if driver.in_transaction:  # unless the work ended it
                    _execute(connection, driver, "COMMIT")
                return result
            with connection.begin():
                self._begin(connection)
                return work(connection)
        except BaseException as error:
            _roll_back(connection)
            _leave_unusable(connection, error)
            if isinstance(error, AssertionError) and isinstance(error.__context__, KeyboardInterrupt):
                # SQLAlchemy's commit, interrupted before it began, fails over what it asserts at its end.
                raise error.__context__ from None
            raise

    def _begin(self, connection: Connection) -> None:
        """Begin, on the database, the transaction that SQLAlchemy thinks has begun."""
        if self._backend == "sqlite":
            # Take the write lock at once, waiting for it. A deferred transaction that reads and then writes fails
            # without waiting when another connection wrote in between, so one that a listener of the engine began is
            # begun anew.
            driver: Any = connection.connection.driver_connection
            if driver.in_transaction:
                change(connection, "ROLLBACK", ())
            change(connection, "BEGIN IMMEDIATE", ())
        elif self._backend != "postgresql":
            if not self._made_here:
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            change(connection, "START TRANSACTION", ())
        elif self._made_here:
            _set_autocommit(connection, False)


def connect(engine: Engine) -> Connection:
    """A connection from the pool.

    Raises:
        StorageError: the driver could not use what the URL or the engine's options say, or none came free.
    """
    try:
        return engine.connect()
    except PoolTimeout as error:
        raise StorageError(
            f"every connection of the pool was in use for too long: {error}; use fewer threads or tasks at once, "
            "or pass engine_options={'pool_size': ...}"
        ) from error
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        # What drivers raise before they speak to a server: no such host, an option that they do not know, an
        # authentication method that needs another package.
        raise StorageError(
            f"cannot connect to {safe_url(engine.url)}: {type(error).__name__}: {error}; {db_errors.advice(error)}"
        ) from error


def _roll_back(connection: Connection) -> None:
    """End, on the database, what SQLAlchemy may think there is no need to end."""
    if connection.closed or connection.invalidated:
        return
    try:
        driver: Any = connection.connection.dbapi_connection
        driver.rollback()
    except BaseException as error:
        connection.invalidate()
        if not isinstance(error, Exception):  # otherwise the caller hears of the error that led here
            raise


def _leave_unusable(connection: Connection, error: BaseException) -> None:
    """Close a connection whose state is not what SQLAlchemy takes it for, or whose prepared statements are no good."""
    stale = isinstance(error, DBAPIError) and db_errors.is_unprepared(error)
    if isinstance(error, InvalidRequestError) or (stale and not connection.invalidated):
        connection.invalidate()


def _execute(connection: Connection, driver: Any, statement: str) -> None:
    """Begin or end a transaction of SQLite's; errors are wrapped as SQLAlchemy does it."""
    try:
        driver.execute(statement)
    except sqlite3.Error as error:
        connection._handle_dbapi_exception(error, statement, None, None, None)


def _set_autocommit(connection: Connection, mode: bool) -> None:
    driver: Any = connection.connection.dbapi_connection
    if driver.autocommit is not mode:
        try:
            driver.autocommit = mode
        except connection.dialect.loaded_dbapi.Error as error:  # in the middle of something that was interrupted
            connection.invalidate()
            raise OperationalError(None, None, error, connection_invalidated=True) from error


# The queue of SQLite's writers.


class _Ticket:
    """A place in the queue; `turn` is there for one who found others in it."""

    def __init__(self) -> None:
        self.turn: threading.Event | None = None
        self.gone = False


class WriterQueue:
    """A first-come first-served lock.

    It is never held while code of the caller runs (values are serialised before, deserialised after), so whoever
    holds it finishes. An interruption (Ctrl-C) may come between any two steps of the main thread, also while it
    leaves. That it is gone is therefore noted in one step, by itself; if the next in the queue was not called any
    more, it finds out by looking.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards the queue, held for microseconds
        self._tickets: deque[_Ticket] = deque()  # the first one's turn it is; there may be some that are gone

    def run(self, do: Callable[[], T]) -> T:
        """Wait until it is this caller's turn, and call `do`."""
        ticket = _Ticket()
        try:
            with self._mutex:
                if self._tickets:
                    ticket.turn = threading.Event()
                self._tickets.append(ticket)
            if ticket.turn is not None:
                self._call_first()
                while not ticket.turn.wait(_PATIENCE):
                    self._call_first()
            return do()
        finally:
            ticket.gone = True
            self._call_first()

    def _call_first(self) -> None:
        """Remove those at the head who are gone, and tell the first that it is its turn; any number of times."""
        with self._mutex:
            while self._tickets and self._tickets[0].gone:
                self._tickets.popleft()
            first = self._tickets[0].turn if self._tickets else None
            if first is not None:
                first.set()


_queues: WeakValueDictionary[object, WriterQueue] = WeakValueDictionary()
_queues_mutex = threading.Lock()


def _queue_of(source: Source) -> WriterQueue:
    """The queue of a SQLite database, shared by everybody in this process who uses it."""
    if source.engine is not None and isinstance(source.engine.pool, StaticPool):
        key: object = source.engine.pool
    else:
        key = object() if source.in_memory else Path(str(source.url.database)).resolve()
    with _queues_mutex:
        return _queues.setdefault(key, WriterQueue())
