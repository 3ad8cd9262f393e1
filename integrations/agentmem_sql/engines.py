"""From a URL, or an engine of the caller's, to the one synchronous engine that a saver works with.

A URL may name its driver or leave it to us (`postgresql://`). One that names an asynchronous driver is served by the
synchronous one of the same database, and what is said in that driver's words is translated, or refused by name:
tasks are served by threads, which is as quick for one task and quicker for many. An `AsyncEngine` is taken for its
URL and options in the same way.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import URL, Engine, ExceptionContext, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool, StaticPool

from agentmem.errors import MissingExtraError, StorageError
from agentmem_sql.statements import DIRECT

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

# How long a writer waits for the lock of a SQLite file that another process holds, in seconds.
BUSY_TIMEOUT = 30

# Connections of one engine. Whoever finds all of them in use waits for one, which is sooner done than opening
# another: it takes milliseconds, on PostgreSQL a process of the server, and servers allow few (100 by default).
POOL_SIZE = 16

SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")

# What transactions here depend on.
_FIXED = ("isolation_level", "skip_autocommit_rollback")


@dataclass(frozen=True)
class _Backend:
    """A kind of database: the driver that serves it, those whose place it takes, and the extra that installs it."""

    driver: str
    asynchronous: tuple[str, ...]
    extra: str


_MYSQL = _Backend("pymysql", ("asyncmy", "aiomysql"), "mysql")
_BACKENDS = {
    "sqlite": _Backend("pysqlite", ("aiosqlite",), "sql"),
    "postgresql": _Backend("psycopg", ("asyncpg", "psycopg_async"), "postgres"),
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}

# Hosting services still spell it so.
_SPELLINGS = {"postgres": "postgresql"}

_INSTEAD = {
    "psycopg2": "use psycopg (version 3)",
    "pg8000": "use psycopg",
    "mysqldb": "use pymysql, which needs no compiler",
}

# Options of asynchronous drivers for which something else is to be written; others that it does not have, the
# synchronous driver refuses by name itself.
_ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "aiosqlite": {"iter_chunk_size": "leave it out"},
    "asyncpg": {
        "direct_tls": "write sslnegotiation=direct",
        "prepared_statement_name_func": "behind PgBouncer write connect_args={'prepare_threshold': None}",
    },
    "asyncmy": {},
    "aiomysql": {
        "auth_plugin": "write connect_args={'auth_plugin_map': ...}",
        "minsize": "write engine_options={'pool_size': ...}",
        "maxsize": "write engine_options={'pool_size': ...}",
    },
}
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


@dataclass(frozen=True)
class Source:
    """Where a database is and how it is connected to, in the words of its synchronous driver.

    Attributes:
        url: with the driver's name.
        options: for `create_engine`.
        engine: the caller's own, if it is synchronous; it keeps its settings and is never disposed of.
        execution_options: of the caller's asynchronous engine, which ours inherits.
    """

    url: URL
    options: Mapping[str, Any]
    engine: Engine | None = None
    execution_options: Mapping[str, Any] | None = None

    @property
    def in_memory(self) -> bool:
        """Whether it is a SQLite database without a file."""
        return is_memory(self.url)


def source_of(given: Engine | AsyncEngine | URL | str, options: Mapping[str, Any] | None = None) -> Source:
    """Read a URL or an engine.

    Args:
        given: the database.
        options: arguments for `create_engine`, which may hold `connect_args` in the words of the driver that the URL
            names.

    Raises:
        StorageError: the URL cannot be read, names a database or driver that cannot be used, or an option of an
            asynchronous driver that the synchronous one has no counterpart for; or an asynchronous engine has its
            database in memory, or connections that the caller makes.
    """
    if not isinstance(given, URL | str) and options:
        raise StorageError("expected engine_options beside a URL, found them beside an engine, which has its own")
    if isinstance(given, Engine):
        return Source(_with_driver(parse(given.url)), {}, given)
    if isinstance(given, URL | str):
        url = parse(given)
        url, chosen = _translated(url, dict(options or {}))
        return Source(url, chosen)
    url = parse(given.url)
    if is_memory(url):
        raise StorageError(
            "the AsyncEngine given to SQLAlchemySaver holds its database in memory, which no other connection sees; "
            "use a file, a synchronous engine with poolclass=StaticPool, or "
            "SQLAlchemySaver.from_url('sqlite:///:memory:')"
        )
    url, chosen = _translated(url, _options_of(given))
    inherited = dict(given.get_execution_options())
    inherited.pop("isolation_level", None)  # reads and writes have theirs
    return Source(url, chosen, None, inherited)


def parse(url: URL | str) -> URL:
    """The URL of a database that can be used here, as SQLAlchemy writes it.

    Raises:
        StorageError: it cannot be read, or names a database or a driver that this version does not speak.
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
    backend = _BACKENDS.get(name)
    if backend is None or driver not in ("", backend.driver, *backend.asynchronous):
        usable = "sqlite, postgresql, mysql or mariadb" if backend is None else f"{name} or {name}+{backend.driver}"
        raise StorageError(
            f"expected a URL that begins with {usable}, found {parsed.drivername!r}, which this version cannot use"
            + (f": {_INSTEAD[driver]}" if driver in _INSTEAD else "")
        )
    if name == "sqlite" and parsed.host:
        raise StorageError(
            f"expected three slashes before the path of a SQLite file, found {safe_url(parsed)!r}, where "
            f"{parsed.host!r} stands for a server; write 'sqlite:///{parsed.host}{parsed.database or ''}' "
            "(four slashes for an absolute path)"
        )
    return parsed.set(drivername=f"{name}+{driver}" if driver else name)


