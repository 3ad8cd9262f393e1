"""A call of many tokens: how every layer reads the state while the model runs, and when the tokens are written.

A `ForwardContext` wraps the model's projections. It lets each layer read the state, in the order in which the model
reaches the layers, and returns the new state at the end. In a `TokenPass` token t reads the state that token t - 1
left. In a `SegmentPass` every token reads the state from before the pass, and at the end each segment writes once, from
the mean of its hidden states, in ascending order of segments. For that the pass sums the tokens' products with the
writing weights: products are linear, so the product of the mean is the mean of the products, and for rank 8 these are
32 numbers per segment and layer where a hidden state has thousands. The sums can be handed from call to call as
`Pending`, so that a pass can be cut anywhere. `decode` does the same for one token per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agentmem import kernels
from agentmem.delta.attach import ProjectionSite
from agentmem.delta.layer import LayerMemory
from agentmem.errors import TurnError
from agentmem.kernels import ScanArgs

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Pending:
    """An open pass: sums over the tokens read so far. Opaque to callers.

    Attributes:
        ids: the S segments that occur in any row, ascending.
        counts: [B, S] float32, the number of tokens in each.
        sums: for each layer [B, S, 2 H r + gates] float32, the sum of the tokens' `LayerMemory.write_features`;
            after a decode step one tensor [L, B, S, 2 H r + gates].
    """

    ids: tuple[int, ...]
    counts: Tensor
    sums: Tensor | tuple[Tensor, ...]


class AllRead(Exception):
    """Raised inside the model when every layer has read and nothing else of the call is wanted."""


class ForwardContext(ABC):
    """One call with memory, over all layers.

    Attributes:
        memory: the memory of all layers.
        state: [B, L, H, r, r] float32, the state that the layers read.
        first_order: whether gradients flow through what is written and read, but not through the model, which then
            runs without a graph.
        kept: the read of each layer, [B, T, H, r]; None: they are not kept.
        steer: whether tokens are corrected by what they read: one bool, or by how much, [B, T] bool or float32.
        stops: whether to leave the model, by `AllRead`, as soon as the last layer has read.
    """

    def __init__(self, memory: Sequence[LayerMemory], state: Tensor) -> None:
        self.memory = memory
        self.state = state
        self.first_order = False
        self.kept: dict[int, Tensor] | None = None
        self.steer: bool | Tensor = True
        self.stops = False
        self._reads: dict[int, Tensor] = {}
        self._layers_read = 0

    def begin(self) -> None:  # noqa: B027 - most contexts have nothing to do then
        """Called once, before the model runs."""

    def forward(
        self, site: ProjectionSite, projection: Forward, hidden: Tensor, *inputs: Any, **options: Any
    ) -> Tensor:
        """Replaces the forward of a projection while the call runs: its output, corrected by the read of its layer.

        The first projection of a layer to run makes the layer read the state, for the hidden states that are its input.

        Args:
            site: the projection.
            projection: the original forward.
            hidden: [B, T, D]; for the layer's output projection the result of the attention.
            inputs, options: any further arguments of the projection.
        """
        output = projection(hidden, *inputs, **options)
        layer = site.layer
        if not site.is_output and layer not in self._reads:
            self._layers_read += 1
            read = self.read_apart(layer, hidden) if self.first_order else self.read(layer, hidden)  # [B, T, H, r]
            if self.kept is not None:
                self.kept[layer] = read
            if self.stops and self._layers_read == len(self.memory):
                raise AllRead
            if isinstance(self.steer, Tensor):
                read = read * self.steer.to(read.device)[..., None, None]
            self._reads[layer] = read.detach() if self.first_order else read
        if layer not in self._reads:  # none of the layer's input projections ran; `end` raises
            return output
        read = self._reads.pop(layer) if site.is_output else self._reads[layer]
        if self.steer is False:
            return output
        for head, start in site.heads:
            output = self.memory[layer].correct(head, read, output, start)
        return output

    @torch.enable_grad()
    def read_apart(self, layer: int, hidden: Tensor) -> Tensor:
        """`read` with a graph of its own, while the model runs without one."""
        return self.read(layer, hidden)

    @abstractmethod
    def read(self, layer: int, hidden: Tensor) -> Tensor:
        """The read of the tokens [B, T, D] in a layer, [B, T, H, r]."""

    @abstractmethod
    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The state after the call and, where the pass stays open, the sums so far.

        Raises:
            TurnError: some layers did not read.
        """


