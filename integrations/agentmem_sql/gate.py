"""One at a time: a first-come first-served lock that threads and asyncio tasks of any loop wait on together.

SQLite lets one connection write. Left to its busy handler, waiting writers poll and the unlucky one starves,
so the writers of one process line up here instead, whichever saver they use. The lock belongs to no event
loop. It is never held while code of the caller runs (values are serialised before, deserialised after), so
whoever holds it finishes, with one exception: a task's turn ends only when its loop runs. A blocking call
made in that loop's own thread would wait for ever, and is refused with a ``StorageError`` instead.

An interruption (Ctrl-C) may come between any two steps of the main thread, also while it leaves. That it is gone is
therefore noted in one step, by itself; if the next in line was not called any more, it finds out by looking.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar
from weakref import WeakValueDictionary

from agentmem.errors import StorageError
from agentmem_sql import forks
from agentmem_sql.inflight import REFUSAL

T = TypeVar("T")

# How long whoever waits goes without looking for itself, in seconds.
_PATIENCE = 1.0


@dataclass(eq=False, slots=True)
class _Ticket:
    loop: asyncio.AbstractEventLoop | None  # whose task it is; None for a thread
    turn: Future[None] | None = None  # of one who found others in the line
    gone: bool = False


class Gate:
    """A fair lock; ``gate.run(do)`` in a thread, ``await gate.arun(do)`` in a task."""

    def __init__(self) -> None:
        self._mutex = Lock()  # guards the line, held for microseconds
        self._line: deque[_Ticket] = deque()  # the first one's turn it is; there may be some that are gone
        forks.watch(self)

    def forked(self) -> None:
        """Forget the line: its threads and tasks are those of the process that this one was forked from."""
        self._mutex = Lock()
        self._line.clear()

    def run(self, do: Callable[[], T]) -> T:
        """Wait in this thread until it is this caller's turn, and call ``do``.

        Raises:
            StorageError: called in a running event loop that has a task in the line: neither could go on.
        """
        ticket = _Ticket(loop=None)
        try:
            self._join(ticket, blocks=_running_loop())
            while ticket.turn is not None and not ticket.turn.done():
                try:
                    ticket.turn.result(_PATIENCE)
                except WaitTimeout:
                    self._call_first()
            return do()
        finally:
            ticket.gone = True
            self._call_first()

    async def arun(self, do: Callable[[], Awaitable[T]]) -> T:
        """Wait in this task until it is its turn, and await ``do()``; the loop goes on meanwhile."""
        ticket = _Ticket(loop=asyncio.get_running_loop())
        try:
            self._join(ticket, blocks=None)
            while ticket.turn is not None and not ticket.turn.done():
                await asyncio.wait({asyncio.wrap_future(ticket.turn)}, timeout=_PATIENCE)
                self._call_first()
            return await do()
        finally:
            ticket.gone = True
            self._call_first()

    def _join(self, ticket: _Ticket, blocks: asyncio.AbstractEventLoop | None) -> None:
        with self._mutex:
            if blocks is not None and any(ahead.loop is blocks and not ahead.gone for ahead in self._line):
                raise StorageError(REFUSAL)
            if self._line:
                ticket.turn = Future()
            self._line.append(ticket)
        if ticket.turn is not None:
            self._call_first()

    def _call_first(self) -> None:
        """Strike off those at the head who are gone, and tell the first that it is its turn; any number of times."""
        with self._mutex:
            while self._line and self._line[0].gone:
                self._line.popleft()
            first = self._line[0].turn if self._line else None
            if first is not None and not first.done():
                first.set_result(None)


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
