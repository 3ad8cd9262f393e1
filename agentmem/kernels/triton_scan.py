"""The scan and its gradient as Triton kernels: compose all chunks in parallel, chain their boundaries, compute reads.

Rows of a state evolve independently, each by an affine map: `row -> row A_t + c_t` with A_t = keep_i I - erase_i k k^T,
which is symmetric. So a chunk of tokens is one matrix P [r, r] and one offset [r] per row, and

    compose    P and offset of every chunk, all chunks at once
    boundary   the state at the start of every chunk, chunk after chunk
    outputs    the plain recurrence inside every chunk from that start, all chunks at once

The gradient needs only the inputs; nothing of the forward pass is kept. The gradient of a state is carried back by the
same maps, transposed, so the first two kernels run in both directions (`REVERSE`: time runs from the end, and a token
adds dy q instead of write v k). With G_t the gradient of S_t, u_t = write v - erase p, p = S_{t-1} k and du = G_t k,

    dq = S_{t-1}^T dy     dk = G_t^T u - S_{t-1}^T (erase du)     dv = write du
    dkeep_i = G_t[i] . S_{t-1}[i]     derase = -du p     dwrite = du v
    G_{t-1} = keep G_t - (erase du) k^T + dy q^T

Inside a chunk the state before every FINE-th token is stored and those in between are recomputed, with at most FINE - 1
steps for a token: memory for one state in FINE instead of one per token. All arithmetic is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentmem.kernels.recurrence import ScanArgs
from agentmem.kernels.scan_blocks import chunk_length

# Iterations of a loop whose loads are in flight at once; with fewer, each waits longer than it computes. By default
# Triton does this only for operands of matrix products. Derived from latencies; not measured on a device.
STAGES = tl.constexpr(4)

FINE = 8


@triton.jit
def _chunk(length, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """Of a program that runs one chunk: the chunk's number, sequence, head, first token and the one after its last."""
    n = tl.program_id(0)
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    h = tl.program_id(1) % HEADS
    low = n * CHUNK
    return n, b, h, low, tl.minimum(low + CHUNK, length)


