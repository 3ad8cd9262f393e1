"""Confidence intervals for shares of correct answers.

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


def _wilson(right: int, n: int) -> tuple[float, float]:
    p = right / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
