"""The tables, with one definition for every database.

Keys, names and values are bytes everywhere, since text columns differ too much: collations merge `a`, `A` and `á`, NUL
and lone surrogates are refused, indexed text is limited. No key contains anything of unbounded length, so the widest
primary key, that of the writes, takes under 600 bytes.

    schema_versions   which migrations this database has had
    settings          how its rows are protected (see `protection`)
    threads           one row a thread, whose number is in all its other rows. `epoch` is increased whenever content is
                      removed from the thread, so who knows the epoch knows what is still there. It starts at random,
                      so that a thread of new tables is not taken for an earlier one
    blobs             content of the thread, one row for each distinct content, by digest (see `list_tree`)
    checkpoints       metadata, the checkpoint without its channel values, and the digests of those
    writes            pending writes of a checkpoint
    audit             what was done to a thread, by whom and when (see `audit`); outlives the thread
    audit_chains      the last row of each chain of `audit`
    subjects          whose threads and facts are whose, where their names do not say (see `agentmem_governance`)
    journal           deletions over several stores that were begun; they are completed after a crash

A channel value and the pending write that made it are the same content and so the same row.

There are no foreign keys: who inserts rows has locked the row of the thread, and who deletes the thread has locked it
exclusively (see `writer`). The check of every row would take a fifteenth of the time of a put.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar, cast

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    and_,
    bindparam,
    func,
    literal,
    select,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import TypeEngine

from agentmem.errors import ConfigError, StorageError
from agentmem_sql.engines import is_missing_table
from agentmem_sql.statements import add_rows

T = TypeVar("T")

DEFAULT_PREFIX = "agentmem_"
MOST_PREFIX_BYTES = 48  # PostgreSQL's names have 63, of which `schema_versions` takes 15

DIGEST_BYTES = 32
KEY_BYTES = 128
RUN_BYTES = 8

# MySQL alone sizes binary columns, and indexes only those with a size.
_KEY: TypeEngine[bytes] = LargeBinary().with_variant(mysql.VARBINARY(KEY_BYTES), "mysql", "mariadb")
_RUN: TypeEngine[bytes] = LargeBinary().with_variant(mysql.VARBINARY(RUN_BYTES), "mysql", "mariadb")
_DIGEST: TypeEngine[bytes] = LargeBinary().with_variant(mysql.BINARY(DIGEST_BYTES), "mysql", "mariadb")
_BODY: TypeEngine[bytes] = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
# SQLite numbers rows by itself only where the type is INTEGER.
_NUMBER: TypeEngine[int] = BigInteger().with_variant(Integer, "sqlite")


class Tables:
    """The tables under a name prefix and in a schema; `metadata` holds them all (for Alembic, too)."""

    def __init__(self, *, prefix: str = DEFAULT_PREFIX, schema: str | None = None) -> None:
        """Define the tables.

        Raises:
            ConfigError: table names cannot begin with `prefix`.
        """
        if not isinstance(prefix, str) or "\0" in prefix or len(prefix.encode("utf-8", "replace")) > MOST_PREFIX_BYTES:
            raise ConfigError(
                f"expected a table_prefix of at most {MOST_PREFIX_BYTES} bytes without NUL, found {prefix!r}: no "
                "database here has longer names; use a shorter one"
            )
        if not isinstance(schema, str | None) or schema == "":
            raise ConfigError(f"expected `schema` to be the name of a schema, or None, found {schema!r}")
        self.prefix = prefix
        self.metadata = MetaData(
            schema=schema,
            naming_convention={
                "ix": "ix_%(table_name)s_%(column_0_N_name)s",
                "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            },
        )
        self.schema_versions = self._table(
            "schema_versions", Column("version", Integer, primary_key=True, autoincrement=False)
        )
        self.settings = self._table(
            "settings", Column("name", _KEY, primary_key=True), Column("value", _BODY, nullable=False)
        )
        self.threads = self._table(
            "threads",
            Column("number", _NUMBER, primary_key=True, autoincrement=True),
            Column("key", _DIGEST, nullable=False, unique=True),
            Column("name", _BODY, nullable=False),
            Column("epoch", BigInteger, nullable=False),
            sqlite_autoincrement=True,  # the number of a deleted thread is never given to another
        )
        self.blobs = self._table(
            "blobs",
            self._thread(),
            Column("digest", _DIGEST, primary_key=True),
            Column("kind", SmallInteger, nullable=False),
            Column("body", _BODY, nullable=False),
        )
        self.checkpoints = self._table(
            "checkpoints",
            self._thread(),
            Column("ns", _KEY, primary_key=True),
            Column("id", _KEY, primary_key=True),
            Column("ns_name", _BODY),  # only where `ns` is the digest of a long name
            Column("parent", _KEY),
            Column("created", BigInteger, nullable=False),  # milliseconds since 1970, when it was first stored
            Column("run", _RUN),  # the beginning of the digest of metadata["run_id"]
            Column("metadata", _BODY, nullable=False),
            Column("body", _BODY, nullable=False),
            Column("content", _BODY, nullable=False),  # channel -> digest, see `rows`
            Column("history", _DIGEST),  # what pruned ancestors wrote to delta channels, see `reader`
            Column("seal", _DIGEST, nullable=False),  # over the columns above but the thread's number
        )
        self.writes = self._table(
            "writes",
            self._thread(),
            Column("ns", _KEY, primary_key=True),
            Column("checkpoint", _KEY, primary_key=True),
            Column("task", _KEY, primary_key=True),
            Column("idx", Integer, primary_key=True, autoincrement=False),
            Column("path", _BODY, nullable=False),
            Column("channel", _BODY, nullable=False),
            Column("digest", _DIGEST, nullable=False),
            Column("seal", _DIGEST, nullable=False),
        )
        self.audit = self._table(
            "audit",
            Column("chain", _DIGEST, primary_key=True),
            Column("seq", BigInteger, primary_key=True, autoincrement=False),
            Column("created", BigInteger, nullable=False),  # milliseconds since 1970
            Column("body", _BODY, nullable=False),
            Column("private", _BODY),  # None where there was nothing, or what there was has been forgotten
            Column("private_digest", _DIGEST),
            Column("hash", _DIGEST, nullable=False),
        )
        self.audit_chains = self._table(
            "audit_chains",
            Column("chain", _DIGEST, primary_key=True),
            Column("seq", BigInteger, nullable=False),
            Column("hash", _DIGEST, nullable=False),
        )
        self.subjects = self._table(
            "subjects",
            Column("kind", _KEY, primary_key=True),
            Column("key", _DIGEST, primary_key=True),
            Column("value", _BODY, nullable=False),
            Column("subject", _BODY, nullable=False),
        )
        self.journal = self._table(
            "journal", Column("id", _KEY, primary_key=True), Column("body", _BODY, nullable=False)
        )
        Index(None, self.checkpoints.c.thread, self.checkpoints.c.created)
        Index(None, self.checkpoints.c.run)

    def _table(self, name: str, *columns: Column[Any], **options: Any) -> Table:
        return Table(self.prefix + name, self.metadata, *columns, **options)

    def _thread(self) -> Column[Any]:
        return Column("thread", _NUMBER, primary_key=True, autoincrement=False)


def by(table: Table, *columns: str) -> ColumnElement[bool]:
    """The rows in which these columns equal the parameters of the same names."""
    return and_(*(table.c[name] == bindparam(name) for name in columns))


def metadata(*, prefix: str = DEFAULT_PREFIX, schema: str | None = None) -> MetaData:
    """The tables as SQLAlchemy metadata, to be merged into an Alembic `target_metadata`."""
    return Tables(prefix=prefix, schema=schema).metadata


# Text as keys. Encodings are exact, also for NUL and lone surrogates, and keep the order of the text. Namespaces longer
# than a key are replaced by a tagged SHA-256, and their name is stored in another column.

HASHED = b"\xff"  # the tag; never occurs in UTF-8


def encode_text(text: str) -> bytes:
    """UTF-8 that also carries lone surrogates."""
    return text.encode("utf-8", "surrogatepass")


def decode_text(data: bytes) -> str:
    """The inverse of `encode_text`.

    Raises:
        StorageError: the bytes are not encoded text.
    """
    try:
        return data.decode("utf-8", "surrogatepass")
    except (UnicodeDecodeError, AttributeError) as error:  # AttributeError: a damaged file gives other types, too
        raise StorageError(
            f"expected a stored name or id, found {str(data)[:40]}, which is no text: the row was changed from outside "
            "or the disk is damaged; restore the database from a backup"
        ) from error


@lru_cache(maxsize=1024)
def thread_key(thread_id: str) -> bytes:
    """The 32-byte key of a thread id of any length."""
    return sha256(encode_text(thread_id)).digest()


@lru_cache(maxsize=1024)
def open_key(text: str) -> bytes:
    """A key of at most `KEY_BYTES` for any text: the text, or its tagged digest where it is longer."""
    data = encode_text(text)
    return data if len(data) <= KEY_BYTES else HASHED + sha256(data).digest()


def exact_key(text: Any, what: str) -> bytes:
    """A key that contains the text, for ids that are sorted by and read back.

    Raises:
        StorageError: the text takes more than `KEY_BYTES` bytes.
        ConfigError: it is no text.
    """
    if not isinstance(text, str):
        raise ConfigError(f"expected a {what} (a string), found {text!r}")
    data = encode_text(text)
    if len(data) > KEY_BYTES:
        raise StorageError(
            f"expected a {what} of at most {KEY_BYTES} bytes, found {len(data)} bytes ({text[:40]!r}...); "
            "LangGraph's own ids have 36 characters, use a shorter one"
        )
    return data


# Which version of the tables a database has, and how it gets to the one that this code uses.
#
# Migrations are numbered and each is recorded in `schema_versions`, in the transaction that does it: one that fails
# leaves the database where the one before it ended, and is taken up again by the next caller. Several processes may
# start on one database together: the first takes a lock, the others find the work done.
#
# MySQL commits when a table is made or changed, so there a migration that fails may have done a part of its work. Every
# one of them must therefore do nothing where its work is done already.

# How long a process waits for another one's migrations on MySQL, in seconds; elsewhere the database decides.
_LOCK_TIMEOUT = 300


# `transact(connection, work)` does work in one transaction; SQLite's holds the write lock from the start.
Transact = Callable[[Connection, Callable[[Connection], Any]], Any]


def _create_missing(connection: Connection, tables: Tables) -> None:
    tables.metadata.create_all(connection)


class Migration(NamedTuple):
    """One step: `upgrade(connection, tables)` brings tables of the number before it to `number`."""

    number: int
    description: str
    upgrade: Callable[[Connection, Tables], None] = _create_missing


# 1 was a development version.
MIGRATIONS: Sequence[Migration] = (
    Migration(2, "threads, blobs, checkpoints, writes, settings"),
    Migration(3, "audit, audit_chains, subjects, journal"),
    Migration(4, "witnesses among the blobs, of checkpoints that are stored from now on"),
)


def migrate(connection: Connection, tables: Tables, transact: Transact) -> None:
    """Do what is missing, each step in a transaction of its own.

    Args:
        connection: one that has no transaction under way.
        transact: how.

    Raises:
        StorageError: as `version_of`, or another process kept the lock for too long.
    """

    def next_step(connection: Connection) -> bool:
        """Do the next migration; gives whether there are more."""
        tables.schema_versions.create(connection, checkfirst=True)
        version = version_of(connection, tables)
        following = next((migration for migration in MIGRATIONS if migration.number > (version or 0)), None)
        if following is None:
            return False
        following.upgrade(connection, tables)
        add_rows(connection, tables.schema_versions, [{"version": following.number}], replace=False)
        return following is not MIGRATIONS[-1]

    while alone(connection, tables, transact, next_step):
        pass


def alone(connection: Connection, tables: Tables, transact: Transact, work: Callable[[Connection], T]) -> T:
    """Do work in a transaction while no other connection, of any process, does so on the same tables.

    Raises:
        StorageError: another process kept the lock for too long.
    """
    schema = connection.schema_for_object(tables.schema_versions)
    spelled = f"{connection.engine.url.database}\0{schema}\0{tables.schema_versions.name}"
    number = int.from_bytes(sha256(spelled.encode()).digest()[:8], signed=True)

    def locked(connection: Connection) -> T:
        if connection.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(literal(number, BigInteger))))
        return work(connection)

    if connection.dialect.name in ("sqlite", "postgresql"):
        return cast(T, transact(connection, locked))
    # A lock that outlives the commits which MySQL makes of itself.
    name = f"agentmem-{number & (1 << 63) - 1}"
    if connection.execute(select(func.get_lock(name, _LOCK_TIMEOUT))).scalar() != 1:
        raise StorageError(
            f"expected the migrations of the checkpoint tables to end within {_LOCK_TIMEOUT} s, found the lock "
            f"{name!r} still held by another connection; see SHOW PROCESSLIST for what it does"
        )
    connection.rollback()
    try:
        return cast(T, transact(connection, locked))
    finally:
        try:
            connection.rollback()
            connection.execute(select(func.release_lock(name)))
            connection.rollback()
        except DBAPIError:
            connection.invalidate()  # the lock ends with the connection


def version_of(connection: Connection, tables: Tables) -> int | None:
    """The number of the newest migration that was done, by one statement; None where there are no tables.

    Raises:
        StorageError: a newer version made the database, or one from before the first release.
    """
    versions = tables.schema_versions
    try:
        version: int | None = connection.execute(select(func.max(versions.c.version))).scalar()
    except DBAPIError as error:
        if is_missing_table(error):
            return None
        raise
    if version is not None and version < MIGRATIONS[0].number:
        raise StorageError(
            f"expected a checkpoint database of schema version {MIGRATIONS[0].number} or later, found version "
            f"{version}, made by agentmem before its first release, whose threads cannot be carried over: "
            f"drop the tables whose names begin with {tables.prefix!r}, or open another database"
        )
    if version is not None and version > MIGRATIONS[-1].number:
        raise StorageError(
            f"expected a checkpoint database of schema version {MIGRATIONS[-1].number} at most, found version "
            f"{version}: a newer agentmem made it; upgrade agentmem-delta, or open another database"
        )
    return version
