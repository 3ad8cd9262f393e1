"""Confidence intervals for shares of correct answers and for mean scores, and the gain of one arm over others.

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
    """A difference of shares, with a 95 % interval.

    Attributes:
        value: the difference.
        low, high: the ends of the interval.
        p: two-sided p-value for a difference of 0, from the same resamples. Never below what a sign test of so few
            conversations could give.
    """

    value: float
    low: float
    high: float
    p: float = 1.0


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
    opposed = min(np.count_nonzero(samples <= 0), np.count_nonzero(samples >= 0))
    p = max(2 * (opposed + 1) / (_RESAMPLES + 1), 2.0 ** (1 - counts.shape[1]))
    return Gain(value, low, high, min(1.0, float(p)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several questions that were asked at once, adjusted by Holm's method, in the same order.

    Where each below 0.05 is taken as a difference, the chance that any of them is none is below 0.05.
    """
    adjusted, least = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


@dataclass(frozen=True)
class Mean:
    """A mean score, or a ratio, with a 95 % interval."""

    value: float
    low: float
    high: float


def mean(conversations: Sequence[tuple[float, int]], seed: int = 0) -> Mean:
    """The mean score from (sum of scores, questions) of each conversation.

    Raises:
        ValueError: there is no conversation.
    """
    if not conversations:
        raise ValueError("a mean needs a conversation at least")
    totals = np.array(conversations, dtype=np.float64)
    return _ratio(totals[:, 0], totals[:, 1], seed)


def ratio(arm: Sequence[tuple[int, int]], whole: Sequence[tuple[int, int]], seed: int = 0) -> Mean | None:
    """The share of an arm divided by that of another over the same conversations; None if the other is never right."""
    counts, others = np.array(arm, dtype=np.float64), np.array(whole, dtype=np.float64)
    return _ratio(counts[:, 0], others[:, 0], seed) if others[:, 0].sum() else None


def _ratio(parts: np.ndarray, wholes: np.ndarray, seed: int) -> Mean:
    """Sum of the parts by sum of the wholes; samples in which the wholes are nothing are left out."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(parts), (_RESAMPLES, len(parts)))
    above, below = parts[drawn].sum(axis=1), wholes[drawn].sum(axis=1)
    low, high = np.quantile(above[below > 0] / below[below > 0], [0.025, 0.975])
    return Mean(float(parts.sum() / wholes.sum()), float(low), float(high))


def _wilson(right: int, n: int) -> tuple[float, float]:
    p = right / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
