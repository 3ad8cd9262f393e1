"""Decoding in buffers that never move: a pass is captured once as a CUDA graph and replayed for whoever sits there.

A graph repeats kernels with the addresses that they had. So what changes from token to token (tokens, places, who
writes, the states) is copied into buffers, and the pass looks through a mask at as many tokens of its block as it was
made for. Nothing in it waits for the device. Rows in which nobody sits, and sessions that sit a token out, are inert:
their states stay as they are, and what is written of them lies behind their last token, where nothing looks.

On for CUDA with ``AGENTMEM_TRITON=1`` and ``AGENTMEM_CUDA_GRAPHS=1``; elsewhere a pass takes the shapes of its
sessions.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agentmem.delta.model import mask_for
from agentmem.kernels import runs_triton

if TYPE_CHECKING:
    from agentmem.generation.batch_cache import Block
    from agentmem.generation.session import Runtime

_WARMUPS = 2
_CAPTURING = threading.Lock()


class CannotCapture(Exception):
    """A pass of this model does something that a CUDA graph cannot repeat."""


def replays(device: torch.device) -> bool:
    """Whether sessions of a model on this device are to decode in fixed buffers."""
    return os.environ.get("AGENTMEM_CUDA_GRAPHS") == "1" and runs_triton(device)


def bare(model: Any, tokens: Tensor, cache: Any, places: Tensor, allowed: Tensor) -> Tensor:
    """The logits [rows, V] of a model without memory, for one more token [rows, 1] in every row of a block."""
    out = model(
        input_ids=tokens,
        attention_mask=mask_for(model, allowed),
        position_ids=places,
        cache=cache,
        use_cache=True,
    )
    logits: Tensor = out.logits
    return logits[:, -1]


class Captures:
    """Where the passes of one engine are captured: on one stream, for which libraries keep buffers of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None

    def capture(self, run: Callable[[], None]) -> Any:
        """A graph of ``run``, which is run a few times before.

        Raises:
            CannotCapture: it did something that a graph cannot repeat.
        """
        # One capture at a time in a process, on the model's device.
        with _CAPTURING, _uncollected(), torch.cuda.device(self._device):
            before = torch.cuda.current_stream(self._device)
            aside = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            aside.wait_stream(before)
            graph, memory = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            try:
                # Kernels are compiled, and libraries choose theirs, before anything is captured. A pass changes no
                # buffer that it reads but the KV behind each row's last token, so running it again is harmless.
                with torch.cuda.stream(aside):
                    for _ in range(_WARMUPS):
                        run()
                try:
                    with torch.cuda.graph(graph, memory, stream=aside, capture_error_mode="thread_local"):
                        run()
                except RuntimeError as error:
                    # Where torch has not noticed the end, what is asked for on this device would still go to the pool.
                    with suppress(RuntimeError):
                        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), memory)
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise CannotCapture(str(error)) from error
                self._stream = aside  # one on which a capture failed is not used again
            finally:
                # A capture that failed leaves its stream behind.
                torch.cuda.set_stream(before)
                before.wait_stream(aside)
        return graph


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: to end a graph that is garbage would break a capture that is under way, and to end an
    engine would wait for its thread, which may wait to capture. For the holder of ``_CAPTURING``."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Replay:
    """One token for each of the first ``rows`` rows of a block.

    Args:
        runtime: the model.
        block: the KV; its tensors must stay where they are for as long as this is used.
        rows: a power of two; as many rows as the block has, or fewer.
        width: how many tokens of the block it looks at; no row may hold as many.
        state: like one session's state [1, L, H, r, r]; None: the bare model.
        captures: where to capture.
    """

    def __init__(
        self, runtime: Runtime, block: Block, rows: int, width: int, state: Tensor | None, captures: Captures
    ) -> None:
        self._runtime, self._block, self.rows, self._width = runtime, block, rows, width
        self._captures = captures
        # Tokens, places, and 1 where a row writes.
        self._given = torch.zeros(3, rows, 1, dtype=torch.int64, device=runtime.device)
        self._states = None if state is None else state.new_zeros(rows, *state.shape[1:])
        self._after: Tensor | None = None
        self._logits: Tensor | None = None
        self._graph: Any = None

    def run(
        self, tokens: Sequence[int], places: Sequence[int], writes: Sequence[bool], states: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One pass: the logits [n, V] of the rows that were given, and their states afterwards [n, L, H, r, r].

        Raises:
            CannotCapture: nothing was read.
        """
        count, free = len(tokens), [0] * (self.rows - len(tokens))
        given = torch.tensor([[*tokens, *free], [*places, *free], [*map(int, writes), *free]])
        self._given.copy_(given[..., None], non_blocking=True)
        if states is not None and self._states is not None:
            self._states[:count].copy_(states)
        if self._runtime.device.type == "cuda":
            self._graph = self._graph or self._captures.capture(self._pass)
            self._graph.replay()
        else:
            self._pass()
        assert self._logits is not None
        # What a replay leaves is overwritten by the next; what sessions are given is theirs.
        return self._logits[:count].clone(), None if self._after is None else self._after[:count].clone()

    def _pass(self) -> None:
        tokens, places, writes = self._given.unbind()
        cache, allowed = self._block.over(places, self._width)
        runtime = self._runtime
        if self._states is None:
            self._logits = bare(runtime.model, tokens, cache, places, allowed)
            return
        assert runtime.steered is not None
        out = runtime.steered(
            tokens,
            self._states,
            position_ids=places,
            write=writes.bool(),
            cache=cache,
            attention_bias=allowed,
            logits_to_keep=1,
        )
        assert out.logits is not None
        self._logits, self._after = out.logits[:, -1], out.state
