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

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agentmem.errors import ConfigError
from agentmem.state import MemoryState, as_state


def merge_states(
    base: MemoryState | Mapping[str, Any], branches: Sequence[MemoryState | Mapping[str, Any]]
) -> MemoryState:
    """The memory after parallel branches; each memory is a value, its plain dict or its JSON form.

    Args:
        base: the memory that every branch started from.
        branches: the memories that they ended with, in task order.

    Raises:
        CorruptStateError: a memory is something else, or a dict is not exactly what was written.
        StateMismatchError: a branch has another model, adapter or shape, or does not continue the base.
        ConfigError: `branches` is a single memory.
    """
    if isinstance(branches, MemoryState | Mapping):
        raise ConfigError("the branches are a list of memories; found a single one; pass [memory]")
    start, ends = as_state(base), [as_state(branch) for branch in branches]
    for end in ends:
        end.require(start.model_fingerprint, start.adapter_fingerprint, start.shape)
    changed = [end for end in ends if end != start]
    if not changed:
        return start
    if len(changed) == 1:
        return changed[0]
    record = start.record.merge([branch.record for branch in changed])
    # Computed in float64, so that the sums over branches are rounded only once, to float32 at the end.
    old = start.matrices.astype(np.float64)  # [L, H, r, r]
    energy = np.square(old).sum(axis=-1, keepdims=True)  # [L, H, r, 1]
    least = np.ones_like(energy)
    added = np.zeros_like(old)
    for branch in changed:
        new = branch.matrices.astype(np.float64)
        overlap = (new * old).sum(axis=-1, keepdims=True)
        kept = np.where(energy > 0, np.clip(overlap / np.where(energy > 0, energy, 1.0), 0.0, 1.0), 1.0)
        least = np.minimum(least, kept)
        added += new - kept * old
    return start.replaced(matrices=least * old + added, record=record)


def merge_from_nothing(branches: Sequence[MemoryState]) -> MemoryState:
    """As `merge_states`, for branches that started from an empty memory.

    Raises:
        StateMismatchError: the branches have different models, adapters or shapes.
    """
    first = branches[0]
    base = MemoryState.zeros(first.shape, first.model_fingerprint, first.adapter_fingerprint)
    return merge_states(base, branches)
