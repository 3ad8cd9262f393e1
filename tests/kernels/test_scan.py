"""The scan and its gradients against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from agentmem import kernels
from agentmem.errors import StateMismatchError, TurnError
from agentmem.kernels import ScanArgs
from tests.helpers.backends import INTERPRETED, slow_interpreted
from tests.helpers.kernel_cases import close, defined_scan, moved, scan_inputs, unwritten, weights_for

pytestmark = pytest.mark.usefixtures("backend")


def check(
    args: ScanArgs, device: torch.device, *, chunk: int = 0, seed: int = 0, gradients: bool = True, terms: int = 0
) -> None:
    """Reads, states and gradients; sums are of as many writes as there are tokens, and reads of as many as the rank.

    What no gradients are asked of may be computed otherwise (by numba), so it is compared too.
    """
    terms = terms or args.q.shape[1] + 3 * args.q.shape[3]
    weights = weights_for(args, seed)
    y, last, grads = defined_scan(args, weights)
    placed, weights = moved(device, *args), tuple(moved(device, *weights))
    before = [x.clone() for x in placed]
    leaves = ScanArgs(*(x.requires_grad_(gradients) for x in placed))
    computed = [kernels.scan(leaves, chunk=chunk)]
    if gradients and not INTERPRETED:
        with torch.no_grad():
            computed.insert(0, kernels.scan(leaves, chunk=chunk))
    for reads, state in computed:
        close(reads.detach(), y, terms, "reads")
        close(state.detach(), last, terms, "state")
    if gradients:
        reads, state = computed[-1]
        total = (reads * weights[0]).sum() + (state * weights[1]).sum()
        for name, grad, expected in zip(ScanArgs._fields, torch.autograd.grad(total, leaves), grads, strict=True):
            close(grad, expected, 2 * terms, f"gradient of {name}")
    for was, now in zip(before, leaves, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True, msg="arguments were changed")


@pytest.mark.parametrize(
    ("batch", "length", "heads", "rank", "chunk", "gates"),
    [
        (2, 7, 1, 8, 3, "smooth"),
        (1, 9, 2, 5, 4, "steep"),
        (1, 9, 1, 4, 4, "hard"),
        (1, 8, 1, 8, 8, "smooth"),
        (1, 10, 1, 3, 16, "steep"),
        (2, 5, 1, 4, 0, "hard"),
        (3, 1, 2, 2, 0, "smooth"),
    ],
)
def test_equal_lengths(
    batch: int, length: int, heads: int, rank: int, chunk: int, gates: str, seed: int, device: torch.device
) -> None:
    inputs = scan_inputs(seed, batch, length, heads, rank, gates)
    check(inputs, device, chunk=chunk, seed=seed)


@slow_interpreted
@pytest.mark.parametrize("gates", ["smooth", "steep", "hard"])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "rank"),
    [(3, 70, 2, 5), (1, 300, 8, 4), (64, 5, 1, 8), (1, 40, 1, 64), (2, 33, 3, 16)],
)
def test_without_gradients(
    batch: int, length: int, heads: int, rank: int, gates: str, seed: int, device: torch.device
) -> None:
    check(scan_inputs(seed, batch, length, heads, rank, gates), device, seed=seed, gradients=False)


@pytest.mark.parametrize("chunk", [0, 3, 64])
def test_tokens_that_do_not_write(chunk: int, seed: int, device: torch.device) -> None:
    args = unwritten(scan_inputs(seed, 2, 10, 1, 4, "smooth"), 0.4, seed)
    check(args, device, chunk=chunk, seed=seed)


@pytest.mark.parametrize("chunk", [0, 4])
def test_where_nothing_writes_the_state_stays_bit_for_bit(chunk: int, seed: int, device: torch.device) -> None:
    args = ScanArgs(*moved(device, *unwritten(scan_inputs(seed, 2, 7, 1, 4, "smooth"), 1.0, seed)))
    _, last = kernels.scan(args, chunk=chunk)
    assert torch.equal(last, args.state)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3)])
def test_nothing_to_scan(batch: int, length: int, device: torch.device) -> None:
    args = ScanArgs(*moved(device, *scan_inputs(0, batch, length, 1, 4, "smooth")))
    y, last = kernels.scan(args)
    assert y.shape == (batch, length, 1, 4)
    assert torch.equal(last, args.state)


def test_arguments_need_not_be_contiguous(seed: int, device: torch.device) -> None:
    """Gates that a head shares are views with stride 0."""
    args = scan_inputs(seed, 1, 6, 2, 4, "smooth")
    shared = {name: getattr(args, name)[..., :1].expand(1, 6, 2, 4) for name in ("keep", "erase", "write")}
    args = args._replace(q=args.q.transpose(1, 2).contiguous().transpose(1, 2), **shared)
    for x, name in ((args.q, "q"), (args.keep, "keep")):
        assert not x.is_contiguous(), name
    for chunk in (0, 4):
        check(args, device, chunk=chunk, seed=seed)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    args = ScanArgs(*moved(device, *scan_inputs(0, 2, 6, 1, 4, "smooth")))
    with pytest.raises(StateMismatchError, match="a state must be float32"):
        kernels.scan(args._replace(state=args.state.half()))
    with pytest.raises(TurnError, match=r"v must have shape \[2, 6, 1, 4\]"):
        kernels.scan(args._replace(v=args.v[:, :5]))
    with pytest.raises(TurnError, match=r"k must have shape .* of torch.float32; found torch.float64"):
        kernels.scan(args._replace(k=args.k.double()))
    with pytest.raises(TurnError, match="chunk must be 0 or more"):
        kernels.scan(args, chunk=-1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "rank"),
    [
        (1, 300, 1, 4),
        (2, 130, 4, 8),
        (64, 20, 1, 8),
        (4, 70, 8, 8),
        (1, 200, 1, 12),
        (1, 150, 2, 16),
        (1, 300, 1, 32),
        (1, 530, 1, 64),
    ],
)
def test_all_shapes(batch: int, length: int, heads: int, rank: int, seed: int, device: torch.device) -> None:
    """With the chunks that the kernels choose."""
    args = unwritten(scan_inputs(seed, batch, length, heads, rank, "smooth"), 0.1, seed)
    check(args, device, seed=seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("length", "gates"), [(8_192, "steep"), (32_768, "smooth")])
def test_long(length: int, gates: str, seed: int, device: torch.device) -> None:
    """Gates forget, so the sums are no longer than those of a few hundred tokens."""
    check(scan_inputs(seed, 1, length, 1, 8, gates), device, seed=seed, gradients=False, terms=800)
