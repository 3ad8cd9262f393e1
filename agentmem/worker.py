"""One thread owns the model; callers hand it jobs from any thread or event loop.

A job is a generator that yields between forward passes. The worker takes one step of each job in turn, so that a short
turn does not wait for a long one, and drops a job as soon as its future is cancelled. Jobs share nothing here.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from agentmem.errors import EngineClosedError

T = TypeVar("T")

Steps = Generator[None, None, T]


@dataclass
class _Job:
    steps: Steps[Any]
    future: Future[Any]


class Worker:
    """Runs jobs step by step on one daemon thread, without gradients."""

    def __init__(self, name: str) -> None:
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
        while True:
            while not running or not self._inbox.empty():
                job = self._inbox.get()
                if job is None:
                    self._abandon(running)
                    return
                running.append(job)
            job = running.popleft()
            if self._step(job):
                running.append(job)

    def _step(self, job: _Job) -> bool:
        """Advance a job; True while it goes on."""
        if job.future.cancelled():
            _drop(job)
            return False
        # A caller may cancel between a job's last step and its result; then the result is dropped.
        with suppress(InvalidStateError):
            try:
                next(job.steps)
            except StopIteration as end:
                job.future.set_result(end.value)
            except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is; the worker lives on
                job.future.set_exception(error)
            else:
                return True
        return False

    def _abandon(self, running: deque[_Job]) -> None:
        waiting = [*running]
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
