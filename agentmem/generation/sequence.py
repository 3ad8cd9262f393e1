"""One running generation as data: its state, the sums of an open pass, its KV, and the last logits.

All of the memory goes in as a tensor and comes out as one; the sequence itself is discarded after the turn. A turn that
needs a token decoded yields a `DecodeRequest`, so that whoever runs the turn can decode for several sequences at once.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from agentmem.delta.passes import Pending
from agentmem.generation.batch_cache import BatchRow
from agentmem.generation.kv_cache import crop
from agentmem.generation.sampling import Sampler

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """A position of a sequence to which `rewind` can go back: number of tokens read, state, open sums.

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
        cache: its own KV cache; while the sequence has a row, without the tokens that were read there.
        pending: the sums of an open pass, for adapters that write by message or sentence.
        logits: [V] after the last token, if that token was read with logits.
        sampler: chooses the next token from the logits unchanged; None where no token is chosen or the logits are
            masked first.
        next_token: the token that it chooses, where that is already known.
        row: its row in a batched KV cache, while it decodes together with others.
        cache_valid: False after a failed pass: the layers of the cache may then hold different tokens.
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
        """The number of tokens that were read, into its row or its own cache."""
        return int(self.cache.get_seq_length()) if self.row is None else self.row.length

    def rewind(self, to: Snapshot) -> None:
        """Go back to an earlier position in the same pass. Only while the sequence has no row."""
        crop(self.cache, to.length)
        self.state, self.pending = to.state, to.pending


@dataclass(slots=True, eq=False)
class DecodeRequest:
    """Asks for one token of a sequence to be read and the next one to be chosen.

    Attributes:
        segment: the segment that the token belongs to; -1: the token is not written.
        error: why this request failed, if it did.
    """

    sequence: Sequence
    token: int
    segment: int
    error: BaseException | None = None


Steps = Generator[DecodeRequest | None, None, T]
"""A turn, step by step: None after a step of its own, a request where it waits for a token; at last its result."""
