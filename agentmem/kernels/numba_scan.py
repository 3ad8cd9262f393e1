"""The scan on a CPU, float32, compiled by numba: token by token, exactly as it is defined, and its gradients.

A token that costs torch 20 microseconds takes a few dozen nanoseconds here, so working in chunks would gain nothing.
The sequences of a batch and its heads are independent; `run` and `run_backward` take a range of them, so that threads
can share the work.

Gradients, for one row i of the state before a token, S, and its gradient after the token, G (sums over j):

    a = G . k    p = S . k    y = S . q
    dkeep = G . S    derase = -p a    dwrite = v a    dv = write a
    dk = sum_i (write v - erase p)_i G_i - (erase a)_i S_i      dq = sum_i dy_i S_i
    G before the token = keep G - erase a k + dy q

They need the state before each token. It is computed again from the beginning of a chunk, whose states are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from agentmem.kernels.numba_jit import compiled, floats, inlined

__all__ = ["run", "run_backward"]

_CHUNK = 16
"""Tokens whose states are held at once: 64 kB for rank 32, which stays in a core's second cache."""


@inlined
def _next_row(before: Any, row: int, after: Any, to: int, k: Any, at: int, rank: int, u: Any, gate: Any) -> None:
    for j in range(rank):
        after[to + j] = gate * before[row + j] + u * k[at + j]


def _scan(addresses: Any, first: int, last: int, length: int, heads: int, rank: int) -> None:
    """`addresses`: of q, k, v, keep, erase, write, the reads, and the states, which are updated in place."""
    q, k, v = floats(addresses[0]), floats(addresses[1]), floats(addresses[2])
    keep, erase, write = floats(addresses[3]), floats(addresses[4]), floats(addresses[5])
    reads, states = floats(addresses[6]), floats(addresses[7])
    for sequence in range(first, last):
        b, h = sequence // heads, sequence % heads
        s = sequence * rank * rank
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
                _next_row(states, row, states, row, k, at, rank, u, keep[at + i])


def _scan_backward(addresses: Any, first: int, last: int, length: int, heads: int, rank: int) -> None:
    """`addresses`: of the states before, q, k, v, keep, erase, write, and the gradient of the reads; of the gradients
    of the last states, which become those of the states before; and of the six other gradients, which are zeros.
    """
    states = floats(addresses[0])
    q, k, v = floats(addresses[1]), floats(addresses[2]), floats(addresses[3])
    keep, erase, write = floats(addresses[4]), floats(addresses[5]), floats(addresses[6])
    dy, grads = floats(addresses[7]), floats(addresses[8])
    dq, dk, dv = floats(addresses[9]), floats(addresses[10]), floats(addresses[11])
    dkeep, derase, dwrite = floats(addresses[12]), floats(addresses[13]), floats(addresses[14])
    size, chunks = rank * rank, (length + _CHUNK - 1) // _CHUNK
    starts = np.empty((chunks + 1) * size, np.float32)
    held = np.empty((_CHUNK + 1) * size, np.float32)
    for sequence in range(first, last):
        b, h = sequence // heads, sequence % heads
        g = sequence * size
        for n in range(size):
            starts[n] = states[g + n]
        # Backwards over the chunks, after one pass that finds where each of them begins.
        for step in range(2 * chunks):
            chunk = step if step < chunks else 2 * chunks - 1 - step
            begin = chunk * _CHUNK
            count = min(_CHUNK, length - begin)
            for n in range(size):
                held[n] = starts[chunk * size + n]
            for t in range(count):
                at = ((b * length + begin + t) * heads + h) * rank
                for i in range(rank):
                    row = t * size + i * rank
                    predicted = np.float32(0)
                    for j in range(rank):
                        predicted += held[row + j] * k[at + j]
                    u = write[at + i] * v[at + i] - erase[at + i] * predicted
                    _next_row(held, row, held, row + size, k, at, rank, u, keep[at + i])
            if step < chunks:
                for n in range(size):
                    starts[(chunk + 1) * size + n] = held[count * size + n]
                continue
            for t in range(count - 1, -1, -1):
                at = ((b * length + begin + t) * heads + h) * rank
                for i in range(rank):
                    row, grad = t * size + i * rank, g + i * rank
                    a = predicted = kept = np.float32(0)
                    for j in range(rank):
                        a += grads[grad + j] * k[at + j]
                        predicted += held[row + j] * k[at + j]
                        kept += grads[grad + j] * held[row + j]
                    dkeep[at + i] = kept
                    derase[at + i] = -predicted * a
                    dwrite[at + i] = v[at + i] * a
                    dv[at + i] = write[at + i] * a
                    u = write[at + i] * v[at + i] - erase[at + i] * predicted
                    back, gate, read = erase[at + i] * a, keep[at + i], dy[at + i]
                    for j in range(rank):
                        dk[at + j] += u * grads[grad + j] - back * held[row + j]
                        dq[at + j] += read * held[row + j]
                        grads[grad + j] = gate * grads[grad + j] - back * k[at + j] + read * q[at + j]


_SIGNATURE = types.void(types.Array(types.int64, 1, "C"), *[types.intp] * 5)
run: Any = compiled(_SIGNATURE, _scan, nogil=True)
run_backward: Any = compiled(_SIGNATURE, _scan_backward, nogil=True)
