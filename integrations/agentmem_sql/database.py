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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from sqlalchemy import URL, Connection, Engine, inspect
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import Pool, StaticPool

from agentmem.errors import StorageError
from agentmem_sql import db_errors
from agentmem_sql.engines import Source, check_options, make_engine, safe_url, source_of
from agentmem_sql.migrations import MIGRATIONS, Migration, alone, is_current, migrate
from agentmem_sql.schema import Tables
from agentmem_sql.statements import change, check_mysql, enable_wal

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")
Work = Callable[[Connection], T]

# How long a writer in the queue goes without looking for itself, in seconds.
_PATIENCE = 1.0
# Beyond this nobody waits for a turn that may not come: a lock timeout may have taken most of it, in seconds.
_RETRY_BUDGET = 20.0
_RETRIES = 6
_FIRST_PAUSE = 0.01
# Every connection of a pool may have prepared the same statement.
_MOST_UNPREPARED = 32


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
        prepare: Callable[[Connection], None] | None = None,
        is_prepared: Callable[[Connection], bool] | None = None,
        on_lost: Callable[[], None] | None = None,
        on_fork: Callable[[], None] | None = None,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> None:
        """Take a URL, or an engine of the caller's, which keeps its settings and is never disposed of.

        Args:
            engine: the database; an asynchronous engine is taken for its URL and options.
            tables: the tables that are made, or brought up to date, before the first work.
            synchronous: how SQLite's files are synchronised: OFF, NORMAL, FULL or EXTRA.
            engine_options: more arguments for `create_engine`, for an engine made here.
            must_exist: make neither file nor tables, and refuse a database that has none.
            prepare: called in a write transaction once the tables are there, before the first work, by one process
                and one thread at a time; where the database takes no writes, as a read. If it raises, the next call
                begins with it again. First calls that come at the same time may each call it.
            is_prepared: asked before, as a read, whether `prepare` is needed at all: who only reads waits for no
                writer then.
            on_lost: called when a connection turns out to be lost, before anything is run again.
            on_fork: called in a process that was forked from this one, while it has one thread.
            migrations: what makes the tables.

        Raises:
            StorageError: the URL or the engine cannot be used.
        """
        self.tables = tables
        self._synchronous = check_options(engine_options, synchronous)
        self._source = source_of(engine, engine_options)
        self._must_exist = must_exist
        self._prepare = prepare
        self._is_prepared = is_prepared
        self._on_lost = on_lost
        self._on_fork = on_fork
        self._migrations = migrations
        self._anchor: sqlite3.Connection | None = None
        if self._source.in_memory:
            self._take_memory()
        self.backend = self._source.url.get_backend_name()
        given = self._source.engine
        self._one_connection = self._source.in_memory or (given is not None and isinstance(given.pool, StaticPool))
        self._queue = _queue_of(self._source) if self.backend == "sqlite" else None
        self._transactions: _Transactions | None = None if given is None else _of_given(given)
        self._making = threading.Lock()
        self._inherited = False  # whether the connections are those of the process that this one was forked from
        self._ready = False
        self._closed = False
        _databases.add(self)

    def run(self, work: Work[T], *, write: bool = False, autocommit: bool = False) -> T:
        """Do work, a write in one transaction; with `autocommit` the write is one statement, and may be one itself.

        Raises:
            StorageError: the database could not be opened or did not take it, or the saver is closed.
            MissingExtraError: the driver is not installed.
        """
        retries: _Retries | None = None
        while True:
            try:
                self.check_open()
                transactions = self._transactions or self._connect()
                if not self._ready:
                    self._in_turn(partial(self._set_up, transactions), write=True)
                if write and not (autocommit and transactions.autocommits):
                    return self._in_turn(partial(transactions.write, work), write=True)
                return self._in_turn(partial(transactions.read, work), write=write)
            except DBAPIError as error:
                retries = retries or _Retries()
                pause = self._pause(retries, error)
            time.sleep(pause)

    def check_open(self) -> None:
        """Refuse a call after `close`.

        Raises:
            StorageError: it is closed.
        """
        if self._closed:
            raise StorageError("this SQLAlchemySaver is closed; make a new one with from_url(...)")

    def close(self) -> None:
        """Close every connection that was opened here; from anywhere, any number of times."""
        self._closed = True
        if self._source.engine is None and self._transactions is not None:
            self._transactions.engine.dispose()
        if self._anchor is not None:
            self._anchor.close()

    def after_fork(self) -> None:
        """Forget, in a process that was just forked, what belongs to the threads of the other one."""
        self._making = threading.Lock()
        self._inherited = True
        if self._queue is not None:
            self._queue.reset()
        if self._on_fork is not None:
            self._on_fork()

    def _connect(self) -> _Transactions:
        with self._making:
            if self._transactions is None:
                self._transactions = _of_own(make_engine(self._source, self._synchronous))
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
        if self._prepare is not None and not (self._is_prepared and transactions.read(self._is_prepared)):
            try:
                with connect(transactions.writer) as connection:
                    alone(connection, self.tables, transactions.write_on, self._prepare)
            except DBAPIError as error:
                if not db_errors.is_read_only(error):
                    raise
                transactions.read(self._prepare)
        self._ready = True

    def _in_turn(self, do: Callable[[], T], *, write: bool) -> T:
        if self._inherited:
            self._leave_inherited()
        if self._queue is None:
            return do()
        if self._source.engine is not None:
            do = partial(self._alone, do)
        return self._queue.run(do) if write or self._one_connection else do()

    def _alone(self, do: Callable[[], T]) -> T:
        """Do something unless the only connection there is is in a transaction of the caller's."""
        given = self._source.engine
        if given is not None and isinstance(given.pool, StaticPool):
            record = vars(given.pool).get("connection")  # what there is before the first use is nothing
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
                self._transactions.engine.dispose(close=self.backend == "sqlite")
            self._inherited = False

    def _check_exists(self, transactions: _Transactions) -> None:
        threads, where = self.tables.threads, safe_url(self._source.url)

        def has_tables(connection: Connection) -> bool:
            return inspect(connection).has_table(threads.name, schema=threads.schema)

        if self.backend == "sqlite" and not self._source.in_memory:
            path = Path(str(self._source.url.database).removeprefix("file:").partition("?")[0])
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

    def _pause(self, retries: _Retries, error: DBAPIError) -> float:
        """How long to wait before the work is run again; raises where it is not."""
        if error.connection_invalidated and self._on_lost is not None:
            self._on_lost()
        pause = retries.pause(error)
        if pause is not None:
            return pause
        where = safe_url(self._source.url)
        message = " ".join(str(error.orig).split())
        raise StorageError(f"the database {where} answered: {message}; {db_errors.advice(error)}") from error


