"""The decode step as one Triton kernel: one program for each row and state head.

A program turns its part of the packed products into query, key, value and gates, reads the head's matrix, and updates
it in place in the pool. It touches no other global memory except for the read that it stores. All arithmetic is
float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentmem.kernels.recurrence import MODES, NORM_EPS, StepArgs

# A kernel can use globals only as constexpr.
EPS = tl.constexpr(NORM_EPS)


@triton.jit
def _tanh(x):
    """tanh to float32 accuracy everywhere.

    Vectors of tiny components are normalised afterwards, so cancellation near 0 would change their direction.
    """
    square = x * x
    series = -17.0 / 315.0 + square * (62.0 / 2835.0 - square * (1382.0 / 155925.0))
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series)))
    size = tl.abs(x)
    decay = tl.exp(-2.0 * size)
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(size < 0.35, series, tl.where(x < 0, -far, far))


@triton.jit
def _sigmoid(x):
    """The sigmoid, without an exponential that can overflow."""
    decay = tl.exp(-tl.abs(x))
    return tl.where(x < 0, decay, 1.0) / (1.0 + decay)


# Otherwise Triton would compile separate kernels for layer 1 and for layers divisible by 16.
@triton.jit(do_not_specialize=["layer"])
def _step(
    products,  # [B, 3 H r + gates], rows `stride` apart
    pool,  # [slots, L, H, r, r] float32
    slots,  # [B] int32 or int64
    mask,  # [B] uint8; ignored unless MASKED
    beta_bias,
    lambda_bias,
    reads,  # [B, H r], any float type
    layer,
    layers,
    stride,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    ROWWISE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COUPLED: tl.constexpr,
    MODE: tl.constexpr,
    MASKED: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    at = tl.arange(0, R)
    inside = at < RANK
    out = reads + (b * HEADS + h) * RANK + at
    slot = tl.load(slots + b).to(tl.int64)
    if slot < 0:
        tl.store(out, at * 0.0, mask=inside)
    else:
        SIZE: tl.constexpr = HEADS * RANK
        row = products + b * stride + h * RANK + at
        q = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(row + SIZE, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(row + 2 * SIZE, mask=inside, other=0.0).to(tl.float32)
        if NORMALIZE:
            q = _tanh(q)
            k = _tanh(k)
            q = q / tl.maximum(tl.sqrt(tl.sum(q * q, 0)), EPS)
            k = k / tl.maximum(tl.sqrt(tl.sum(k * k, 0)), EPS)
        tile = at[:, None] * RANK + at[None, :]
        both = inside[:, None] & inside[None, :]
        place = pool + ((slot * layers + layer) * HEADS + h) * RANK * RANK + tile
        s = tl.load(place, mask=both, other=0.0)
        tl.store(out, tl.sum(s * q[None, :], 1), mask=inside)
        on = True
        if MASKED:
            on = tl.load(mask + b) != 0
        if on:
            gate = h * RANK + at if ROWWISE else h + at * 0
            GATES: tl.constexpr = SIZE if ROWWISE else HEADS
            first = products + b * stride + 3 * SIZE + gate
            x = tl.load(first, mask=inside, other=0.0).to(tl.float32)
            x += tl.load(beta_bias + gate, mask=inside, other=0.0).to(tl.float32)
            beta = _sigmoid(x)
            keep = 1.0 - beta
            if not COUPLED:
                x = tl.load(first + GATES, mask=inside, other=0.0).to(tl.float32)
                x += tl.load(lambda_bias + gate, mask=inside, other=0.0).to(tl.float32)
                keep = _sigmoid(x)
            erase = beta
            if MODE == 1:
                erase = keep * beta
            if MODE == 2:
                keep = beta * 0.0 + 1.0
            u = beta * v - erase * tl.sum(s * k[None, :], 1)
            tl.store(place, keep[:, None] * s + u[:, None] * k[None, :], mask=both)


def step(args: StepArgs) -> Tensor:
    """As `agentmem.kernels.step`, for checked arguments; slots, biases and mask are contiguous."""
    products, pool, slots, layer, beta_bias, lambda_bias, mask, normalize, mode = args
    batch = products.shape[0]
    _, layers, heads, rank, _ = pool.shape
    reads = products.new_empty(batch, heads * rank)
    if batch == 0:
        return reads
    products = products if products.stride(-1) == 1 else products.contiguous()
    padded = triton.next_power_of_2(rank)
    _step[(batch, heads)](
        products,
        pool,
        slots,
        slots if mask is None else mask.view(torch.uint8),
        beta_bias,
        beta_bias if lambda_bias is None else lambda_bias,
        reads,
        layer,
        layers,
        products.stride(0),
        HEADS=heads,
        RANK=rank,
        R=padded,
        ROWWISE=beta_bias.shape[0] == heads * rank,
        NORMALIZE=normalize,
        COUPLED=lambda_bias is None,
        MODE=MODES[mode],
        MASKED=mask is not None,
        num_warps=1 if padded <= 16 else 4,
    )
    return reads
