"""One thread owns the model; callers hand it jobs from any thread or event loop.

A job is a generator. It yields None between steps of its own, and a `DecodeRequest` where it wants a token read: the
tokens of all jobs that wait for one are read together, and then these go on. While some wait, one step of one other job
is taken between two such passes, each job in its turn, so that a long one holds nobody up. A job ends before its next
step when its future is cancelled or its time is over.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from agentmem.errors import EngineClosedError, TurnTimeoutError
from agentmem.generation.batch import DecodeBatch, DecodeRequest

_logger = logging.getLogger(__name__)
T = TypeVar("T")

Steps = Generator[DecodeRequest | None, None, T]
"""What a job is: it ends with its result."""


@dataclass(slots=True, eq=False)
class _Job:
    steps: Steps[Any]
    future: Future[Any]
    timeout: float | None
    deadline: float | None  # of `time.monotonic`
    request: DecodeRequest | None = None  # what it waits for


class Scheduler:
    """Runs jobs step by step on one daemon thread, without gradients.

    Args:
        name: of the thread.
        batch: reads the next tokens of those who wait for one; what it keeps is given up when the thread ends.
    """

    def __init__(self, name: str, batch: DecodeBatch) -> None:
        self._batch = batch
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, steps: Steps[T], timeout: float | None = None) -> Future[T]:
        """Queue a job; cancelling the future ends it before its next step.

        Args:
            steps: the job, not begun.
            timeout: seconds from now after which the job fails with `TurnTimeoutError`, before its next step.

        Raises:
            EngineClosedError: the scheduler was closed, or this process was forked from the one that has its thread.
        """
        if os.getpid() != self._process:  # before the lock, which a thread of the other process may have held
            raise EngineClosedError(
                f"this engine was loaded in process {self._process} and its thread lives there; found process "
                f"{os.getpid()}, a fork of it; load the engine after the fork (gunicorn without --preload, Celery's "
                "worker_process_init signal), or start processes by multiprocessing's spawn method"
            )
        deadline = None if timeout is None else time.monotonic() + timeout
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise EngineClosedError("this engine is closed; load a new one")
            self._inbox.put(_Job(steps, future, timeout, deadline))
        return future

    def close(self) -> None:
        """End the thread; running and waiting jobs fail with EngineClosedError. Idempotent; in a fork nothing."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        # Thread-local, so it holds for every job and leaks into no caller's thread.
        torch.set_grad_enabled(False)
        running: deque[_Job] = deque()  # they have something of their own to do
        waiting: list[_Job] = []  # they want a token read
        while True:
            while not (running or waiting) or not self._inbox.empty():
                arrived = self._inbox.get()
                if arrived is None:
                    self._abandon([*running, *waiting])
                    return
                running.append(arrived)
            ready: deque[_Job] = deque()
            requests: list[DecodeRequest] = []
            for job in waiting:
                over = (job.future.cancelled() or job.deadline is not None) and self._is_over(job)
                if job.request is not None and not over:  # those who are gone get no token
                    ready.append(job)
                    requests.append(job.request)
            if requests:
                try:
                    self._batch.run(requests)
                except BaseException as error:  # noqa: BLE001 - each job is told
                    for request in requests:
                        request.error = request.error or error
            waiting = []
            others: int | None = None
            while True:
                if ready:
                    job = ready.popleft()
                else:
                    # Then a step of one of the others. Where nobody waits, of each: short first steps are taken before
                    # the next pass, so those who come together begin together.
                    if others is None:
                        others = min(1, len(running)) if waiting else len(running)
                    if others == 0:
                        break
                    others -= 1
                    job = running.popleft()
                if (job.future.cancelled() or job.deadline is not None) and self._is_over(job):
                    continue
                failure = None if job.request is None else job.request.error
                # A caller may cancel between a job's last step and its result; then the result is dropped.
                with suppress(InvalidStateError):
                    try:
                        job.request = next(job.steps) if failure is None else job.steps.throw(failure)
                    except StopIteration as end:
                        job.future.set_result(end.value)
                    except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is
                        job.future.set_exception(error)
                    else:
                        (running if job.request is None else waiting).append(job)

    def _is_over(self, job: _Job) -> bool:
        """End a job whose future was cancelled or whose time is over."""
        if job.future.cancelled():
            _drop(job)
            return True
        if job.deadline is not None and time.monotonic() > job.deadline:
            _drop(job)
            _fail(
                job,
                TurnTimeoutError(
                    f"the turn took longer than its timeout of {job.timeout} seconds and was given up; its state is "
                    "unchanged; give it more time, fewer max_tokens or a smaller window"
                ),
            )
            return True
        return False

    def _abandon(self, jobs: list[_Job]) -> None:
        """End all jobs, and give up what the batch keeps."""
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is not None:
                jobs.append(job)
        for job in jobs:
            _drop(job)
            _fail(job, EngineClosedError("the engine was closed while this turn ran"))
        try:
            self._batch.release()
        except Exception:
            _logger.exception("%s has ended, but could not give back all that it held", self._thread.name)


def _fail(job: _Job, error: Exception) -> None:
    with suppress(InvalidStateError):  # cancelled meanwhile
        job.future.set_exception(error)


def _drop(job: _Job) -> None:
    """End a job that nobody waits for; what its clean-up raises must not end the thread."""
    with suppress(Exception):
        job.steps.close()