def safe_url(url: URL) -> str:
    """A URL without what may be secret: a password, and options, which may hold one as well."""
    return url.set(query={}).render_as_string(hide_password=True)


def is_memory(url: URL) -> bool:
    """Whether a URL names a SQLite database without a file."""
    name = url.database or ""
    return url.get_backend_name() == "sqlite" and (
        name in ("", ":memory:")
        or name.startswith("file::memory:")
        or url.query.get("mode") == "memory"
        or url.query.get("vfs") == "memdb"
    )


def make_engine(source: Source, synchronous: str) -> Engine:
    """The engine of a source that is not one already; `synchronous` is how SQLite's files are synchronised.

    Raises:
        MissingExtraError: the driver is not installed.
    """
    url = source.url
    backend = url.get_backend_name()
    try:
        engine = create_engine(url, **_arguments(url, source.options))
    except ImportError as error:  # not only ModuleNotFoundError: psycopg without its library says this
        raise MissingExtraError(error.name or url.get_driver_name(), _BACKENDS[backend].extra) from error
    # Who asked for a log of statements gets all of them.
    direct = {DIRECT: not source.options.get("echo")}
    engine.update_execution_options(**direct, **(source.execution_options or {}))
    if backend == "sqlite":

        def synchronise(connection: Any, _record: object) -> None:
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA synchronous={synchronous}")
            cursor.close()

        event.listen(engine, "connect", synchronise)
        event.listen(engine, "handle_error", _keep_connection)
    elif backend in ("mysql", "mariadb"):
        event.listen(engine, "connect", _tune_mysql)
    return engine


def check_options(options: Mapping[str, Any] | None, synchronous: str) -> str:
    """How SQLite's files are synchronised, as SQLite writes it.

    Raises:
        StorageError: it is nothing that SQLite knows, or `options` holds one that cannot be chosen.
    """
    if synchronous.upper() not in SYNCHRONOUS:
        raise StorageError(
            f"expected `synchronous` to be one of {', '.join(SYNCHRONOUS)} (what SQLite knows), found {synchronous!r}"
        )
    fixed = [name for name in _FIXED if name in (options or {})]
    if fixed:
        raise StorageError(
            f"expected engine_options without {fixed[0]!r}, which is not free: writes are READ COMMITTED "
            "transactions and reads have none; leave it out"
        )
    return synchronous.upper()


