"""Merges the memories of parallel branches that started from one base.

Per state row, with S the base's row and S_i the branches': what branch i kept of the base is

    d_i = clamp(<S_i, S> / <S, S>, 0, 1)                 (1 where S is zero)

and the merged row is the base as far as every branch kept it, plus what each branch added:

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
    # float64 inside: the sums over branches round once, when the result becomes float32.
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
