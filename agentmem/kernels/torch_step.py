"""The decode step in plain torch, for devices without Triton: same arguments and results, any float dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agentmem.kernels.recurrence import NORM_EPS, StepArgs, write_once


def step(args: StepArgs) -> Tensor:
    """As `agentmem.kernels.step`."""
    products, pool, slots, layer, beta_bias, lambda_bias, mask, normalize, mode = args
    batch = products.shape[0]
    heads, rank = pool.shape[2:4]
    size, gates = heads * rank, beta_bias.shape[0]
    z = products.to(pool.dtype)
    q, k, v = z[:, : 3 * size].view(batch, 3, heads, rank).unbind(1)  # each [B, H, r]
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
    writing = live if mask is None else live & mask
    # An inert row reads slot 0; its read is discarded.
    s = pool[slots.clamp_min(0), layer]  # [B, H, r, r]
    reads = torch.where(live[:, None, None], torch.einsum("bhij,bhj->bhi", s, q), 0.0)
    keep, erase, beta = (
        x.reshape(batch, heads, gates // heads).expand(batch, heads, rank) for x in (keep, erase, beta)
    )
    rows = [x.reshape(-1, rank) for x in (k, v, keep, erase, beta)]
    after = write_once(s.reshape(-1, rank, rank), *rows).view_as(s)
    pool[slots[writing], layer] = after[writing]
    return reads.reshape(batch, size).to(products.dtype)
