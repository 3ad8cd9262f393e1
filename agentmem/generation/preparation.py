"""Prepares turns that take long to prepare, away from the thread that runs the model.

A turn is planned on that thread, since planning takes a millisecond and the tokenizer is at hand there. A message of
megabytes takes seconds to tokenise and a schema of a megabyte to compile; done there, all turns under way would wait.
So what is large is prepared here, on one thread of its own with a copy of the tokenizer (tokenizers are not made for
several threads), and handed to the scheduler when it is ready. What is prepared follows from the request in either
place. A turn's time begins when it is asked for: where it is over before, the caller is told at once, and what is left
of the preparation is done for nobody.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from agentmem.generation.scheduler import Scheduler, fail, timeout_error
from agentmem.generation.sequence import Steps

T = TypeVar("T")


@dataclass(frozen=True)
class _Item:
    prepare: Callable[[], Steps[Any]]
    future: Future[Any]
    timeout: float | None
    deadline: float | None
    timer: threading.Timer | None


class Preparation:
    """One daemon thread, started when it is first needed.

    Args:
        name: of the thread.
        scheduler: runs what was prepared.
    """

    def __init__(self, name: str, scheduler: Scheduler) -> None:
        self._name = name
        self._scheduler = scheduler
        self._inbox: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, prepare: Callable[[], Steps[T]], timeout: float | None = None) -> Future[T]:
        """Queue a job that `prepare` makes; cancelling the future ends it before its next step.

        Args:
            prepare: called on this object's thread.
            timeout: seconds from now after which the future fails with `TurnTimeoutError`.

        Raises:
            EngineClosedError: as `Scheduler.submit`.
        """
        self._scheduler.require_open()  # in a fork, before the lock, as there
        future: Future[T] = Future()
        deadline = timer = None
        if timeout is not None:
            deadline = time.monotonic() + timeout
            timer = threading.Timer(timeout, fail, (future, timeout_error(timeout)))
            timer.daemon = True
            timer.start()
        with self._lock:
            self._scheduler.require_open()  # behind the end that `close` puts in, nobody would find the item
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._inbox.put(_Item(prepare, future, timeout, deadline, timer))
        return future

    def close(self) -> None:
        """End the thread when it has done what it is at; what waits fails with EngineClosedError.

        To be called after the scheduler was closed.
        """
        self._inbox.put(None)

    def _run(self) -> None:
        while (item := self._inbox.get()) is not None:
            if item.future.done():
                continue
            try:
                self._scheduler.require_open()  # nothing is prepared for an engine that was closed meanwhile
                steps = item.prepare()
                if item.timer is not None:
                    item.timer.cancel()  # from here on the scheduler looks at the time
                self._scheduler.submit(steps, item.timeout, future=item.future, deadline=item.deadline)
            except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is
                if item.timer is not None:
                    item.timer.cancel()
                fail(item.future, error)