def _arguments(url: URL, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `create_engine`: ours, and over them the caller's."""
    chosen: dict[str, Any] = {"hide_parameters": True, "skip_autocommit_rollback": True}
    if not {"pool", "poolclass"} & options.keys():
        chosen |= {"pool_size": POOL_SIZE, "max_overflow": 0}
    match url.get_backend_name():
        case "sqlite":
            chosen["connect_args"] = {"isolation_level": None}
            chosen["pool_reset_on_return"] = None  # a work ends what it begins, and nobody else begins any
            if "timeout" not in url.query:
                chosen["connect_args"]["timeout"] = BUSY_TIMEOUT
        case "postgresql":
            chosen["isolation_level"] = "READ COMMITTED"
            chosen["use_native_hstore"] = False  # or the first connection asks for it
            # The statements of the hot paths are few and fixed: planned once, when first used.
            if "prepare_threshold" not in url.query:
                chosen["connect_args"] = {"prepare_threshold": 0}
        case _:
            chosen["isolation_level"] = "READ COMMITTED"
    if "connect_args" in options:
        chosen["connect_args"] = chosen.get("connect_args", {}) | options["connect_args"]
    return chosen | {name: value for name, value in options.items() if name != "connect_args"}


def _keep_connection(context: ExceptionContext) -> None:
    """Keep the connection to a file when its user is interrupted, so that it can be rolled back.

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


# What asynchronous drivers and engines say, in the words of the synchronous ones.


def _with_driver(url: URL) -> URL:
    name = url.drivername.partition("+")[0]
    if _BACKENDS[name] is _MYSQL and "charset" not in url.query:
        url = url.update_query_dict({"charset": "utf8mb4"})
    return url.set(drivername=f"{name}+{_BACKENDS[name].driver}")


def _translated(url: URL, options: dict[str, Any]) -> tuple[URL, dict[str, Any]]:
    """A URL that names its synchronous driver, and options for `create_engine` that go with it."""
    if "async_creator" in options:
        _refuse("async_creator", "write `creator`, a function that makes a synchronous connection")
    if isinstance(pool := options.get("poolclass"), type) and issubclass(pool, AsyncAdaptedQueuePool):
        options["poolclass"] = QueuePool
    driver = url.drivername.partition("+")[2]
    if driver not in _ELSEWHERE:
        return _with_driver(url), options
    query: dict[str, Any] = {}
    translated: list[dict[str, Any]] = []
    for name, value in url.query.items():
        option = _option(driver, name, value)
        if option == {name: value}:
            query[name] = value
        else:
            translated.append(option)
    translated += [_option(driver, name, value) for name, value in options.get("connect_args", {}).items()]
    connect_args = {name: value for option in translated for name, value in option.items()}
    if settings := [option["options"] for option in translated if "options" in option]:
        connect_args["options"] = " ".join(settings)
    if connect_args:
        options["connect_args"] = connect_args
    return _with_driver(url.set(query=query)), options


def _option(driver: str, name: str, value: Any) -> dict[str, Any]:
    """An option of an asynchronous driver as the synchronous one takes it."""
    if name in _ELSEWHERE[driver]:
        _refuse(name, _ELSEWHERE[driver][name], driver)
    if driver != "asyncpg":  # sqlite3 and PyMySQL call everything else as aiosqlite and asyncmy do
        return {name: value}
    match name:
        case "ssl":
            if value not in _SSL_MODES:
                _refuse(name, f"write sslmode=, one of {', '.join(_SSL_MODES)}, and sslrootcert=, sslcert=", driver)
            return {"sslmode": value}
        case "database":
            return {"dbname": value}
        case "timeout":
            return {"connect_timeout": math.ceil(float(value))}
        case "command_timeout":
            return {"options": f"-c statement_timeout={math.ceil(1000 * float(value))}"}
        case "server_settings":
            settings = [f"-c {setting}={_escaped(str(text))}" for setting, text in value.items()]
            return {"options": " ".join(settings)}
        case "statement_cache_size" | "prepared_statement_cache_size":
            if int(value) != 0:
                _refuse(name, "leave it out: psycopg keeps the statements that it prepared", driver)
            return {"prepare_threshold": None}
        case _:
            return {name: value}


def _escaped(text: str) -> str:
    """A value inside libpq's `options`."""
    return text.replace("\\", "\\\\").replace(" ", "\\ ")


def _refuse(name: str, instead: str, driver: str = "") -> NoReturn:
    of = f" of {driver}" if driver else ""
    raise StorageError(
        f"expected options of a synchronous driver, found {name!r}{of}, which has no counterpart there; {instead}"
    )


def _options_of(engine: AsyncEngine) -> dict[str, Any]:
    """What an asynchronous engine was made with, as far as a synchronous one can be made so."""
    pool: Any = engine.pool
    options: dict[str, Any] = {"echo": engine.echo} if engine.echo else {}
    if isinstance(pool, NullPool | StaticPool):
        options["poolclass"] = type(pool)
    elif isinstance(pool, QueuePool):
        options |= {"pool_size": pool.size(), "max_overflow": pool._max_overflow, "pool_timeout": pool._timeout}
    options |= {"pool_recycle": pool._recycle, "pool_pre_ping": pool._pre_ping}
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
    connect_args = {name: value for name, value in arguments.items() if name not in of_url or of_url[name] != value}
    if connect_args:
        options["connect_args"] = connect_args
    return options
