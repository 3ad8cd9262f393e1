"""Tokens are drawn as often as the distribution says, filters included, and the same ones for the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentmem import Sampling
from agentmem.errors import ConfigError, TurnError
from agentmem.generation.sampling import Sampler, choose_all

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 3.0, -torch.inf, 1.0, -2.0])


def expected(temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution by its definition, token by token from the most likely on."""
    share = (LOGITS / temperature).softmax(-1)
    ranked = sorted(range(len(LOGITS)), key=lambda i: -share[i])
    kept = ranked[: top_k or None]
    share[[i for i in range(len(LOGITS)) if i not in kept]] = 0.0
    share /= share.sum()
    before = 0.0
    for i in kept:
        mass = float(share[i])
        if before >= top_p:
            share[i] = 0.0
        before += mass
    return share / share.sum()


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 1.0},
        {"temperature": 2.5},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9},
    ],
)
def test_tokens_are_drawn_by_their_share(filters: dict[str, Any]) -> None:
    count = 3000
    sampler = Sampler(Sampling(seed=5, **filters))
    drawn = torch.bincount(torch.tensor([sampler.choose(LOGITS) for _ in range(count)]), minlength=len(LOGITS))
    share = expected(filters["temperature"], filters.get("top_k", 0), filters.get("top_p", 1.0))
    assert (drawn[share == 0] == 0).all(), "what the filters take away is never drawn"
    spread = (share * (1 - share) / count).sqrt()
    assert ((drawn / count - share).abs() <= 4.5 * spread).all(), (drawn / count, share)


def test_a_seed_says_it_all() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(30)]

    assert draw(1) == draw(1) != draw(2)


def test_a_rare_token_among_many_is_drawn() -> None:
    """Two halves of tokens that are each a millionth of a percent: in float32 sums the later ones would be lost."""
    logits = torch.zeros(200_000)
    logits[0] = 12.0
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    drawn = [sampler.choose(logits) for _ in range(60)]
    assert any(0 < token < 100_000 for token in drawn)
    assert any(token >= 100_000 for token in drawn)


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers(filters: dict[str, Any], wrong: float) -> None:
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 0} | filters))
    logits = torch.zeros(8)
    logits[3] = wrong
    for one in (logits, torch.full((8,), wrong)):
        with pytest.raises(TurnError, match="not numbers"):
            sampler.choose(one)


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}])
def test_one_token_that_is_left_is_drawn(filters: dict[str, Any]) -> None:
    """As a format leaves it: all others are at minus infinity."""
    logits = torch.full((8,), -torch.inf)
    logits[5] = -3.0
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 0} | filters))
    assert [sampler.choose(logits) for _ in range(20)] == [5] * 20


def test_many_rows_are_drawn_as_each_alone() -> None:
    """Whatever their filters; nobody is a token further until the token is taken."""
    filters: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 0.8, "top_k": 3, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.5, "top_p": 0.3},
        {"temperature": 0.0, "top_k": 2},
        {"temperature": 0.5, "top_k": 20},
    ]
    made = [Sampling(seed=n, **each) for n, each in enumerate(filters)]
    alone, together = [Sampler(one) for one in made], [Sampler(one) for one in made]
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        logits = torch.randn(len(made) + 2, 50, generator=generator) * 2
        logits[-1] = torch.nan
        known = choose_all(logits, [*together, None, Sampler(Sampling(temperature=1.0))])
        assert known[-2:] == [None, None]
        assert choose_all(logits, [*together, None, None]) == known
        for row, (one, other) in enumerate(zip(alone, together, strict=True)):
            token = one.choose(logits[row])
            assert token == known[row] == other.choose(logits[row], known[row])


@pytest.mark.parametrize("stop", [("",), (1,), ("a", None), ["a"], "a"])
def test_stop_strings_are_texts(stop: Any) -> None:
    with pytest.raises(ConfigError, match="stop must be a tuple of non-empty strings"):
        Sampling(stop=stop)
