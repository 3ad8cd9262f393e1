"""What happens in the layers during one steered call: who reads what, and what is written when.

A pass hands every layer its read, in the order in which the model asks for it, and returns the state at its
end. ``TokenPass``: token t reads the state that token t - 1 left. ``SegmentPass``: every token reads the state from
before the pass, and at its end each segment writes once, from the mean of its hidden states, in ascending order. What
gathers by segment are sums of the tokens' products with the weights that write: the mean's products are their mean, and
for rank 8 they are 32 numbers a segment and layer, where a hidden state is thousands. Sums may travel from call to call
as ``Pending``, so that one pass can be cut anywhere.
``stepping.StepPass`` and ``stepping.GatherPass`` are the same for one token a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agentmem import kernels
from agentmem.delta.config import DeltaHead
from agentmem.delta.layer import LayerMemory
from agentmem.errors import TurnError
from agentmem.kernels import recurrence


@dataclass(frozen=True)
class Pending:
    """An open pass: sums over the tokens seen so far. Opaque to callers.

    Attributes:
        ids: ascending, the S segments seen in any row.
        counts: [B, S] float32, tokens of each.
        sums: for each layer [B, S, 2 H r + gates] float32, the sum of what their tokens tell (``LayerMemory.told``);
            one tensor [L, B, S, 2 H r + gates] after a step.
    """

    ids: tuple[int, ...]
    counts: Tensor
    sums: Tensor | tuple[Tensor, ...]


class Place(NamedTuple):
    """A projection of a steered layer.

    Attributes:
        number: its own among all of the model.
        layer: its index among the layers with memory.
        heads: what is corrected in its output, each with the first column of it.
        last: it is the layer's output; the others are given the hidden state.
    """

    number: int
    layer: int
    heads: tuple[tuple[DeltaHead, int], ...]
    last: bool


Through = Callable[[Place, Tensor, Tensor], Tensor]
"""The output of a projection, corrected by what its layer reads: of the place, its input [B, T, D], its output.

The first place of a layer to run has the layer read the state for its hidden states, which are its input.
"""


class Pass(ABC):
    """One steered call over all layers. ``state`` is [B, L, H, r, r] float32."""

    def __init__(self, memory: Sequence[LayerMemory], state: Tensor) -> None:
        self.memory = memory
        self.state = state

    @property
    @abstractmethod
    def through(self) -> Through:
        """What the model's seams call while the pass runs."""

    @abstractmethod
    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The state after the pass and, where it stays open, its sums."""


class LayerPass(Pass):
    """A pass whose layers are corrected one product after another."""

    def __init__(self, memory: Sequence[LayerMemory], state: Tensor) -> None:
        super().__init__(memory, state)
        self._reads: dict[int, Tensor] = {}
        self._seen = 0

    @property
    def through(self) -> Through:
        return self._through

    def _through(self, place: Place, given: Tensor, output: Tensor) -> Tensor:
        index = place.layer
        if not place.last and index not in self._reads:
            self._seen += 1
            self._reads[index] = self._visit(index, given)
        if index not in self._reads:  # the layer was never asked; the pass ends with an error
            return output
        read = self._reads.pop(index) if place.last else self._reads[index]
        for head, start in place.heads:
            output = self.memory[index].corrected(head, read, output, start)
        return output

    def _read(self, index: int, q: Tensor) -> Tensor:
        """Read the state from before the pass with every token's query."""
        return torch.einsum("bhij,bthj->bthi", self.state[:, index].to(q.device), q)

    @abstractmethod
    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        """The read [B, T, H, r] of a layer."""


class TokenPass(LayerPass):
    """Every token writes (where ``mask`` [B, T] allows; None = everywhere), unless ``writing`` is off."""

    def __init__(self, memory: Sequence[LayerMemory], state: Tensor, mask: Tensor | None, writing: bool) -> None:
        super().__init__(memory, state)
        self._mask = mask
        self._writing = writing
        self._written: dict[int, Tensor] = {}

    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        if not self._writing:
            return self._read(index, self.memory[index].query(hidden))
        mask = self._mask.to(hidden.device) if self._mask is not None else None
        q, k, v, (keep, erase, write) = self.memory[index].project(hidden, mask)
        y, self._written[index] = scan(self.state[:, index].to(q.device), q, k, v, keep, erase, write)
        return y

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        need_all(self._seen, self.memory)
        return _stack(self.state, self._written), None


