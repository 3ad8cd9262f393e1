"""Chooses the next token: greedy, or temperature with top-k and top-p, from a seed."""

from __future__ import annotations

from dataclasses import dataclass

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
        seed: the same seed gives the same reply; None = another one each time.

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
            (self.top_k >= 0, "top_k", "0 or more"),
            (self.max_tokens >= 1, "max_tokens", "1 or more"),
            (self.seed is None or 0 <= self.seed < 2**63, "seed", "None or an integer from 0 to 2**63 - 1"),
            (isinstance(self.stop, tuple) and all(self.stop), "stop", "a tuple of non-empty strings"),
        ):
            if not holds:
                raise ConfigError(f"{name} must be {expected}; found {getattr(self, name)!r}")


class Sampler:
    """Draws the tokens of one reply."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: Tensor, likeliest: int | None = None) -> int:
        """The next token from logits [V]: one random number, and the token in whose share of the whole it falls.

        ``likeliest``: the token with the largest, where that is known.

        Raises:
            TurnError: logits that are no numbers.
        """
        chosen = self._sampling
        if chosen.temperature == 0:
            return int(logits.argmax()) if likeliest is None else likeliest
        # Less the largest, which changes nothing of the distribution and cannot overflow.
        scores = logits.float()
        scores = (scores - scores.max()).div_(chosen.temperature)
        order: Tensor | None = None
        if 0 < chosen.top_k < scores.shape[-1]:
            scores, order = scores.topk(chosen.top_k)
        elif chosen.top_p < 1:
            scores, order = scores.sort(descending=True)
        # In float32 many small shares would be lost beside the sum of the others; MPS has no float64.
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        mass = scores.softmax(-1).cumsum(-1, dtype=wide)
        if chosen.top_p < 1:
            # A token stays while the tokens before it have not reached top_p; so the first always stays.
            mass = mass[: int(torch.searchsorted(mass, chosen.top_p)) + 1]
        point = torch.rand(1, generator=self._generator, dtype=wide, device=mass.device).mul_(mass[-1])
        found = int(torch.searchsorted(mass, point, right=True))
        if found == mass.shape[0]:
            raise TurnError("the model's logits are not numbers (nan or inf): no token can be drawn from them")
        return found if order is None else int(order[found])
