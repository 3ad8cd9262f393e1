"""Merges the memories of parallel branches that started from the same memory, the base.

For each row of the state, let S be the base's row and S_i the branches' rows. The share of the base that branch i kept
is

    d_i = clamp(<S_i, S> / <S, S>, 0, 1)                 (1 where S is zero)

and the merged row is the base times the smallest share, plus what each branch added:

    S' = min_i d_i * S + sum_i (S_i - d_i S)

So facts of the base survive: a plain sum of differences would decay the base once per branch. A branch that
changed nothing adds nothing, and one changed branch alone gives exactly that branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agentmem.state import MemoryState


def merge_states(base: MemoryState, branches: Sequence[MemoryState]) -> MemoryState:
    """The memory after parallel branches.

    Args:
        base: the memory that every branch started from.
        branches: the memories that they ended with, in task order.

    Raises:
        StateMismatchError: a branch has another model, adapter or shape, or does not continue the base.
    """
    for branch in branches:
        branch.require(base.model_fingerprint, base.adapter_fingerprint, base.shape)
    changed = [branch for branch in branches if branch != base]
    if not changed:
        return base
    if len(changed) == 1:
        return changed[0]
    record = base.record.merge([branch.record for branch in changed])
    # Computed in float64, so that the sums over branches are rounded only once, to float32 at the end.
    old = base.matrices.astype(np.float64)  # [L, H, r, r]
    energy = np.square(old).sum(axis=-1, keepdims=True)  # [L, H, r, 1]
    least = np.ones_like(energy)
    added = np.zeros_like(old)
    for branch in changed:
        new = branch.matrices.astype(np.float64)
        overlap = (new * old).sum(axis=-1, keepdims=True)
        kept = np.where(energy > 0, np.clip(overlap / np.where(energy > 0, energy, 1.0), 0.0, 1.0), 1.0)
        least = np.minimum(least, kept)
        added += new - kept * old
    return base.replaced(matrices=least * old + added, record=record)


def merge_from_nothing(branches: Sequence[MemoryState]) -> MemoryState:
    """As `merge_states`, for branches that started from an empty memory.

    Raises:
        StateMismatchError: the branches have different models, adapters or shapes.
    """
    first = branches[0]
    base = MemoryState.zeros(first.shape, first.model_fingerprint, first.adapter_fingerprint)
    return merge_states(base, branches)
