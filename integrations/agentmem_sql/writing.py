"""What is written, as functions of a connection inside a transaction that holds the write lock.

Order matters where the database checks references and several writers meet: the thread's row first (a lock on
it keeps a deletion away), then content sorted by digest, then the rows that point to it.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, bindparam, delete, select

from agentmem_sql.codec import VALUE, NewCheckpoint, NewWrites
from agentmem_sql.dialects import add_rows
from agentmem_sql.keys import encode_text, thread_key
from agentmem_sql.reading import chunks
from agentmem_sql.tables import blobs, channels, checkpoints, threads, writes

# Built once: building a statement takes SQLAlchemy longer than running it takes SQLite.
_FIND_THREAD = select(threads.c.number).where(threads.c.key == bindparam("key"))
_LOCK_THREAD = _FIND_THREAD.with_for_update()
_SHARE_THREAD = _FIND_THREAD.with_for_update(read=True, key_share=True)
_KNOWN_CONTENT = select(blobs.c.digest).where(
    blobs.c.thread == bindparam("thread"), blobs.c.digest.in_(bindparam("digests", expanding=True))
)


def put_checkpoint(connection: Connection, new: NewCheckpoint) -> None:
    """Store a checkpoint; one of the same id is replaced."""
    thread = _thread_number(connection, new.thread)
    _add_content(connection, thread, new.blobs)
    add_rows(connection, channels, [{"thread": thread, **row} for row in new.channels], replace=True)
    add_rows(connection, checkpoints, [{"thread": thread, **new.row}], replace=True)


def put_writes(connection: Connection, new: NewWrites) -> None:
    """Store pending writes; the checkpoint they belong to may arrive later."""
    thread = _thread_number(connection, new.thread)
    _add_content(connection, thread, new.blobs)
    add_rows(connection, writes, [{"thread": thread, **row} for row in new.rows], replace=new.replace)


def delete_thread(connection: Connection, thread_id: str) -> None:
    """Remove every row of a thread; one that is not there is no error."""
    thread = connection.execute(_LOCK_THREAD, {"key": thread_key(thread_id)}).scalar_one_or_none()
    if thread is not None:
        for table in (writes, channels, checkpoints, blobs):
            connection.execute(delete(table).where(table.c.thread == thread))
        connection.execute(delete(threads).where(threads.c.number == thread))


def _thread_number(connection: Connection, thread_id: str) -> int:
    """The thread's number, which is given on first use; its row stays as it is until the transaction ends."""
    key = thread_key(thread_id)
    number: int | None = connection.execute(_SHARE_THREAD, {"key": key}).scalar_one_or_none()
    if number is None:
        add_rows(connection, threads, [{"key": key, "name": encode_text(thread_id)}], replace=False)
        number = connection.execute(_SHARE_THREAD, {"key": key}).scalar_one()
    return number


def _add_content(connection: Connection, thread: int, contents: Mapping[bytes, bytes]) -> None:
    """Store content that the thread does not have yet; what it has is not sent."""
    known: set[bytes] = set()
    for part in chunks(sorted(contents)):
        known.update(connection.execute(_KNOWN_CONTENT, {"thread": thread, "digests": part}).scalars())
    rows = [
        {"thread": thread, "digest": digest, "kind": VALUE, "body": contents[digest]}
        for digest in sorted(contents.keys() - known)
    ]
    add_rows(connection, blobs, rows, replace=False)
