"""The rule over many tokens on a CPU, float32, without gradients, compiled by numba: token by token, as it is defined.

What costs torch 20 microseconds a token is a few dozen nanoseconds here, so nothing is gained by chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from agentmem.kernels.numba_jit import compiled, floats

__all__ = ["scan"]


def _scan(places: Any, batch: int, length: int, heads: int, rank: int) -> None:
    """``places``: addresses of q, k, v, keep, erase, write, of the reads, and of the states, which are moved on."""
    q, k, v = floats(places[0]), floats(places[1]), floats(places[2])
    keep, erase, write = floats(places[3]), floats(places[4]), floats(places[5])
    reads, states = floats(places[6]), floats(places[7])
    for b in range(batch):
        for h in range(heads):
            s = (b * heads + h) * rank * rank
            for t in range(length):
                at = ((b * length + t) * heads + h) * rank
                for i in range(rank):
                    row = s + i * rank
                    read = seen = np.float32(0)
                    for j in range(rank):
                        read += states[row + j] * q[at + j]
                        seen += states[row + j] * k[at + j]
                    reads[at + i] = read
                    told = write[at + i] * v[at + i] - erase[at + i] * seen
                    kept = keep[at + i]
                    for j in range(rank):
                        states[row + j] = kept * states[row + j] + told * k[at + j]


_run: Any = compiled(types.void(types.Array(types.int64, 1, "C"), *[types.intp] * 4), _scan, nogil=True)


def scan(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``recurrence.scan``, of float32 tensors on a CPU; nothing it gives has a gradient."""
    batch, length, heads, rank = q.shape
    inputs = [x.contiguous() for x in (q, k, v, keep, erase, write)]
    last, reads = state.clone(memory_format=torch.contiguous_format), torch.empty_like(inputs[0])
    _run(np.array([x.data_ptr() for x in (*inputs, reads, last)], dtype=np.int64), batch, length, heads, rank)
    return reads, last