class TokenPass(ForwardContext):
    """Every token writes where `mask` [B, T] allows it (None = everywhere), unless `writing` is False."""

    def __init__(self, memory: Sequence[LayerMemory], state: Tensor, mask: Tensor | None, writing: bool) -> None:
        super().__init__(memory, state)
        self._mask = mask
        self._writing = writing
        self._written: dict[int, Tensor] = {}

    def read(self, layer: int, hidden: Tensor) -> Tensor:
        if not self._writing:
            return read_state(self.state, layer, self.memory[layer].query(hidden))
        mask = self._mask.to(hidden.device) if self._mask is not None else None
        terms = self.memory[layer].terms(hidden, mask)
        args = ScanArgs(self.state[:, layer].to(terms.q.device), *terms)
        reads, self._written[layer] = kernels.scan(args)  # [B, T, H, r], [B, H, r, r]
        return reads

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        if self._layers_read != len(self.memory):
            raise skipped_layers(self._layers_read, len(self.memory))
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.first_order):
            return _with_layers(self.state, self._written), None


class SegmentPass(ForwardContext):
    """A pass that sums by segment what its tokens write.

    Args:
        memory, state: of all layers.
        segments: [B, T] int64, each token's segment, -1 where the token is not written; None = nothing is written.
        pending: sums of earlier calls of the same pass.
    """

    def __init__(
        self, memory: Sequence[LayerMemory], state: Tensor, segments: Tensor | None, pending: Pending | None
    ) -> None:
        super().__init__(memory, state)
        self._pending = pending
        self._ids: tuple[int, ...] = ()
        self._segments: Tensor | None = None
        self._sums: dict[int, Tensor] = {}
        if segments is not None:
            ids = torch.unique(segments.contiguous())
            self._ids = joined_ids(ids[ids >= 0].tolist(), pending)
            self._columns = torch.tensor(self._ids, dtype=torch.int64, device=segments.device)
            self._segments = segments if self._ids else None

    def read(self, layer: int, hidden: Tensor) -> Tensor:
        module = self.memory[layer]
        if self._segments is None:
            return read_state(self.state, layer, module.query(hidden))
        products = module.products(hidden).float()  # [B, T, 3 H r + gates]
        features = module.write_features(products)
        self._sums[layer] = torch.einsum("bts,btp->bsp", self._members(hidden.device), features)
        return read_state(self.state, layer, module.unit(module.split(products).q))

    def _members(self, device: torch.device) -> Tensor:
        """Which token belongs to which segment, [B, T, S].

        The matrix is large (tokens times segments), so it is computed anew at each use: kept while the model runs, it
        would add to the peak of memory.
        """
        assert self._segments is not None
        return (self._segments.to(device)[..., None] == self._columns.to(device)).float()

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        if self._layers_read != len(self.memory):
            raise skipped_layers(self._layers_read, len(self.memory))
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.first_order):
            return closed(self.memory, self.state, self._total(), close)

    def _total(self) -> Pending | None:
        """The sums of this call and of earlier ones; None where no segment has occurred yet."""
        pending = self._pending
        if self._segments is None:
            return pending
        counts = self._members(self._segments.device).sum(1)  # [B, S]
        sums = tuple(self._sums[layer] for layer in range(len(self.memory)))
        if pending is not None:
            columns = torch.tensor([self._ids.index(segment) for segment in pending.ids])
            counts = _add_columns(counts, pending.counts, columns)
            sums = tuple(_add_columns(new, old, columns) for new, old in zip(sums, pending.sums, strict=True))
        return Pending(self._ids, counts, sums)


