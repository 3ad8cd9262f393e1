"""The scan as three Triton kernels: compose chunks side by side, chain their borders, fill in the reads.

Rows of a state evolve independently, each by an affine map: ``row -> row A_t + c_t`` with A_t = keep_i I - erase_i k
k^T, which is symmetric. So a chunk of tokens is one map P [r, r] and one offset [r] for every row, and

    compose    P and offset of every chunk, all chunks at once
    boundary   the state at every chunk's start, chunk after chunk
    outputs    the plain recurrence inside every chunk from its true start, all chunks at once

The gradient of a state travels back through the same maps, transposed: the first two kernels run in both directions
(``REVERSE``: time from the end, and a token adds dy q instead of write v k).

Sequences lie one after another, [N, H, r] with N their tokens together; where they are of one length T, ``borders`` is
not read and sequence b starts at b T. The chunks of sequence b are numbered from ``start // CHUNK + b``, which leaves
room for all without asking the device for lengths. A token that is masked is no write: keep 1, erase and write 0, and
whatever its k and v hold is not used. All arithmetic is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# Steps of a loop whose numbers are under way at once: else each waits for memory longer than it computes. Unless asked,
# Triton does so only for what goes into matrix products. From latencies; not measured on a device.
STAGES = tl.constexpr(4)


@triton.jit
def _span(borders, b, length, RAGGED: tl.constexpr):
    """First token of sequence b, and the one behind its last."""
    if RAGGED:
        return tl.load(borders + b).to(tl.int64), tl.load(borders + b + 1).to(tl.int64)
    else:
        return b * length, b * length + length


@triton.jit
def _is_on(mask, t, MASKED: tl.constexpr):
    """Whether token t writes."""
    if MASKED:
        return tl.load(mask + t) != 0
    else:
        return tl.full([], 1, tl.int1)


@triton.jit
def _row_of(x, where, on, inside):
    """One token's vector of key or value; zeros where it does not write, whatever it holds."""
    return tl.load(x + where, mask=inside & on, other=0.0)


