"""What the errors of databases and drivers mean: what to do about one, and whether the work may be run again.

Databases number their errors: SQLite by name, PostgreSQL by SQLSTATE, MySQL by number. psycopg gives none for a
connection that could not be made, and drivers word a lost connection each in its way: there the message is read.
"""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

# Serialisation failure and deadlock of PostgreSQL; deadlock, lock timeout and snapshot conflict of MySQL.
_TRANSIENT = {"40001", "40P01", "1213", "1205", "1020"}
# A prepared statement that the server has forgotten, or whose tables have been altered since.
_FORGOTTEN = {"26000"}
_ALTERED = ("cached plan must not change result type", "cached statement plan is invalid")
_NO_TABLE = {"42P01", "1146"}


# Numbers, separated by spaces; or what the message says, in lower case, separated by bars; and what to do.
_ADVICE = (
    (
        "SQLITE_BUSY SQLITE_LOCKED",
        "is locked",
        "another connection held the lock of the SQLite file for longer than this one waits; find out which",
    ),
    ("SQLITE_READONLY", "readonly|read-only file", "make the file and its folder writable"),
    ("SQLITE_FULL", "disk is full", "free some space; nothing of this call was stored"),
    ("SQLITE_CANTOPEN", "", "check that the folder exists and may be entered"),
    ("SQLITE_NOTADB", "", "the path names a file of another kind, or an encrypted or damaged database"),
    ("SQLITE_CORRUPT", "", "the file is damaged; restore it from a backup"),
    ("SQLITE_IOERR", "", "the disk or file system failed or is full; nothing of this call was stored"),
    ("3F000", "", "create the schema first (CREATE SCHEMA ...), or correct the name given as `schema`"),
    (
        "25006 1290 1792 1836",
        "read-only",
        "the server takes no writes from this connection: connect to the primary server, and check "
        "default_transaction_read_only (PostgreSQL) or read_only (MySQL)",
    ),
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
        "this user lacks the right: grant CREATE on the schema for the first call and migrations, and SELECT, "
        "INSERT, UPDATE, DELETE on the tables always",
    ),
    (
        "28P01 28000 1045 1698",
        'password authentication failed|no password supplied|pg_hba.conf|role "',
        "check the user name and password in the URL, and that this user may connect from this host",
    ),
    ("3D000 1049", 'database "', "create the database first (CREATE DATABASE ...), or correct its name in the URL"),
    (
        "55P03 1205",
        "",
        "another transaction held a row for longer than this one waits; find out which, or raise lock_timeout "
        "(PostgreSQL) or innodb_lock_wait_timeout (MySQL)",
    ),
    (
        "42P05 26000",
        "prepared statement",
        "a pooler between here and the server (PgBouncer) mixes up prepared statements: switch them off with "
        "engine_options={'connect_args': {'prepare_threshold': None}}, or pool by session",
    ),
    ("57014 1969 3024", "", "the statement took longer than the server's statement timeout allows"),
    ("40001 40P01 1213 1020", "", "the transaction lost against another one several times; try again"),
    ("57P03", "starting up|shutting down", "the server is starting or stopping; try again"),
    (
        "2002 2003 08001 08006",
        "connection refused|connect call failed|could not translate host|failed to resolve|timeout expired",
        "the server cannot be reached: check host and port in the URL, and that it runs",
    ),
    (
        "2006 2013 57P01",
        "lost connection|server closed the connection|connection was closed|broken pipe",
        "the connection was lost twice: the server's log says why; if it happens with large values only, raise "
        "max_allowed_packet (MySQL)",
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
