"""Decode steps in fixed buffers: captured once as a CUDA graph, then replayed for each token.

A graph repeats kernels with the addresses that they were captured with. So everything that changes from token to token
(tokens, positions, which rows write, states) is copied into buffers, and the step always attends, through a mask, to
the number of KV tokens that it was captured for. Nothing in it waits for the device. Unused rows, and rows that skip a
token, are inert: their states stay as they are, and their KV is written after their last token, where no mask looks.

Used on CUDA with `AGENTMEM_TRITON=1` and `AGENTMEM_CUDA_GRAPHS=1`; without these, a step has the shapes of its
sequences.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from agentmem.kernels import runs_triton

_WARMUPS = 2
_CAPTURING = threading.Lock()

Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Maps tokens, positions and write flags, each [rows, 1] int64, and states [rows, L, H, r, r] to logits [rows, V] and
new states. It must not wait for a number from the device, and running it again must do no harm."""


class CannotCapture(Exception):
    """A pass of this model does something that a CUDA graph cannot repeat."""


def uses_graphs(device: torch.device) -> bool:
    """Whether sequences of a model on this device should decode in fixed buffers."""
    return os.environ.get("AGENTMEM_CUDA_GRAPHS") == "1" and runs_triton(device)


class GraphCapturer:
    """Captures the decode steps of one engine, all on one stream, since libraries keep buffers per stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None

    def capture(self, run: Callable[[], None]) -> Any:
        """A graph of `run`, after a few runs to warm up.

        Raises:
            CannotCapture: `run` did something that a graph cannot repeat.
        """
        # Only one capture at a time in a process, on the model's device.
        with _CAPTURING, _uncollected(), torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            side = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            graph, memory = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            try:
                # The first runs compile kernels and let libraries choose theirs before the capture. A step changes no
                # buffer that it reads, except the KV after each row's last token, so running it again is harmless.
                with torch.cuda.stream(side):
                    for _ in range(_WARMUPS):
                        run()
                try:
                    with torch.cuda.graph(graph, memory, stream=side, capture_error_mode="thread_local"):
                        run()
                except RuntimeError as error:
                    # If torch has not noticed the end, allocations on this device would still go to the graph's pool.
                    with suppress(RuntimeError):
                        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), memory)
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise CannotCapture(str(error)) from error
                self._stream = side  # a stream on which a capture failed is not used again
            finally:
                # A failed capture leaves its stream as the current one.
                torch.cuda.set_stream(current)
                current.wait_stream(side)
        return graph


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection, for the holder of `_CAPTURING`: freeing an unused graph would break a running capture, and
    freeing an engine would wait for its thread, which may itself be waiting to capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class CapturedDecode:
    """One token for each of up to `rows` rows.

    Args:
        step: the step to capture; the KV that it writes to must stay at its address for as long as this is used.
        rows: number of rows in the buffers.
        state: an example of one sequence's state [1, L, H, r, r]; None: the bare model.
        device: the model's device.
        capturer: captures the step on CUDA; None: the step is run without a graph.
    """

    def __init__(
        self, step: Step, rows: int, state: Tensor | None, device: torch.device, capturer: GraphCapturer
    ) -> None:
        self.rows = rows
        self._step, self._device, self._capturer = step, device, capturer
        # Tokens, positions, and 1 where the row writes: [3, rows, 1].
        self._inputs = torch.zeros(3, rows, 1, dtype=torch.int64, device=device)
        self._states = None if state is None else state.new_zeros(rows, *state.shape[1:])
        self._new_states: Tensor | None = None
        self._logits: Tensor | None = None
        self._graph: Any = None

    def run(
        self, tokens: Sequence[int], positions: Sequence[int], writes: Sequence[bool], states: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One step: the logits [n, V] of the n given rows, and their new states [n, L, H, r, r].

        Raises:
            CannotCapture: no token was read.
        """
        count, free = len(tokens), [0] * (self.rows - len(tokens))
        inputs = torch.tensor([[*tokens, *free], [*positions, *free], [*map(int, writes), *free]])
        self._inputs.copy_(inputs[..., None], non_blocking=True)
        if states is not None and self._states is not None:
            self._states[:count].copy_(states)
        if self._device.type == "cuda":
            self._graph = self._graph or self._capturer.capture(self._run_step)
            self._graph.replay()
        else:
            self._run_step()
        assert self._logits is not None
        # The next replay overwrites the buffers, so sequences get copies.
        return self._logits[:count].clone(), None if self._new_states is None else self._new_states[:count].clone()

    def _run_step(self) -> None:
        tokens, positions, writes = self._inputs.unbind()
        self._logits, self._new_states = self._step(tokens, positions, writes, self._states)