@triton.jit
def _compose(
    q,
    k,
    v,
    keep,
    erase,
    write,
    dy,
    mask,
    borders,
    maps,  # [chunks, H, r (row), r (from), r (to)]
    offsets,  # [chunks, H, r, r]
    length,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    RAGGED: tl.constexpr,
    MASKED: tl.constexpr,
):
    n = tl.program_id(0)
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = tl.program_id(1) % HEADS
    start, end = _span(borders, b, length, RAGGED)
    low = start + n * CHUNK
    high = tl.minimum(low + CHUNK, end)
    # The map of the chunk at which a direction ends leads nowhere.
    used = low + CHUNK < end
    if REVERSE:
        used = (low < end) & (n > 0)
    if used:
        at = tl.arange(0, R)
        row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        inside = at < RANK
        real = row < RANK
        p = tl.zeros([ROWS, R, R], tl.float32) + (at[:, None] == at[None, :]).to(tl.float32)[None, :, :]
        g = tl.zeros([ROWS, R], tl.float32)
        for i in tl.range(high - low, num_stages=STAGES):
            t = low + i
            if REVERSE:
                t = high - 1 - i
            here = (t * HEADS + h) * RANK
            on = _is_on(mask, t, MASKED)
            kt = _row_of(k, here + at, on, inside)
            a = tl.load(keep + here + row, mask=real & on, other=1.0)
            e = tl.load(erase + here + row, mask=real & on, other=0.0)
            u = -e * tl.sum(g * kt[None, :], 1)
            if not REVERSE:
                u += tl.load(write + here + row, mask=real & on, other=0.0) * _row_of(v, here + row, on, real)
            g = a[:, None] * g + u[:, None] * kt[None, :]
            if REVERSE:
                read = tl.load(dy + here + row, mask=real, other=0.0)
                g += read[:, None] * tl.load(q + here + at, mask=inside, other=0.0)[None, :]
            lost = e[:, None] * tl.sum(p * kt[None, None, :], 2)
            p = a[:, None, None] * p - lost[:, :, None] * kt[None, None, :]
        place = ((start // CHUNK + b + n) * HEADS + h) * RANK + row
        cell = at[:, None] * RANK + at[None, :]
        tl.store(
            maps + place[:, None, None] * RANK * RANK + cell[None, :, :],
            p,
            mask=real[:, None, None] & inside[None, :, None] & inside[None, None, :],
        )
        tl.store(offsets + place[:, None] * RANK + at[None, :], g, mask=real[:, None] & inside[None, :])


@triton.jit
def _boundary(
    first,  # [B, H, r, r]: the state that came in, or in reverse the gradient of the one that went out
    maps,
    offsets,
    borders,
    starts,  # [chunks, H, r, r]: what every chunk starts from in this direction
    length,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    RAGGED: tl.constexpr,
):
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    h = tl.program_id(0) % HEADS
    start, end = _span(borders, b, length, RAGGED)
    at = tl.arange(0, R)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = at < RANK
    real = row < RANK
    tile = row[:, None] * RANK + at[None, :]
    both = real[:, None] & inside[None, :]
    s = tl.load(first + (b * HEADS + h) * RANK * RANK + tile, mask=both, other=0.0)
    # An empty sequence has one empty chunk, which hands the state through.
    count = tl.maximum(tl.cdiv(end - start, CHUNK), 1)
    for i in tl.range(count, num_stages=STAGES):
        n = i
        if REVERSE:
            n = count - 1 - i
        chunk = ((start // CHUNK + b + n) * HEADS + h) * RANK
        tl.store(starts + chunk * RANK + tile, s, mask=both)
        # The last chunk of a direction has no map; its border is the scan's own end.
        go = real & (i < count - 1)
        cell = (chunk + row)[:, None, None] * RANK * RANK + (at[:, None] * RANK + at[None, :])[None, :, :]
        p = tl.load(maps + cell, mask=go[:, None, None] & inside[None, :, None] & inside[None, None, :], other=0.0)
        s = tl.sum(s[:, :, None] * p, 1)
        s += tl.load(offsets + chunk * RANK + tile, mask=go[:, None] & inside[None, :], other=0.0)


@triton.jit
def _outputs(
    q,
    k,
    v,
    keep,
    erase,
    write,
    mask,
    borders,
    starts,  # [chunks, H, r, r], or [B, H, r, r] where CHAINED is off
    reads,  # [N, H, r], where READS
    last,  # [B, H, r, r], where READS
    fine,  # [chunks, CHUNK // FINE, H, r, r]: the state before every FINE-th token, where FINE > 0
    length,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHAINED: tl.constexpr,
    READS: tl.constexpr,
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
        row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        inside = at < RANK
        real = row < RANK
        tile = row[:, None] * RANK + at[None, :]
        both = real[:, None] & inside[None, :]
        chunk = start // CHUNK + b + n
        place = (b * HEADS + h) * RANK * RANK
        if CHAINED:
            place = (chunk * HEADS + h) * RANK * RANK
        s = tl.load(starts + place + tile, mask=both, other=0.0)
        for i in tl.range(high - low, num_stages=STAGES):
            t = low + i
            here = (t * HEADS + h) * RANK
            on = _is_on(mask, t, MASKED)
            kt = _row_of(k, here + at, on, inside)
            a = tl.load(keep + here + row, mask=real & on, other=1.0)
            e = tl.load(erase + here + row, mask=real & on, other=0.0)
            w = tl.load(write + here + row, mask=real & on, other=0.0)
            if READS:
                qt = tl.load(q + here + at, mask=inside, other=0.0)
                tl.store(reads + here + row, tl.sum(s * qt[None, :], 1), mask=real)
            if FINE > 0:  # noqa: SIM102 - settled when the kernel is compiled
                if i % FINE == 0:
                    mark = ((chunk * (CHUNK // FINE) + i // FINE) * HEADS + h) * RANK * RANK
                    tl.store(fine + mark + tile, s, mask=both)
            u = w * _row_of(v, here + row, on, real) - e * tl.sum(s * kt[None, :], 1)
            s = a[:, None] * s + u[:, None] * kt[None, :]
        if READS:  # noqa: SIM102 - settled when the kernel is compiled
            if low + CHUNK >= end:
                tl.store(last + (b * HEADS + h) * RANK * RANK + tile, s, mask=both)


@dataclass(frozen=True)
class Shape:
    """How a scan is cut.

    Attributes:
        batch, heads, rank: of the states.
        length: tokens of every sequence, or of the longest where they are ragged.
        chunk: tokens of a chunk.
        tokens: of all sequences together.
    """

    batch: int
    heads: int
    rank: int
    length: int
    chunk: int
    tokens: int

    @property
    def count(self) -> int:
        """Chunks of the longest sequence; an empty one has one."""
        return max(1, -(-self.length // self.chunk))

    @property
    def room(self) -> int:
        """Chunk numbers that may occur."""
        return self.tokens // self.chunk + self.batch

    @property
    def padded(self) -> int:
        return int(triton.next_power_of_2(self.rank))

    def kernel(self, elements: int, dimensions: int) -> tuple[int, int, dict[str, int]]:
        """Rows of one program whose tile of ``dimensions`` holds about ``elements``, programs, and its constants."""
        r = self.padded
        rows = max(1, min(r, elements // r ** (dimensions - 1)))
        warps = 1 if rows * r ** (dimensions - 1) <= 256 else 4
        constants = {"HEADS": self.heads, "RANK": self.rank, "R": r, "CHUNK": self.chunk, "num_warps": warps}
        return rows, r // rows, constants


def chunk_length(length: int, rank: int) -> int:
    """Tokens of a chunk: short enough that many run side by side, long enough that their maps (rank^3 numbers a
    chunk and head) stay small beside the inputs. From counts of operations; not measured on a device."""
    if rank > 32:
        return 512
    if rank > 16:
        return 256
    return 64 if length <= 16_384 else 128


def borders_of(
    shape: Shape, inputs: Inputs, mask: Tensor | None, cu_seqlens: Tensor | None, first: Tensor, dy: Tensor | None
) -> Tensor:
    """What every chunk starts from, [chunks, H, r, r]; with ``dy`` in reverse, ``first`` the last state's gradient.

    ``first`` itself, [B, H, r, r], where one chunk is enough for every sequence.
    """
    if shape.count == 1:
        return first
    q, k, v, keep, erase, write = inputs
    size = (shape.room, shape.heads, shape.rank, shape.rank)
    maps = first.new_empty(*size, shape.rank)
    offsets, starts = first.new_empty(size), first.new_empty(size)
    rows, programs, constants = shape.kernel(256, 3)
    constants |= {"ROWS": rows, "REVERSE": dy is not None, "RAGGED": cu_seqlens is not None}
    table = q if cu_seqlens is None else cu_seqlens
    _compose[(shape.count, shape.batch * shape.heads, programs)](
        *(q, k, v, keep, erase, write, q if dy is None else dy),
        q if mask is None else mask.view(torch.uint8),
        *(table, maps, offsets, shape.length),
        MASKED=mask is not None,
        **constants,
    )
    _boundary[(shape.batch * shape.heads, programs)](first, maps, offsets, table, starts, shape.length, **constants)
    return starts


def replay(
    shape: Shape,
    inputs: Inputs,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    *,
    reads: tuple[Tensor, Tensor] | None = None,
    fine: tuple[Tensor, int] | None = None,
) -> None:
    """Run every chunk from its start: into ``reads`` (reads and last states), or ``fine`` (states, and how many
    tokens apart)."""
    q, k, v, keep, erase, write = inputs
    rows, programs, constants = shape.kernel(1024, 2)
    _outputs[(shape.count, shape.batch * shape.heads, programs)](
        *(q, k, v, keep, erase, write),
        q if mask is None else mask.view(torch.uint8),
        q if cu_seqlens is None else cu_seqlens,
        starts,
        *(reads or (starts, starts)),
        starts if fine is None else fine[0],
        shape.length,
        ROWS=rows,
        CHAINED=shape.count > 1,
        READS=reads is not None,
        FINE=0 if fine is None else fine[1],
        RAGGED=cu_seqlens is not None,
        MASKED=mask is not None,
        **constants,
    )


def scan(
    state: Tensor, inputs: Inputs, mask: Tensor | None, cu_seqlens: Tensor | None, max_length: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """As ``agentmem.kernels.scan``, of arguments that were checked and lie dense."""
    shape = shape_of(state, inputs[0], max_length, chunk)
    # Tokens outside every sequence are read by nobody, but must not be left to chance.
    reads = torch.empty_like(inputs[0]) if cu_seqlens is None else torch.zeros_like(inputs[0])
    last = torch.empty_like(state)
    if shape.batch * shape.heads:
        starts = borders_of(shape, inputs, mask, cu_seqlens, state, None)
        replay(shape, inputs, mask, cu_seqlens, starts, reads=(reads, last))
    return reads, last


def shape_of(state: Tensor, q: Tensor, max_length: int, chunk: int) -> Shape:
    """How to cut a scan; ``chunk`` 0 = as ``chunk_length`` says."""
    batch, heads, rank, _ = state.shape
    tokens = q.shape[0] * q.shape[1]
    return Shape(batch, heads, rank, max_length, chunk or chunk_length(max_length, rank), tokens)
