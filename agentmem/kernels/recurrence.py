"""The gated delta rule as a scan over time: its definition in three forms, all with the same signature.

    y_t      = S_{t-1} q_t
    S_t[i,:] = keep_i S_{t-1}[i,:] - erase_i (S_{t-1}[i,:] . k_t) k_t + write_i v_i k_t

Every form takes `ScanArgs` and returns `(reads [B, T, H, r], state [B, H, r, r])`. All are differentiable and none
changes its arguments.

`scan` picks the fastest form for a shape; `scan_reference` is the definition that the others are tested against. The
blocked form is the chunk-wise one of delta-rule networks (Yang et al., arXiv 2406.06484), here with separate gates for
every row of S. Rows evolve independently, so the writes of a chunk's tokens are the solution of one triangular system
per row, and one matrix product carries the state to the next chunk.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["MODES", "NORM_EPS", "Mode", "ScanArgs", "scan", "scan_blocked", "scan_loop", "scan_reference", "write_once"]

NORM_EPS = 1e-6
"""The shortest length that a query or key is divided by when it is scaled to unit length."""

Mode = Literal["standard", "lambda_outside", "no_lambda"]
MODES: dict[Mode, int] = {"standard": 0, "lambda_outside": 1, "no_lambda": 2}
"""The number of each update mode in compiled kernels."""


class ScanArgs(NamedTuple):
    """The arguments of a scan, all float32 (as in the engine) or all float64.

    A token that must not write has keep 1, erase 0 and write 0.
    """

    state: Tensor  # [B, H, r, r]
    q: Tensor  # [B, T, H, r], as are all that follow
    k: Tensor
    v: Tensor
    keep: Tensor
    erase: Tensor
    write: Tensor


class StepArgs(NamedTuple):
    """The arguments of a step: one token per row through one layer's memory, on a pool of states.

    Attributes:
        products: [B, 3 H r + gates], each row's products with `LayerMemory.packed_weight`; any float dtype.
        pool: [slots, L, H, r, r] float32, contiguous; changed in place.
        slots: [B] int32 or int64, the slot of every row's state; -1 = the row is inert: it reads zeros and writes
            nothing. No slot may occur twice.
        layer: which of the L layers.
        beta_bias, lambda_bias: [H r], or [H] where each head has a single gate; `lambda_bias` None = lambda is 1 -
            beta.
        mask: [B] bool, False where a row reads and does not write; None = all rows write.
        normalize: whether query and key go through tanh and are scaled to unit length.
        mode: as `MemoryConfig.state_update_mode`.
    """

    products: Tensor
    pool: Tensor
    slots: Tensor
    layer: int
    beta_bias: Tensor
    lambda_bias: Tensor | None = None
    mask: Tensor | None = None
    normalize: bool = True
    mode: Mode = "standard"


def scan(args: ScanArgs) -> tuple[Tensor, Tensor]:
    """Run the rule over T tokens in the form that is fastest for this shape (see the module)."""
    batch, length, heads, rank = args.q.shape
    chunk = block_length(batch * heads, length, rank)
    return scan_loop(args) if chunk == 0 else scan_blocked(args, chunk=chunk)


def block_length(rows: int, length: int, rank: int) -> int:
    """Chunk length for the blocked form, or 0 where the plain loop is at least as fast.

    `rows` is batch x heads. The loop's cost per step hardly depends on the rows; the blocked form's cost per token
    grows with rows x rank x chunk. The thresholds come from `benchmarks/scan.py --grid`.
    """
    size = rows * rank
    chunk = 32 if size <= 8 else 16 if size < 128 else 8
    return chunk if size < 512 and length >= max(32, 2 * chunk) else 0


def scan_reference(args: ScanArgs) -> tuple[Tensor, Tensor]:
    """The definition, token by token, as in the module's docstring."""
    state, q, k, v, keep, erase, write = args
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


