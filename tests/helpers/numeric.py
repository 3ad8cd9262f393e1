"""How far two computations of the same numbers may lie apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from agentmem import MemoryState, Turn


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """The largest relative difference of two computations that sum `terms` numbers, each in an order of its own.

    Bits are equal only where the very same call runs on the same shapes. Another batch size, another cut or another
    instruction set sums in another order, and every addition and product rounds with a relative error of at most
    u = eps / 2, to either side. Such errors add up like a random walk (Higham and Mary, A New Approach to Probabilistic
    Rounding Error Analysis, 2019): where they are spread evenly over [-u, u], whose standard deviation is u / sqrt(3),
    a sum of n terms is off by sqrt(n / 3) u of their size, and by more than 3 sqrt(n) u, five deviations, once in
    millions of numbers. Two computations differ by twice as much at most: 2 * 3 sqrt(n) eps / 2.

    Args:
        dtype: what the sums are computed in.
        terms: the length of the sums; of sums that feed one another, their lengths together.
    """
    return 3 * sqrt(terms) * torch.finfo(dtype).eps


def assert_close(found: Tensor, expected: Tensor, terms: int, *, growth: float = 1.0) -> None:
    """Equal in shape and dtype, and within the `tolerance` of sums of `terms`, relative to each number or to 1.

    `growth`: how many times larger an error may have become where a computation amplifies what it is given.
    """
    bound = growth * tolerance(expected.dtype, terms)
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


def assert_states_close(found: MemoryState | None, expected: MemoryState | None) -> None:
    """Memories of tiny models that were computed by other batches, cuts or caches, to about a thousand summed terms."""
    assert found is not None
    assert expected is not None
    assert_close(torch.tensor(found.matrices), torch.tensor(expected.matrices), 1000)


def assert_same_turn(found: Turn, alone: Turn) -> None:
    """The same reply, and the same memory up to the order of its sums."""
    for name in ("token_ids", "message", "reasoning", "invalid_tool_calls", "finish_reason", "written", "edits"):
        assert getattr(found, name) == getattr(alone, name), name
    assert (found.state is None) == (alone.state is None)
    if found.state is not None and alone.state is not None:
        assert_states_close(found.state, alone.state)
        assert found.state.record == alone.state.record


def assert_same_at_once(run: Callable[[Any], Turn], given: Iterable[Any], alone: Iterable[Turn]) -> None:
    """Turns that run at the same time, each in a thread of its own, are as they are alone."""
    given = list(given)
    with ThreadPoolExecutor(len(given)) as pool:
        for found, solo in zip(list(pool.map(run, given)), alone, strict=True):
            assert_same_turn(found, solo)
