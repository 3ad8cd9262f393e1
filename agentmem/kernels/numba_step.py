"""The decode step on a CPU, float32, compiled by numba: a layer's read and correction, and all layers' writes.

Next to weights that are read once per token, an operation costs about as much as fetching its code. So a layer makes
only two calls: one where the hidden state is projected and one where the layer's output is. `steer` and `write` take
addresses, since a call with tensors would cost several times as much; the caller must keep the memory at these
addresses alive, contiguous, and of the sizes in the table. A table is an int64 array of the numbers named below.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types

from agentmem.kernels.numba_jit import address, compiled, floats, inlined, numbers, octets
from agentmem.kernels.recurrence import NORM_EPS

__all__ = ["STEER", "WRITE", "steer", "write"]

STEER = ("weight", "rows", "hidden", "batch", "heads", "rank", "normalize", "layer", "layers",
         "products", "reads", "output_weight", "width", "start")  # fmt: skip
"""The entries of a table of `steer`, in this order.

Addresses: of the packed weight [rows, hidden], of the buffers for its products [batch, rows] and for the reads [batch,
heads rank], and of an output weight [width, heads rank], whose correction is added to the columns from `start` on;
`width` 0: no correction.
"""
WRITE = ("products", "rows", "batch", "heads", "rank", "normalize", "layers", "beta", "lam", "gates", "mode")
"""The entries of a table of `write`: `products` [layers, batch, rows] as `steer` left them, the biases [layers, gates]
of beta and of lambda (0: lambda is 1 - beta), and the number of the update mode."""

_EPS = np.float32(NORM_EPS)


def _project(x: Any, weight: Any, products: Any, batch: int, rows: int, hidden: int) -> None:
    """The products of every x [batch, hidden] with the weight [rows, hidden], four rows at a time."""
    for four in range(0, rows - 3, 4):
        w = four * hidden
        for b in range(batch):
            s0 = s1 = s2 = s3 = np.float32(0)
            for j in range(hidden):
                xj = x[b * hidden + j]
                s0 += xj * weight[w + j]
                s1 += xj * weight[w + hidden + j]
                s2 += xj * weight[w + 2 * hidden + j]
                s3 += xj * weight[w + 3 * hidden + j]
            p = b * rows + four
            products[p], products[p + 1], products[p + 2], products[p + 3] = s0, s1, s2, s3
    for row in range(rows - rows % 4, rows):
        for b in range(batch):
            s0 = np.float32(0)
            for j in range(hidden):
                s0 += x[b * hidden + j] * weight[row * hidden + j]
            products[b * rows + row] = s0


def _tanh(x: Any, at: int, rank: int) -> np.float32:
    """tanh of `rank` numbers starting at index `at`, in place; returns the factor that makes them a unit vector."""
    square = np.float32(0)
    for j in range(at, at + rank):
        x[j] = math.tanh(x[j])
        square += x[j] * x[j]
    return np.float32(1) / max(np.float32(math.sqrt(square)), _EPS)


def _sigmoid(x: np.float32) -> np.float32:
    return np.float32(1) / (np.float32(1) + np.float32(math.exp(-x)))


def _steer(table: int, state: int, hidden: int, output: int, stride: int, scale: np.float32) -> None:
    t = numbers(table)
    batch, heads, rank = t[3], t[4], t[5]
    size = heads * rank
    reads = floats(t[10])
    if hidden != 0:
        rows, products, states = t[1], floats(t[9]), floats(state)
        _project(floats(hidden), floats(t[0]), products, batch, rows, t[2])
        for b in range(batch):
            for h in range(heads):
                q = b * rows + h * rank
                factor = _tanh(products, q, rank) if t[6] != 0 else np.float32(1)
                s = ((b * t[8] + t[7]) * heads + h) * rank * rank
                for i in range(rank):
                    read = np.float32(0)
                    for j in range(rank):
                        read += states[s + i * rank + j] * products[q + j]
                    reads[b * size + h * rank + i] = read * factor
    width = t[12]
    if width != 0:
        out, weight = floats(output), floats(t[11])
        for b in range(batch):
            o, r = b * stride + t[13], b * size
            for i in range(width):
                correction = np.float32(0)
                for j in range(size):
                    correction += weight[i * size + j] * reads[r + j]
                out[o + i] += scale * correction


def _write(table: int, state: int, after: int, mask: int) -> None:
    t = numbers(table)
    products, rows, batch, heads, rank, layers = floats(t[0]), t[1], t[2], t[3], t[4], t[6]
    beta_bias, lambda_bias, gates, mode = floats(t[7]), floats(t[8]), t[9], t[10]
    states, result, size = floats(state), floats(after), heads * rank
    for b in range(batch):
        for layer in range(layers):
            first = (b * layers + layer) * heads * rank * rank
            if mask != 0 and octets(mask)[b] == 0:
                for n in range(first, first + heads * rank * rank):
                    result[n] = states[n]
                continue
            for h in range(heads):
                p = (layer * batch + b) * rows + h * rank
                k, v, s = p + size, p + 2 * size, first + h * rank * rank
                factor = _tanh(products, k, rank) if t[5] != 0 else np.float32(1)
                for i in range(rank):
                    gate = h * rank + i if gates == size else h
                    at = (layer * batch + b) * rows + 3 * size + gate
                    beta = _sigmoid(products[at] + beta_bias[layer * gates + gate])
                    keep = np.float32(1) - beta
                    if t[8] != 0:
                        keep = _sigmoid(products[at + gates] + lambda_bias[layer * gates + gate])
                    erase = keep * beta if mode == 1 else beta
                    if mode == 2:
                        keep = np.float32(1)
                    predicted = np.float32(0)
                    for j in range(rank):
                        predicted += states[s + i * rank + j] * products[k + j]
                    u = (beta * products[v + i] - erase * predicted * factor) * factor
                    for j in range(rank):
                        n = s + i * rank + j
                        result[n] = keep * states[n] + u * products[k + j]


_project, _tanh, _sigmoid = map(inlined, (_project, _tanh, _sigmoid))
steer = compiled(types.void(address, address, address, address, types.intp, types.float32), _steer)
"""Read a layer's state for its hidden states (unless `hidden` is 0), and correct an output with the read.

Args: table; state [batch, layers, heads, rank, rank]; hidden [batch, hidden] or 0; output [batch, stride], changed in
place; stride; the factor of the correction.
"""
write = compiled(types.void(address, address, address, address), _write)
"""Compute the states after a token.

Args: table; state; the address for the new states, of the same shape; a byte per row, 0 where the row does not write
(address 0: all rows write).
"""
