"""Sequences that decode together: a row for each in a shared KV cache, and one forward pass over the rows.

A sequence that decodes together with others has a row in a batched KV cache, which it shares with sequences of about
its length. It gets the row when it first decodes with others, and leaves it when it has work of its own (reading
several tokens, going back); the tokens read in the row are then copied to its own cache. Sequences can join and leave
between any two tokens. Rows share the weights and nothing else: each has its own state, length and mask, and a row that
skips a token is neither written nor advanced.

A pass that runs out of memory is split into halves, and for a while no batch grows that large again. A pass that fails
is repeated row by row, so that only the sequence that causes the failure fails.
"""

from __future__ import annotations

import logging
from collections import abc
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agentmem.delta.passes import Pending, joined_ids, row_of
from agentmem.errors import ConfigError
from agentmem.generation.batch_cache import BatchedKVCache
from agentmem.generation.cuda_graph import CannotCapture, CapturedDecode, GraphCapturer, uses_graphs
from agentmem.generation.runner import ModelRunner
from agentmem.generation.sampling import Sampler, choose_all
from agentmem.generation.sequence import DecodeRequest, Sequence

_logger = logging.getLogger(__name__)
_PATIENCE = 64  # full passes until larger ones are tried again; doubled each time they do not fit
_LONGEST_PATIENCE = 8192
_TRIES = 2  # captures in a row that may fail, say because another thread waits for the device
_IDLE = 16  # 1/16 of a device's memory may hold caches that no sequence uses
_SMALLEST = 256  # tokens in a row of the smallest cache; each larger size holds twice as many