def scan(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """``recurrence.scan``, by what is quickest on the device."""
    given = state, q, k, v, keep, erase, write
    if kernels.runs_triton(state.device):
        return kernels.scan(*given)
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    if learns or not kernels.runs_numba(*given):
        return recurrence.scan(*given)
    from agentmem.kernels import numba_scan

    return numba_scan.scan(*given)


class SegmentPass(LayerPass):
    """Gathers by segment what tokens tell.

    Args:
        memory, state: of all layers.
        segments: [B, T] int64, each token's segment, -1 where it is not written; None = only read.
        before: what the calls before gathered in the same pass.
    """

    def __init__(
        self, memory: Sequence[LayerMemory], state: Tensor, segments: Tensor | None, before: Pending | None
    ) -> None:
        super().__init__(memory, state)
        self._before = before
        self._ids: tuple[int, ...] = ()
        self._segments: Tensor | None = None
        self._sums: dict[int, Tensor] = {}
        if segments is not None:
            seen = torch.unique(segments.contiguous())
            self._ids = joined_ids(seen[seen >= 0].tolist(), before)
            self._known = torch.tensor(self._ids, dtype=torch.int64, device=segments.device)
            self._segments = segments if self._ids else None

    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        module = self.memory[index]
        if self._segments is None:
            return self._read(index, module.query(hidden))
        products = module.products(hidden).float()
        self._sums[index] = torch.einsum("bts,btp->bsp", self._member(hidden.device), module.told(products))
        return self._read(index, module.unit(module.split(products).q))

    def _member(self, device: torch.device) -> Tensor:
        """Which token is of which segment, [B, T, S].

        Of tokens times segments, so made anew where it is used: held through the model it would count in its peak.
        """
        assert self._segments is not None
        return (self._segments.to(device)[..., None] == self._known.to(device)).float()

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        need_all(self._seen, self.memory)
        return ended(self.memory, self.state, self._total(), close)

    def _total(self) -> Pending | None:
        """Sums of this call and the calls before it; None where no segment was ever seen."""
        before = self._before
        if self._segments is None:
            return before
        counts = self._member(self._segments.device).sum(1)
        sums = tuple(self._sums[index] for index in range(len(self.memory)))
        if before is not None:
            place = torch.tensor([self._ids.index(one) for one in before.ids])
            counts = _add_at(counts, before.counts, place)
            sums = tuple(_add_at(new, old, place) for new, old in zip(sums, before.sums, strict=True))
        return Pending(self._ids, counts, sums)


def need_all(seen: int, memory: Sequence[LayerMemory]) -> None:
    """Refuse a pass in which layers did not read: its logits are not steered, and it would write half a token.

    Raises:
        TurnError: naming both numbers.
    """
    if seen != len(memory):
        raise TurnError(
            f"the model ran {seen} of its {len(memory)} steered layers; nothing was written. If another library took "
            "the forward of its projections away (accelerate's remove_hook_from_module does), attach the memory again"
        )


def joined_ids(seen: Sequence[int], before: Pending | None) -> tuple[int, ...]:
    """The segments of a call and of the calls before it, ascending."""
    return tuple(sorted({*seen, *before.ids} if before is not None else seen))


def side_by_side(rows: Sequence[Pending | None]) -> Pending | None:
    """The open passes of several calls of one row each as that of one call of all rows; None where none is open."""
    known = [one for one in rows if one is not None]
    if not known:
        return None
    ids = tuple(sorted({own for one in known for own in one.ids}))
    counts = known[0].counts.new_zeros(len(rows), len(ids))
    sums = [part.new_zeros(len(rows), len(ids), part.shape[-1]) for part in known[0].sums]
    for row, one in enumerate(rows):
        if one is not None:
            place = torch.tensor([ids.index(own) for own in one.ids])
            counts[row, place.to(counts.device)] = one.counts[0]
            for whole, part in zip(sums, one.sums, strict=True):
                whole[row, place.to(whole.device)] = part[0]
    return Pending(ids, counts, tuple(sums))


def row_of(pending: Pending, row: int, ids: tuple[int, ...]) -> Pending:
    """What the open pass of several rows has of one, of its own segments alone."""
    columns: Any = slice(None) if ids == pending.ids else [pending.ids.index(own) for own in ids]
    part = slice(row, row + 1)
    sums = pending.sums
    if isinstance(sums, Tensor):
        return Pending(ids, pending.counts[part, columns], sums[:, part, columns])
    return Pending(ids, pending.counts[part, columns], tuple(one[part, columns] for one in sums))


def ended(
    memory: Sequence[LayerMemory], state: Tensor, total: Pending | None, close: bool
) -> tuple[Tensor, Pending | None]:
    """What a pass that gathers returns at its end: where it closes, each segment writes once."""
    if total is None or not close:
        return state, total
    written = {}
    for index, module in enumerate(memory):
        sums = total.sums[index]
        counts = total.counts.to(sums.device)
        mean = sums / counts.clamp_min(1.0).unsqueeze(-1)
        # A segment asks nothing: its query is zeros.
        mean = F.pad(mean, (module.asked, 0))
        q, k, v, (keep, erase, write) = module.project_from(mean, counts > 0)
        _, written[index] = scan(state[:, index].to(q.device), q, k, v, keep, erase, write)
    return _stack(state, written), None


def _add_at(new: Tensor, old: Tensor, place: Tensor) -> Tensor:
    """``new`` plus ``old``'s columns (dim 1) at ``place``."""
    return new.index_add(1, place.to(new.device), old.to(new.device))


def _stack(state: Tensor, written: dict[int, Tensor]) -> Tensor:
    """The whole state with the written layers in place."""
    if not written:
        return state
    layers = [written[i].to(state.device) if i in written else state[:, i] for i in range(state.shape[1])]
    return torch.stack(layers, dim=1)
