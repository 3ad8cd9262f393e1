"""One thread owns the model; callers hand it jobs from any thread or event loop.

A job is a generator. It yields None between steps of its own, and a ``Shared`` where a step can be done for several
jobs at once: that is done for all who wait for it, and then they go on. While some wait, one step of one other job is
taken between two shared ones, each job in its turn, so that a long one holds nobody up. A job is dropped as soon as its
future is cancelled.
"""

from __future__ import annotations

import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from agentmem.errors import EngineClosedError

_logger = logging.getLogger(__name__)
T = TypeVar("T")


class Team(ABC):
    """Does work that several jobs wait for."""

    @abstractmethod
    def run(self, wants: Sequence[Shared]) -> None:
        """Do it for all of them; what goes wrong with one is set as its ``error``."""


class Shared:
    """Work that a job wants done together with that of others, by ``team``; ``error`` is raised in the job."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.error: BaseException | None = None


Steps = Generator[Shared | None, None, T]


@dataclass
class _Job:
    steps: Steps[Any]
    future: Future[Any]
    wants: Shared | None = None


class Worker:
    """Runs jobs step by step on one daemon thread, without gradients.

    Args:
        name: of the thread.
        last: done on the thread before it ends.
    """

    def __init__(self, name: str, last: Callable[[], None]) -> None:
        self._last = last
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, steps: Callable[[], Steps[T]]) -> Future[T]:
        """Queue a job; cancelling the future ends it before its next step.

        Raises:
            EngineClosedError: the worker was closed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise EngineClosedError("this engine is closed; load a new one")
            self._inbox.put(_Job(steps(), future))
        return future

    def close(self) -> None:
        """End the thread; running and waiting jobs fail with EngineClosedError. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        # Thread-local, so it holds for every job and leaks into no caller's thread.
        torch.set_grad_enabled(False)
        running: deque[_Job] = deque()
        waiting: list[_Job] = []
        while True:
            while not (running or waiting) or not self._inbox.empty():
                job = self._inbox.get()
                if job is None:
                    self._abandon([*running, *waiting])
                    try:
                        self._last()
                    except Exception:
                        _logger.exception("%s has ended, but could not give back all that it held", self._thread.name)
                    return
                running.append(job)
            # Those who come together begin together: short first steps are taken before the next shared one.
            for _ in range(len(running) if not waiting else 1):
                if running:
                    self._advance(running.popleft(), running, waiting)
            if waiting:
                waiting = self._share(waiting, running)

    def _share(self, waiting: list[_Job], running: deque[_Job]) -> list[_Job]:
        """Do what jobs wait for and take them on; gives those who wait again."""
        alive = [job for job in waiting if not self._is_dropped(job)]
        teams: dict[int, list[Shared]] = {}
        for job in alive:
            assert job.wants is not None
            teams.setdefault(id(job.wants.team), []).append(job.wants)
        for wants in teams.values():
            try:
                wants[0].team.run(wants)
            except BaseException as error:  # noqa: BLE001 - as in `_step`
                for want in wants:
                    want.error = want.error or error
        again: list[_Job] = []
        for job in alive:
            self._advance(job, running, again)
        return again

    def _advance(self, job: _Job, running: deque[_Job], waiting: list[_Job]) -> None:
        """Take a step of a job and put it where it belongs then."""
        if self._step(job):
            (running if job.wants is None else waiting).append(job)

    def _is_dropped(self, job: _Job) -> bool:
        if job.future.cancelled():
            _drop(job)
            return True
        return False

    def _step(self, job: _Job) -> bool:
        """Advance a job; True while it goes on."""
        if self._is_dropped(job):
            return False
        failed = None if job.wants is None else job.wants.error
        # A caller may cancel between a job's last step and its result; then the result is dropped.
        with suppress(InvalidStateError):
            try:
                job.wants = next(job.steps) if failed is None else job.steps.throw(failed)
            except StopIteration as end:
                job.future.set_result(end.value)
            except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is; the worker lives on
                job.future.set_exception(error)
            else:
                return True
        return False

    def _abandon(self, waiting: list[_Job]) -> None:
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is not None:
                waiting.append(job)
        for job in waiting:
            _drop(job)
            with suppress(InvalidStateError):
                job.future.set_exception(EngineClosedError("the engine was closed while this turn ran"))


def _drop(job: _Job) -> None:
    """End a job that nobody waits for; what its clean-up raises must not end the worker."""
    with suppress(Exception):
        job.steps.close()
