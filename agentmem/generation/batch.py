"""Continuous batching: one thread runs all turns; those that wait for a next token get it from one forward pass.

A turn is a job, a generator. It yields None between steps of its own, and a `DecodeRequest` where it wants a token
read: the `Scheduler` has the `DecodeBatch` read the tokens of all jobs that wait for one together, and then these go
on. While some wait, one step of one other job is taken between two such passes, each job in its turn, so that a long
one holds nobody up. A job ends before its next step when its future is cancelled or its time is over.

A sequence that decodes together with others has a row of a batched KV cache that it shares with sequences of about its
length. It gets the row when it first meets others and leaves when it has to do something of its own (read several
tokens, go back); the tokens that it read there then go to its own cache. Between two tokens sequences come and go. Rows
share the weights and nothing else: each has its own state, length and mask, and a row that sits a token out is neither
written nor moved on.

A pass that runs out of memory is split in halves, and for a while no batch grows as large again; one that fails is done
again row by row, so that the failure is that of the sequence that causes it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import abc, deque
from collections.abc import Generator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from agentmem.delta.passes import Pending, joined_ids, row_of
from agentmem.errors import ConfigError, EngineClosedError, TurnTimeoutError
from agentmem.generation.batch_cache import BatchedKVCache
from agentmem.generation.cuda_graph import CannotCapture, CapturedDecode, GraphCapturer, uses_graphs
from agentmem.generation.runner import ModelRunner
from agentmem.generation.sampling import Sampler, choose_all
from agentmem.generation.sequence import Sequence

_logger = logging.getLogger(__name__)
T = TypeVar("T")
_PATIENCE = 64  # full passes after which larger ones are tried again; twice as many each time that they do not fit
_LONGEST_PATIENCE = 8192
_TRIES = 2  # captures one after another that may fail, as when another thread waits for the device meanwhile
_IDLE = 16  # this part of a device's memory may hold caches in which no sequence has a row
_SMALLEST = 256  # tokens that a row holds; each larger kind of cache holds twice as many


@dataclass(slots=True, eq=False)
class DecodeRequest:
    """A sequence's wish to read one token and know what follows it.

    Attributes:
        segment: what the token writes; -1: it is not written.
        error: what went wrong with this one.
    """

    sequence: Sequence
    token: int
    segment: int
    error: BaseException | None = None


class DecodeBatch:
    """The sequences of one engine that decode, in batches by kind and length.

    Args:
        runner: the model.
        max_batch: sequences in one pass; further ones are in another.
        idle_tokens: how many tokens of KV may be kept for sequences to come where graphs were made for it; on a GPU a
            part of its memory in place of that.

    Attributes:
        uses_graphs: whether they decode in fixed buffers; not any more once these could not be captured.

    Raises:
        ConfigError: `max_batch` is not 1 or more.
    """

    def __init__(self, runner: ModelRunner, max_batch: int, idle_tokens: int) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch must be 1 or more; found {max_batch}")
        self._runner = runner
        self._idle_tokens = idle_tokens
        self._limit = self._most = max_batch
        self._patience = _PATIENCE
        self._fitted = 0  # passes of as many rows as may be now, since that last changed
        self._grew = False  # whether it then became more
        # By whether they have memory, and the capacity of a row.
        self._caches: dict[tuple[bool, int], list[BatchedKVCache]] = {}
        # By number of rows and width; good for as long as the cache's KV lies where it lies.
        self._captured: dict[BatchedKVCache, dict[tuple[int, int], CapturedDecode]] = {}
        self._shares = max_batch > 1 and _can_share(runner)
        self.uses_graphs = (
            self._shares and not runner.writes_at_close and uses_graphs(runner.device) and _on_one_device(runner)
        )
        self._capturer = GraphCapturer(runner.device)
        self._failed_captures = 0  # since one did not fail

    # ------------------------------------------------------------------ what turns and the scheduler call

    def run(self, requests: abc.Sequence[DecodeRequest]) -> None:
        """Read a token for each; what goes wrong with one is noted with it."""
        if not self._shares or (len(requests) == 1 and not self.uses_graphs):
            for request in requests:
                self._run_alone(request)
        else:
            self._run_together(requests)

    def extend(
        self, sequence: Sequence, ids: abc.Sequence[int], segments: abc.Sequence[int], *, logits: bool, close: bool
    ) -> None:
        """As `ModelRunner.extend`; a sequence that has a row leaves first, and takes along what it read there."""
        if sequence.row is not None:
            self.leave(sequence, keep=True)
        try:
            self._runner.extend(sequence, ids, segments, logits=logits, close=close)
        except torch.OutOfMemoryError:
            self.release()  # what is kept for later: the next one may find room
            raise

    def leave(self, sequence: Sequence, *, keep: bool) -> None:
        """Give up the row of a sequence; `keep`: what was read there is wanted in its own cache."""
        row = sequence.row
        if row is None:
            return
        sequence.row = None
        try:
            if keep:
                row.kv.copy_back(row, sequence.cache)
        finally:
            row.kv.remove_row(row)
            if not row.kv.rows:
                self._retire(row.kv)

    def release(self) -> None:
        """Give up all that is kept for later."""
        self._captured.clear()
        for caches in self._caches.values():
            caches[:] = [kv for kv in caches if kv.rows]
        if self._runner.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ who has a row

    def _join(self, sequence: Sequence) -> BatchedKVCache:
        """The cache that a sequence has a row of, with room for one more token."""
        if sequence.row is not None:
            return sequence.row.kv
        length, capacity = sequence.length, _SMALLEST
        while capacity <= length + 1:
            capacity *= 2
        caches = self._caches.setdefault((sequence.state is not None, capacity), [])
        kv = next((kv for kv in caches if len(kv.rows) < self._most), None)
        if kv is None:
            kv = BatchedKVCache(sequence.cache, capacity)
            sequence.row = kv.add_row(sequence.cache, length)
            caches.append(kv)  # only now: where there was no room for the sequence, nothing is kept for it
            return kv
        if kv.is_full:
            self._captured.pop(kv, None)
        sequence.row = kv.add_row(sequence.cache, length)
        return kv

    def _leave_or_fail(self, request: DecodeRequest) -> bool:
        """Let a sequence leave its row, if it has one; a failure is its own. Says whether it can go on."""
        if request.sequence.row is None:
            return True
        try:
            self.leave(request.sequence, keep=True)
        except Exception as error:  # noqa: BLE001 - what was read in the row is lost with it
            request.sequence.cache_valid = False
            request.error = error
            return False
        return True

    def _retire(self, kv: BatchedKVCache) -> None:
        """Give up a cache without rows; where graphs were captured for it, it may stay for those who come next."""
        idle = [other for caches in self._caches.values() for other in caches if not other.rows]
        if kv in self._captured and self._may_stay(idle):
            return
        self._captured.pop(kv, None)
        for caches in self._caches.values():
            if kv in caches:
                caches.remove(kv)

    def _may_stay(self, idle: abc.Sequence[BatchedKVCache]) -> bool:
        device = self._runner.device
        if device.type == "cuda":
            return sum(kv.nbytes for kv in idle) <= torch.cuda.get_device_properties(device).total_memory // _IDLE
        return sum(kv.tokens for kv in idle) <= self._idle_tokens

    # ------------------------------------------------------------------ passes, and those that fail

    def _run_alone(self, request: DecodeRequest) -> None:
        if not self._leave_or_fail(request):
            return
        sequence = request.sequence
        try:
            self.extend(sequence, [request.token], [request.segment], logits=True, close=False)
        except Exception as error:  # noqa: BLE001 - the sequence's job gets it
            sequence.cache_valid = False
            request.error = error

    def _run_together(self, requests: abc.Sequence[DecodeRequest]) -> None:
        by_cache: dict[BatchedKVCache, list[DecodeRequest]] = {}
        for request in requests:
            row = request.sequence.row
            # One that has outgrown its row takes a larger one. A position is kept free: a pass writes behind the last
            # token of every row, also of those that sit it out.
            if row is not None and row.length + 1 >= row.kv.capacity and not self._leave_or_fail(request):
                continue
            try:
                kv = self._join(request.sequence)
            except torch.OutOfMemoryError:  # the sequence's own cache is as it was
                self.release()
                self._run_alone(request)
                continue
            by_cache.setdefault(kv, []).append(request)
        for kv, group in by_cache.items():
            self._run_pass(kv, group)

    def _run_pass(self, kv: BatchedKVCache, requests: abc.Sequence[DecodeRequest]) -> None:
        """One forward pass over all rows of a cache, of which those of `requests` go on."""
        try:
            self._forward(kv, requests)
            failure: Exception | None = None
        except Exception as error:  # noqa: BLE001 - whose fault it is comes out when each is alone
            failure = error.with_traceback(None)  # this and where it comes from would keep what the pass held
            failure.__cause__ = failure.__context__ = None
        if failure is None:
            self._failed_captures = 0
            self._grow(len(kv.rows))
        elif isinstance(failure, torch.OutOfMemoryError):
            self._run_halves(kv, requests)
        elif isinstance(failure, CannotCapture):
            self._failed_captures += 1
            if self._failed_captures >= _TRIES:
                _logger.warning("decoding goes on without CUDA graphs: a pass cannot be captured (%s)", failure)
                self.uses_graphs = False
            self.release()
            self._run_pass(kv, requests)
        else:
            for request in requests:
                self._run_alone(request)

    def _run_halves(self, kv: BatchedKVCache, requests: abc.Sequence[DecodeRequest]) -> None:
        """A pass did not fit: in two. It takes all rows of the cache, so one half moves to another."""
        self.release()
        if len(requests) == 1:
            self._run_alone(requests[0])
            return
        half = len(requests) // 2
        self._shrink(half)
        others = [request for request in requests[half:] if self._leave_or_fail(request)]
        self._run_pass(kv, requests[:half])
        self._run_together(others)

    def _shrink(self, rows: int) -> None:
        """More than so many did not fit: no batch grows larger for now, and for longer where that was tried in vain."""
        if self._grew:
            self._patience = min(2 * self._patience, _LONGEST_PATIENCE)
        self._most, self._fitted, self._grew = max(1, min(self._most, rows)), 0, False

    def _grow(self, rows: int) -> None:
        """So many did fit: when all that may be often did, those who come may join larger batches again."""
        if rows < self._most or self._most == self._limit:
            return
        self._fitted += 1
        if self._fitted >= self._patience:
            self._most, self._fitted, self._grew = min(2 * self._most, self._limit), 0, True

    def _forward(self, kv: BatchedKVCache, requests: abc.Sequence[DecodeRequest]) -> None:
        """The pass; sequences are given their logits, states and sums only when all is there."""
        by_row: list[DecodeRequest | None] = [None] * len(kv.rows)  # None: the row sits this token out
        for request in requests:
            assert request.sequence.row is not None
            by_row[request.sequence.row.index] = request
        states: Tensor | None = None
        row_states: list[Tensor] = []
        if requests[0].sequence.state is not None:
            states, row_states = kv.states([None if request is None else request.sequence.state for request in by_row])
        writes = [request is not None and request.segment >= 0 for request in by_row]
        if self.uses_graphs:
            logits, new_states = self._replay(kv, by_row, writes, states)
        else:
            logits, new_states = self._forward_rows(kv, by_row, writes, states)
        if new_states is not None:
            # Those who write get theirs; the others have the very ones that they had.
            if any(writes) and not self._runner.writes_at_close:
                for row, state in enumerate(torch.split(new_states, 1)):
                    entry = by_row[row]
                    if writes[row] and entry is not None:
                        entry.sequence.state = row_states[row] = state
            kv.keep_states(new_states, row_states)
        tokens = _next_tokens(logits, [None if request is None else request.sequence.sampler for request in by_row])
        for row, (entry, row_logits) in enumerate(zip(by_row, logits.unbind(), strict=True)):
            if entry is not None:
                entry.sequence.logits, entry.sequence.next_token = row_logits, tokens[row]
                kv.rows[row].length += 1

    def _forward_rows(
        self,
        kv: BatchedKVCache,
        by_row: abc.Sequence[DecodeRequest | None],
        writes: abc.Sequence[bool],
        states: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The pass over the rows as they are: logits [rows, V] and states [rows, L, H, r, r]; sums are moved on."""
        cache, positions, allowed = kv.view()
        ids = [[0 if request is None else request.token] for request in by_row]
        tokens = torch.tensor(ids, device=self._runner.device)  # [rows, 1]
        forward = partial(self._runner.forward, tokens, states, cache, position_ids=positions, attention_bias=allowed)
        if states is None or not self._runner.writes_at_close:
            write: Any = all(writes) or (any(writes) and torch.tensor(writes, device=tokens.device)[:, None])
            out = forward(write=write)
        else:
            # Adapters that write by message or sentence: states stay, open sums are moved on.
            own: list[Pending | None] = [None if request is None else request.sequence.pending for request in by_row]
            sums, row_sums = kv.sums(own, [request is None for request in by_row])
            segments = [-1 if request is None else request.segment for request in by_row]
            numbers = torch.tensor(segments, device=tokens.device)[:, None]
            out = forward(segments=numbers, pending=sums, close=False)
            # Where this fails half-way, the pass is done again, so nobody is given anything before all is there.
            moved: list[tuple[int, Sequence, Pending]] = []
            for row, (request, segment) in enumerate(zip(by_row, segments, strict=True)):
                if request is not None and segment >= 0:
                    assert out.pending is not None
                    seen = joined_ids([segment], request.sequence.pending)
                    moved.append((row, request.sequence, row_of(out.pending, row, seen)))
            for row, sequence, pending in moved:
                sequence.pending = row_sums[row] = pending
            kv.keep_sums(out.pending, row_sums)
        assert out.logits is not None
        return out.logits, out.state

    def _replay(
        self,
        kv: BatchedKVCache,
        by_row: abc.Sequence[DecodeRequest | None],
        writes: abc.Sequence[bool],
        states: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The pass in fixed buffers, for the next power of two of rows."""
        size = rows, width = 1 << (len(by_row) - 1).bit_length(), kv.width
        captured = self._captured.get(kv, {}).get(size)
        if captured is None:
            step = partial(decode_step, self._runner, kv, width)
            like = None if states is None else states[:1]
            captured = CapturedDecode(step, rows, like, self._runner.device, self._capturer)
        tokens = [0 if request is None else request.token for request in by_row]
        out = captured.run(tokens, [row.length for row in kv.rows], writes, states)
        self._captured.setdefault(kv, {})[size] = captured  # only now: one that cannot be captured is not kept
        return out


def decode_step(
    runner: ModelRunner,
    kv: BatchedKVCache,
    width: int,
    tokens: Tensor,
    positions: Tensor,
    writes: Tensor,
    states: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One token [rows, 1] for each of the first rows of a cache, of which `width` tokens are looked at.

    What `cuda_graph.Step` asks for: it waits for no number of the device.
    """
    cache, allowed = kv.over(positions, width)
    write = writes.bool() if states is not None else False
    out = runner.forward(tokens, states, cache, write=write, position_ids=positions, attention_bias=allowed)
    assert out.logits is not None
    return out.logits, out.state


def _next_tokens(logits: Tensor, samplers: abc.Sequence[Sampler | None]) -> list[int | None]:
    """The token that follows in every row, for all at once: on a GPU every number that is fetched is a wait.

    None where nobody asks for it or it fails: by now the token is read and written, and must not be read again.
    """
    try:
        return choose_all(logits, samplers)
    except Exception:  # noqa: BLE001 - each sequence meets it again when it chooses alone
        return [None] * len(samplers)


def _on_one_device(runner: ModelRunner) -> bool:
    """Whether all weights lie where the tokens are."""
    memory = runner.steered.memory.parameters() if runner.steered is not None else ()
    return all(weight.device == runner.device for weight in (*runner.model.parameters(), *memory))


def _can_share(runner: ModelRunner) -> bool:
    """Whether rows of one pass can have masks of their own here.

    Attention over windows and flash attention take no mask like ours; some rotary embeddings depend on the longest
    position of a pass. There sequences take turns.
    """
    config = runner.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    implementation = runner.model.config._attn_implementation
    rotary = getattr(config, "rope_parameters", None) or {}
    types = {str(options.get("rope_type")) for options in (rotary, *rotary.values()) if isinstance(options, dict)}
    unmasked = kinds == {"full_attention"} and not windowed and not types & {"longrope", "dynamic"}
    return unmasked and implementation in ("sdpa", "eager")


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
            steps: the job, not begun.
            timeout: seconds from now after which the job fails with `TurnTimeoutError`, before its next step.
            future: what gets the result, where the caller has one already.
            deadline: when a timeout that began earlier ends, by `time.monotonic`.

        Raises:
            EngineClosedError: the scheduler was closed, or this process was forked from the one that has its thread.
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
            fail(job.future, timeout_error(job.timeout))
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
    """End a job that nobody waits for; what its clean-up raises must not end the thread."""
    with suppress(Exception):
        job.steps.close()
