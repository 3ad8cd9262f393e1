"""KV of sequences that decode together: a row of one padded cache each.

A `BatchedKVCache` holds the KV and the states of sequences of about one length; a `BatchRow` is one of its rows. What a
pass over all rows is given (`view`, `over`) writes each row's token behind the row's others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from agentmem.delta.passes import Pending, side_by_side

_STEP = 256  # tokens


class BatchRow:
    """A row of a batched cache, and how many tokens it holds."""

    __slots__ = ("index", "kv", "length")

    def __init__(self, kv: BatchedKVCache, index: int, length: int) -> None:
        self.kv = kv
        self.index = index
        self.length = length


class BatchedKVCache:
    """KV and states of some sequences; rows are dense.

    For each layer keys and values [rows, heads, capacity, d]; `rows` to begin with, twice as many when they are taken.
    What was not read yet is zero: attention gives it no weight, but no weight times NaN would be NaN.

    Args:
        like: a sequence's own cache, of the same layers.
        capacity: tokens that a row holds.
        rows: how many rows to begin with.
    """

    def __init__(self, like: Any, capacity: int, rows: int = 1) -> None:
        from transformers import Cache

        self.capacity = capacity
        self.rows: list[BatchRow] = []
        self._kv = [
            tuple(part.new_zeros(rows, part.shape[1], capacity, part.shape[3]) for part in (layer.keys, layer.values))
            for layer in like.layers
        ]
        self._layers = [_layer_class()() for _ in self._kv]
        self._cache = Cache(layers=self._layers)
        # The states after the last pass, all in one tensor, and the row of it that each sequence was given.
        self._states: Tensor | None = None
        self._row_states: list[Tensor] = []
        # The same of the sums of open passes.
        self._sums: Pending | None = None
        self._row_sums: list[Pending | None] = []

    @property
    def is_full(self) -> bool:
        """Whether a further row moves the KV to other memory."""
        return len(self.rows) == int(self._kv[0][0].shape[0])

    @property
    def tokens(self) -> int:
        """How many tokens there is room for, in all rows."""
        return int(self._kv[0][0].shape[0]) * self.capacity

    @property
    def nbytes(self) -> int:
        """What its KV takes."""
        return sum(part.nbytes for layer in self._kv for part in layer)

    @property
    def width(self) -> int:
        """Tokens that a pass has to look at, one more for every row included; seldom another number.

        A step is an eighth of a row, or 256 tokens where that is more: so at most a quarter of a long sequence is
        looked at in vain, where by rows alone, which double, it would be all of it once more.
        """
        longest = max(row.length for row in self.rows) + 1
        step = max(_STEP, self.capacity // 8)
        return min(self.capacity, -(-longest // step) * step)

    def add_row(self, own: Any, length: int) -> BatchRow:
        """Copy a sequence's own cache of `length` tokens into a new row."""
        index = len(self.rows)
        if self.is_full:
            self._kv = [tuple(torch.cat((part, torch.zeros_like(part))) for part in layer) for layer in self._kv]
        for parts, layer in zip(self._kv, own.layers, strict=True):
            for part, read in zip(parts, (layer.keys, layer.values), strict=True):
                part[index, :, :length] = read[0, :, :length]
        row = BatchRow(self, index, length)
        self.rows.append(row)
        return row

    def copy_back(self, row: BatchRow, own: Any) -> None:
        """Append to a sequence's own cache what its row has read since."""
        start = int(own.get_seq_length())
        for layer, parts in enumerate(self._kv):
            new = [part[row.index : row.index + 1, :, start : row.length] for part in parts]
            if new[0].shape[2]:
                own.update(*new, layer)

    def remove_row(self, row: BatchRow) -> None:
        """Give a row up; the last row moves into its place. What is free is zero again."""
        last = self.rows.pop()
        self._states, self._row_states = None, []
        self._sums, self._row_sums = None, []
        for parts in self._kv:
            for part in parts:
                if last is not row:
                    part[row.index] = part[last.index]
                part[last.index] = 0
        if last is not row:
            last.index = row.index
            self.rows[last.index] = last

    def view(self) -> tuple[Any, Tensor, Tensor]:
        """A cache for one more token in every row, the positions of those [rows, 1], and where each may look.

        The last [rows, 1, 1, longest + 1] bool. What an earlier call gave is no longer of use.
        """
        lengths = [row.length for row in self.rows]
        positions = torch.tensor(lengths, device=self._kv[0][0].device)[:, None]
        cache, allowed = self.over(positions, max(lengths) + 1)
        return cache, positions, allowed

    def over(self, positions: Tensor, width: int) -> tuple[Any, Tensor]:
        """A cache of the first rows for one more token each, at `positions` [rows, 1], and where each may look.

        The last [rows, 1, 1, width] bool. Nothing of it depends on numbers that a device holds.
        """
        rows = positions.shape[0]
        targets: dict[tuple[int, torch.device], Tensor] = {}
        for layer, parts in zip(self._layers, self._kv, strict=True):
            heads, device = parts[0].shape[1], parts[0].device
            if (heads, device) not in targets:  # the same for all layers but in odd models
                starts = torch.arange(0, rows * heads * self.capacity, self.capacity, device=device).view(rows, heads)
                targets[heads, device] = (starts + positions.to(device)).view(-1)  # [rows * heads]
            layer.point(parts, targets[heads, device], rows, width)
        allowed = torch.arange(width, device=positions.device) <= positions  # [rows, width]
        return self._cache, allowed[:, None, None]

    def states(self, wanted: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """The states of all rows in one tensor [rows, L, H, r, r], and one by one; where none is wanted any will do.

        Without a copy where they are as the last pass left them.
        """
        count = len(self._row_states)
        spare = next(state for state in wanted if state is not None)
        by_row = [
            state if state is not None else self._row_states[index] if index < count else spare
            for index, state in enumerate(wanted)
        ]
        if self._states is None or len(by_row) != count or any(map(is_not, by_row, self._row_states)):
            return torch.cat(by_row), by_row
        return self._states, by_row

    def keep_states(self, states: Tensor, by_row: list[Tensor]) -> None:
        """Remember the states after a pass, and which tensor each row's sequence has them in."""
        self._states, self._row_states = states, by_row

    def sums(
        self, wanted: Sequence[Pending | None], out: Sequence[bool]
    ) -> tuple[Pending | None, list[Pending | None]]:
        """The open passes of all rows as one, and one by one; a row that sits `out` may have any.

        Without a copy where they are as the last pass left them.
        """
        count = len(self._row_sums)
        by_row = [
            self._row_sums[index] if absent and index < count else pending
            for index, (pending, absent) in enumerate(zip(wanted, out, strict=True))
        ]
        if self._sums is None or len(by_row) != count or any(map(is_not, by_row, self._row_sums)):
            return side_by_side(by_row), by_row
        return self._sums, by_row

    def keep_sums(self, pending: Pending | None, by_row: list[Pending | None]) -> None:
        """Remember the open passes after a pass, and what each row's sequence has of them."""
        self._sums, self._row_sums = pending, by_row


@cache
def _layer_class() -> Any:
    """One layer of a batched cache as transformers takes it: an update writes each row's token behind its others."""
    from transformers.cache_utils import CacheLayerMixin

    class Layer(CacheLayerMixin):  # type: ignore[misc]
        def point(self, parts: tuple[Tensor, ...], targets: Tensor, rows: int, width: int) -> None:
            """Write at `targets` into `parts` taken as [rows * heads * capacity, d], and show `width` tokens."""
            self._targets, self._rows, self._width, self._parts = targets, rows, width, parts

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            """Nothing to do: the memory is there."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            keys, values = self._parts
            for part, new in ((keys, key_states), (values, value_states)):
                d = part.shape[3]
                part.view(-1, d).index_copy_(0, self._targets, new.reshape(-1, d))
            return keys[: self._rows, :, : self._width], values[: self._rows, :, : self._width]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self._width, 0

        def get_seq_length(self) -> int:
            return self._width - 1

        def get_max_length(self) -> int:
            return int(self._parts[0].shape[2])

    return Layer
