"""Continuous batching: one thread runs all turns, and decodes those that wait for a token in one forward pass.

A turn is a job, and a job is a generator. It yields None between its own steps, and a `DecodeRequest` where it needs a
token decoded. The `Scheduler` collects the requests of all waiting jobs, has the `DecodeBatch` run them in one pass (a
request that is alone, the `ModelRunner`), and lets the jobs go on. Between two such passes it runs one step of one
other job, in rotation, so that a long prefill does not hold up the rest. A job ends before its next step if its future
is cancelled or its timeout has passed.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import abc, deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from agentmem.errors import EngineClosedError, TurnTimeoutError
from agentmem.generation.batch import DecodeBatch
from agentmem.generation.runner import ModelRunner
from agentmem.generation.sequence import DecodeRequest, Steps
from agentmem.telemetry import ACTIVE, batched

_logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Job:
    steps: Steps[Any]
    future: Future[Any]
    timeout: float | None
    deadline: float | None  # of `time.monotonic`
    request: DecodeRequest | None = None  # the request that the job waits for


class Scheduler:
    """Runs jobs step by step on one daemon thread, without gradients.

    Args:
        name: of the thread.
        runner: decodes for a sequence that is alone.
        batch: decodes for several; what it keeps for later is freed when memory runs out and when the thread ends.
    """

    def __init__(self, name: str, runner: ModelRunner, batch: DecodeBatch) -> None:
        self._runner = runner
        self._batch = batch
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(
        self,
        steps: Steps[T],
        timeout: float | None = None,
        *,
        future: Future[T] | None = None,
        deadline: float | None = None,
    ) -> Future[T]:
        """Queue a job; cancelling the future ends it before its next step.

        Args:
            steps: the job, not started.
            timeout: seconds from now after which the job fails with `TurnTimeoutError`, before its next step.
            future: what gets the result, where the caller has one already.
            deadline: when a timeout that began earlier ends, by `time.monotonic`.

        Raises:
            EngineClosedError: the scheduler was closed, or this process is a fork of the one that runs its thread.
        """
        if timeout is not None and deadline is None:
            deadline = time.monotonic() + timeout
        job = _Job(steps, Future() if future is None else future, timeout, deadline)
        self.require_open()
        with self._lock:
            if self._closed:
                raise EngineClosedError("this engine is closed; load a new one")
            self._inbox.put(job)
        return job.future

    def require_open(self) -> None:
        """Raise EngineClosedError where `submit` would."""
        if os.getpid() != self._process:  # before the lock, which a thread of the other process may have held
            raise EngineClosedError(
                f"this engine was loaded in process {self._process} and its thread lives there; found process "
                f"{os.getpid()}, a fork of it; load the engine after the fork (gunicorn without --preload, Celery's "
                "worker_process_init signal), or start processes by multiprocessing's spawn method"
            )
        if self._closed:
            raise EngineClosedError("this engine is closed; load a new one")

    def close(self) -> None:
        """End the thread; running and waiting jobs fail with EngineClosedError. Idempotent; no effect in a fork."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        # Gradient mode is thread-local: this covers every job and affects no caller's thread.
        torch.set_grad_enabled(False)
        running: deque[_Job] = deque()  # jobs with steps of their own to run
        waiting: list[_Job] = []  # jobs that wait for a token
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
                if job.request is not None and not over:  # a job that is over gets no token
                    ready.append(job)
                    requests.append(job.request)
            if requests:
                try:
                    self._decode(requests)
                except BaseException as error:  # noqa: BLE001 - each job is told
                    for request in requests:
                        request.error = request.error or error
            waiting = []
            others: int | None = None
            while True:
                if ready:
                    job = ready.popleft()
                else:
                    # Then one step of one other job. Where no job waits for a token, a step of each: jobs that arrive
                    # together finish their short first steps before the next pass and so start decoding together.
                    if others is None:
                        others = min(1, len(running)) if waiting else len(running)
                    if others == 0:
                        break
                    others -= 1
                    job = running.popleft()
                if (job.future.cancelled() or job.deadline is not None) and self._is_over(job):
                    continue
                failure = None if job.request is None else job.request.error
                # A caller may cancel between a job's last step and its result; the result is then dropped.
                with suppress(InvalidStateError):
                    try:
                        job.request = next(job.steps) if failure is None else job.steps.throw(failure)
                    except StopIteration as end:
                        job.future.set_result(end.value)
                    except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is
                        if isinstance(error, torch.OutOfMemoryError):
                            self._batch.release()  # free what is kept for later, so that the next attempt may fit
                        job.future.set_exception(error)
                    else:
                        (running if job.request is None else waiting).append(job)

    def _decode(self, requests: abc.Sequence[DecodeRequest]) -> None:
        """Read a token for each request; a failure is stored in its request."""
        if ACTIVE:
            batched(len(requests))
        if self._batch.shares and (len(requests) > 1 or self._batch.uses_graphs):
            self._batch.run(requests)
            return
        for request in requests:
            if request.sequence.row is None:
                self._runner.decode(request)
            else:
                self._batch.run_alone(request)

    def _is_over(self, job: _Job) -> bool:
        """End a job whose future was cancelled or whose timeout has passed."""
        if job.future.cancelled():
            _drop(job)
            return True
        if job.deadline is not None and time.monotonic() > job.deadline:
            _drop(job)
            fail(job.future, timeout_error(job.timeout))
            return True
        return False

    def _abandon(self, jobs: list[_Job]) -> None:
        """End all jobs, and free what the batch keeps."""
        while not self._inbox.empty():
            if (job := self._inbox.get()) is not None:
                jobs.append(job)
        for job in jobs:
            _drop(job)
            fail(job.future, EngineClosedError("the engine was closed while this turn ran"))
        try:
            self._batch.release()
        except Exception:
            _logger.exception("%s has ended, but could not give back all that it held", self._thread.name)


def fail(future: Future[Any], error: BaseException) -> None:
    """End a future with an error, if it has not ended."""
    with suppress(InvalidStateError):  # cancelled meanwhile
        future.set_exception(error)


def timeout_error(timeout: float | None) -> TurnTimeoutError:
    """What a turn ends with that was given so many seconds."""
    return TurnTimeoutError(
        f"the turn took longer than its timeout of {timeout} seconds and was given up; its state is "
        "unchanged; give it more time, fewer max_tokens or a smaller window"
    )


def _drop(job: _Job) -> None:
    """End a job that nobody waits for; an exception from its clean-up must not end the thread."""
    with suppress(Exception):
        job.steps.close()
