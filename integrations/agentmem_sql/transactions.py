"""How work runs on a connection: reads with as few round trips as the database allows, writes in a transaction.

A read is promised no transaction, so none is begun where the driver lets us: every statement is sent alone and
sees what is committed when it runs. A write is one transaction of isolation READ COMMITTED (on SQLite, which has
but one isolation, one that takes the write lock at once), committed when the work returns and rolled back when it
raises; one that is a single statement is a transaction by itself where the driver's mode allows it.

On engines of our own the driver's mode says which of the two it is, since changing SQLAlchemy's isolation level
for each use costs more than a read. On an engine that was given the mode is SQLAlchemy's, so that the owner's
settings and listeners go on as they are.

Everything here is synchronous: the asynchronous engines run it in a greenlet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from agentmem.errors import StorageError
from agentmem_sql import faults
from agentmem_sql.drivers import spelled
from agentmem_sql.idle import Idle
from agentmem_sql.prepared import change

T = TypeVar("T")
Work = Callable[[Connection], T]
_Prepare = Callable[[Connection], None]


@dataclass(frozen=True)
class Transactions:
    """Reads and writes on one engine."""

    reader: Engine
    writer: Engine
    before_read: _Prepare | None
    before_write: _Prepare | None  # the first act of a transaction
    commits: bool = False  # whether the reader's connections commit every statement
    plain: bool = False  # whether SQLAlchemy need not know of a write's transaction
    begins: bool = False  # whether SQLAlchemy is to know of a read, as listeners and pools of the owner expect
    idle: Idle | None = None  # for connections of reader and writer, which then are the same engine

    def read(self, work: Work[T]) -> T:
        """Do work that changes nothing."""
        return self._connected(self.reader, self._read_on, work)

    def write(self, work: Work[T]) -> T:
        """Do work in one transaction, on a connection of its own."""
        return self._connected(self.writer, self.write_on, work)

    def _connected(self, engine: Engine, do: Callable[[Connection, Work[T]], T], work: Work[T]) -> T:
        """Do work on a connection that nobody else uses meanwhile."""
        idle = self.idle
        if idle is None:
            with connect(engine) as connection:
                return do(connection, work)
        idle.enter()
        try:
            since = idle.round
            connection = idle.take() or connect(engine)
            try:
                result = do(connection, work)
            except BaseException:
                # If the connection was lost, so were the others, and the work may be run again only once.
                idle.release()
                connection.close()
                raise
            idle.keep(connection, since)
            return result
        finally:
            idle.leave()

    def _read_on(self, connection: Connection, work: Work[T]) -> T:
        if self.before_read is not None:
            self.before_read(connection)
        if self.begins:
            connection.begin()  # closing the connection rolls it back
        try:
            return work(connection)
        except InvalidRequestError:
            connection.invalidate()  # its state is not what SQLAlchemy takes it for
            raise
        except DBAPIError as error:
            _forget_prepared(connection, error)
            raise

    def way(self, *, write: bool, single: bool) -> Callable[[Work[T]], T]:
        """How to do work; a single statement is a transaction by itself where the database lets it be one."""
        return self.write if write and not (single and self.commits) else self.read

    def write_on(self, connection: Connection, work: Work[T]) -> T:
        """Do work in one transaction on a connection of ``writer`` that has none open."""
        try:
            if self.plain:
                _begin_immediate(connection)
                result = work(connection)
                _commit(connection)
                return result
            with connection.begin():
                if self.before_write is not None:
                    self.before_write(connection)
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


def own(engine: Engine, idle: Idle | None = None) -> Transactions:
    """Transactions on an engine that ``engines`` made."""
    if engine.dialect.name == "sqlite":
        return Transactions(engine, engine, None, _begin_immediate, plain=True, idle=idle)
    if engine.dialect.name == "postgresql":
        return Transactions(engine, engine, _autocommit_on, _autocommit_off, commits=True, idle=idle)
    return Transactions(engine, engine, None, _start_transaction, idle=idle)


def given(engine: Engine) -> Transactions:
    """Transactions on an engine of the caller's (the ``sync_engine`` of an asynchronous one)."""
    if engine.dialect.name == "sqlite":
        return Transactions(engine, engine, None, _begin_immediate, begins=True)
    if engine.dialect.name == "postgresql":
        # A listener for `begin` may set what the rows that one sees depend on, for as long as the transaction lasts.
        listened = bool(engine.dispatch.begin)
        reader = engine if listened else engine.execution_options(isolation_level="AUTOCOMMIT")
        writer = engine.execution_options(isolation_level="READ COMMITTED")
        return Transactions(reader, writer, None, None, commits=not listened, begins=True)
    return Transactions(engine, engine, None, _start_read_committed, begins=True)


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
        where = spelled(engine.url)
        raise StorageError(
            f"cannot connect to {where}: {type(error).__name__}: {error}; {faults.advice(error)}"
        ) from error


def _roll_back(connection: Connection) -> None:
    """End, on the database, what SQLAlchemy may think there is no need to end; see ``own``."""
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
    if faults.is_unprepared(error) and not connection.invalidated:
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


def _commit(connection: Connection) -> None:
    """End SQLite's transaction, unless the work did."""
    driver: Any = connection.connection.driver_connection
    if driver.in_transaction:
        change(connection, "COMMIT", ())


def _autocommit_on(connection: Connection) -> None:
    _set_autocommit(connection, True)


def _autocommit_off(connection: Connection) -> None:
    _set_autocommit(connection, False)


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
