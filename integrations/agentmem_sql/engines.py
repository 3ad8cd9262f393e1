"""From a URL, or the caller's engine, to the one synchronous engine that a saver works with; and its errors.

A URL that names an asynchronous driver is served by the synchronous one of the same database, and options that only the
former has are refused by name. An `AsyncEngine` is taken for its URL and options in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from agentmem.errors import ConfigError, MissingExtraError, StorageError
from agentmem_sql.statements import DIRECT

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

BUSY_TIMEOUT = 30  # seconds that a writer waits for the lock of a SQLite file held by another process

# Connections of one engine. If all are in use, waiting for one is faster than opening another, which takes
# milliseconds and on PostgreSQL a process of the server; and servers allow few (100 by default).
POOL_SIZE = 16

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
    if not isinstance(options or {}, Mapping) or not isinstance((options or {}).get("connect_args", {}), Mapping):
        raise ConfigError(f"expected dicts as `engine_options` and its `connect_args`, found {type(options).__name__}")
    if isinstance(database, URL | str):
        return _synchronous(parse(database), options or {})
    if not hasattr(database, "url"):
        raise StorageError(f"expected the URL of a database, or an engine of SQLAlchemy, found {database!r}")
    if options:
        raise StorageError("expected engine_options beside a URL, found them beside an engine, which has its own")
    url = parse(database.url)
    if Source(url, {}).in_memory or isinstance(database.pool, StaticPool):
        raise StorageError(
            "expected an engine that gives each thread a connection, found one with a database in memory or with one "
            "connection for everybody (StaticPool), on which a transaction of yours and the saver's would be one; use "
            "a file, or SQLAlchemySaver.from_url('sqlite:///:memory:')"
        )
    if isinstance(database, Engine):
        return Source(_with_driver(url), {}, database)
    return _synchronous(url, _options_of(database))


def parse(url: URL | str) -> URL:
    """A URL as SQLAlchemy reads it.

    Raises:
        StorageError: it cannot be read, or names a database or a driver that cannot be used.
    """
    try:
        parsed = make_url(url)
        if "\0" in (parsed.database or "") or "@" in (parsed.host or ""):
            raise ArgumentError("write '@' in a password as '%40', and no NUL")
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
            "or `creator`), which makes no synchronous ones; pass a full URL, or a synchronous engine with a `creator`"
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
    if isinstance(pool, NullPool):
        options["poolclass"] = NullPool
    elif isinstance(pool, QueuePool):
        options |= {"pool_size": pool.size(), "max_overflow": pool._max_overflow, "pool_timeout": pool._timeout}
    return options


# The engine.

# Of sqlite3, in a URL; SQLAlchemy ignores others where there is no `uri`.
_SQLITE_OPTIONS = {"timeout", "isolation_level", "detect_types", "check_same_thread", "cached_statements"}


def make_engine(source: Source) -> Engine:
    """The engine of a source that is not one already; raises `MissingExtraError` without its driver."""
    backend, query = source.url.get_backend_name(), source.url.query
    if backend == "sqlite" and "uri" not in query and (ignored := sorted(query.keys() - _SQLITE_OPTIONS)):
        raise StorageError(f"found {ignored} in the URL, which take uri=true: sqlite:///file:PATH?mode=ro&uri=true")
    try:
        engine = create_engine(source.url, **_arguments(source))
    except ImportError as error:  # not only ModuleNotFoundError: psycopg without its library says this
        driver, extra, _ = _DRIVERS[backend]
        raise MissingExtraError(error.name or driver, extra) from error
    except Exception as error:
        raise StorageError(f"cannot use the options of {safe_url(source.url)}, or engine_options: {error}") from error
    # Who asked for a log of statements gets all of them.
    engine.update_execution_options(**{DIRECT: not source.options.get("echo")})
    if backend == "sqlite":
        event.listen(engine, "connect", _tune_sqlite)
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
            chosen["isolation_level"] = "AUTOCOMMIT"
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


def _tune_sqlite(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA synchronous=FULL").close()  # what is acknowledged survives a power cut


def _tune_mysql(connection: Any, _record: object) -> None:
    connection.autocommit(True)
    with connection.cursor() as cursor:  # otherwise a server may cut values that are too long
        cursor.execute("SET SESSION sql_mode = CONCAT(@@SESSION.sql_mode, ',STRICT_TRANS_TABLES')")


def enable_wal(connection: Connection) -> None:
    """Give a SQLite file a write-ahead log, so that readers and the writer do not wait for each other.

    A read-only file stays as it is.

    Raises:
        StorageError: the file is where a write-ahead log is impossible, such as a network share.
    """
    try:
        journal = connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar_one()
    except DBAPIError as error:
        if code(error).startswith("SQLITE_READONLY"):
            return
        raise
    if journal != "wal":
        raise StorageError(
            f"expected SQLite to keep a write-ahead log beside {connection.engine.url.database!r}, found "
            f"journal mode {journal!r}; put the database on a local disk"
        )


def check_mysql(connection: Connection) -> None:
    """Refuse a MySQL or MariaDB server with settings under which writes fail or mean something else.

    Raises:
        StorageError: with what to change.
    """
    log, log_format, mode = connection.exec_driver_sql("SELECT @@log_bin, @@binlog_format, @@sql_mode").one()
    if "ORACLE" in str(mode).upper().split(","):
        raise StorageError(
            f"expected a session with MySQL's own SQL, found sql_mode {mode!r}: ORACLE changes what statements mean; "
            "set another sql_mode on the server, or for the saver: "
            "engine_options={'connect_args': {'init_command': \"SET SESSION sql_mode = 'STRICT_TRANS_TABLES'\"}}"
        )
    if log and str(log_format).upper() == "STATEMENT":
        raise StorageError(
            "expected a server whose binary log holds rows, found binlog_format=STATEMENT, with which InnoDB takes no "
            "writes of READ COMMITTED transactions; set binlog_format to ROW or MIXED (SET GLOBAL binlog_format = "
            "'ROW'), or switch the binary log off"
        )


# What the errors of databases and drivers mean: what to do about one, and whether the work may be run again. Databases
# number their errors: SQLite by name, PostgreSQL by SQLSTATE, MySQL by number. psycopg gives none for a connection that
# could not be made, and drivers word a lost connection each in its way: there the message is read.

# Serialisation failure and deadlock of PostgreSQL; deadlock, lock timeout and snapshot conflict of MySQL.
_TRANSIENT = {"40001", "40P01", "1213", "1205", "1020"}
# A prepared statement that the server has forgotten, or whose tables have been altered since.
_FORGOTTEN = {"26000"}
_ALTERED = ("cached plan must not change result type", "cached statement plan is invalid")
_NO_TABLE = {"42P01", "1146"}


# Numbers, separated by spaces; or what the message says, in lower case, separated by bars; and what to do.
_ADVICE = (
    ("SQLITE_BUSY SQLITE_LOCKED", "is locked", "another connection held the file's lock too long; find out which"),
    ("SQLITE_READONLY", "readonly|read-only file", "make the file and its folder writable"),
    ("SQLITE_FULL", "disk is full", "free some space; nothing of this call was stored"),
    ("SQLITE_CANTOPEN", "", "check that the folder exists and may be entered"),
    ("SQLITE_NOTADB", "", "the path names a file of another kind, or an encrypted or damaged database"),
    ("SQLITE_CORRUPT", "", "the file is damaged; restore it from a backup"),
    ("SQLITE_IOERR", "", "the disk or file system failed or is full; nothing of this call was stored"),
    ("3F000", "", "create the schema first (CREATE SCHEMA ...), or correct the name given as `schema`"),
    ("25006 1290 1792 1836", "read-only", "it takes no writes: connect to the primary server, or see read_only"),
    ("53100 1021 1114", "no space left", "the server's disk is full; free some space; nothing of this call was stored"),
    (
        "53300 1040 1203",
        "too many clients|too many connections|remaining connection slots",
        "the server allows no more connections: raise max_connections, or lower pool_size in engine_options",
    ),
    ("1153 2020", "packet sequence number", "a value is larger than the server takes: raise max_allowed_packet"),
    (
        "42501 1044 1142 1143 1227",
        "permission denied",
        "grant CREATE on the schema for the first call and migrations, SELECT, INSERT, UPDATE, DELETE always",
    ),
    (
        "28P01 28000 1045 1698",
        'password authentication failed|no password supplied|pg_hba.conf|role "',
        "check the user name and password in the URL, and that this user may connect from this host",
    ),
    ("3D000 1049", 'database "', "create the database first (CREATE DATABASE ...), or correct its name in the URL"),
    ("55P03 1205", "", "another transaction held a row too long; see lock_timeout or innodb_lock_wait_timeout"),
    (
        "42P05 26000",
        "prepared statement",
        "PgBouncer mixes up prepared statements: pass engine_options={'connect_args': {'prepare_threshold': None}}",
    ),
    ("57014 1969 3024", "", "the statement took longer than the server's statement timeout allows"),
    ("40001 40P01 1213 1020", "", "the transaction lost against another one several times; try again"),
    ("57P03", "starting up|shutting down", "the server is starting or stopping; try again"),
    ("1046", "invalid connection option|bad value for|invalid port|sslmode|support ssl", "correct the URL's options"),
    (
        "2002 2003 08001 08006",
        "connection refused|connect call failed|could not translate host|failed to resolve|timeout expired",
        "the server cannot be reached: check host and port in the URL, and that it runs",
    ),
    (
        "2006 2013 57P01",
        "lost connection|server closed the connection|connection was closed|broken pipe",
        "the connection was lost twice: see the server's log; with large values only, raise max_allowed_packet (MySQL)",
    ),
)


def advice(error: BaseException) -> str:
    """What to do about an error of the database, its driver or the connection to it."""
    number, message = code(error), str(error).lower()
    for codes, _, text in _ADVICE:
        # SQLite's extended names begin with the general one: SQLITE_READONLY_DIRECTORY.
        if number and any(number == listed or number.startswith(listed + "_") for listed in codes.split()):
            return text
    for _, phrases, text in _ADVICE:
        if phrases and any(phrase in message for phrase in phrases.split("|")):
            return text
    return "the transaction was rolled back"


def code(error: BaseException) -> str:
    """The database's own number for an error; empty where there is none."""
    original: object = error.orig if isinstance(error, DBAPIError) else error
    arguments = getattr(original, "args", ())
    if arguments and isinstance(arguments[0], int):
        return str(arguments[0])
    for name in ("sqlstate", "sqlite_errorname"):
        value = getattr(original, name, None)
        if isinstance(value, str):
            return value
    return ""


def is_transient(error: DBAPIError) -> bool:
    """Whether the transaction fell to others at the same time, so that it may succeed when run again."""
    return code(error) in _TRANSIENT


def is_unprepared(error: DBAPIError) -> bool:
    """Whether a statement is fine but the connection's prepared form of it is not."""
    return code(error) in _FORGOTTEN or any(said in str(error.orig) for said in _ALTERED)


def is_missing_table(error: DBAPIError) -> bool:
    """Whether a statement failed because its table (or the table's schema) does not exist."""
    return code(error) in _NO_TABLE or "no such table" in str(error.orig)
