"""Decode steps in buffers that never move: captured once as a CUDA graph and replayed for whoever decodes there.

A graph repeats kernels with the addresses that they had. So what changes from token to token (tokens, positions, who
writes, the states) is copied into buffers, and the step looks through a mask at as many tokens of its KV as it was made
for. Nothing in it waits for the device. Rows that are free, and sequences that sit a token out, are inert: their states
stay as they are, and what is written of them lies behind their last token, where nothing looks.

On for CUDA with `AGENTMEM_TRITON=1` and `AGENTMEM_CUDA_GRAPHS=1`; elsewhere a step takes the shapes of its sequences.
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
"""Of tokens, positions and who writes, [rows, 1] int64 each, and states [rows, L, H, r, r]: logits [rows, V] and the
states afterwards. It may wait for no number of the device, and run again it must do no harm."""


class CannotCapture(Exception):
    """A pass of this model does something that a CUDA graph cannot repeat."""


def uses_graphs(device: torch.device) -> bool:
    """Whether sequences of a model on this device are to decode in fixed buffers."""
    return os.environ.get("AGENTMEM_CUDA_GRAPHS") == "1" and runs_triton(device)


class GraphCapturer:
    """Captures the steps of one engine: on one stream, for which libraries keep buffers of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None

    def capture(self, run: Callable[[], None]) -> Any:
        """A graph of `run`, which is run a few times first.

        Raises:
            CannotCapture: it did something that a graph cannot repeat.
        """
        # One capture at a time in a process, on the model's device.
        with _CAPTURING, _uncollected(), torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            side = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            graph, memory = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            try:
                # Kernels are compiled, and libraries choose theirs, before anything is captured. A step changes no
                # buffer that it reads but the KV behind each row's last token, so running it again is harmless.
                with torch.cuda.stream(side):
                    for _ in range(_WARMUPS):
                        run()
                try:
                    with torch.cuda.graph(graph, memory, stream=side, capture_error_mode="thread_local"):
                        run()
                except RuntimeError as error:
                    # Where torch has not noticed the end, what is allocated on this device would still go to the pool.
                    with suppress(RuntimeError):
                        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), memory)
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise CannotCapture(str(error)) from error
                self._stream = side  # one on which a capture failed is not used again
            finally:
                # A capture that failed leaves its stream behind.
                torch.cuda.set_stream(current)
                current.wait_stream(side)
        return graph


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: to end a graph that is garbage would break a capture that is under way, and to end an
    engine would wait for its thread, which may wait to capture. For the holder of `_CAPTURING`."""
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
        step: what is captured; the KV that it writes to must stay where it is for as long as this is used.
        rows: how many rows it has buffers for.
        state: like one sequence's state [1, L, H, r, r]; None: the bare model.
        device: of the model.
        capturer: captures on CUDA; elsewhere the step is run as it is.
    """

    def __init__(
        self, step: Step, rows: int, state: Tensor | None, device: torch.device, capturer: GraphCapturer
    ) -> None:
        self.rows = rows
        self._step, self._device, self._capturer = step, device, capturer
        # Tokens, positions, and 1 where a row writes: [3, rows, 1].
        self._inputs = torch.zeros(3, rows, 1, dtype=torch.int64, device=device)
        self._states = None if state is None else state.new_zeros(rows, *state.shape[1:])
        self._new_states: Tensor | None = None
        self._logits: Tensor | None = None
        self._graph: Any = None

    def run(
        self, tokens: Sequence[int], positions: Sequence[int], writes: Sequence[bool], states: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One step: the logits [n, V] of the rows that were given, and their states afterwards [n, L, H, r, r].

        Raises:
            CannotCapture: nothing was read.
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
        # What a replay leaves is overwritten by the next; what sequences are given is theirs.
        return self._logits[:count].clone(), None if self._new_states is None else self._new_states[:count].clone()

    def _run_step(self) -> None:
        tokens, positions, writes = self._inputs.unbind()
        self._logits, self._new_states = self._step(tokens, positions, writes, self._states)
