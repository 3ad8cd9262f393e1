"""The step against its definition: what is read, what is written, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agentmem import kernels
from agentmem.errors import StateMismatchError, TurnError
from agentmem.kernels import StepArgs
from tests.helpers.kernel_cases import close, defined_step, generator, moved

# Slots 0 to SLOTS - 1 of a pool of LAYERS layers.
SLOTS, LAYERS = 5, 3


def arguments(
    seed: int,
    batch: int,
    heads: int,
    rank: int,
    *,
    coupled: bool = True,
    rowwise: bool = True,
    size: float = 1.0,
    dtype: torch.dtype = torch.float32,
    slots: int = SLOTS,
) -> dict[str, Any]:
    source = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    gates = heads * rank if rowwise else heads
    return {
        "products": (normal(batch, 3 * heads * rank + gates * (1 if coupled else 2)) * size).to(dtype),
        "pool": normal(slots, LAYERS, heads, rank, rank),
        "slots": torch.randperm(slots, generator=source)[:batch],
        "layer": int(torch.randint(LAYERS, (), generator=source)),
        "beta_bias": normal(gates).to(dtype),
        "lambda_bias": None if coupled else normal(gates).to(dtype),
        "mask": None,
        "normalize": True,
        "mode": "standard",
    }


def run(given: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    args = StepArgs(*moved(device, *StepArgs(**given)))
    if args.pool.is_contiguous():
        args = args._replace(pool=args.pool.clone())
    reads = kernels.step(args)
    return reads.cpu(), args.pool.cpu()


def terms(given: dict[str, Any], tokens: int = 1) -> int:
    """The length of a query or key and the product with it sum rank numbers each; every token writes two terms."""
    rank: int = given["pool"].shape[-1]
    return 2 * rank + 12 + 2 * tokens  # and what tanh, the sigmoid and the gates round


def check(given: dict[str, Any], device: torch.device) -> None:
    reads, pool = run(given, device)
    expected = defined_step(**given)
    close(reads, expected[0], terms(given), "reads", given["products"].dtype)
    close(pool, expected[1], terms(given), "pool")
    written = given["slots"][given["slots"] >= 0 if given["mask"] is None else (given["slots"] >= 0) & given["mask"]]
    touched = torch.zeros(pool.shape[:2], dtype=torch.bool)
    touched[written, given["layer"]] = True
    assert torch.equal(pool[~touched], given["pool"][~touched]), "another slot or layer was changed"


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize(("heads", "rank"), [(1, 8), (3, 5)])
def test_every_rule(
    mode: str, coupled: bool, rowwise: bool, heads: int, rank: int, seed: int, device: torch.device
) -> None:
    check({**arguments(seed, 2, heads, rank, coupled=coupled, rowwise=rowwise), "mode": mode}, device)


@pytest.mark.parametrize("rank", [1, 4, 7, 16, 33, 64])
def test_ranks(rank: int, seed: int, device: torch.device) -> None:
    check(arguments(seed, 2, 1, rank, coupled=False), device)


@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.2, 5.0, 200.0])
def test_products_of_any_size(size: float, seed: int, device: torch.device) -> None:
    """Tiny ones are as large as any after they were normalised, and so would be their error."""
    check(arguments(seed, 3, 1, 8, coupled=False, size=size), device)


def test_zeros_have_no_direction(device: torch.device) -> None:
    given = arguments(1, 2, 1, 8)
    given["products"].zero_()
    check(given, device)
    assert not run(given, device)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_low_precision(dtype: torch.dtype, seed: int, device: torch.device) -> None:
    check(arguments(seed, 3, 2, 8, coupled=False, dtype=dtype), device)


def test_nothing_is_normalised(seed: int, device: torch.device) -> None:
    check({**arguments(seed, 3, 2, 4), "normalize": False}, device)


def test_rows_that_do_not_write_read(seed: int, device: torch.device) -> None:
    given = arguments(seed, 4, 2, 8, coupled=False)
    check({**given, "mask": torch.tensor([True, False, True, False])}, device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_inert_rows_do_nothing(dtype: torch.dtype, seed: int, device: torch.device) -> None:
    """Whatever they hold; and a live row may have slot 0 beside them."""
    given = arguments(seed, 4, 2, 8)
    given["slots"] = torch.tensor([-1, 0, -1, 3], dtype=dtype)
    given["products"][[0, 2]] = torch.nan
    check(given, device)
    given["slots"] = torch.full((4,), -1, dtype=dtype)
    check(given, device)


def test_a_slot_that_nobody_named_may_hold_anything(seed: int, device: torch.device) -> None:
    given = arguments(seed, 2, 1, 8)
    given["slots"] = torch.tensor([3, -1])
    given["pool"][[0, 1, 2, 4]] = torch.nan
    reads, pool = run(given, device)
    assert reads.isfinite().all()
    assert pool[3].isfinite().all()
    assert pool[[0, 1, 2, 4]].isnan().all()


def test_products_cut_from_a_wider_tensor(seed: int, device: torch.device) -> None:
    given = arguments(seed, 3, 1, 8)
    wide = torch.full((3, 2 * given["products"].shape[1]), torch.nan)
    wide[:, 1 : 1 + given["products"].shape[1]] = given["products"]
    given["products"] = wide.to(device)[:, 1 : 1 + given["products"].shape[1]]
    reads, _ = run(given, device)
    given["products"] = given["products"].cpu()
    close(reads, defined_step(**given)[0], terms(given), "reads")


def test_arguments_need_not_be_contiguous(seed: int, device: torch.device) -> None:
    """A column of what was decided for many tokens, a part of wider parameters."""
    given = {**arguments(seed, 4, 2, 8, coupled=False), "mask": torch.tensor([True, False, False, True])}
    reads, pool = run(given, device)
    for name in ("slots", "mask", "beta_bias", "lambda_bias"):
        one = given[name].to(device)  # what is brought to another device is dense
        given[name] = torch.stack((one, ~one if one.dtype == torch.bool else one + 1), dim=1)[:, 0]
        assert not given[name].is_contiguous()
    found = run(given, device)
    assert torch.equal(found[0], reads)
    assert torch.equal(found[1], pool)


def test_no_rows(device: torch.device) -> None:
    reads, _ = run(arguments(0, 0, 2, 4), device)
    assert reads.shape == (0, 8)


def test_steps_add_up(seed: int, device: torch.device) -> None:
    """Twelve tokens, the slots of the rows changing between them."""
    given = arguments(seed, 3, 1, 8, coupled=False)
    found = expected = given["pool"]
    for number in range(12):
        token = {**arguments(seed + number, 3, 1, 8, coupled=False), "layer": 1}
        reads, found = run({**token, "pool": found}, device)
        want, expected = defined_step(**{**token, "pool": expected})
        close(reads, want, terms(given, 12), f"reads of step {number}")
    close(found, expected, terms(given, 12), "pool")


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    given = arguments(0, 2, 1, 8)
    for changes, error, said in (
        ({"pool": given["pool"].half()}, StateMismatchError, "a pool must be float32"),
        ({"pool": given["pool"][:, :, :, :4, :4]}, StateMismatchError, "and contiguous"),
        ({"products": given["products"][:, 1:]}, TurnError, r"products must have shape \[2, 32\]"),
        ({"slots": given["slots"][:1]}, TurnError, r"slots must have shape \[2\]"),
        ({"slots": given["slots"].float()}, TurnError, "of torch.int32 or torch.int64"),
        ({"mask": torch.ones(2)}, TurnError, "of torch.bool"),
        ({"beta_bias": torch.zeros(3), "products": torch.zeros(2, 27)}, TurnError, "beta_bias must have shape"),
        ({"layer": LAYERS}, TurnError, "layer must be 0 to 2"),
        ({"mode": "other"}, TurnError, "an update mode"),
    ):
        with pytest.raises(error, match=said):
            run({**given, **changes}, device)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("rank", [4, 8, 12, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_all_shapes(batch: int, heads: int, rank: int, seed: int, device: torch.device) -> None:
    check(arguments(seed, batch, heads, rank, coupled=False, slots=70), device)
