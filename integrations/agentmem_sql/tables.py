"""The tables, one definition for every database.

Keys, names and values are bytes everywhere. Text columns differ too much to hold them: collations merge
``a``, ``A`` and ``á``, NUL and lone surrogates are refused, index rows have length limits. Nothing of
unbounded length is part of a key (see ``keys``), so the widest primary key, that of the writes, takes under
500 bytes.

    schema_versions   which migrations this database has seen
    threads           one row a thread; every other row hangs on its number
    blobs             content of the thread, one row a distinct content, keyed by SHA-256; kind 0 is a
    serialised
                      value, other kinds are free for structures made of values
    checkpoints       metadata, and the checkpoint without its channel values
    channels          (version, channel) -> blob; no blob: the channel was empty at that version
    writes            pending writes of a checkpoint -> blob

A channel value and the pending write that made it are the same content and so the same row.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

from agentmem_sql.keys import DIGEST_BYTES, KEY_BYTES

# MySQL alone sizes binary columns, and indexes only those with a size.
_KEY: TypeEngine[bytes] = LargeBinary().with_variant(mysql.VARBINARY(KEY_BYTES), "mysql", "mariadb")
_DIGEST: TypeEngine[bytes] = LargeBinary().with_variant(mysql.BINARY(DIGEST_BYTES), "mysql", "mariadb")
_BODY: TypeEngine[bytes] = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
# SQLite numbers rows by itself only where the type is INTEGER.
_NUMBER: TypeEngine[int] = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _thread() -> Column[Any]:
    return Column("thread", _NUMBER, ForeignKey("agentmem_threads.number"), primary_key=True, autoincrement=False)


def _blob() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["thread", "digest"], ["agentmem_blobs.thread", "agentmem_blobs.digest"])


schema_versions = Table(
    "agentmem_schema_versions",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
)

threads = Table(
    "agentmem_threads",
    metadata,
    Column("number", _NUMBER, primary_key=True, autoincrement=True),
    Column("key", _DIGEST, nullable=False, unique=True),
    Column("name", _BODY, nullable=False),
    sqlite_autoincrement=True,  # the number of a deleted thread is never given to another
)

blobs = Table(
    "agentmem_blobs",
    metadata,
    _thread(),
    Column("digest", _DIGEST, primary_key=True),
    Column("kind", SmallInteger, nullable=False),
    Column("body", _BODY, nullable=False),
)

checkpoints = Table(
    "agentmem_checkpoints",
    metadata,
    _thread(),
    Column("ns", _KEY, primary_key=True),
    Column("id", _KEY, primary_key=True),
    Column("ns_name", _BODY),  # only where `ns` is the digest of a long name
    Column("parent", _KEY),
    Column("metadata", _BODY, nullable=False),
    Column("body", _BODY, nullable=False),
    Column("seal", _DIGEST, nullable=False),  # SHA-256 over the columns above but the thread's number
)

channels = Table(
    "agentmem_channels",
    metadata,
    _thread(),
    Column("ns", _KEY, primary_key=True),
    # The version stands first: one names hardly more than a row, so a list of them finds all.
    Column("version", _KEY, primary_key=True),
    Column("name", _KEY, primary_key=True),
    Column("digest", _DIGEST),
    _blob(),
)

writes = Table(
    "agentmem_writes",
    metadata,
    _thread(),
    Column("ns", _KEY, primary_key=True),
    Column("checkpoint", _KEY, primary_key=True),
    Column("task", _KEY, primary_key=True),
    Column("idx", Integer, primary_key=True, autoincrement=False),
    Column("path", _BODY, nullable=False),
    Column("channel", _BODY, nullable=False),
    Column("digest", _DIGEST, nullable=False),
    _blob(),
)
