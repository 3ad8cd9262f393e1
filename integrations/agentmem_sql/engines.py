"""From a URL, or the caller's engine, to the one synchronous engine that a saver works with.

A URL that names an asynchronous driver is served by the synchronous driver of the same database: tasks are served by
threads, which is as fast for one task and faster for many. Options that only the asynchronous driver has are refused by
name. An `AsyncEngine` is taken for its URL and options in the same way.
"""

from __future__ import annotations

import inspect
import sqlite3
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import URL, Engine, ExceptionContext, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from agentmem.errors import MissingExtraError, StorageError
from agentmem_sql.statements import DIRECT

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

BUSY_TIMEOUT = 30  # seconds that a writer waits for the lock of a SQLite file held by another process

# Connections of one engine. If all are in use, waiting for one is faster than opening another, which takes
# milliseconds and on PostgreSQL a process of the server; and servers allow few (100 by default).
POOL_SIZE = 16

SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")

# The driver of each database, the extra that installs it, and the asynchronous drivers that it replaces.
_MYSQL = "pymysql", "mysql", ("asyncmy", "aiomysql")
_DRIVERS = {
    "sqlite": ("pysqlite", "sql", ("aiosqlite",)),
    "postgresql": ("psycopg", "postgres", ("asyncpg", "psycopg_async")),
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}
_SPELLINGS = {"postgres": "postgresql"}  # of hosting services

# Options that are not free or that the synchronous driver lacks, and what to do. Any others it refuses itself.
_ISOLATION = "leave it out: writes are READ COMMITTED transactions, and reads have none"
_REFUSED = {
    "isolation_level": _ISOLATION,
    "skip_autocommit_rollback": _ISOLATION,
    "async_creator": "write `creator`, a function that makes a synchronous connection",
    "auth_plugin": "write connect_args={'auth_plugin_map': ...}",
    "iter_chunk_size": "leave it out",
}
_WITHOUT_CACHE = "leave it out, or behind PgBouncer write connect_args={'prepare_threshold': None}"
_REFUSED_OF_ASYNCPG = {
    "command_timeout": "write options='-c statement_timeout=...', in milliseconds",
    "direct_tls": "write sslnegotiation=direct",
    "prepared_statement_cache_size": _WITHOUT_CACHE,
    "prepared_statement_name_func": _WITHOUT_CACHE,
    "server_settings": "write options='-c name=value -c ...'",
    "ssl": "write sslmode= (require, verify-full ...), sslrootcert=, sslcert=",
    "statement_cache_size": _WITHOUT_CACHE,
    "timeout": "write connect_timeout=, in whole seconds",
}


class Source(NamedTuple):
    """A database as its synchronous driver addresses it, with options for `create_engine`; or the caller's engine."""

    url: URL
    options: Mapping[str, Any]
    engine: Engine | None = None

    @property
    def in_memory(self) -> bool:
        """Whether it is a SQLite database without a file."""
        name, query = self.url.database or "", self.url.query
        return self.url.get_backend_name() == "sqlite" and (
            name in ("", ":memory:")
            or name.startswith("file::memory:")
            or query.get("mode") == "memory"
            or query.get("vfs") == "memdb"
        )


def source_of(database: Engine | AsyncEngine | URL | str, options: Mapping[str, Any] | None = None) -> Source:
    """Read a URL, with arguments for `create_engine`, or an engine; raises as `SQLAlchemySaver`."""
    if isinstance(database, URL | str):
        return _synchronous(parse(database), options or {})
    if options:
        raise StorageError("expected engine_options beside a URL, found them beside an engine, which has its own")
    url = parse(database.url)
    if isinstance(database, Engine):
        return Source(_with_driver(url), {}, database)
    if Source(url, {}).in_memory:
        raise StorageError(
            "the AsyncEngine given to SQLAlchemySaver holds its database in memory, which no other connection sees; "
            "use a file, a synchronous engine with poolclass=StaticPool, or "
            "SQLAlchemySaver.from_url('sqlite:///:memory:')"
        )
    return _synchronous(url, _options_of(database))


