"""One at a time: a first-come first-served lock that threads and asyncio tasks of any loop wait on together.

SQLite lets one connection write. Left to its busy handler, waiting writers poll and the unlucky one starves,
so the writers of one process line up here instead, whichever saver they use. The lock belongs to no event
loop. It is never held while code of the caller runs (values are serialised before, deserialised after), so
whoever holds it finishes, with one exception: a task's turn ends only when its loop runs. A blocking call
made in that loop's own thread would wait for ever, and is refused with a ``StorageError`` instead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

from agentmem.errors import StorageError


@dataclass(eq=False)
class _Ticket:
    loop: asyncio.AbstractEventLoop | None  # whose task it is; None for a thread
    turn: Future[None] = field(default_factory=Future)


class Gate:
    """A fair lock; ``with gate.hold()`` in a thread, ``async with gate.ahold()`` in a task."""

    def __init__(self) -> None:
        self._mutex = Lock()  # guards the line, held for microseconds
        self._line: deque[_Ticket] = deque()  # the first one's turn it is

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait in this thread until it is this caller's turn.

        Raises:
            StorageError: called in a running event loop that has a task in the line: neither could go on.
        """
        ticket = self._join(_Ticket(loop=None), blocks=_running_loop())
        try:
            ticket.turn.result()
            yield
        finally:
            self._leave(ticket)

    @asynccontextmanager
    async def ahold(self) -> AsyncIterator[None]:
        """Wait in this task until it is its turn; the loop goes on meanwhile."""
        ticket = self._join(_Ticket(loop=asyncio.get_running_loop()), blocks=None)
        try:
            if not ticket.turn.done():
                await asyncio.wrap_future(ticket.turn)
            yield
        finally:
            self._leave(ticket)

    def _join(self, ticket: _Ticket, blocks: asyncio.AbstractEventLoop | None) -> _Ticket:
        with self._mutex:
            if blocks is not None and any(ahead.loop is blocks for ahead in self._line):
                raise StorageError(
                    "a synchronous checkpointer call was made in a running event loop while an asynchronous "
                    "one on the same database is under way in that loop, so both would wait for ever; "
                    "await the asynchronous method (aput, aput_writes, aget_tuple, ...) here, "
                    "or make the synchronous call in another thread (asyncio.to_thread)"
                )
            self._line.append(ticket)
            if self._line[0] is ticket:
                ticket.turn.set_result(None)
        return ticket

    def _leave(self, ticket: _Ticket) -> None:
        with self._mutex:
            held = self._line[0] is ticket
            self._line.remove(ticket)
            # A ticket that was cancelled in the meantime is skipped here: it leaves by itself and calls the
            # next.
            if held and self._line and self._line[0].turn.set_running_or_notify_cancel():
                self._line[0].turn.set_result(None)


_gates: WeakValueDictionary[Path, Gate] = WeakValueDictionary()
_gates_mutex = Lock()


def gate_of(file: str) -> Gate:
    """The gate of a file, shared by everybody in this process who asks for the same one."""
    path = Path(file).resolve()
    with _gates_mutex:
        return _gates.setdefault(path, Gate())


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