def read_state(state: Tensor, layer: int, query: Tensor) -> Tensor:
    """Every token's read [B, T, H, r], by its query [B, T, H, r], of the state [B, L, H, r, r] before the call."""
    return torch.einsum("bhij,bthj->bthi", state[:, layer].to(query.device), query)


def skipped_layers(layers_read: int, layers: int) -> TurnError:
    """The error for a call in which some layers did not read, so that they corrected and would write nothing."""
    return TurnError(
        f"the model ran {layers_read} of its {layers} steered layers; nothing was written. It skips layers, or calls "
        "other modules than it had when memory was attached: attach the memory again after such changes"
    )


def joined_ids(ids: Sequence[int], pending: Pending | None) -> tuple[int, ...]:
    """The segments of a call and of earlier calls of its pass, ascending."""
    return tuple(sorted({*ids, *pending.ids} if pending is not None else ids))


def side_by_side(rows: Sequence[Pending | None]) -> Pending | None:
    """The open passes of several one-row calls, as the open pass of one call with all rows; None where none is open."""
    opened = [pending for pending in rows if pending is not None]
    if not opened:
        return None
    ids = tuple(sorted({segment for pending in opened for segment in pending.ids}))
    counts = opened[0].counts.new_zeros(len(rows), len(ids))
    sums = [part.new_zeros(len(rows), len(ids), part.shape[-1]) for part in opened[0].sums]
    for row, pending in enumerate(rows):
        if pending is not None:
            columns = torch.tensor([ids.index(segment) for segment in pending.ids])
            counts[row, columns.to(counts.device)] = pending.counts[0]
            for joined, part in zip(sums, pending.sums, strict=True):
                joined[row, columns.to(joined.device)] = part[0]
    return Pending(ids, counts, tuple(sums))


def row_of(pending: Pending, row: int, ids: tuple[int, ...]) -> Pending:
    """One row of the open pass of several rows, with only that row's own segments."""
    columns: Any = slice(None) if ids == pending.ids else [pending.ids.index(segment) for segment in ids]
    rows = slice(row, row + 1)
    sums = pending.sums
    if isinstance(sums, Tensor):
        return Pending(ids, pending.counts[rows, columns], sums[:, rows, columns])
    return Pending(ids, pending.counts[rows, columns], tuple(part[rows, columns] for part in sums))


def closed(
    memory: Sequence[LayerMemory], state: Tensor, pending: Pending | None, close: bool
) -> tuple[Tensor, Pending | None]:
    """What a call with segments returns at its end: if the pass closes, each segment writes once."""
    if pending is None or not close:
        return state, pending
    written = {}
    for layer, module in enumerate(memory):
        sums = pending.sums[layer]
        counts = pending.counts.to(sums.device)
        mean = sums / counts.clamp_min(1.0).unsqueeze(-1)  # [B, S, 2 H r + gates]
        # A segment reads nothing, so its query is zero.
        mean = F.pad(mean, (module.query_width, 0))  # [B, S, 3 H r + gates]
        terms = module.terms_from(mean, counts > 0)
        _, written[layer] = kernels.scan(ScanArgs(state[:, layer].to(terms.q.device), *terms))
    return _with_layers(state, written), None


def _add_columns(new: Tensor, old: Tensor, columns: Tensor) -> Tensor:
    """`new` [B, S, ...] with the columns of `old` added at the indices `columns`."""
    return new.index_add(1, columns.to(new.device), old.to(new.device))


def _with_layers(state: Tensor, written: dict[int, Tensor]) -> Tensor:
    """The state [B, L, H, r, r] with the written layers [B, H, r, r] put in."""
    if not written:
        return state
    layers = [written[i].to(state.device) if i in written else state[:, i] for i in range(state.shape[1])]
    return torch.stack(layers, dim=1)