class DecodeBatch:
    """The sequences of one engine that are decoding, in batches by kind and length.

    Args:
        runner: the model.
        max_batch: most sequences in one pass; further ones form another.
        idle_tokens: how many tokens of KV may be kept for future sequences where CUDA graphs were captured for
            them. On a GPU a fraction of its memory takes the place of this limit.

    Attributes:
        shares: whether sequences can decode together at all.
        uses_graphs: whether decoding runs in fixed buffers, which is worth it for one sequence too; turned off for good
            when these cannot be captured.

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
        self._fitted = 0  # full passes since the limit on rows last changed
        self._grew = False  # whether that change raised the limit
        # Key: whether the sequences have memory, and the capacity of a row.
        self._caches: dict[tuple[bool, int], list[BatchedKVCache]] = {}
        # Key: number of rows, and width. Valid for as long as the cache's KV stays at its address.
        self._captured: dict[BatchedKVCache, dict[tuple[int, int], CapturedDecode]] = {}
        self.shares = max_batch > 1 and _can_share(runner)
        self.uses_graphs = (
            self.shares and not runner.writes_at_close and uses_graphs(runner.device) and _on_one_device(runner)
        )
        self._capturer = GraphCapturer(runner.device)
        self._failed_captures = 0  # since the last that succeeded

    # ------------------------------------------------------------------ called by turns and the scheduler

    def run(self, requests: abc.Sequence[DecodeRequest]) -> None:
        """Read a token for each request, in passes over shared rows; a failure is stored in its request."""
        by_cache: dict[BatchedKVCache, list[DecodeRequest]] = {}
        for request in requests:
            row = request.sequence.row
            # A sequence that has outgrown its row gets a larger one. One position is kept free: a pass writes after the
            # last token of every row, even of those that skip the token.
            if row is not None and row.length + 1 >= row.kv.capacity and not self._leave_or_fail(request):
                continue
            try:
                kv = self._join(request.sequence)
            except torch.OutOfMemoryError:  # the sequence's own cache is unchanged
                self.release()
                self.run_alone(request)
                continue
            by_cache.setdefault(kv, []).append(request)
        for kv, group in by_cache.items():
            self._run_pass(kv, group)

    def run_alone(self, request: DecodeRequest) -> None:
        """As `run`, in a pass of the sequence's own, for which it leaves its row."""
        if self._leave_or_fail(request):
            self._runner.decode(request)

    def leave(self, sequence: Sequence, *, keep: bool) -> None:
        """Give up the row of a sequence; `keep`: copy what was read there to the sequence's own cache."""
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
        """Free everything that is kept for later."""
        self._captured.clear()
        for caches in self._caches.values():
            caches[:] = [kv for kv in caches if kv.rows]
        if self._runner.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ rows

    def _join(self, sequence: Sequence) -> BatchedKVCache:
        """The cache in which a sequence has its row, with room for one more token."""
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
            caches.append(kv)  # last, so that nothing is kept if there was no room for the sequence
            return kv
        if kv.is_full:
            self._captured.pop(kv, None)
        sequence.row = kv.add_row(sequence.cache, length)
        return kv

    def _leave_or_fail(self, request: DecodeRequest) -> bool:
        """Let a sequence leave its row, if it has one. False if that failed; its request then has the error."""
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
        """Drop a cache without rows, or keep it for later sequences if graphs were captured for it."""
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

    # ------------------------------------------------------------------ passes and their failures

    def _run_pass(self, kv: BatchedKVCache, requests: abc.Sequence[DecodeRequest]) -> None:
        """One forward pass over all rows of a cache; only the rows of `requests` advance."""
        try:
            self._forward(kv, requests)
            failure: Exception | None = None
        except Exception as error:  # noqa: BLE001 - whose fault it is comes out when each is alone
            failure = error.with_traceback(None)  # the traceback would keep the tensors of the pass alive
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
                self.run_alone(request)

    def _run_halves(self, kv: BatchedKVCache, requests: abc.Sequence[DecodeRequest]) -> None:
        """Repeat a pass that did not fit, in halves. A pass covers all rows of a cache, so one half leaves it."""
        self.release()
        if len(requests) == 1:
            self.run_alone(requests[0])
            return
        half = len(requests) // 2
        self._shrink(half)
        others = [request for request in requests[half:] if self._leave_or_fail(request)]
        self._run_pass(kv, requests[:half])
        self.run(others)

    def _shrink(self, rows: int) -> None:
        """After `rows` did not fit, limit batches for a while; longer if a larger batch had just been tried."""
        if self._grew:
            self._patience = min(2 * self._patience, _LONGEST_PATIENCE)
        self._most, self._fitted, self._grew = max(1, min(self._most, rows)), 0, False

    def _grow(self, rows: int) -> None:
        """Count a pass of `rows` that fitted; after enough full passes, larger batches are allowed again."""
        if rows < self._most or self._most == self._limit:
            return
        self._fitted += 1
        if self._fitted >= self._patience:
            self._most, self._fitted, self._grew = min(2 * self._most, self._limit), 0, True

    def _forward(self, kv: BatchedKVCache, requests: abc.Sequence[DecodeRequest]) -> None:
        """Run the pass; sequences get their logits, states and sums only when all of it has succeeded."""
        by_row: list[DecodeRequest | None] = [None] * len(kv.rows)  # None: the row skips this token
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
            # Sequences that write get their new states; the others keep the very tensors that they had.
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
        """The pass over the rows: logits [rows, V] and states [rows, L, H, r, r]; open sums are updated."""
        cache, positions, allowed = kv.view()
        ids = [[0 if request is None else request.token] for request in by_row]
        tokens = torch.tensor(ids, device=self._runner.device)  # [rows, 1]
        forward = partial(self._runner.forward, tokens, states, cache, position_ids=positions, attention_bias=allowed)
        if states is None or not self._runner.writes_at_close:
            write: Any = all(writes) or (any(writes) and torch.tensor(writes, device=tokens.device)[:, None])
            out = forward(write=write)
        else:
            # Adapters that write by message or sentence: states stay as they are, and open sums are updated.
            own: list[Pending | None] = [None if request is None else request.sequence.pending for request in by_row]
            sums, row_sums = kv.sums(own, [request is None for request in by_row])
            segments = [-1 if request is None else request.segment for request in by_row]
            numbers = torch.tensor(segments, device=tokens.device)[:, None]
            out = forward(segments=numbers, pending=sums, close=False)
            # If this fails half-way the pass is repeated, so no sequence is changed before all results are there.
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
        """The pass in fixed buffers, with the number of rows rounded up to a power of two."""
        size = rows, width = 1 << (len(by_row) - 1).bit_length(), kv.width
        captured = self._captured.get(kv, {}).get(size)
        if captured is None:
            step = partial(decode_step, self._runner, kv, width)
            like = None if states is None else states[:1]
            captured = CapturedDecode(step, rows, like, self._runner.device, self._capturer)
        tokens = [0 if request is None else request.token for request in by_row]
        out = captured.run(tokens, [row.length for row in kv.rows], writes, states)
        self._captured.setdefault(kv, {})[size] = captured  # last, so that a step that cannot be captured is not kept
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
    """One token [rows, 1] for each of the first rows of a cache, attending to `width` tokens.

    Meets the requirement of `cuda_graph.Step`: it waits for no number from the device.
    """
    cache, allowed = kv.over(positions, width)
    write = writes.bool() if states is not None else False
    out = runner.forward(tokens, states, cache, write=write, position_ids=positions, attention_bias=allowed)
    assert out.logits is not None
    return out.logits, out.state


def _next_tokens(logits: Tensor, samplers: abc.Sequence[Sampler | None]) -> list[int | None]:
    """The next token of every row, chosen for all rows at once: on a GPU every number that is fetched means a wait.

    None where no token is wanted or choosing fails: the input token was read and written, and must not be read again.
    """
    try:
        return choose_all(logits, samplers)
    except Exception:  # noqa: BLE001 - each sequence meets it again when it chooses alone
        return [None] * len(samplers)


def _on_one_device(runner: ModelRunner) -> bool:
    """Whether all weights are on the device of the tokens."""
    memory = runner.steered.memory.parameters() if runner.steered is not None else ()
    return all(weight.device == runner.device for weight in (*runner.model.parameters(), *memory))


def _can_share(runner: ModelRunner) -> bool:
    """Whether the rows of one pass can have masks of their own with this model.

    Sliding-window attention and flash attention do not take such a mask, and some rotary embeddings depend on the
    longest position in a pass. Sequences of such models take turns.
    """
    config = runner.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    implementation = runner.model.config._attn_implementation
    rotary = getattr(config, "rope_parameters", None) or {}
    types = {str(options.get("rope_type")) for options in (rotary, *rotary.values()) if isinstance(options, dict)}
    unmasked = kinds == {"full_attention"} and not windowed and not types & {"longrope", "dynamic"}
    return unmasked and implementation in ("sdpa", "eager")
