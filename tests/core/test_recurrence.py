"""The three forms of the scan, and the chooser, against the definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentmem.kernels.recurrence import ScanArgs, block_length, scan, scan_blocked, scan_loop, scan_reference
from tests.helpers.kernel_cases import scan_inputs, unwritten
from tests.helpers.numeric import tolerance

Form = Callable[..., tuple[Tensor, Tensor]]

FORMS: dict[str, Form] = {
    "chooser": scan,
    "loop": scan_loop,
    "blocked 1": lambda args: scan_blocked(args, chunk=1),
    "blocked 5": lambda args: scan_blocked(args, chunk=5),
    "blocked 16": lambda args: scan_blocked(args, chunk=16),
    "blocked 64": lambda args: scan_blocked(args, chunk=64),
}
# How gates are drawn: between 0 and 1, near them, or nothing but 0 and 1.
GATES = ("smooth", "steep", "hard")


def _inputs(
    seed: int, batch: int, length: int, heads: int, rank: int, gates: str, masked: float, dtype: torch.dtype
) -> ScanArgs:
    args = unwritten(scan_inputs(seed, batch, length, heads, rank, gates), masked, seed)
    return ScanArgs(*(x.to(dtype) for x in args))


def _close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], terms: int) -> None:
    """Up to sums of `terms`, relative to the largest number or 1."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        size = 1 + b.abs().amax() if b.numel() else 1
        assert bool(((a - b).abs() <= tolerance(b.dtype, terms) * size).all())


def _terms(args: ScanArgs) -> int:
    """A state is a sum of as many writes as there are tokens, a read one of as many numbers as the rank has."""
    return args.q.shape[1] + args.q.shape[3]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 4),
    length=st.integers(0, 200),
    heads=st.integers(1, 4),
    rank=st.one_of(st.integers(1, 16), st.sampled_from([32, 64])),
    gates=st.sampled_from(GATES),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    form=st.sampled_from(sorted(FORMS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@torch.no_grad()
def test_every_form_agrees_with_the_definition(
    seed: int, batch: int, length: int, heads: int, rank: int, gates: str, masked: float, form: str, dtype: torch.dtype
) -> None:
    inputs = _inputs(seed, batch, length, heads, rank, gates, masked, dtype)
    before = [x.clone() for x in inputs]
    _close(FORMS[form](inputs), scan_reference(inputs), _terms(inputs))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "arguments were changed"


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 70),
    heads=st.integers(1, 2),
    rank=st.integers(1, 6),
    gates=st.sampled_from(GATES),
    form=st.sampled_from(sorted(FORMS)),
)
def test_gradients_agree_with_the_definition(
    seed: int, length: int, heads: int, rank: int, gates: str, form: str
) -> None:
    inputs = _inputs(seed, 2, length, heads, rank, gates, 0.2, torch.float64)

    def gradients(of: Form) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, state = of(ScanArgs(*leaves))
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (y, state)]
        return torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), leaves)

    for found, expected in zip(gradients(FORMS[form]), gradients(scan_reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_definition_by_hand() -> None:
    """One row, two tokens, numbers that can be followed on paper."""
    one = torch.ones(1, 1, 1, 1)
    state = torch.full((1, 1, 1, 1), 2.0)
    q, k, v = 3 * one, 0.5 * one, 4 * one
    both = [torch.cat((x, x), dim=1) for x in (q, k, v, 0.9 * one, 0.4 * one, 0.2 * one)]
    y, last = scan_reference(ScanArgs(state, *both))
    first = 0.9 * 2.0 - 0.4 * (2.0 * 0.5) * 0.5 + 0.2 * 4.0 * 0.5
    torch.testing.assert_close(y.flatten(), torch.tensor([6.0, 3 * first]))
    expected = 0.9 * first - 0.4 * (first * 0.5) * 0.5 + 0.2 * 4.0 * 0.5
    torch.testing.assert_close(last.flatten(), torch.tensor([expected]))


def test_of_the_definition_masked_tokens_may_as_well_not_be_there() -> None:
    """And so of every form, which agrees with it."""
    inputs = _inputs(2, 1, 120, 1, 8, "smooth", 0.5, torch.float64)
    on = inputs.write[0].any(-1).any(-1)
    assert 20 < int(on.sum()) < 100
    kept = [x[:, on] for x in inputs[1:]]
    y, state = scan_reference(inputs)
    _close((y[:, on], state), scan_reference(ScanArgs(inputs.state, *kept)), _terms(inputs))


def test_the_chooser_knows_rows_length_and_rank() -> None:
    """Blocked only for scans of some length and few rows, with shorter chunks where rows or rank are larger."""
    assert block_length(1, 8192, 8) > block_length(1, 8192, 32) > block_length(8, 8192, 32) > 0
    assert block_length(1, 8192, 16) > 0
    assert block_length(1, 1, 8) == 0
    assert block_length(1, 160, 8) > 0
    assert block_length(64, 160, 8) == 0
    assert block_length(8, 512, 8) > 0
    assert block_length(1, 8192, 64) > 0
    assert block_length(256, 8192, 8) == 0
