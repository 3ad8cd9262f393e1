"""Step and scan as numba compiles them, against the definition: what is read, corrected, written, and left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agentmem import kernels
from agentmem.kernels import ops
from agentmem.kernels.recurrence import MODES, ScanArgs, scan_reference
from tests.helpers.kernel_cases import close, defined_scan, defined_step, generator, scan_inputs, weights_for

LAYERS, SCALE, START = 3, 0.7, 2


@pytest.fixture
def numba_step(needs: Callable[[object, str], None]) -> ModuleType:
    needs(find_spec("numba"), "numba, which is part of the dependency group `dev`")
    from agentmem.kernels import numba_step as module

    return module


def table(names: tuple[str, ...], **numbers: Any) -> Tensor:
    assert not numbers.keys() - set(names)
    given = (numbers.get(name, 0) for name in names)
    return torch.tensor([one.data_ptr() if isinstance(one, Tensor) else int(one) for one in given])


def check(
    module: ModuleType,
    seed: int,
    batch: int,
    heads: int,
    rank: int,
    *,
    coupled: bool = True,
    rowwise: bool = True,
    normalize: bool = True,
    mode: str = "standard",
    size: float = 1.0,
    masked: bool = False,
) -> None:
    """Three layers, a hidden state of an odd width, outputs wider than what is corrected; all is NaN before."""
    source = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    def coarse(*shape: int) -> Tensor:
        """Of so few bits that products are exact: where they are large, gates would amplify what is rounded in them."""
        return (normal(*shape) * 32).round() / 32

    terms = 19 + 2 * rank + heads * rank + 20  # hidden size, norm and read, correction, and what tanh and gates round
    inner, gates = heads * rank, heads * rank if rowwise else heads
    rows, hidden, width = 3 * inner + gates * (1 if coupled else 2), 19, 13
    state, x = normal(batch, LAYERS, heads, rank, rank), coarse(LAYERS, batch, hidden)
    weight, out_weight = coarse(LAYERS, rows, hidden) * size / 4, normal(LAYERS, width, inner)
    beta, lam = normal(LAYERS, gates), normal(LAYERS, gates)
    output = normal(LAYERS, batch, width + 2 * START)
    mask = torch.rand(batch, generator=source) < 0.5 if masked else None
    products, reads = torch.empty(LAYERS, batch, rows), torch.empty(batch, inner)
    given = state.clone(), output.clone()
    common = {"rows": rows, "batch": batch, "heads": heads, "rank": rank, "normalize": normalize, "layers": LAYERS}
    for layer in range(LAYERS):
        steps = table(
            module.STEER, weight=weight[layer], hidden=hidden, layer=layer, products=products[layer], reads=reads,
            output_weight=out_weight[layer], width=width, start=START, **common,
        )  # fmt: skip
        address, out = steps.data_ptr(), output[layer].data_ptr()
        module.steer(address, state.data_ptr(), x[layer].data_ptr(), out, width + 2 * START, SCALE)
        z = x[layer].double() @ weight[layer].double().T
        slots = torch.arange(batch)
        lambda_bias = None if coupled else lam[layer]
        want, _ = defined_step(z, state, slots, layer, beta[layer], lambda_bias, mask, normalize, mode)
        close(reads, want, terms, "reads")
        expected = given[1][layer].double()
        expected[:, START : START + width] += SCALE * want @ out_weight[layer].double().T
        close(output[layer], expected, terms, "output")
        # Once more with what was read.
        module.steer(address, state.data_ptr(), 0, out, width + 2 * START, SCALE)
        expected[:, START : START + width] += SCALE * want @ out_weight[layer].double().T
        close(output[layer], expected, terms, "output of a second call")
    assert torch.equal(state, given[0]), "a state that was read is a value"
    after = torch.empty_like(state)
    writes = table(
        module.WRITE, products=products, beta=beta, lam=0 if coupled else lam, gates=gates, mode=MODES[mode],
        **common,
    )  # fmt: skip
    module.write(writes.data_ptr(), state.data_ptr(), after.data_ptr(), 0 if mask is None else mask.data_ptr())
    wanted = state.double()
    for layer in range(LAYERS):
        z = x[layer].double() @ weight[layer].double().T
        lambda_bias = None if coupled else lam[layer]
        _, wanted = defined_step(z, wanted, torch.arange(batch), layer, beta[layer], lambda_bias, mask, normalize, mode)
    close(after, wanted, terms, "state")
    if mask is not None:
        assert torch.equal(after[~mask], state[~mask])


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize(("heads", "rank"), [(1, 8), (3, 5)])
def test_every_rule(
    numba_step: ModuleType, seed: int, mode: str, coupled: bool, rowwise: bool, heads: int, rank: int
) -> None:
    check(numba_step, seed, 2, heads, rank, coupled=coupled, rowwise=rowwise, mode=mode)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("rank", [1, 4, 7, 16, 33, 64])
def test_ranks_and_heads(numba_step: ModuleType, seed: int, heads: int, rank: int) -> None:
    check(numba_step, seed, 3, heads, rank, coupled=False)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_rows_of_which_some_write(numba_step: ModuleType, seed: int, batch: int) -> None:
    check(numba_step, seed, batch, 2, 8, masked=True)


@pytest.mark.parametrize("size", [0.0, 2.0**-10, 4.0, 256.0])
def test_products_of_any_size(numba_step: ModuleType, seed: int, size: float) -> None:
    check(numba_step, seed, 2, 1, 8, coupled=False, size=size)


def test_nothing_is_normalised(numba_step: ModuleType, seed: int) -> None:
    check(numba_step, seed, 2, 2, 4, normalize=False)


def test_a_row_that_is_not_finite_stays_alone(numba_step: ModuleType) -> None:
    """What a model computes may overflow; the rows beside it are as they were."""
    rows, rank = 32, 8
    products, reads, state = torch.empty(2, rows), torch.empty(2, rank), torch.randn(2, 1, 1, rank, rank)
    weight, x = torch.randn(rows, 4), torch.randn(2, 4)
    common = {"rows": rows, "batch": 2, "heads": 1, "rank": rank, "normalize": True, "layers": 1}
    steps = table(numba_step.STEER, weight=weight, hidden=4, products=products, reads=reads, **common)
    numba_step.steer(steps.data_ptr(), state.data_ptr(), x.data_ptr(), 0, 0, 0.0)
    alone = reads[1].clone()
    x[0] = torch.inf
    numba_step.steer(steps.data_ptr(), state.data_ptr(), x.data_ptr(), 0, 0, 0.0)
    assert reads[0].isnan().any()
    assert torch.equal(reads[1], alone)


@pytest.mark.parametrize("gates", ["smooth", "steep", "hard"])
@pytest.mark.parametrize(
    ("rows", "length", "heads", "rank"),
    [(1, 0, 1, 8), (1, 1, 1, 8), (3, 70, 2, 5), (1, 300, 8, 4), (64, 5, 1, 8), (1, 40, 1, 64), (2, 33, 3, 16)],
)
def test_many_tokens(
    numba_step: ModuleType, seed: int, rows: int, length: int, heads: int, rank: int, gates: str
) -> None:
    args = scan_inputs(seed, rows, length, heads, rank, gates)
    before = [x.clone() for x in args]
    reads, last = ops._scan_by_numba(args)
    want = defined_scan(args, weights_for(args, seed))
    close(reads, want[0], length + 3 * rank, "reads")
    close(last, want[1], length + 3 * rank, "states")
    assert all(map(torch.equal, args, before)), "what was given is not changed"


def test_a_piece_of_a_larger_tensor_is_scanned_as_it_is(numba_step: ModuleType, seed: int) -> None:
    args = scan_inputs(seed, 2, 12, 2, 8, "smooth")
    pieces = ScanArgs(*(torch.cat((x, x * torch.nan), dim=-1)[..., : x.shape[-1]] for x in args))
    assert not any(piece.is_contiguous() for piece in pieces)
    for whole, piece in zip(ops._scan_by_numba(args), ops._scan_by_numba(pieces), strict=True):
        assert torch.equal(whole, piece)


def test_a_numba_that_cannot_be_used_is_said_once_and_torch_goes_on(
    numba_step: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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


def test_what_runs_compiled(numba_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2)
    monkeypatch.setenv("AGENTMEM_NUMBA", "1")
    assert kernels.runs_numba(x, torch.nn.Parameter(x))
    assert not kernels.runs_numba(x, x.double())
    assert not kernels.runs_numba(x.to("meta"))
    with FakeTensorMode():
        assert not kernels.runs_numba(torch.zeros(2))
    monkeypatch.setenv("AGENTMEM_NUMBA", "0")
    assert not kernels.runs_numba(x)


@pytest.mark.parametrize(("rows", "length", "heads", "rank"), [(3, 70, 2, 5), (1, 16, 1, 8), (40, 300, 2, 16)])
def test_gradients_are_those_of_the_definition(
    numba_step: ModuleType, seed: int, rows: int, length: int, heads: int, rank: int, monkeypatch: pytest.MonkeyPatch
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
