"""The gated delta rule as a scan over time: one definition, three forms, one signature.

    y_t      = S_{t-1} q_t
    S_t[i,:] = keep_i S_{t-1}[i,:] - erase_i (S_{t-1}[i,:] . k_t) k_t + write_i v_i k_t

Every form takes ``(state, q, k, v, keep, erase, write)`` with state ``[B, H, r, r]`` and the rest ``[B, T, H,
r]``, all of one float type (the engine uses float32), and returns ``(y [B, T, H, r], state [B, H, r, r])``.
All are differentiable and none changes its arguments. A token that must not write has erase = write = 0 and
keep = 1.

``scan`` picks the quickest form for a shape; ``scan_reference`` is the definition that the others are tested
against. The blocked form follows the usual chunk-wise evaluation of linear recurrences: rows of S evolve
independently, each by an affine map, so chunks are composed side by side, their borders are chained, and the
outputs are filled in side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["scan", "scan_blocked", "scan_loop", "scan_reference", "write_once"]


def scan(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the rule over T tokens in the form that is quickest for this shape (see the module)."""
    batch, length, heads, rank = q.shape
    chunk = block_length(batch * heads, length, rank)
    if chunk == 0:
        return scan_loop(state, q, k, v, keep, erase, write)
    return scan_blocked(state, q, k, v, keep, erase, write, chunk=chunk)


def block_length(rows: int, length: int, rank: int) -> int:
    """Chunk length for the blocked form, or 0 where the tight loop is as quick or quicker.

    ``rows`` is batch x heads. The loop costs per step whatever the rows, the blocked form per token and rows x rank^3:
    it pays for few rows of a small rank and many tokens. Thresholds from ``benchmarks/scan.py --grid``.
    """
    work = rows * rank**3
    if work > 4_500 or length < 96 + work // 32:
        return 0
    return 16 if length < 512 else 32 if length < 4096 else 64


def scan_reference(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, as it is written in the module's contract."""
    reads = []
    for t in range(q.shape[1]):
        reads.append(torch.einsum("bhij,bhj->bhi", state, q[:, t]))
        predicted = torch.einsum("bhij,bhj->bhi", state, k[:, t])
        state = (
            keep[:, t, :, :, None] * state
            - (erase[:, t] * predicted)[..., None] * k[:, t, :, None, :]
            + (write[:, t] * v[:, t])[..., None] * k[:, t, :, None, :]
        )
    return torch.stack(reads, dim=1) if reads else torch.zeros_like(q), state


def scan_loop(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition with four operations a step: read and prediction in one product, one fused update."""
    batch, length, heads, rank = q.shape
    if length == 0:
        return torch.zeros_like(q), state

    def rows(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(length, batch * heads, rank)

    s = state.reshape(batch * heads, rank, rank)
    y, s = _steps(s, rows(q), rows(k), rows(keep), rows(erase), rows(write * v))
    return y.reshape(length, batch, heads, rank).transpose(0, 1), s.reshape(state.shape)


def write_once(s: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor) -> Tensor:
    """The rule's second line for one token: s [M, r, r], the rest [M, r]; the new s."""
    predicted = torch.bmm(s, k.unsqueeze(-1)).squeeze(-1)
    u = torch.addcmul(write * v, erase, predicted, value=-1)
    return torch.addcmul(u.unsqueeze(-1) * k.unsqueeze(-2), keep.unsqueeze(-1), s)


def _steps(s: Tensor, q: Tensor, k: Tensor, keep: Tensor, erase: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The loop itself: s [M, r, r], the rest [T, M, r], value = write * v; reads [T, M, r] and the last s."""
    reads = []
    for probe, kt, a, e, wv in zip(
        torch.stack((q, k), dim=-1).unbind(0),
        k.unsqueeze(2).unbind(0),
        keep.unsqueeze(3).unbind(0),
        erase.unbind(0),
        value.unbind(0),
        strict=True,
    ):
        both = torch.bmm(s, probe)
        reads.append(both[..., 0])
        u = torch.addcmul(wv, e, both[..., 1], value=-1)
        s = torch.addcmul(u.unsqueeze(-1) * kt, a, s)
    return torch.stack(reads), s


def scan_blocked(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    erase: Tensor,
    write: Tensor,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunks of ``chunk`` tokens composed side by side, chained, then read side by side.

    The tail is padded with tokens that do nothing (keep 1, erase and write 0).
    """
    batch, length, heads, rank = q.shape
    count = -(-length // chunk)
    if count <= 1:
        return scan_loop(state, q, k, v, keep, erase, write)
    tail = count * chunk - length

    def blocks(x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, H, r] -> [chunk, B*H*count, r], time first, the padding filled in."""
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, tail), value=fill) if tail else x
        x = x.reshape(batch, count, chunk, heads, rank)
        return x.permute(2, 0, 3, 1, 4).reshape(chunk, batch * heads * count, rank)

    kb, eb, ab, wv = blocks(k), blocks(erase), blocks(keep, 1.0), blocks(write * v)
    maps, offsets = _compose(kb, ab, eb, wv)
    by_border = (batch * heads, count, rank, -1, rank)
    maps = maps.reshape(by_border).transpose(0, 1).reshape(count, batch * heads * rank, rank, rank)
    offsets = offsets.reshape(by_border).transpose(0, 1).reshape(count, batch * heads * rank, 1, rank)
    row = state.reshape(batch * heads * rank, 1, rank)
    starts = []
    for a_map, offset in zip(maps.unbind(0), offsets.unbind(0), strict=True):
        starts.append(row)
        row = torch.baddbmm(offset, row, a_map)
    # The chunks run once more, now from their true starts, for the reads alone.
    s = torch.stack(starts).reshape(count, batch * heads, rank, rank).transpose(0, 1)
    s = s.reshape(batch * heads * count, rank, rank)
    reads, _ = _steps(s, blocks(q), kb, ab, eb, wv)
    y = reads.reshape(chunk, batch, heads, count, rank).permute(1, 3, 0, 2, 4)
    y = y.reshape(batch, count * chunk, heads, rank)[:, :length]
    return y, row.reshape(state.shape)


def _compose(k: Tensor, keep: Tensor, erase: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map of every chunk and state row.

    Takes [C, M, r] each and returns maps [M, r, r, r] (chunk, row i, from, to) and offsets [M, r, r], so that
    row i leaves a chunk as ``s @ maps[:, i] + offsets[:, i]``.
    """
    length, blocks, rank = k.shape
    # r basis vectors and the offset evolve together, as r + 1 vectors of each row.
    start = torch.zeros(rank + 1, rank, dtype=k.dtype, device=k.device)
    start[:rank].fill_diagonal_(1.0)
    p = start.expand(blocks, rank, rank + 1, rank)
    only_offset = torch.zeros(rank + 1, dtype=k.dtype, device=k.device)
    only_offset[rank] = 1.0
    for t in range(length):
        kt = k[t].view(blocks, 1, 1, rank)
        predicted = torch.matmul(p.reshape(blocks, rank * (rank + 1), rank), k[t].unsqueeze(-1))
        u = value[t].unsqueeze(-1) * only_offset - erase[t].unsqueeze(-1) * predicted.view(blocks, rank, rank + 1)
        p = torch.addcmul(u.unsqueeze(-1) * kt, keep[t].view(blocks, rank, 1, 1), p)
    return p[:, :, :rank], p[:, :, rank]
