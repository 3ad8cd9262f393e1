"""The KV of sequences that decode together, each in a row of one padded cache.

A `BatchedKVCache` holds the KV and the states of sequences of similar length; a `BatchRow` is one of its rows. A pass
over all rows uses a view of the cache (`view`, `over`) that puts each row's new token after the row's others.
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
    """A row of a batched cache, and the number of tokens in it."""

    __slots__ = ("index", "kv", "length")

    def __init__(self, kv: BatchedKVCache, index: int, length: int) -> None:
        self.kv = kv
        self.index = index
        self.length = length


class BatchedKVCache:
    """KV and states of several sequences; used rows have no gaps between them.

    For each layer keys and values [rows, heads, capacity, d]; the number of rows doubles when all are taken. Unused
    positions are zero: attention gives them no weight, but zero weight times NaN would be NaN.

    Args:
        like: a sequence's own cache, with the same layers.
        capacity: tokens that fit in a row.
        rows: number of rows to begin with.
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
        # The states after the last pass in one tensor, and the view of it that each row's sequence was given.
        self._states: Tensor | None = None
        self._row_states: list[Tensor] = []
        # The same for the sums of open passes.
        self._sums: Pending | None = None
        self._row_sums: list[Pending | None] = []

    @property
    def is_full(self) -> bool:
        """Whether adding a row moves the KV to new memory."""
        return len(self.rows) == int(self._kv[0][0].shape[0])

    @property
    def tokens(self) -> int:
        """The capacity in tokens, over all rows."""
        return int(self._kv[0][0].shape[0]) * self.capacity

    @property
    def nbytes(self) -> int:
        """Size of its KV in bytes."""
        return sum(part.nbytes for layer in self._kv for part in layer)

    @property
    def width(self) -> int:
        """The number of tokens that a pass attends to, with room for one more in every row; it changes seldom.

        It grows in steps of an eighth of the capacity, at least 256 tokens, so that at most a quarter of a long
        sequence is attended to in vain. Capacities themselves double: by them alone it could be half.
        """
        longest = max(row.length for row in self.rows) + 1
        step = max(_STEP, self.capacity // 8)
        return min(self.capacity, -(-longest // step) * step)

    def add_row(self, own: Any, length: int) -> BatchRow:
        """Copy a sequence's own cache, of `length` tokens, into a new row."""
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
        """Append to a sequence's own cache the tokens that its row has read since."""
        start = int(own.get_seq_length())
        for layer, parts in enumerate(self._kv):
            new = [part[row.index : row.index + 1, :, start : row.length] for part in parts]
            if new[0].shape[2]:
                own.update(*new, layer)

    def remove_row(self, row: BatchRow) -> None:
        """Free a row; the last row moves into its place, and the freed memory is zeroed."""
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
        """A cache for one more token in every row, the tokens' positions [rows, 1], and their attention masks.

        The masks are [rows, 1, 1, longest + 1] bool. The result of an earlier call can no longer be used.
        """
        lengths = [row.length for row in self.rows]
        positions = torch.tensor(lengths, device=self._kv[0][0].device)[:, None]
        cache, allowed = self.over(positions, max(lengths) + 1)
        return cache, positions, allowed

    def over(self, positions: Tensor, width: int) -> tuple[Any, Tensor]:
        """A cache of the first rows for one more token in each, at `positions` [rows, 1], and their attention masks.

        The masks are [rows, 1, 1, width] bool. Nothing here waits for numbers on the device.
        """
        rows = positions.shape[0]
        targets: dict[tuple[int, torch.device], Tensor] = {}
        for layer, parts in zip(self._layers, self._kv, strict=True):
            heads, device = parts[0].shape[1], parts[0].device
            if (heads, device) not in targets:  # in most models the same for all layers
                starts = torch.arange(0, rows * heads * self.capacity, self.capacity, device=device).view(rows, heads)
                targets[heads, device] = (starts + positions.to(device)).view(-1)  # [rows * heads]
            layer.point(parts, targets[heads, device], rows, width)
        allowed = torch.arange(width, device=positions.device) <= positions  # [rows, width]
        return self._cache, allowed[:, None, None]

    def states(self, wanted: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """The states of all rows as one tensor [rows, L, H, r, r], and one by one; any state where `wanted` is None.

        Nothing is copied if the states are those that the last pass left.
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
        """Keep the states after a pass, and the tensor that each row's sequence has them in."""
        self._states, self._row_states = states, by_row

    def sums(
        self, wanted: Sequence[Pending | None], out: Sequence[bool]
    ) -> tuple[Pending | None, list[Pending | None]]:
        """The open passes of all rows as one, and one by one; a row in `out` gets any.

        Nothing is copied if the sums are those that the last pass left.
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
        """Keep the open passes after a pass, and the part that each row's sequence has of them."""
        self._sums, self._row_sums = pending, by_row


@cache
def _layer_class() -> Any:
    """A layer of a batched cache for transformers: an update writes each row's token after the row's others."""
    from transformers.cache_utils import CacheLayerMixin

    class Layer(CacheLayerMixin):  # type: ignore[misc]
        def point(self, parts: tuple[Tensor, ...], targets: Tensor, rows: int, width: int) -> None:
            """Write at `targets` into `parts`, viewed as [rows * heads * capacity, d], and show `width` tokens."""
            self._targets, self._rows, self._width, self._parts = targets, rows, width, parts

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            """Nothing to do: the memory is already allocated."""

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