@triton.jit
def _rows(first, RANK: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    """Some rows of a state: columns [R], rows [ROWS], which of them exist, and the same as a tile [ROWS, R]."""
    at = tl.arange(0, R)
    row = first + tl.arange(0, ROWS)
    inside = at < RANK
    real = row < RANK
    return at, row, inside, real, row[:, None] * RANK + at[None, :], real[:, None] & inside[None, :]


@triton.jit
def _token(k, v, keep, erase, write, here, at, row, inside, real):
    """One token: its key [R] and, for each row, what is kept, erased along the key, and written."""
    kt = tl.load(k + here + at, mask=inside, other=0.0)
    a = tl.load(keep + here + row, mask=real, other=1.0)
    e = tl.load(erase + here + row, mask=real, other=0.0)
    w = tl.load(write + here + row, mask=real, other=0.0) * tl.load(v + here + row, mask=real, other=0.0)
    return kt, a, e, w


@triton.jit
def _updated(s, kt, a, e, w):
    """The rows [ROWS, R] after the token."""
    u = w - e * tl.sum(s * kt[None, :], 1)
    return a[:, None] * s + u[:, None] * kt[None, :]


@triton.jit
def _compose(
    q,  # [B, T, H, r], as are all inputs and dy
    k,
    v,
    keep,
    erase,
    write,
    dy,
    maps,  # [B, chunks, H, r (row), r (from), r (to)]
    offsets,  # [B, chunks, H, r, r]
    length,
    chunks,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    n, b, h, low, high = _chunk(length, HEADS, CHUNK)
    # The last chunk in a direction needs no map: no chunk starts from its end.
    used = low + CHUNK < length
    if REVERSE:
        used = n > 0
    if used:
        at, row, inside, real, _, both = _rows(tl.program_id(2) * ROWS, RANK, R, ROWS)
        p = tl.zeros([ROWS, R, R], tl.float32) + (at[:, None] == at[None, :]).to(tl.float32)[None, :, :]
        g = tl.zeros([ROWS, R], tl.float32)
        for i in tl.range(high - low, num_stages=STAGES):
            t = low + i
            if REVERSE:
                t = high - 1 - i
            here = ((b * length + t) * HEADS + h) * RANK
            kt, a, e, w = _token(k, v, keep, erase, write, here, at, row, inside, real)
            if REVERSE:
                g = _updated(g, kt, a, e, tl.zeros([ROWS], tl.float32))
                read = tl.load(dy + here + row, mask=real, other=0.0)
                g += read[:, None] * tl.load(q + here + at, mask=inside, other=0.0)[None, :]
            else:
                g = _updated(g, kt, a, e, w)
            lost = e[:, None] * tl.sum(p * kt[None, None, :], 2)
            p = a[:, None, None] * p - lost[:, :, None] * kt[None, None, :]
        place = ((b * chunks + n) * HEADS + h) * RANK + row
        cell = at[:, None] * RANK + at[None, :]
        tl.store(
            maps + place[:, None, None] * RANK * RANK + cell[None, :, :],
            p,
            mask=real[:, None, None] & inside[None, :, None] & inside[None, None, :],
        )
        tl.store(offsets + place[:, None] * RANK + at[None, :], g, mask=both)


@triton.jit
def _boundary(
    first,  # [B, H, r, r]: the initial state; in reverse, the gradient of the final state
    maps,
    offsets,
    starts,  # [B, chunks, H, r, r]: the value at the start of every chunk in this direction
    chunks,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    h = tl.program_id(0) % HEADS
    at, row, inside, real, tile, both = _rows(tl.program_id(1) * ROWS, RANK, R, ROWS)
    s = tl.load(first + (b * HEADS + h) * RANK * RANK + tile, mask=both, other=0.0)
    for i in tl.range(chunks, num_stages=STAGES):
        n = i
        if REVERSE:
            n = chunks - 1 - i
        place = ((b * chunks + n) * HEADS + h) * RANK
        tl.store(starts + place * RANK + tile, s, mask=both)
        # The last chunk in a direction has no map: the scan ends there.
        go = real & (i < chunks - 1)
        cell = (place + row)[:, None, None] * RANK * RANK + (at[:, None] * RANK + at[None, :])[None, :, :]
        p = tl.load(maps + cell, mask=go[:, None, None] & inside[None, :, None] & inside[None, None, :], other=0.0)
        s = tl.sum(s[:, :, None] * p, 1)
        s += tl.load(offsets + place * RANK + tile, mask=go[:, None] & inside[None, :], other=0.0)


@triton.jit
def _outputs(
    q,
    k,
    v,
    keep,
    erase,
    write,
    starts,  # [B, chunks, H, r, r]
    reads,  # [B, T, H, r], where READS
    last,  # [B, H, r, r], where READS
    fine,  # [B, chunks, CHUNK // FINE, H, r, r]: the state before every FINE-th token, where FINE > 0
    length,
    chunks,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    READS: tl.constexpr,
    FINE: tl.constexpr,
):
    n, b, h, low, high = _chunk(length, HEADS, CHUNK)
    at, row, inside, real, tile, both = _rows(tl.program_id(2) * ROWS, RANK, R, ROWS)
    chunk = b * chunks + n
    s = tl.load(starts + (chunk * HEADS + h) * RANK * RANK + tile, mask=both, other=0.0)
    for i in tl.range(high - low, num_stages=STAGES):
        here = ((b * length + low + i) * HEADS + h) * RANK
        kt, a, e, w = _token(k, v, keep, erase, write, here, at, row, inside, real)
        if READS:
            qt = tl.load(q + here + at, mask=inside, other=0.0)
            tl.store(reads + here + row, tl.sum(s * qt[None, :], 1), mask=real)
        if FINE > 0:  # noqa: SIM102 - settled when the kernel is compiled
            if i % FINE == 0:
                mark = ((chunk * (CHUNK // FINE) + i // FINE) * HEADS + h) * RANK * RANK
                tl.store(fine + mark + tile, s, mask=both)
        s = _updated(s, kt, a, e, w)
    if READS:  # noqa: SIM102 - settled when the kernel is compiled
        if low + CHUNK >= length:
            tl.store(last + (b * HEADS + h) * RANK * RANK + tile, s, mask=both)


@triton.jit
def _gradients(
    q,
    k,
    v,
    keep,
    erase,
    write,
    dy,
    fine,  # [B, chunks, CHUNK // FINE, H, r, r]
    ends,  # [B, chunks, H, r, r]: the gradient of the state after every chunk
    dq,
    dk,
    dv,
    dkeep,
    derase,
    dwrite,
    dstate,  # [B, H, r, r]
    length,
    chunks,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    FINE: tl.constexpr,
):
    n, b, h, low, high = _chunk(length, HEADS, CHUNK)
    at, _, inside, _, tile, both = _rows(0, RANK, R, R)
    chunk = b * chunks + n
    g = tl.load(ends + (chunk * HEADS + h) * RANK * RANK + tile, mask=both, other=0.0)
    pieces = (high - low + FINE - 1) // FINE
    for x in range(pieces):
        piece = pieces - 1 - x
        begin = low + piece * FINE
        stop = tl.minimum(begin + FINE, high)
        mark = ((chunk * (CHUNK // FINE) + piece) * HEADS + h) * RANK * RANK
        for y in range(stop - begin):
            t = stop - 1 - y
            s = tl.load(fine + mark + tile, mask=both, other=0.0)
            for z in range(begin, t):
                there = ((b * length + z) * HEADS + h) * RANK
                kt, a, e, w = _token(k, v, keep, erase, write, there, at, at, inside, inside)
                s = _updated(s, kt, a, e, w)
            here = ((b * length + t) * HEADS + h) * RANK
            kt, a, e, w = _token(k, v, keep, erase, write, here, at, at, inside, inside)
            gate = tl.load(write + here + at, mask=inside, other=0.0)
            vt = tl.load(v + here + at, mask=inside, other=0.0)
            qt = tl.load(q + here + at, mask=inside, other=0.0)
            read = tl.load(dy + here + at, mask=inside, other=0.0)
            p = tl.sum(s * kt[None, :], 1)
            du = tl.sum(g * kt[None, :], 1)
            dp = -e * du
            u = w - e * p
            out = here + at
            tl.store(dq + out, tl.sum(s * read[:, None], 0), mask=inside)
            tl.store(dk + out, tl.sum(g * u[:, None] + s * dp[:, None], 0), mask=inside)
            tl.store(dv + out, gate * du, mask=inside)
            tl.store(dkeep + out, tl.sum(g * s, 1), mask=inside)
            tl.store(derase + out, -du * p, mask=inside)
            tl.store(dwrite + out, du * vt, mask=inside)
            g = a[:, None] * g + dp[:, None] * kt[None, :] + read[:, None] * qt[None, :]
    if n == 0:
        tl.store(dstate + (b * HEADS + h) * RANK * RANK + tile, g, mask=both)


@dataclass(frozen=True)
class Shape:
    """How a scan is divided into chunks and programs.

    Attributes:
        batch, heads, rank: dimensions of the states.
        length: tokens per sequence.
        chunk: tokens per chunk.
    """

    batch: int
    heads: int
    rank: int
    length: int
    chunk: int

    @classmethod
    def of(cls, args: ScanArgs, chunk: int, *, backward: bool = False) -> Shape:
        """The shape of a scan or of its gradient; `chunk` 0 = use `chunk_length`."""
        batch, length, heads, rank = args.q.shape
        return cls(batch, heads, rank, length, chunk or chunk_length(length, rank, backward=backward))

    @property
    def chunks(self) -> int:
        """Chunks per sequence; an empty sequence has one, which passes the state through."""
        return max(1, -(-self.length // self.chunk))

    @property
    def padded(self) -> int:
        return int(triton.next_power_of_2(self.rank))

    def kernel(self, elements: int, dimensions: int) -> tuple[int, int, dict[str, int]]:
        """The rows per program (its tile of `dimensions` holds about `elements`), the programs, and constants."""
        r = self.padded
        rows = max(1, min(r, elements // r ** (dimensions - 1)))
        warps = 1 if rows * r ** (dimensions - 1) <= 256 else 4
        return rows, r // rows, {"HEADS": self.heads, "RANK": self.rank, "R": r, "num_warps": warps}


def _chunk_starts(shape: Shape, args: ScanArgs, first: Tensor, dy: Tensor | None = None) -> Tensor:
    """The value each chunk starts from, [B, chunks, H, r, r]; with `dy` in reverse, from the last state's gradient."""
    if shape.chunks == 1:
        return first[:, None]
    size = (shape.batch, shape.chunks, shape.heads, shape.rank, shape.rank)
    maps = first.new_empty(*size, shape.rank)
    offsets, starts = first.new_empty(size), first.new_empty(size)
    rows, programs, constants = shape.kernel(256, 3)
    constants |= {"ROWS": rows, "REVERSE": dy is not None}
    _compose[(shape.chunks, shape.batch * shape.heads, programs)](
        *args[1:],
        args.q if dy is None else dy,
        *(maps, offsets, shape.length, shape.chunks),
        CHUNK=shape.chunk,
        **constants,
    )
    _boundary[(shape.batch * shape.heads, programs)](first, maps, offsets, starts, shape.chunks, **constants)
    return starts


def _run_chunks(
    shape: Shape,
    args: ScanArgs,
    starts: Tensor,
    *,
    reads: tuple[Tensor, Tensor] | None = None,
    fine: tuple[Tensor, int] | None = None,
) -> None:
    """Run every chunk from its start.

    Fills `reads` (reads and final states) or `fine` (states, and their distance in tokens).
    """
    rows, programs, constants = shape.kernel(1024, 2)
    _outputs[(shape.chunks, shape.batch * shape.heads, programs)](
        *args[1:],
        starts,
        *(reads or (starts, starts)),
        starts if fine is None else fine[0],
        *(shape.length, shape.chunks),
        ROWS=rows,
        CHUNK=shape.chunk,
        READS=reads is not None,
        FINE=0 if fine is None else fine[1],
        **constants,
    )


def scan(args: ScanArgs, chunk: int) -> tuple[Tensor, Tensor]:
    """As `agentmem.kernels.scan`, for checked and contiguous arguments."""
    shape = Shape.of(args, chunk)
    reads, last = torch.empty_like(args.q), torch.empty_like(args.state)
    if shape.batch * shape.heads:
        _run_chunks(shape, args, _chunk_starts(shape, args, args.state), reads=(reads, last))
    return reads, last


def scan_backward(dy: Tensor, dlast: Tensor, args: ScanArgs, chunk: int) -> ScanArgs:
    """The gradients of all arguments, which must be checked and contiguous."""
    shape = Shape.of(args, chunk, backward=True)
    grads = ScanArgs(*map(torch.empty_like, args))
    if not shape.batch * shape.heads:
        return grads
    step = next(size for size in (FINE, 4, 2, 1) if shape.chunk % size == 0)
    fine = args.q.new_empty(shape.batch, shape.chunks, shape.chunk // step, shape.heads, shape.rank, shape.rank)
    _run_chunks(shape, args, _chunk_starts(shape, args, args.state), fine=(fine, step))
    ends = _chunk_starts(shape, args, dlast, dy)
    _, _, constants = shape.kernel(shape.padded**2, 2)
    _gradients[(shape.chunks, shape.batch * shape.heads)](
        *args[1:],
        *(dy, fine, ends, *grads[1:], grads.state),
        *(shape.length, shape.chunks),
        CHUNK=shape.chunk,
        FINE=step,
        **constants,
    )
    return grads
