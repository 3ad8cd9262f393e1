"""One generation while its turn runs, as data: a state, the sums of an open pass, KV, the last logits.

The memory's whole truth goes in as a tensor and comes out as one; the sequence is thrown away with the turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from agentmem.delta.passes import Pending
from agentmem.generation.batch_cache import BatchRow
from agentmem.generation.kv_cache import crop
from agentmem.generation.sampling import Sampler


@dataclass(frozen=True)
class Snapshot:
    """Where a sequence stood, to come back to with `rewind`: how many tokens it had read, its state, its open sums.

    Tensors are never changed in place, so this copies nothing.
    """

    length: int
    state: Tensor | None
    pending: Pending | None


@dataclass(slots=True, eq=False)
class Sequence:
    """One running generation.

    Attributes:
        state: the memory [1, L, H, r, r]; None runs the bare model.
        cache: its own KV; without what was read in `row` for as long as it has one.
        pending: the sums of an open pass, for adapters that write by message or sentence.
        logits: [V] after the last token that was read with them.
        sampler: who will choose the next token from the logits as they are; None: nobody, or not as they are.
        next_token: what it chooses, where that is known already.
        row: its row of KV while it decodes together with others.
        cache_valid: False once a pass has failed: its layers may hold different tokens.
    """

    state: Tensor | None
    cache: Any
    pending: Pending | None = None
    logits: Tensor | None = None
    sampler: Sampler | None = None
    next_token: int | None = None
    row: BatchRow | None = None
    cache_valid: bool = True

    @property
    def length(self) -> int:
        """Tokens that were read, in its row or its own cache."""
        return int(self.cache.get_seq_length()) if self.row is None else self.row.length

    def rewind(self, to: Snapshot) -> None:
        """Go back to an earlier place of the same pass. Only while it has no row."""
        crop(self.cache, to.length)
        self.state, self.pending = to.state, to.pending
