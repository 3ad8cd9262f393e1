"""The gradient of the scan in Triton, from the inputs alone: nothing of the forward pass is kept.

With G_t the gradient of S_t, u_t = write v - erase p, p = S_{t-1} k and du = G_t k,

    dq = S_{t-1}^T dy     dk = G_t^T u - S_{t-1}^T (erase du)     dv = write du
    dkeep_i = G_t[i] . S_{t-1}[i]     derase = -du p     dwrite = du v
    G_{t-1} = keep G_t - (erase du) k^T + dy q^T

Chunk borders of S come from the first two kernels of ``triton_scan``, those of G from the same kernels in reverse.
Inside a chunk the state before every FINE-th token is written down, and those between are computed again, at most
FINE - 1 steps for a token: memory for one state in FINE instead of every token's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentmem.kernels.triton_scan import Inputs, _is_on, _row_of, _span, borders_of, replay, shape_of

FINE = 8


@triton.jit
def _gradients(
    q,
    k,
    v,
    keep,
    erase,
    write,
    dy,
    mask,
    borders,
    fine,  # [chunks, CHUNK // FINE, H, r, r]
    ends,  # gradients of the states behind every chunk, [chunks, H, r, r], or [B, H, r, r] where CHAINED is off
    dq,
    dk,
    dv,
    dkeep,
    derase,
    dwrite,
    dstate,  # [B, H, r, r]
    length,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    CHAINED: tl.constexpr,
    FINE: tl.constexpr,
    RAGGED: tl.constexpr,
    MASKED: tl.constexpr,
):
    n = tl.program_id(0)
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = tl.program_id(1) % HEADS
    start, end = _span(borders, b, length, RAGGED)
    low = start + n * CHUNK
    high = tl.minimum(low + CHUNK, end)
    if (low < end) | (n == 0):
        at = tl.arange(0, R)
        inside = at < RANK
        tile = at[:, None] * RANK + at[None, :]
        both = inside[:, None] & inside[None, :]
        chunk = start // CHUNK + b + n
        place = (b * HEADS + h) * RANK * RANK
        if CHAINED:
            place = (chunk * HEADS + h) * RANK * RANK
        g = tl.load(ends + place + tile, mask=both, other=0.0)
        pieces = tl.cdiv(high - low, FINE)
        for x in range(pieces):
            piece = pieces - 1 - x
            begin = low + piece * FINE
            stop = tl.minimum(begin + FINE, high)
            mark = ((chunk * (CHUNK // FINE) + piece) * HEADS + h) * RANK * RANK
            for y in range(stop - begin):
                t = stop - 1 - y
                s = tl.load(fine + mark + tile, mask=both, other=0.0)
                for z in range(begin, t):
                    there = (z * HEADS + h) * RANK + at
                    on = _is_on(mask, z, MASKED)
                    kt = _row_of(k, there, on, inside)
                    a = tl.load(keep + there, mask=inside & on, other=1.0)
                    e = tl.load(erase + there, mask=inside & on, other=0.0)
                    w = tl.load(write + there, mask=inside & on, other=0.0)
                    u = w * _row_of(v, there, on, inside) - e * tl.sum(s * kt[None, :], 1)
                    s = a[:, None] * s + u[:, None] * kt[None, :]
                here = (t * HEADS + h) * RANK + at
                on = _is_on(mask, t, MASKED)
                qt = tl.load(q + here, mask=inside, other=0.0)
                kt = _row_of(k, here, on, inside)
                vt = _row_of(v, here, on, inside)
                a = tl.load(keep + here, mask=inside & on, other=1.0)
                e = tl.load(erase + here, mask=inside & on, other=0.0)
                w = tl.load(write + here, mask=inside & on, other=0.0)
                read = tl.load(dy + here, mask=inside, other=0.0)
                p = tl.sum(s * kt[None, :], 1)
                # k is zero for a masked token, so du is, and all but dq and dkeep.
                du = tl.sum(g * kt[None, :], 1)
                dp = -e * du
                u = w * vt - e * p
                tl.store(dq + here, tl.sum(s * read[:, None], 0), mask=inside)
                tl.store(dk + here, tl.sum(g * u[:, None] + s * dp[:, None], 0), mask=inside)
                tl.store(dv + here, w * du, mask=inside)
                tl.store(dkeep + here, tl.where(on, tl.sum(g * s, 1), 0.0), mask=inside)
                tl.store(derase + here, -du * p, mask=inside)
                tl.store(dwrite + here, du * vt, mask=inside)
                g = a[:, None] * g + dp[:, None] * kt[None, :] + read[:, None] * qt[None, :]
        if n == 0:
            tl.store(dstate + (b * HEADS + h) * RANK * RANK + tile, g, mask=both)


def scan_backward(
    dy: Tensor,
    dlast: Tensor,
    state: Tensor,
    inputs: Inputs,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_length: int,
    chunk: int,
) -> list[Tensor]:
    """Gradients of state, q, k, v, keep, erase and write, of arguments that were checked and lie dense."""
    shape = shape_of(state, inputs[0], max_length, chunk)
    fresh = torch.empty_like if cu_seqlens is None else torch.zeros_like
    grads = [torch.empty_like(state), *map(fresh, inputs)]
    if not shape.batch * shape.heads:
        return grads
    step = next(size for size in (FINE, 4, 2, 1) if shape.chunk % size == 0)
    fine = state.new_empty(shape.room, shape.chunk // step, shape.heads, shape.rank, shape.rank)
    starts = borders_of(shape, inputs, mask, cu_seqlens, state, None)
    replay(shape, inputs, mask, cu_seqlens, starts, fine=(fine, step))
    ends = borders_of(shape, inputs, mask, cu_seqlens, dlast, dy)
    _, _, constants = shape.kernel(shape.padded**2, 2)
    dstate, dq, dk, dv, dkeep, derase, dwrite = grads
    _gradients[(shape.count, shape.batch * shape.heads)](
        *inputs,
        dy,
        dy if mask is None else mask.view(torch.uint8),
        dy if cu_seqlens is None else cu_seqlens,
        *(fine, ends, dq, dk, dv, dkeep, derase, dwrite, dstate),
        shape.length,
        CHAINED=shape.count > 1,
        FINE=step,
        RAGGED=cu_seqlens is not None,
        MASKED=mask is not None,
        **constants,
    )
    return grads
