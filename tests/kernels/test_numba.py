"""Calls of one token as numba compiles them, against the same calls in torch; and when numba is used at all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agentmem import SteeredModel, kernels
from agentmem.kernels import ops
from agentmem.kernels.recurrence import ScanArgs, scan_reference
from tests.helpers.core_models import TERMS, random_ids, random_state, steer, tiny
from tests.helpers.kernel_cases import close, scan_inputs
from tests.helpers.numeric import assert_close


@pytest.fixture(autouse=True)
def numba(needs: Callable[[object, str], None]) -> None:
    needs(find_spec("numba"), "numba, which is part of the dependency group `dev`")


def made(size: float = 1.0, **options: Any) -> SteeredModel:
    """A memory whose queries, keys and values come from weights of this size."""
    steered = steer(tiny(num_hidden_layers=2), **options)
    with torch.no_grad():
        for name, parameter in steered.memory.named_parameters():
            if "memory_" in name:
                parameter.mul_(size)
    return steered


def check(
    monkeypatch: pytest.MonkeyPatch, size: float = 1.0, batch: int = 2, write: Tensor | bool = True, **options: Any
) -> None:
    """Two tokens of every row, the second after what the first wrote, by numba and by torch."""
    pair = made(size, **options), made(size, **options)
    ids, growth = random_ids(batch, 2), 1.0 if pair[0].config.normalize_qk else 50.0
    state, caches = random_state(pair[0], batch), [True, True]
    for token in (ids[:, :1], ids[:, 1:]):
        outs = []
        for steered, on, cache in zip(pair, "10", caches, strict=True):
            monkeypatch.setenv("AGENTMEM_NUMBA", on)
            with torch.inference_mode():
                outs.append(steered(token, state, write=write, cache=cache))
        found, expected = outs
        assert_close(found.logits, expected.logits, TERMS, growth=growth)
        assert_close(found.state, expected.state, TERMS, growth=growth)
        if isinstance(write, Tensor):
            assert torch.equal(found.state[~write[:, 0]], state[~write[:, 0]])
        state, caches = found.state, [found.cache, expected.cache]


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize(("heads", "rank"), [(1, 8), (3, 5)])
def test_every_rule(
    monkeypatch: pytest.MonkeyPatch, mode: str, coupled: bool, rowwise: bool, heads: int, rank: int
) -> None:
    options = {"state_update_mode": mode, "couple_lambda": coupled, "rankwise_gates": rowwise}
    check(monkeypatch, num_state_heads=heads, rank=rank, **options)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("rank", [1, 4, 7, 16, 33, 64])
def test_ranks_and_heads(monkeypatch: pytest.MonkeyPatch, heads: int, rank: int) -> None:
    check(monkeypatch, num_state_heads=heads, rank=rank, couple_lambda=False)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_rows_of_which_some_write(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    write = torch.rand(batch, 1, generator=torch.Generator().manual_seed(batch)) < 0.5
    check(monkeypatch, batch=batch, write=write, num_state_heads=2)


@pytest.mark.parametrize(("size", "normalize"), [(0.0, True), (2.0**-10, True), (64.0, True), (1.0, False)])
def test_queries_and_keys_of_any_size(monkeypatch: pytest.MonkeyPatch, size: float, normalize: bool) -> None:
    check(monkeypatch, size, couple_lambda=False, normalize_qk=normalize)


def test_a_row_that_is_not_finite_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a memory holds may overflow; the rows beside it are as they were."""
    monkeypatch.setenv("AGENTMEM_NUMBA", "1")
    steered = made()
    ids, state = random_ids(2, 1), random_state(steered, 2)
    with torch.inference_mode():
        alone = steered(ids, state)
        state[0] = torch.inf
        found = steered(ids, state)
    assert not found.logits[0].isfinite().all()
    assert torch.equal(found.logits[1], alone.logits[1])
    assert torch.equal(found.state[1], alone.state[1])


def test_a_numba_that_cannot_be_used_is_said_once_and_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AGENTMEM_NUMBA", "1")
    assert kernels.runs_numba(torch.zeros(1))
    ops._has_numba.cache_clear()
    # What an import of a module raises that is there and cannot be loaded.
    monkeypatch.setitem(sys.modules, "agentmem.kernels.numba_step", None)
    monkeypatch.delattr(kernels, "numba_step", raising=False)
    try:
        assert not kernels.runs_numba(torch.zeros(1))
        assert not kernels.runs_numba(torch.zeros(1))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "cannot be used, so torch computes" in caplog.text
    finally:
        ops._has_numba.cache_clear()


def test_what_runs_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2)
    monkeypatch.setenv("AGENTMEM_NUMBA", "1")
    assert kernels.runs_numba(x, torch.nn.Parameter(x))
    assert not kernels.runs_numba(x, x.double())
    assert not kernels.runs_numba(x.to("meta"))
    with FakeTensorMode():
        assert not kernels.runs_numba(torch.zeros(2))
    monkeypatch.setenv("AGENTMEM_NUMBA", "0")
    assert not kernels.runs_numba(x)


@pytest.mark.parametrize(("rows", "length", "heads", "rank"), [(3, 70, 2, 5), (1, 16, 1, 8), (40, 100, 2, 16)])
def test_gradients_are_those_of_the_definition(
    seed: int, rows: int, length: int, heads: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTMEM_NUMBA", "1")
    args = ScanArgs(*(x.requires_grad_() for x in scan_inputs(seed, rows, length, heads, rank, "smooth")))
    generator = torch.Generator().manual_seed(seed)

    def gradients(args: ScanArgs, scan: Callable[[ScanArgs], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        generator.manual_seed(seed)
        outputs = scan(args)
        total = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
        assert isinstance(total, Tensor)
        return torch.autograd.grad(total, args)

    found = gradients(args, ops.scan)
    assert all(map(torch.equal, found, gradients(args, ops.scan))), "the same whichever thread computes what"
    want = gradients(ScanArgs(*(x.detach().double().requires_grad_() for x in args)), scan_reference)
    for name, x, y in zip(ScanArgs._fields, found, want, strict=True):
        close(x / y.abs().max(), (y / y.abs().max()).float(), 3 * (length + 3 * rank), name)
