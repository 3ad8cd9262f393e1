"""Part 1: every Triton kernel against the definition in float64, on fresh random inputs, at the shapes of real models.

Inputs and definition are those of the tests (`tests/helpers/kernel_cases.py`). Fresh memory holds NaN, so that what a
kernel leaves unwritten, or reads before another has written it, is seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from agentmem import kernels
from agentmem.kernels import ScanArgs, StepArgs
from gpu.parts import Setting
from gpu.results import Recorder
from tests.helpers.kernel_cases import defined_scan, defined_step, generator, moved, scan_inputs, unwritten, weights_for
from tests.helpers.numeric import tolerance

LAYERS = 3


class Memory(NamedTuple):
    """The memory of a model: state heads, rank, and whether lambda is 1 - beta."""

    name: str
    heads: int
    rank: int
    coupled: bool


MODELS = (Memory("Qwen3-4B", 1, 8, True), Memory("SmolLM2", 2, 32, False), Memory("nano", 1, 32, False))
ROWS, LENGTHS = (1, 32), ((1, 1000), (4, 300))
"""Rows of a step; rows and tokens of a scan, several chunks and a rest."""


def check(recorder: Recorder, setting: Setting) -> None:
    """Step, scan and gradients, each model's shape."""
    torch.set_deterministic_debug_mode("warn")  # fills fresh memory with NaN
    device = torch.device(setting.device)
    seed = random.SystemRandom().randrange(2**31)
    recorder.tell("seed of the inputs", str(seed))
    models = (MODELS[0], Memory("rank 5, 2 heads", 2, 5, False)) if setting.tiny else MODELS
    for model in models:
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (2,) if setting.tiny else ROWS:
                what = f"step, {model.name}, {rows} rows, {_name(dtype)}"
                recorder.attempt(what, partial(_step, recorder, what, model, rows, dtype, seed, device), exact=True)
        for rows, length in ((1, 6),) if setting.tiny else LENGTHS:
            what = f"scan and gradients, {model.name}, {rows} x {length:,}"
            chunk = 4 if setting.tiny else 0
            run = partial(_scan, recorder, what, model, rows, length, chunk, seed, device)
            recorder.attempt(what, run, exact=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _judge(recorder: Recorder, what: str, found: Sequence[tuple[str, float]]) -> None:
    """The largest share of what rounding explains, by what it was found in."""
    name, worst = max(found, key=lambda entry: (entry[1] != entry[1], entry[1]))  # a NaN first
    said = f"off by {worst:.2f} of what rounding explains, at most ({name})"
    recorder.judge(what, worst, 1.0, said, most=True, exact=True, shares=dict(found))


def _share(found: Tensor, expected: Tensor, terms: int, dtype: torch.dtype = torch.float32) -> float:
    """The largest error by the most that sums of `terms` numbers may differ, and what `dtype` rounds off."""
    bound = max(tolerance(torch.float32, terms), torch.finfo(dtype).eps)
    error = (found.detach().double().cpu() - expected).abs().amax() / expected.abs().amax().clamp_min(1e-3)
    return float(error) / bound


def _step(
    recorder: Recorder, what: str, memory: Memory, rows: int, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    """A row that does not write, an inert one where there are several, and all else as decoding has it."""
    _, heads, rank, coupled = memory
    source = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    gates = heads * rank
    slots = torch.randperm(rows + 2, generator=source)[:rows]
    mask = torch.ones(rows, dtype=torch.bool)
    if rows > 1:
        slots[-1], mask[0] = -1, False
    given = StepArgs(
        normal(rows, 3 * gates + gates * (1 if coupled else 2)).to(dtype),
        normal(rows + 2, LAYERS, heads, rank, rank),
        slots,
        1,
        normal(gates).to(dtype),
        None if coupled else normal(gates).to(dtype),
        mask,
    )
    reads, pool = defined_step(*given)
    args = StepArgs(*moved(device, *given))
    args = args._replace(pool=args.pool.clone())
    found = kernels.step(args)
    terms = 2 * rank + 14
    _judge(recorder, what, [("reads", _share(found, reads, terms, dtype)), ("pool", _share(args.pool, pool, terms))])


def _scan(
    recorder: Recorder, what: str, memory: Memory, rows: int, length: int, chunk: int, seed: int, device: torch.device
) -> None:
    """With a tenth of the tokens not written; sums are of as many writes as there are tokens."""
    args = unwritten(scan_inputs(seed, rows, length, memory.heads, memory.rank, "smooth"), 0.1, seed)
    weights = weights_for(args, seed)
    y, last, grads = defined_scan(args, weights)
    terms = length + 3 * memory.rank
    leaves = ScanArgs(*(x.requires_grad_() for x in moved(device, *args)))
    on_device = moved(device, *weights)
    reads, state = kernels.scan(leaves, chunk=chunk)
    total = (reads * on_device[0]).sum() + (state * on_device[1]).sum()
    found = torch.autograd.grad(total, leaves)
    _judge(recorder, what, [
        ("reads", _share(reads, y, terms)), ("state", _share(state, last, terms)), *_gradients(found, grads, 2 * terms)
    ])  # fmt: skip


def _gradients(found: Iterable[Tensor], expected: Iterable[Tensor], terms: int) -> list[tuple[str, float]]:
    pairs = zip(ScanArgs._fields, found, expected, strict=True)
    return [(f"gradient of {name}", _share(grad, wanted, terms)) for name, grad, wanted in pairs]
