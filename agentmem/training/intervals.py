"""Confidence intervals for shares of correct answers, and for the gain of one arm over others.

Questions of one conversation share a memory and are not independent, so whole conversations are resampled. Where all
answers are right, or all are wrong, the samples do not vary; the interval is then Wilson's, with the number of
conversations as the sample size. (scipy has both, in as many lines, and is not among the dependencies.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959964  # 95 %
_RESAMPLES = 2000


@dataclass(frozen=True)
class Share:
    """The share of right answers among `questions`, with a 95 % interval."""

    right: int
    questions: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """right / questions."""
        return self.right / self.questions


def share(conversations: Sequence[tuple[int, int]], seed: int = 0) -> Share:
    """The share from (right, questions) of each conversation.

    Raises:
        ValueError: there is no conversation, or one has no questions.
    """
    if not conversations or any(questions < 1 for _, questions in conversations):
        raise ValueError("a share needs conversations with at least one question each")
    counts = np.array(conversations, dtype=np.int64)
    right, questions = (int(total) for total in counts.sum(axis=0))
    if right in (0, questions):
        low, high = _wilson(len(counts) if right else 0, len(counts))
        return Share(right, questions, low, high)
    rng = np.random.default_rng(seed)
    samples = counts[rng.integers(0, len(counts), (_RESAMPLES, len(counts)))].sum(axis=1)  # [_RESAMPLES, 2]
    low, high = np.quantile(samples[:, 0] / samples[:, 1], [0.025, 0.975])
    return Share(right, questions, float(low), float(high))


@dataclass(frozen=True)
class Gain:
    """A difference of shares, with a 95 % interval."""

    value: float
    low: float
    high: float


def gain(arm: Sequence[tuple[int, int]], controls: Sequence[Sequence[tuple[int, int]]], seed: int = 0) -> Gain:
    """The share of an arm minus the largest share among its controls, by a paired bootstrap.

    Args:
        arm: (right, questions) of each conversation.
        controls: the same for each control, over the same conversations in the same order.

    Raises:
        ValueError: there is no control, or a control covers other conversations.
    """
    if not controls or any([n for _, n in control] != [n for _, n in arm] for control in controls):
        raise ValueError("a gain needs controls that were asked the same questions in the same conversations")
    counts = np.array([arm, *controls], dtype=np.int64)  # [arms, conversations, 2]

    def differences(totals: np.ndarray) -> np.ndarray:
        shares = totals[..., 0] / totals[..., 1]  # [arms, ...]
        result: np.ndarray = shares[0] - shares[1:].max(axis=0)
        return result

    value = float(differences(counts.sum(axis=1)))
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, counts.shape[1], (_RESAMPLES, counts.shape[1]))
    samples = differences(counts[:, drawn].sum(axis=2))  # [_RESAMPLES]
    low, high = (float(bound) for bound in np.quantile(samples, [0.025, 0.975]))
    if low == high:  # all conversations are alike, so the samples do not vary
        own, others = share(arm, seed), [share(control, seed) for control in controls]
        low, high = own.low - max(s.high for s in others), own.high - max(s.low for s in others)
    return Gain(value, low, high)


def _wilson(right: int, n: int) -> tuple[float, float]:
    p = right / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
