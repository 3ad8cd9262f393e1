"""Random inputs for the kernels, and what they must give, in float64 from the equations of the design."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from agentmem.kernels.recurrence import scan_reference

NAMES = ("state", "q", "k", "v", "keep", "erase", "write")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: Tensor, expected: Tensor, tolerance: float, what: str, dtype: torch.dtype = torch.float32) -> None:
    """Equal up to ``tolerance`` of the largest expected number, and what ``dtype`` rounds off; NaN never is."""
    assert found.shape == expected.shape, what
    assert found.dtype == dtype, what
    tolerance = max(tolerance, torch.finfo(dtype).eps)
    if expected.numel():
        error = (found.double().cpu() - expected).abs().amax() / (1e-30 + expected.abs().amax().clamp_min(1e-3))
        assert float(error) <= tolerance, f"{what}: off by {float(error):.1e}"


def defined_step(
    products: Tensor,
    pool: Tensor,
    slots: Tensor,
    layer: int,
    beta_bias: Tensor,
    lambda_bias: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """Reads and the pool after a step, row by row."""
    z, pool = products.double(), pool.double().clone()
    heads, rank = pool.shape[2:4]
    size, gates = heads * rank, len(beta_bias)
    reads = torch.zeros(len(z), heads, rank, dtype=torch.float64)
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for h in range(heads):
            part = slice(h * rank, (h + 1) * rank)
            q, k, v = (z[b, n * size : (n + 1) * size][part] for n in range(3))
            if normalize:
                q, k = (torch.tanh(x) / torch.tanh(x).norm().clamp_min(1e-6) for x in (q, k))
            beta = torch.sigmoid(z[b, 3 * size : 3 * size + gates] + beta_bias.double())
            lam = 1 - beta
            if lambda_bias is not None:
                lam = torch.sigmoid(z[b, 3 * size + gates :] + lambda_bias.double())
            beta, lam = (x[part] if gates == size else x[h].expand(rank) for x in (beta, lam))
            keep, erase = {
                "standard": (lam, beta),
                "lambda_outside": (lam, lam * beta),
                "no_lambda": (torch.ones_like(lam), beta),
            }[mode]
            s = pool[slot, layer, h].clone()
            reads[b, h] = s @ q
            if mask is None or mask[b]:
                pool[slot, layer, h] = keep[:, None] * s + torch.outer(beta * v - erase * (s @ k), k)
    return reads.flatten(1), pool


def scan_inputs(seed: int, rows: int, length: int, heads: int, rank: int, states: int, gates: str) -> list[Tensor]:
    """State, q, k, v, keep, erase, write; all float32. ``gates``: smooth, steep (near 0 and 1) or hard (0 and 1)."""
    source = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    size = (rows, length, heads, rank)
    q, k = (torch.nn.functional.normalize(normal(*size), dim=-1) for _ in range(2))
    steepness = {"smooth": 1.0, "steep": 30.0, "hard": math.inf}[gates]
    factors = [torch.nan_to_num(torch.sigmoid(normal(*size) * steepness), nan=1.0) for _ in range(3)]
    return [normal(states, heads, rank, rank), q, k, normal(*size), *factors]


def defined_scan(
    inputs: list[Tensor], mask: Tensor | None, borders: list[int] | None, weights: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Reads, states and the gradients of ``inputs`` for these weights of the results, sequence by sequence."""
    leaves = [x.double().requires_grad_() for x in inputs]
    state, q, k, v, keep, erase, write = leaves
    on = torch.ones(q.shape[:2], dtype=torch.bool) if mask is None else mask
    on = on[..., None, None]
    tokens = [q, torch.where(on, k, 0.0), torch.where(on, v, 0.0)]
    tokens += [torch.where(on, keep, 1.0), torch.where(on, erase, 0.0), torch.where(on, write, 0.0)]
    if borders is None:
        y, last = scan_reference(state, *tokens)
    else:
        parts, ends = [], []
        for b, (low, high) in enumerate(pairwise(borders)):
            read, end = scan_reference(state[b : b + 1], *(x[:, low:high] for x in tokens))
            parts.append(read)
            ends.append(end)
        edge = (torch.zeros_like(q[:, : borders[0]]), torch.zeros_like(q[:, borders[-1] :]))
        y, last = torch.cat((edge[0], *parts, edge[1]), dim=1), torch.cat(ends)
    total = (y * weights[0]).sum() + (last * weights[1]).sum()
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    return y.detach(), last.detach(), list(grads)


def weights_for(inputs: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    source = generator(seed + 1)
    y, last = (torch.randn(x.shape, generator=source, dtype=torch.float64) for x in (inputs[1], inputs[0]))
    return y, last


def moved(device: torch.device, *given: Any) -> list[Any]:
    return [x.to(device) if isinstance(x, Tensor) else x for x in given]
