"""Chooses the next token: greedy, or temperature with top-k and top-p, from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index
from typing import Any

import torch
from torch import Tensor

from agentmem.errors import ConfigError, TurnError


@dataclass(frozen=True)
class Sampling:
    """How a reply is decoded.

    Attributes:
        temperature: 0 = greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 = all.
        top_k: keep this many tokens; 0 = all.
        max_tokens: at most this many reply tokens.
        stop: strings that end the reply; the reply is cut before the first of them.
        seed: the same seed gives the same reply; None = a new seed each time.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for holds, name, expected in (
            (self.temperature == 0 or 1e-4 <= self.temperature < float("inf"), "temperature", "0, or 0.0001 or more"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (_is_whole(self.top_k, 0), "top_k", "an integer from 0 up"),
            (_is_whole(self.max_tokens, 1), "max_tokens", "an integer from 1 up"),
            (
                self.seed is None or (_is_whole(self.seed, 0) and self.seed < 2**63),
                "seed",
                "None or an integer from 0 to 2**63 - 1",
            ),
            (_are_texts(self.stop), "stop", "a tuple of non-empty strings"),
        ):
            if not holds:
                raise ConfigError(f"{name} must be {expected}; found {getattr(self, name)!r}")


def _is_whole(number: Any, least: int) -> bool:
    return not isinstance(number, bool) and isinstance(number, Integral) and index(number) >= least


def _are_texts(stop: object) -> bool:
    return isinstance(stop, tuple) and all(isinstance(text, str) and text for text in stop)


class Sampler:
    """Draws the tokens of one reply. A seed gives the same random numbers on every device."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._point: float | None = None

    @property
    def point(self) -> float:
        """The random number that decides the next token, in [0, 1); it changes only when a token has been chosen."""
        if self._point is None:
            self._point = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        return self._point

    def choose(self, logits: Tensor, chosen: int | None = None) -> int:
        """The next token from logits [V]; the sampler then advances to the one after it.

        Args:
            logits: the logits of the next token.
            chosen: the token, where `choose_all` has already chosen it from these logits.

        Raises:
            TurnError: the logits are not numbers.
        """
        if chosen is None:
            (chosen,) = choose_all(logits[None], [self])
        if chosen is None:
            raise TurnError("the model's logits are not numbers (nan or inf): no token can be drawn from them")
        self._point = None
        return chosen


def choose_all(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[int | None]:
    """The next token of every row of logits [n, V] that has a sampler, waiting for the device as few times as possible.

    None where there is no sampler, or where the logits are not numbers. The samplers do not advance: a token counts as
    drawn once `Sampler.choose` takes it.
    """
    # Rows with the same filters are sampled together: (top_k, whether top_p cuts), or None for greedy rows.
    groups: dict[tuple[int, bool] | None, dict[int, Sampler]] = {}
    for row, sampler in enumerate(samplers):
        if sampler is not None:
            options = sampler.sampling
            filters = None if options.temperature == 0 else (options.top_k, options.top_p < 1)
            groups.setdefault(filters, {})[row] = sampler
    chosen: list[int | None] = [None] * len(samplers)
    for filters, group in groups.items():
        # Stacked, not indexed: an index would first have to be copied to the device.
        part = logits if len(group) == len(logits) else torch.stack([logits[row] for row in group])  # [n', V]
        tokens = _argmax(part) if filters is None else _sample(part, list(group.values()), *filters)
        for row, token in zip(group, tokens, strict=True):
            chosen[row] = None if token < 0 else token
    return chosen


def _argmax(logits: Tensor) -> list[int]:
    """For each row the token with the largest logit, the first of equals; -1 where that is not a finite number."""
    token = logits.argmax(-1, keepdim=True)  # [n, 1]
    tokens: list[int] = torch.where(logits.gather(-1, token).isfinite(), token, -1).flatten().tolist()
    return tokens


def _sample(logits: Tensor, samplers: Sequence[Sampler], top_k: int, cuts: bool) -> list[int]:
    """For each row the token into whose share of the cumulative probability the row's random number falls; -1 where
    the logits are not numbers."""
    # In float32 many small probabilities would be lost in the cumulative sum; MPS has no float64.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    options = zip(*((s.sampling.temperature, s.sampling.top_p, s.point) for s in samplers), strict=True)
    # One copy for all rows. Only CUDA keeps the source of a non-blocking copy alive until it is done.
    on_device = torch.tensor(list(options), dtype=wide).to(logits.device, non_blocking=logits.is_cuda)  # [3, n]
    temperature, top_p, point = on_device.unsqueeze(-1).unbind()  # each [n, 1]
    # The largest is subtracted: the distribution stays the same, and no exponential overflows.
    scores = logits.float()
    scores = (scores - scores.amax(-1, keepdim=True)).div_(temperature.float())
    order: Tensor | None = None
    if 0 < top_k < scores.shape[-1]:
        scores, order = scores.topk(top_k)
    elif cuts:
        scores, order = scores.sort(descending=True, stable=True)
    mass = scores.softmax(-1).cumsum(-1, dtype=wide)  # [n, V or top_k]
    last = torch.full_like(point, mass.shape[-1] - 1, dtype=torch.int64)
    if cuts:
        # A token stays while the tokens before it have not reached top_p; so the first one always stays.
        last = torch.minimum(torch.searchsorted(mass, top_p), last)
    total = mass.gather(1, last)
    token = torch.minimum(torch.searchsorted(mass, point * total, right=True), last)
    if order is not None:
        token = order.gather(1, token)
    tokens: list[int] = torch.where(total.isfinite(), token, -1).flatten().tolist()
    return tokens
