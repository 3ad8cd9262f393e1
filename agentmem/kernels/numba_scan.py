"""The scan on a CPU, float32, without gradients, compiled by numba: token by token, exactly as it is defined.

A token that costs torch 20 microseconds takes a few dozen nanoseconds here, so working in chunks would gain nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from agentmem.kernels.numba_jit import compiled, floats

__all__ = ["run"]


def _scan(addresses: Any, batch: int, length: int, heads: int, rank: int) -> None:
    """`addresses`: of q, k, v, keep, erase, write, the reads, and the states, which are updated in place."""
    q, k, v = floats(addresses[0]), floats(addresses[1]), floats(addresses[2])
    keep, erase, write = floats(addresses[3]), floats(addresses[4]), floats(addresses[5])
    reads, states = floats(addresses[6]), floats(addresses[7])
    for b in range(batch):
        for h in range(heads):
            s = (b * heads + h) * rank * rank
            for t in range(length):
                at = ((b * length + t) * heads + h) * rank
                for i in range(rank):
                    row = s + i * rank
                    read = predicted = np.float32(0)
                    for j in range(rank):
                        read += states[row + j] * q[at + j]
                        predicted += states[row + j] * k[at + j]
                    reads[at + i] = read
                    u = write[at + i] * v[at + i] - erase[at + i] * predicted
                    gate = keep[at + i]
                    for j in range(rank):
                        states[row + j] = gate * states[row + j] + u * k[at + j]


run: Any = compiled(types.void(types.Array(types.int64, 1, "C"), *[types.intp] * 4), _scan, nogil=True)
