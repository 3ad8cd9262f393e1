"""What a forked process must not use of the process that it comes from.

Connections are inherited open, and belong to the other process all the same. Two processes on one connection to a
server read each other's answers, so it is left alone: not even closed, since that would end it for both. Of a
SQLite file the locks stay with the other process, while the notes that SQLite keeps of them are inherited. As long
as there is one inherited connection, a new one takes no lock that those notes say is held; the other process, when
it closes, then deletes the write-ahead log that this one writes to. So inherited connections to files are closed
first. One that a thread was using at the time of the fork cannot be, and the file then cannot be used.

Nothing happens until the forked process uses a database, which most never do.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol
from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.pool import Pool, QueuePool

from agentmem.errors import StorageError
from agentmem_sql.idle import Idle


class Inherited(Protocol):
    """What a forked process gets a copy of."""

    def forked(self) -> None:
        """Forget what belongs to threads and tasks of the other process; called while there is one thread."""


@dataclass(frozen=True)
class _Left:
    """An engine that nobody uses any more, kept so that nothing of it is finalised in this process."""

    engine: Engine
    opened: Iterable[Any] | None
    idle: Idle | None
    kept: object


_inherited: WeakSet[Inherited] = WeakSet()
_mutex = Lock()
_left: list[_Left] = []
_seen_to = 0  # how many of those
_lost: set[Path] = set()  # files that cannot be used


def watch(one: Inherited) -> None:
    """Have ``one.forked()`` called in every process that is forked from this one."""
    _inherited.add(one)


def leave(
    engine: Engine, opened: Iterable[Any] | None = None, *, idle: Idle | None = None, keep: object = None
) -> None:
    """Give up an inherited engine.

    Args:
        engine: the synchronous one, or that inside an asynchronous one.
        opened: the driver's connections of an asynchronous one.
        idle: holds connections that nobody uses.
        keep: what must not be finalised either.
    """
    _left.append(_Left(engine, opened, idle, keep))


def check(file: Path | None) -> None:
    """See to what was inherited; to be called before a database is used.

    Args:
        file: of a SQLite database.

    Raises:
        StorageError: the file was in use when this process was forked.
    """
    if _seen_to < len(_left):
        _see_to()
    if _lost and file in _lost:
        raise StorageError(
            f"this process was forked while a thread or task was using the SQLite file {file}, and SQLite cannot "
            "tell any more which locks are whose; fork before the saver is used, or between two calls, or start "
            "processes with multiprocessing's 'spawn' or 'forkserver'"
        )


def holds_connections(pool: Pool) -> bool:
    """Whether a pool has connections open that a forked process would use."""
    return isinstance(pool, QueuePool) and pool.checkedin() + pool.checkedout() > 0


def _see_to() -> None:
    global _seen_to
    with _mutex:
        for one in _left[_seen_to:]:
            database = one.engine.url.database
            if one.engine.dialect.name == "sqlite" and database and not _close(one):
                _lost.add(Path(database).resolve())
            _seen_to += 1


def _close(left: _Left) -> bool:
    """Close the connections to a SQLite file; False where some are in use."""
    pool = left.engine.pool
    if left.idle is not None:
        left.idle.release()
    if isinstance(pool, QueuePool) and pool.checkedout():
        return False
    if left.opened is None:
        pool.dispose()
        return True
    try:
        for connection in left.opened:
            if connection._connection is not None:
                connection._connection.close()  # aiosqlite's own way goes by a thread, which stayed behind
    except sqlite3.Error:
        return False
    return True


def _in_the_child() -> None:
    global _mutex
    _mutex = Lock()
    for one in list(_inherited):
        one.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_the_child)