_databases: WeakSet[Database] = WeakSet()


def _after_fork() -> None:
    global _queues_mutex
    _queues_mutex = threading.Lock()
    for database in list(_databases):
        database.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Retries:
    """Which failed work of one call is run again, and when."""

    def __init__(self) -> None:
        self._lost = 0
        self._reconnected = False
        self._unprepared = 0
        self._first = time.monotonic()

    def pause(self, error: DBAPIError) -> float | None:
        """The seconds to wait before the work is run again; None where it is not."""
        if error.connection_invalidated:  # the pool has dropped that connection, and all that are as old
            again, self._reconnected = not self._reconnected, True
            return 0.0 if again else None
        if db_errors.is_unprepared(error) and self._unprepared < _MOST_UNPREPARED:
            self._unprepared += 1
            return 0.0
        over = self._lost >= _RETRIES or time.monotonic() - self._first > _RETRY_BUDGET
        if over or not db_errors.is_transient(error):
            return None
        self._lost += 1
        return _FIRST_PAUSE * float(2**self._lost) * random.uniform(0.5, 1.0)


# Transactions.


class _Transactions:
    """Reads and writes on one engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        reader: Engine | None = None,
        writer: Engine | None = None,
        before_read: Callable[[Connection], None] | None = None,
        before_write: Callable[[Connection], None] | None = None,
        autocommits: bool = False,
        announced: bool = False,
        sqlite: bool = False,
    ) -> None:
        """Take an engine.

        Args:
            engine: whose connections these are.
            reader: the engine with the options of reads.
            writer: the engine with the options of writes.
            before_read: the first act of a read.
            before_write: the first act of a transaction.
            autocommits: whether the reader's connections commit every statement.
            announced: whether SQLAlchemy is to know of a read, as listeners and pools of the owner expect.
            sqlite: whether a write's transaction is SQLite's own, which SQLAlchemy need not know of.
        """
        self.engine = engine
        self.reader = reader or engine
        self.writer = writer or engine
        self.autocommits = autocommits
        self._before_read = before_read
        self._before_write = before_write
        self._announced = announced
        self._sqlite = sqlite

    def read(self, work: Work[T]) -> T:
        """Do work that changes nothing, or is one statement that commits itself."""
        with connect(self.reader) as connection:
            if self._before_read is not None:
                self._before_read(connection)
            if self._announced:
                connection.begin()  # closing the connection rolls it back
            try:
                return work(connection)
            except InvalidRequestError:
                connection.invalidate()  # its state is not what SQLAlchemy takes it for
                raise
            except DBAPIError as error:
                _forget_prepared(connection, error)
                raise

    def write(self, work: Work[T]) -> T:
        """Do work in one transaction, on a connection of its own."""
        with connect(self.writer) as connection:
            return self.write_on(connection, work)

    def write_on(self, connection: Connection, work: Work[T]) -> T:
        """Do work in one transaction on a connection of `writer` that has none open."""
        try:
            if self._sqlite:
                driver: Any = connection.connection.driver_connection
                if driver.in_transaction:
                    _execute(connection, driver, "ROLLBACK")
                _execute(connection, driver, "BEGIN IMMEDIATE")
                result = work(connection)
                if driver.in_transaction:  # unless the work ended it
                    _commit(connection, driver)
                return result
            with connection.begin():
                if self._before_write is not None:
                    self._before_write(connection)
                return work(connection)
        except BaseException as error:
            _roll_back(connection)
            if isinstance(error, InvalidRequestError):
                connection.invalidate()  # as in `read`
            if isinstance(error, DBAPIError):
                _forget_prepared(connection, error)
            if isinstance(error, AssertionError) and isinstance(error.__context__, KeyboardInterrupt):
                # SQLAlchemy's commit, interrupted before it began, fails over what it asserts at its end.
                raise error.__context__ from None
            raise


def _of_own(engine: Engine) -> _Transactions:
    """Transactions on an engine that was made here.

    The driver's mode says whether a statement commits itself, since changing SQLAlchemy's isolation level for each
    use costs more than a read.
    """
    if engine.dialect.name == "sqlite":
        return _Transactions(engine, sqlite=True)
    if engine.dialect.name == "postgresql":
        on, off = partial(_set_autocommit, mode=True), partial(_set_autocommit, mode=False)
        return _Transactions(engine, before_read=on, before_write=off, autocommits=True)
    return _Transactions(engine, before_write=_start_transaction)


def _of_given(engine: Engine) -> _Transactions:
    """Transactions on an engine of the caller's, whose mode is SQLAlchemy's: its settings and listeners go on."""
    if engine.dialect.name == "sqlite":
        return _Transactions(engine, before_write=_begin_immediate, announced=True)
    if engine.dialect.name == "postgresql":
        # A listener for `begin` may set what the rows that one sees depend on, for as long as the transaction lasts.
        listened = bool(engine.dispatch.begin)
        reader = engine if listened else engine.execution_options(isolation_level="AUTOCOMMIT")
        writer = engine.execution_options(isolation_level="READ COMMITTED")
        return _Transactions(engine, reader=reader, writer=writer, autocommits=not listened, announced=True)
    return _Transactions(engine, before_write=_start_read_committed, announced=True)


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
    """End, on the database, what SQLAlchemy may think there is no need to end; see `_of_own`."""
    if connection.closed or connection.invalidated:
        return
    try:
        driver: Any = connection.connection.dbapi_connection
        driver.rollback()
    except BaseException as error:
        connection.invalidate()
        if not isinstance(error, Exception):  # otherwise the caller hears of the error that led here
            raise


def _forget_prepared(connection: Connection, error: DBAPIError) -> None:
    """Close a connection whose prepared statements are no good any more; the work is run again on another."""
    if db_errors.is_unprepared(error) and not connection.invalidated:
        connection.invalidate()


def _begin_immediate(connection: Connection) -> None:
    """Take SQLite's write lock at once, waiting for it.

    A deferred transaction that reads and then writes fails without waiting when another connection wrote in
    between, so one that a listener of the engine began is begun anew.
    """
    driver: Any = connection.connection.driver_connection
    if driver.in_transaction:
        change(connection, "ROLLBACK", ())
    change(connection, "BEGIN IMMEDIATE", ())


def _commit(connection: Connection, driver: Any) -> None:
    _execute(connection, driver, "COMMIT")


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


def _start_transaction(connection: Connection) -> None:
    change(connection, "START TRANSACTION", ())


def _start_read_committed(connection: Connection) -> None:
    connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
    change(connection, "START TRANSACTION", ())


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
        self.reset()

    def reset(self) -> None:
        """Forget who waits: after a fork, those are threads of the other process."""
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


_queues: WeakValueDictionary[Path, WriterQueue] = WeakValueDictionary()
_queues_of_pools: WeakKeyDictionary[Pool, WriterQueue] = WeakKeyDictionary()
_queues_mutex = threading.Lock()


def _queue_of(source: Source) -> WriterQueue:
    """The queue of a SQLite database, shared by everybody in this process who uses it."""
    with _queues_mutex:
        if source.engine is not None and isinstance(source.engine.pool, StaticPool):
            return _queues_of_pools.setdefault(source.engine.pool, WriterQueue())
        if source.in_memory:
            return WriterQueue()
        return _queues.setdefault(Path(str(source.url.database)).resolve(), WriterQueue())
