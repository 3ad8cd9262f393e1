"""Random inputs for the kernels, and what they must give, in float64 from the equations of the design."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from agentmem.kernels.recurrence import ScanArgs, StepArgs, scan_reference
from tests.helpers.numeric import tolerance


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: Tensor, expected: Tensor, terms: int, what: str, dtype: torch.dtype = torch.float32) -> None:
    """Equal up to float32 sums of `terms`, relative to the largest expected number, and to what `dtype` rounds off; NaN
    never is."""
    assert found.shape == expected.shape, what
    assert found.dtype == dtype, what
    bound = max(tolerance(torch.float32, terms), torch.finfo(dtype).eps)
    if expected.numel():
        error = (found.double().cpu() - expected).abs().amax() / (1e-30 + expected.abs().amax().clamp_min(1e-3))
        assert float(error) <= bound, f"{what}: off by {float(error):.1e}, more than {bound:.1e}"


def defined_step(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Reads and the pool after the step of these `StepArgs`, row by row."""
    products, pool, slots, layer, beta_bias, lambda_bias, mask, normalize, mode = StepArgs(*given, **named)
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


def scan_inputs(seed: int, batch: int, length: int, heads: int, rank: int, gates: str) -> ScanArgs:
    """All float32. `gates`: smooth, steep (near 0 and 1) or hard (0 and 1)."""
    source = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    size = (batch, length, heads, rank)
    q, k = (torch.nn.functional.normalize(normal(*size), dim=-1) for _ in range(2))
    steepness = {"smooth": 1.0, "steep": 30.0, "hard": math.inf}[gates]
    factors = [torch.nan_to_num(torch.sigmoid(normal(*size) * steepness), nan=1.0) for _ in range(3)]
    return ScanArgs(normal(batch, heads, rank, rank), q, k, normal(*size), *factors)


def unwritten(args: ScanArgs, share: float, seed: int) -> ScanArgs:
    """The same, in which this share of the tokens does not write."""
    off = torch.rand(args.q.shape[:2], generator=generator(seed + 2)) < share
    gates = zip((args.keep, args.erase, args.write), (1.0, 0.0, 0.0), strict=True)
    keep, erase, write = (x.masked_fill(off[..., None, None], fill) for x, fill in gates)
    return args._replace(keep=keep, erase=erase, write=write)


def defined_scan(args: ScanArgs, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Reads, states and the gradients of `args` for these weights of the results."""
    leaves = ScanArgs(*(x.double().requires_grad_() for x in args))
    y, last = scan_reference(leaves)
    total = (y * weights[0]).sum() + (last * weights[1]).sum()
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    return y.detach(), last.detach(), list(grads)


def weights_for(args: ScanArgs, seed: int) -> tuple[Tensor, Tensor]:
    source = generator(seed + 1)
    y, last = (torch.randn(x.shape, generator=source, dtype=torch.float64) for x in (args.q, args.state))
    return y, last


def moved(device: torch.device, *values: Any) -> list[Any]:
    return [x.to(device) if isinstance(x, Tensor) else x for x in values]
