"""The kernels' operations in plain torch, for devices without Triton: same arguments, same numbers, any float type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agentmem.delta.layer import NORM_EPS
from agentmem.kernels import recurrence

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# Tokens whose states the backward holds at a time.
BACKWARD_CHUNK = 64


def step(
    products: Tensor,
    pool: Tensor,
    slots: Tensor,
    layer: int,
    beta_bias: Tensor,
    lambda_bias: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    mode: str,
) -> Tensor:
    """As ``agentmem.kernels.step``."""
    batch = products.shape[0]
    heads, rank = pool.shape[2:4]
    size, gates = heads * rank, beta_bias.shape[0]
    z = products.to(pool.dtype)
    q, k, v = z[:, : 3 * size].view(batch, 3, heads, rank).unbind(1)
    if normalize:
        q, k = (F.normalize(torch.tanh(x), dim=-1, eps=NORM_EPS) for x in (q, k))
    beta = torch.sigmoid(z[:, 3 * size : 3 * size + gates] + beta_bias.to(pool.dtype))
    keep = 1.0 - beta
    if lambda_bias is not None:
        keep = torch.sigmoid(z[:, 3 * size + gates :] + lambda_bias.to(pool.dtype))
    erase = keep * beta if mode == "lambda_outside" else beta
    if mode == "no_lambda":
        keep = torch.ones_like(keep)
    live = slots >= 0
    on = live if mask is None else live & mask
    # An inert row reads slot 0, and what it read is dropped.
    s = pool[slots.clamp_min(0), layer]
    reads = torch.where(live[:, None, None], torch.einsum("bhij,bhj->bhi", s, q), 0.0)
    keep, erase, beta = (
        x.reshape(batch, heads, gates // heads).expand(batch, heads, rank) for x in (keep, erase, beta)
    )
    rows = [x.reshape(-1, rank) for x in (k, v, keep, erase, beta)]
    after = recurrence.write_once(s.reshape(-1, rank, rank), *rows).view_as(s)
    pool[slots[on], layer] = after[on]
    return reads.reshape(batch, size).to(products.dtype)


def scan(
    state: Tensor, inputs: Inputs, mask: Tensor | None, cu_seqlens: Tensor | None, max_length: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """As ``agentmem.kernels.scan``."""
    q, k, v, keep, erase, write = (x.flatten(0, 1) for x in inputs)
    place, inside = _layout(inputs[0], cu_seqlens)
    on = inside if mask is None else inside & mask.flatten()[place]
    gates = _gated(keep[place], erase[place], write[place], on)
    k, v = (torch.where(on[..., None, None], x[place], 0.0) for x in (k, v))
    if chunk:
        y, last = recurrence.scan_blocked(state, q[place], k, v, *gates, chunk=chunk)
    else:
        y, last = recurrence.scan(state, q[place], k, v, *gates)
    reads = torch.zeros_like(q)
    reads[place[inside]] = y[inside]
    return reads.view(inputs[0].shape), last.clone()


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
    """Gradients of state, q, k, v, keep, erase and write; the states inside a chunk are computed again."""
    place, inside = _layout(inputs[0], cu_seqlens)
    on = inside if mask is None else inside & mask.flatten()[place]
    writes = on[..., None, None]
    q, k, v, keep, erase, write, dy = (x.flatten(0, 1)[place] for x in (*inputs, dy))
    k, v = torch.where(writes, k, 0.0), torch.where(writes, v, 0.0)
    dy = torch.where(inside[..., None, None], dy, 0.0)
    keep, erase, write = _gated(keep, erase, write, on)
    length = place.shape[1]
    size = chunk or BACKWARD_CHUNK
    starts = [state]
    for low in range(0, length - size, size):
        tokens = (x[:, low : low + size] for x in (q, k, v, keep, erase, write))
        starts.append(recurrence.scan(starts[-1], *tokens)[1])
    found: list[list[Tensor]] = [[] for _ in range(6)]
    g = dlast
    for low in reversed(range(0, length, size)):
        states = [starts[low // size]]
        high = min(low + size, length)
        for t in range(low, high - 1):
            tokens = (x[:, t : t + 1] for x in (q, k, v, keep, erase, write))
            states.append(recurrence.scan_loop(states[-1], *tokens)[1])
        for t in reversed(range(low, high)):
            s, kt, e = states.pop(), k[:, t], erase[:, t]
            p = torch.einsum("bhij,bhj->bhi", s, kt)
            du = torch.einsum("bhij,bhj->bhi", g, kt)
            u, dp = write[:, t] * v[:, t] - e * p, -e * du
            dk = torch.einsum("bhij,bhi->bhj", g, u) + torch.einsum("bhij,bhi->bhj", s, dp)
            dq = torch.einsum("bhij,bhi->bhj", s, dy[:, t])
            for one, into in zip(
                (dq, dk, write[:, t] * du, (g * s).sum(-1), -du * p, du * v[:, t]), found, strict=True
            ):
                into.append(one)
            g = keep[:, t, :, :, None] * g + dp[..., None] * kt[:, :, None] + dy[:, t, :, :, None] * q[:, t, :, None]
    grads = [g.clone()]
    for number, steps in enumerate(found):
        grad = torch.zeros_like(inputs[0]).flatten(0, 1)
        if steps:
            # What a masked token holds has no effect, its query apart.
            used = inside if number == 0 else on
            grad[place[used]] = torch.stack(steps[::-1], dim=1)[used]
        grads.append(grad.view(inputs[0].shape))
    return grads


def _layout(q: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """For every sequence and token [B, T] its place among all tokens, and whether there is such a token."""
    if cu_seqlens is None:
        place = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(q.shape[:2])
        return place, torch.ones_like(place, dtype=torch.bool)
    borders = cu_seqlens.long()
    lengths = borders.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    at = torch.arange(longest, device=q.device)
    inside = at < lengths[:, None]
    return torch.where(inside, borders[:-1, None] + at, 0), inside


def _gated(keep: Tensor, erase: Tensor, write: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gates, those of a token that does not write being 1, 0, 0."""
    on = on[..., None, None]
    return torch.where(on, keep, 1.0), torch.where(on, erase, 0.0), torch.where(on, write, 0.0)