def scan_loop(args: ScanArgs) -> tuple[Tensor, Tensor]:
    """The definition with four operations per step: read and prediction in one product, and one fused update."""
    state, q, k, v, keep, erase, write = args
    batch, length, heads, rank = q.shape
    if length == 0:
        return torch.zeros_like(q), state

    def rows(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(length, batch * heads, rank)  # [T, M, r], M = B H

    s = state.reshape(batch * heads, rank, rank)  # [M, r, r]
    y, s = _steps(s, rows(q), rows(k), rows(keep), rows(erase), rows(write * v))
    return y.reshape(length, batch, heads, rank).transpose(0, 1), s.reshape(state.shape)


def write_once(s: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor) -> Tensor:
    """The second line of the rule for one token: s [M, r, r], the rest [M, r]; returns the new s."""
    predicted = torch.bmm(s, k.unsqueeze(-1)).squeeze(-1)  # [M, r]
    u = torch.addcmul(write * v, erase, predicted, value=-1)
    return torch.addcmul(u.unsqueeze(-1) * k.unsqueeze(-2), keep.unsqueeze(-1), s)


def _steps(s: Tensor, q: Tensor, k: Tensor, keep: Tensor, erase: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The loop: s [M, r, r], the rest [T, M, r], value = write * v; returns reads [T, M, r] and the last s."""
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


def scan_blocked(args: ScanArgs, *, chunk: int = 16) -> tuple[Tensor, Tensor]:
    """Chunks of `chunk` tokens, one after another; the writes of all tokens in a chunk are computed at once.

    The tail is padded with tokens that do nothing (keep 1, erase and write 0).
    """
    state, q, k, v, keep, erase, write = args
    batch, length, heads, rank = q.shape
    count = -(-length // chunk)
    if count <= 1:
        return scan_loop(args)
    tail = count * chunk - length
    rows = batch * heads

    def blocks(x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, H, r] -> [count, B*H, chunk, r], with the padding filled in."""
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, tail), value=fill) if tail else x
        x = x.reshape(batch, count, chunk, heads, rank)
        return x.permute(1, 0, 3, 2, 4).reshape(count, rows, chunk, rank)

    def by_row(x: Tensor) -> Tensor:
        """[count, B*H, chunk, r] -> [count, B*H, r, chunk]: rows of the state evolve independently."""
        return x.transpose(-1, -2)

    queries, keys = blocks(q), blocks(k)
    erased, written = by_row(blocks(erase)), by_row(blocks(write * v))
    kept = _kept(by_row(blocks(keep, 1.0)))
    from_start, between = kept[..., :chunk, 0], kept[..., :chunk, 1:]
    to_end, from_write = kept[..., chunk, :1], kept[..., chunk, 1:]
    dots = torch.cat((keys, queries), dim=-2) @ by_row(keys)  # [count, B*H, 2 chunk, chunk]
    # u_t = write_t v_t - erase_t (S_{t-1} . k_t), where S_{t-1} contains the u of earlier tokens: a unit triangular
    # system.
    triangle = (between * dots[:, :, None, :chunk]) * erased.unsqueeze(-1)
    s = state.reshape(rows, rank, rank)
    starts, written_rows = [], []
    for system, values, forgets, k_c, k_t, late, decay in zip(
        triangle.reshape(count, rows * rank, chunk, chunk).unbind(0),
        written.unbind(0),
        (-erased * from_start).unbind(0),
        keys.unbind(0),
        by_row(keys).unbind(0),
        from_write.unbind(0),
        to_end.unbind(0),
        strict=True,
    ):
        starts.append(s)
        values = torch.addcmul(values, forgets, torch.bmm(s, k_t)).reshape(rows * rank, chunk, 1)
        u = torch.linalg.solve_triangular(system, values, upper=False, unitriangular=True).view(rows, rank, chunk)
        written_rows.append(u)
        s = torch.baddbmm(decay * s, u * late, k_c)  # [B*H, r, r]
    reads = (between * dots[:, :, None, chunk:]) @ torch.stack(written_rows).unsqueeze(-1)
    y = torch.addcmul(reads.squeeze(-1), from_start, torch.stack(starts) @ by_row(queries))
    y = y.reshape(count, batch, heads, rank, chunk).permute(1, 0, 4, 2, 3)
    return y.reshape(batch, count * chunk, heads, rank)[:, :length], s.reshape(state.shape)


def _kept(keep: Tensor) -> Tensor:
    """What is left just before token t of a chunk: of its start (column 0), of token j's write (column j + 1).

    Maps keep [..., C] to [..., C + 1, C + 1], with 0 where token j has not written yet; the last row is the chunk's
    end. Built from products and not as a difference of logarithms, since a gate may be 0.
    """
    length = keep.shape[-1]
    first = torch.eye(length + 1, dtype=keep.dtype, device=keep.device).unbind(0)
    lines = [first[0].expand(*keep.shape[:-1], length + 1)]
    for t, gate in enumerate(keep.unsqueeze(-2).unbind(-1)):
        lines.append(torch.addcmul(first[t + 1], lines[-1], gate))
    return torch.stack(lines, dim=-2)