def parse(url: URL | str) -> URL:
    """A URL as SQLAlchemy reads it.

    Raises:
        StorageError: it cannot be read, or names a database or a driver that cannot be used.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:  # ValueError: a port that is no number
        raise StorageError(
            "expected a database URL such as 'sqlite:///threads.db' (three slashes, then the path) or "
            f"'postgresql://user@host/database', found one that cannot be read: {error}"
        ) from error
    name, _, driver = parsed.drivername.partition("+")
    name = _SPELLINGS.get(name, name)
    own, _, asynchronous = _DRIVERS.get(name, ("", "", ()))
    if not own or driver not in ("", own, *asynchronous):
        usable = f"{name} or {name}+{own}" if own else "sqlite, postgresql, mysql or mariadb"
        raise StorageError(
            f"expected a URL that begins with {usable}, found {parsed.drivername!r}, which this version cannot use"
        )
    if name == "sqlite" and parsed.host:
        raise StorageError(
            f"expected three slashes before the path of a SQLite file, found {safe_url(parsed)!r}, where "
            f"{parsed.host!r} stands for a server; write 'sqlite:///{parsed.host}{parsed.database or ''}' "
            "(four slashes for an absolute path)"
        )
    return parsed.set(drivername=f"{name}+{driver}" if driver else name)


def check_shared(engine: Engine) -> None:
    """Refuse the one connection of an engine if other threads cannot use it: graphs and tasks do."""
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


def safe_url(url: URL) -> str:
    """A URL without its password and options, which may be secret."""
    return url.set(query={}).render_as_string(hide_password=True)


# From asynchronous drivers and engines to synchronous ones.


def _with_driver(url: URL) -> URL:
    name = url.get_backend_name()
    if name in ("mysql", "mariadb") and "charset" not in url.query:
        url = url.update_query_dict({"charset": "utf8mb4"})
    return url.set(drivername=f"{name}+{_DRIVERS[name][0]}")


def _synchronous(url: URL, options: Mapping[str, Any]) -> Source:
    """The same database and options with the synchronous driver."""
    driver = url.drivername.partition("+")[2]
    refused = _REFUSED | (_REFUSED_OF_ASYNCPG if driver == "asyncpg" else {})
    for name in (*options, *options.get("connect_args", {}), *url.query):
        if name in refused:
            raise StorageError(
                f"expected options of {_DRIVERS[url.get_backend_name()][0]} that may be chosen, found {name!r}"
                f"{' of ' * bool(driver)}{driver}; {refused[name]}"
            )
    return Source(_with_driver(url), options)


def _options_of(engine: AsyncEngine) -> dict[str, Any]:
    """The options that an asynchronous engine was made with, as far as a synchronous one has them."""
    pool: Any = engine.pool
    creator: Any = pool._creator
    if getattr(creator, "__module__", None) != create_engine.__module__:
        raise StorageError(
            "the AsyncEngine given to SQLAlchemySaver makes its connections by a function of yours (`async_creator` "
            "or `creator`), which cannot make synchronous ones; pass a full URL, or a synchronous engine with a "
            "`creator`"
        )
    # SQLAlchemy keeps `connect_args` nowhere but among what its own creator closes over.
    arguments: Mapping[str, Any] = inspect.getclosurevars(creator).nonlocals.get("cparams", {})
    of_url = engine.dialect.create_connect_args(engine.url)[1]
    execution = engine.get_execution_options()
    own = {name: value for name, value in arguments.items() if name not in of_url or of_url[name] != value}
    options: dict[str, Any] = {
        "connect_args": own,
        "echo": engine.echo,
        # Reads and writes have an isolation level of their own.
        "execution_options": {name: value for name, value in execution.items() if name != "isolation_level"},
        "pool_recycle": pool._recycle,
        "pool_pre_ping": pool._pre_ping,
    }
    if isinstance(pool, NullPool | StaticPool):
        options["poolclass"] = type(pool)
    elif isinstance(pool, QueuePool):
        options |= {"pool_size": pool.size(), "max_overflow": pool._max_overflow, "pool_timeout": pool._timeout}
    return options


# The engine.


def make_engine(source: Source, synchronous: str) -> Engine:
    """The engine of a source that is not one already; raises `MissingExtraError` without its driver.

    `synchronous`: how SQLite's files are synchronised.
    """
    backend = source.url.get_backend_name()
    try:
        engine = create_engine(source.url, **_arguments(source))
    except ImportError as error:  # not only ModuleNotFoundError: psycopg without its library says this
        driver, extra, _ = _DRIVERS[backend]
        raise MissingExtraError(error.name or driver, extra) from error
    # Who asked for a log of statements gets all of them.
    engine.update_execution_options(**{DIRECT: not source.options.get("echo")})
    if backend == "sqlite":

        def synchronise(connection: Any, _record: object) -> None:
            connection.execute(f"PRAGMA synchronous={synchronous}").close()

        event.listen(engine, "connect", synchronise)
        event.listen(engine, "handle_error", _keep_connection)
    elif backend != "postgresql":
        event.listen(engine, "connect", _tune_mysql)
    return engine


def _arguments(source: Source) -> dict[str, Any]:
    """The arguments of `create_engine`: ours, and over them the caller's."""
    url, options, _ = source
    chosen: dict[str, Any] = {"hide_parameters": True, "skip_autocommit_rollback": True}
    chosen["pool_reset_on_return"] = None  # a work ends what it begins, and nobody else begins any
    connect_args: dict[str, Any] = {}
    if source.in_memory:  # which one connection sees, that everybody shares
        chosen["poolclass"], connect_args["check_same_thread"] = StaticPool, False
    elif not {"pool", "poolclass"} & options.keys():
        chosen |= {"pool_size": POOL_SIZE, "max_overflow": 0}
    match url.get_backend_name():
        case "sqlite":
            connect_args["isolation_level"] = None
            if "timeout" not in url.query:
                connect_args["timeout"] = BUSY_TIMEOUT
        case "postgresql":
            chosen["isolation_level"] = "READ COMMITTED"
            chosen["use_native_hstore"] = False  # or the first connection asks for it
            # The statements of the hot paths are few and fixed: planned once, when first used.
            if "prepare_threshold" not in url.query:
                connect_args["prepare_threshold"] = 0
        case _:
            chosen["isolation_level"] = "READ COMMITTED"
    return chosen | {**options, "connect_args": connect_args | options.get("connect_args", {})}


def _keep_connection(context: ExceptionContext) -> None:
    """Keep the connection to a file when its user is interrupted, so that it can be rolled back.

    SQLAlchemy would close it, and SQLite takes back nothing of a closed connection while something still refers to
    one of its cursors: the traceback of the interruption does, and the file would stay locked.
    """
    if not isinstance(context.original_exception, Exception):
        context.is_disconnect = False


def _tune_mysql(connection: Any, _record: object) -> None:
    connection.autocommit(True)
    with connection.cursor() as cursor:  # otherwise a server may cut values that are too long
        cursor.execute("SET SESSION sql_mode = CONCAT(@@SESSION.sql_mode, ',STRICT_TRANS_TABLES')")
