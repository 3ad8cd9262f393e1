"""What happens in the layers during one steered call: who reads what, and what is written when.

A pass hands every layer its read, in the order in which the model's hooks ask for it, and returns the state at its
end. ``TokenPass``: token t reads the state that token t - 1 left (``stepping.StepPass`` is the same for one token a
row). ``SegmentPass``: every token reads the state from before the pass; sums of hidden states gather by segment, and
at its end each segment writes once, from its mean, in ascending order. Sums may travel from call to call as
``Pending``, so that one pass can be cut anywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from agentmem import kernels, recurrence
from agentmem.config import DeltaHead
from agentmem.steering import LayerMemory


@dataclass(frozen=True)
class Pending:
    """An open pass: sums over the tokens seen so far. Opaque to callers.

    Attributes:
        ids: [S] int64, ascending, the segments seen in any row.
        counts: [B, S] float32, tokens of each.
        sums: for each layer [B, S, D] float32, the sum of their hidden states.
    """

    ids: Tensor
    counts: Tensor
    sums: tuple[Tensor, ...]


class Place(NamedTuple):
    """A projection of a steered layer.

    Attributes:
        layer: its index among the layers with memory.
        heads: what is corrected in its output, each with the first column of it.
        last: it is the layer's output; the others are given the hidden state.
    """

    layer: int
    heads: tuple[tuple[DeltaHead, int], ...]
    last: bool


class Pass(ABC):
    """One steered call over all layers. ``state`` is [B, L, H, r, r] float32."""

    def __init__(self, memory: Sequence[LayerMemory], state: Tensor) -> None:
        self.memory = memory
        self.state = state
        self._reads: dict[int, Tensor] = {}

    def through(self, place: Place, given: Tensor, output: Tensor) -> Tensor:
        """The output of a projection, corrected by what its layer reads.

        The first of a layer to run has the layer read the state for its hidden states, which it is ``given``
        ([B, T, D]); the last takes the read away.
        """
        index = place.layer
        if not place.last and index not in self._reads:
            self._reads[index] = self._visit(index, given)
        read = self._reads.pop(index) if place.last else self._reads[index]
        for head, start in place.heads:
            output = self.memory[index].corrected(head, read, output, start)
        return output

    def _query(self, index: int, hidden: Tensor) -> Tensor:
        """Read the state from before the pass with every token."""
        q = self.memory[index].query(hidden)
        return torch.einsum("bhij,bthj->bthi", self.state[:, index].to(q.device), q)

    @abstractmethod
    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        """The read [B, T, H, r] of a layer."""

    @abstractmethod
    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The state after the pass and, where it stays open, its sums."""


class TokenPass(Pass):
    """Every token writes (where ``mask`` [B, T] allows; None = everywhere), unless ``writing`` is off."""

    def __init__(self, memory: Sequence[LayerMemory], state: Tensor, mask: Tensor | None, writing: bool) -> None:
        super().__init__(memory, state)
        self._mask = mask
        self._writing = writing
        self._written: dict[int, Tensor] = {}

    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        if not self._writing:
            return self._query(index, hidden)
        mask = self._mask.to(hidden.device) if self._mask is not None else None
        q, k, v, (keep, erase, write) = self.memory[index].project(hidden, mask)
        y, self._written[index] = scan(self.state[:, index].to(q.device), q, k, v, keep, erase, write)
        return y

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        return _stack(self.state, self._written), None


def scan(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """``recurrence.scan``, by kernels where the device has them."""
    form = kernels.scan if kernels.runs_triton(state.device) else recurrence.scan
    return form(state, q, k, v, keep, erase, write)


class SegmentPass(Pass):
    """Gathers hidden states by segment.

    ``ids`` [S] are the segments of this call and of ``before``; ``slots`` [B, T] names each token's place
    among them, S where it is not written. None: this call only reads, and ``ids`` are those of ``before``.
    """

    def __init__(
        self,
        memory: Sequence[LayerMemory],
        state: Tensor,
        ids: Tensor,
        slots: Tensor | None,
        before: Pending | None,
    ) -> None:
        super().__init__(memory, state)
        self._ids = ids
        self._before = before
        self._member: Tensor | None = None
        self._sums: dict[int, Tensor] = {}
        if slots is not None:
            self._member = torch.nn.functional.one_hot(slots, len(ids) + 1)[..., :-1].float()

    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        if self._member is not None:
            member = self._member.to(hidden.device)
            self._sums[index] = torch.einsum("bts,btd->bsd", member, hidden.float())
        return self._query(index, hidden)

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        total = self._total()
        if total is None:
            return self.state, None
        if not close:
            return self.state, total
        written = {}
        for index, module in enumerate(self.memory):
            counts = total.counts.to(total.sums[index].device)
            mean = total.sums[index] / counts.clamp_min(1.0).unsqueeze(-1)
            q, k, v, (keep, erase, write) = module.project(mean, counts > 0)
            start = self.state[:, index].to(q.device)
            _, written[index] = scan(start, q, k, v, keep, erase, write)
        return _stack(self.state, written), None

    def _total(self) -> Pending | None:
        """Sums of this call and the calls before it; None where no segment was ever seen."""
        before = self._before
        if len(self._ids) == 0 or self._member is None:
            return before
        counts = self._member.sum(1)
        sums = tuple(self._sums[index] for index in range(len(self.memory)))
        if before is not None:
            # The segments of the calls before, at their places among all segments.
            place = torch.searchsorted(self._ids, before.ids)
            counts = _add_at(counts, before.counts, place)
            sums = tuple(_add_at(new, old, place) for new, old in zip(sums, before.sums, strict=True))
        return Pending(self._ids, counts, sums)


def segment_pass(
    memory: Sequence[LayerMemory], state: Tensor, segments: Tensor | None, pending: Pending | None
) -> SegmentPass:
    """A pass over ``segments`` [B, T] (None = only read), continuing ``pending`` where one is given."""
    if segments is None:
        ids = pending.ids if pending is not None else torch.zeros(0, dtype=torch.int64, device=state.device)
        return SegmentPass(memory, state, ids, None, pending)
    segments = segments.contiguous()
    seen = torch.unique(segments)
    seen = seen[seen >= 0]
    ids = torch.unique(torch.cat((pending.ids, seen))) if pending is not None else seen
    slots = torch.where(segments >= 0, torch.searchsorted(ids, segments), len(ids))
    return SegmentPass(memory, state, ids, slots, pending)


def _add_at(new: Tensor, old: Tensor, place: Tensor) -> Tensor:
    """``new`` plus ``old``'s columns (dim 1) at ``place``."""
    return new.index_add(1, place.to(new.device), old.to(new.device))


def _stack(state: Tensor, written: dict[int, Tensor]) -> Tensor:
    """The whole state with the written layers in place."""
    if not written:
        return state
    layers = [written[i].to(state.device) if i in written else state[:, i] for i in range(state.shape[1])]
    return torch.stack(layers, dim=1)
