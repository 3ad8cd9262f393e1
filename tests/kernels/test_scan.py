"""The scan and its gradients against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agentmem import kernels
from agentmem.errors import StateMismatchError, TurnError
from tests.helpers.kernel_cases import NAMES, close, defined_scan, generator, moved, scan_inputs, weights_for


def check(
    inputs: list[Tensor],
    device: torch.device,
    *,
    mask: Tensor | None = None,
    borders: list[int] | None = None,
    max_length: int | None = None,
    chunk: int = 0,
    seed: int = 0,
    gradients: bool = True,
    tolerance: float = 3e-6,
) -> None:
    weights = weights_for(inputs, seed)
    y, last, grads = defined_scan(inputs, mask, borders, weights)
    cu = None if borders is None else torch.tensor(borders)
    given, (mask, cu, *weights) = moved(device, *inputs), moved(device, mask, cu, *weights)
    before = [x.clone() for x in given]
    leaves = [x.requires_grad_(gradients) for x in given]
    found = kernels.scan(*leaves, mask=mask, cu_seqlens=cu, max_length=max_length, chunk=chunk)
    close(found[0].detach(), y, tolerance, "reads")
    close(found[1].detach(), last, tolerance, "state")
    if gradients:
        total = (found[0] * weights[0]).sum() + (found[1] * weights[1]).sum()
        for name, grad, expected in zip(NAMES, torch.autograd.grad(total, leaves), grads, strict=True):
            close(grad, expected, 2 * tolerance, f"gradient of {name}")
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
    inputs = scan_inputs(seed, batch, length, heads, rank, batch, gates)
    check(inputs, device, chunk=chunk, seed=seed)


@pytest.mark.parametrize("chunk", [3, 64])
def test_masked_tokens_may_hold_anything(chunk: int, seed: int, device: torch.device) -> None:
    inputs = scan_inputs(seed, 2, 10, 1, 4, 2, "smooth")
    mask = torch.rand(2, 10, generator=generator(seed)) < 0.6
    for x in inputs[2:]:
        x[~mask] = torch.nan
    check(inputs, device, mask=mask, chunk=chunk, seed=seed)


def test_where_nothing_writes_the_state_stays_bit_for_bit(seed: int, device: torch.device) -> None:
    inputs = moved(device, *scan_inputs(seed, 2, 7, 1, 4, 2, "smooth"))
    mask = torch.zeros(2, 7, dtype=torch.bool, device=device)
    _, last = kernels.scan(*inputs, mask=mask, chunk=4)
    assert torch.equal(last, inputs[0])


# Empty sequences, one token, lengths around chunks; tokens before the first border and behind the last.
RAGGED = [[0, 5, 5, 9, 10], [2, 2, 13, 17], [0, 0, 0], [0, 12], [3, 7, 11]]


@pytest.mark.parametrize(("borders", "chunk"), [*((borders, 4) for borders in RAGGED), (RAGGED[0], 64)])
def test_ragged_lengths(borders: list[int], chunk: int, seed: int, device: torch.device) -> None:
    inputs = scan_inputs(seed, 1, 17, 1, 4, len(borders) - 1, "smooth")
    mask = torch.rand(1, 17, generator=generator(seed)) < 0.8
    check(inputs, device, mask=mask, borders=borders, chunk=chunk, seed=seed)


def test_borders_may_lie_on_a_cpu(seed: int, device: torch.device) -> None:
    inputs = [x.requires_grad_() for x in moved(device, *scan_inputs(seed, 1, 9, 1, 4, 2, "smooth"))]
    borders = torch.tensor([0, 4, 9])
    found, expected = (kernels.scan(*inputs, cu_seqlens=at, chunk=4) for at in (borders, borders.to(device)))
    assert torch.equal(found[0], expected[0])
    (grad,) = torch.autograd.grad(found[0].sum(), inputs[0])
    assert torch.equal(grad, torch.autograd.grad(expected[0].sum(), inputs[0])[0])


def test_the_longest_may_be_told(seed: int, device: torch.device) -> None:
    inputs = scan_inputs(seed, 1, 17, 2, 4, 3, "smooth")
    check(inputs, device, borders=[1, 6, 8, 15], max_length=7, chunk=4, seed=seed)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3)])
def test_nothing_to_scan(batch: int, length: int, device: torch.device) -> None:
    inputs = moved(device, *scan_inputs(0, batch, length, 1, 4, batch, "smooth"))
    y, last = kernels.scan(*inputs)
    assert y.shape == (batch, length, 1, 4)
    assert torch.equal(last, inputs[0])
    assert last.data_ptr() != inputs[0].data_ptr() or batch == 0


def test_two_scans_are_one(seed: int, device: torch.device) -> None:
    inputs = moved(device, *scan_inputs(seed, 1, 9, 1, 4, 1, "smooth"))
    y, last = kernels.scan(*inputs, chunk=4)
    y1, between = kernels.scan(inputs[0], *(x[:, :5] for x in inputs[1:]), chunk=4)
    y2, end = kernels.scan(between, *(x[:, 5:] for x in inputs[1:]), chunk=4)
    torch.testing.assert_close(torch.cat((y1, y2), dim=1), y, atol=2e-6, rtol=0)
    torch.testing.assert_close(end, last, atol=2e-6, rtol=0)


def test_arguments_need_not_lie_dense(seed: int, device: torch.device) -> None:
    """Gates that a head shares are views with stride 0."""
    inputs = scan_inputs(seed, 1, 6, 2, 4, 1, "smooth")
    dense = [x.clone() for x in inputs]
    for number in (4, 5, 6):
        inputs[number] = inputs[number][..., :1].expand(1, 6, 2, 4)
        dense[number] = inputs[number].contiguous()
    inputs[1] = inputs[1].transpose(1, 2).contiguous().transpose(1, 2)
    y, last = kernels.scan(*moved(device, *inputs), chunk=4)
    expected = kernels.scan(*moved(device, *dense), chunk=4)
    assert torch.equal(y, expected[0])
    assert torch.equal(last, expected[1])


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    inputs = moved(device, *scan_inputs(0, 2, 6, 1, 4, 2, "smooth"))
    with pytest.raises(StateMismatchError, match="a state must be float32"):
        kernels.scan(inputs[0].half(), *inputs[1:])
    with pytest.raises(TurnError, match=r"v must have shape \[2, 6, 1, 4\]"):
        kernels.scan(*inputs[:3], inputs[3][:, :5], *inputs[4:])
    with pytest.raises(TurnError, match=r"k must have shape .* of torch.float32; found torch.float64"):
        kernels.scan(*inputs[:2], inputs[2].double(), *inputs[3:])
    with pytest.raises(TurnError, match=r"mask must have shape \[2, 6\]"):
        kernels.scan(*inputs, mask=torch.ones(2, 5, dtype=torch.bool, device=device))
    with pytest.raises(TurnError, match=r"q must have shape \[1, 6, 1, 4\]"):
        kernels.scan(*inputs, cu_seqlens=torch.tensor([0, 3, 6], device=device))
    with pytest.raises(TurnError, match=r"cu_seqlens must have shape \[3\]"):
        kernels.scan(*inputs, cu_seqlens=torch.tensor([0, 6], device=device))
    with pytest.raises(TurnError, match="chunk must be 0 or more"):
        kernels.scan(*inputs, chunk=-1)
    # Seen where the borders lie on a CPU: on a GPU looking at them would be to wait for it.
    ragged = [inputs[0].cpu(), *(x.cpu().flatten(0, 1)[None] for x in inputs[1:])]
    with pytest.raises(TurnError, match="max_length must be the longest sequence, 8 tokens, or more; found 7"):
        kernels.scan(*ragged, cu_seqlens=torch.tensor([0, 4, 12]), max_length=7)


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
    inputs = scan_inputs(seed, batch, length, heads, rank, batch, "smooth")
    mask = torch.rand(batch, length, generator=generator(seed)) < 0.9
    check(inputs, device, mask=mask, seed=seed, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("length", "gates"), [(8_192, "steep"), (32_768, "smooth")])
def test_long(length: int, gates: str, seed: int, device: torch.device) -> None:
    inputs = scan_inputs(seed, 1, length, 1, 8, 1, gates)
    check(inputs, device, seed=seed, gradients=False, tolerance=1e-5)
