"""Refusing what would wait for ever: a blocking write in an event loop one of whose tasks holds a lock on a server.

Servers have their own locks, and a task that holds one goes on only when its loop runs. A synchronous write made in
that loop's own thread could wait for that lock, and the loop for the write. (On SQLite the ``gate`` sees to this.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from agentmem.errors import StorageError

_writes: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()
_lock = Lock()

REFUSAL = (
    "a synchronous checkpointer call was made in a running event loop while an asynchronous "
    "one on the same database is under way in that loop, so both would wait for ever; "
    "await the asynchronous method (aput, aput_writes, aget_tuple, ...) here, "
    "or make the synchronous call in another thread (asyncio.to_thread)"
)


@contextmanager
def writing() -> Iterator[None]:
    """Around a write of this task that may hold locks from one statement to the next."""
    loop = asyncio.get_running_loop()
    _count(loop, 1)
    try:
        yield
    finally:
        _count(loop, -1)


def check_free() -> None:
    """Raise if this thread runs a loop that has such a write under way.

    Raises:
        StorageError: it has.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    if _writes.get(loop):
        raise StorageError(REFUSAL)


def _count(loop: asyncio.AbstractEventLoop, by: int) -> None:
    with _lock:
        _writes[loop] = _writes.get(loop, 0) + by
