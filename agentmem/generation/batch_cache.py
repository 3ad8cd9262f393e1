"""Rows of KV that sessions share while they decode side by side.

A ``Block`` holds the KV and the states of sessions of about one length, a row each; a ``Seat`` is one of its rows. What
a pass over all rows is given (``Block.view``, ``Block.over``) writes each row's token behind the row's others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import is_not
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agentmem.delta.passes import Pending, side_by_side

if TYPE_CHECKING:
    from agentmem.generation.cuda_graph import Replay


_STEP = 256  # tokens


class Seat:
    """A row in a block, and how many tokens it holds."""

    def __init__(self, block: Block, row: int, length: int) -> None:
        self.block = block
        self.row = row
        self.length = length


class Block:
    """KV and states of some sessions; rows are dense.

    For each layer keys and values [rows, heads, capacity, d]; ``rows`` to begin with, twice as many when they are
    taken. What is not read yet is zero: attention gives it no weight, but no weight times NaN would be NaN.
    """

    def __init__(self, like: Any, capacity: int, rows: int = 1) -> None:
        from transformers import Cache

        self.capacity = capacity
        self.seats: list[Seat] = []
        self._kv = [
            tuple(part.new_zeros(rows, part.shape[1], capacity, part.shape[3]) for part in (layer.keys, layer.values))
            for layer in like.layers
        ]
        self._layers = [_layer_class()() for _ in self._kv]
        self._cache = Cache(layers=self._layers)
        # Passes over so many rows and tokens, with buffers of their own, for as long as the KV lies where it lies.
        self.replays: dict[tuple[int, int], Replay] = {}
        # The states after the last pass, all in one tensor, and the row of it that each session was given.
        self._pool: Tensor | None = None
        self._given: list[Tensor] = []
        # The same of the sums of open passes.
        self._open: Pending | None = None
        self._opened: list[Pending | None] = []

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

        A step is an eighth of a row, or 256 tokens where that is more: so at most a quarter of a long session is looked
        at in vain, where by rows alone, which double, it would be all of it once more.
        """
        longest = max(seat.length for seat in self.seats) + 1
        step = max(_STEP, self.capacity // 8)
        return min(self.capacity, -(-longest // step) * step)

    def sit(self, own: Any, length: int) -> Seat:
        """Copy a session's cache of ``length`` tokens into a new row."""
        row = len(self.seats)
        if row == self._kv[0][0].shape[0]:
            self.replays.clear()
            self._kv = [tuple(torch.cat((part, torch.zeros_like(part))) for part in layer) for layer in self._kv]
        for parts, layer in zip(self._kv, own.layers, strict=True):
            for part, read in zip(parts, (layer.keys, layer.values), strict=True):
                part[row, :, :length] = read[0, :, :length]
        seat = Seat(self, row, length)
        self.seats.append(seat)
        return seat

    def read(self, seat: Seat, own: Any) -> None:
        """Bring a session's own cache to what its row holds now."""
        start = int(own.get_seq_length())
        for index, parts in enumerate(self._kv):
            new = [part[seat.row : seat.row + 1, :, start : seat.length] for part in parts]
            if new[0].shape[2]:
                own.update(*new, index)

    def free(self, seat: Seat) -> None:
        """Give a row up; the last row moves into its place. What is free is zero again."""
        last = self.seats.pop()
        self._pool, self._given = None, []
        self._open, self._opened = None, []
        for parts in self._kv:
            for part in parts:
                if last is not seat:
                    part[seat.row] = part[last.row]
                part[last.row] = 0
        if last is not seat:
            last.row = seat.row
            self.seats[last.row] = last

    def view(self) -> tuple[Any, Tensor, Tensor]:
        """A cache for one more token in every row, the places of those [rows, 1], and where each may look.

        The last [rows, 1, 1, longest + 1] bool. What an earlier call gave is no longer of use.
        """
        lengths = [seat.length for seat in self.seats]
        places = torch.tensor(lengths, device=self._kv[0][0].device)[:, None]
        cache, allowed = self.over(places, max(lengths) + 1)
        return cache, places, allowed

    def over(self, places: Tensor, width: int) -> tuple[Any, Tensor]:
        """A cache of the first rows for one more token each, at ``places`` [rows, 1], and where each may look.

        The last [rows, 1, 1, width] bool. Nothing of it depends on numbers that a device holds.
        """
        rows = places.shape[0]
        behind: dict[tuple[int, torch.device], Tensor] = {}
        for layer, parts in zip(self._layers, self._kv, strict=True):
            heads, at = parts[0].shape[1], parts[0].device
            if (heads, at) not in behind:  # the same for all layers but in odd models
                starts = torch.arange(0, rows * heads * self.capacity, self.capacity, device=at).view(rows, heads)
                behind[heads, at] = (starts + places.to(at)).view(-1)
            layer.point(parts, behind[heads, at], rows, width)
        allowed = torch.arange(width, device=places.device) <= places
        return self._cache, allowed[:, None, None]

    def states(self, wanted: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """The states of all rows in one tensor, and one by one; where none is wanted any will do.

        Without a copy where they are as the last pass left them.
        """
        known = len(self._given)
        spare = next(state for state in wanted if state is not None)
        given = [
            state if state is not None else self._given[row] if row < known else spare
            for row, state in enumerate(wanted)
        ]
        if self._pool is None or len(given) != known or any(map(is_not, given, self._given)):
            return torch.cat(given), given
        return self._pool, given

    def keep(self, states: Tensor, given: list[Tensor]) -> None:
        """Remember the states after a pass, and which tensor each row's session has them in."""
        self._pool, self._given = states, given

    def sums(
        self, wanted: Sequence[Pending | None], out: Sequence[bool]
    ) -> tuple[Pending | None, list[Pending | None]]:
        """The open passes of all rows as one, and one by one; a row that sits ``out`` may have any.

        Without a copy where they are as the last pass left them.
        """
        known = len(self._opened)
        given = [
            self._opened[row] if absent and row < known else one
            for row, (one, absent) in enumerate(zip(wanted, out, strict=True))
        ]
        if self._open is None or len(given) != known or any(map(is_not, given, self._opened)):
            return side_by_side(given), given
        return self._open, given

    def keep_sums(self, pending: Pending | None, given: list[Pending | None]) -> None:
        """Remember the open passes after a pass, and what each row's session has of them."""
        self._open, self._opened = pending, given


@cache
def _layer_class() -> Any:
    """One layer of a block as transformers takes it: an update writes each row's token behind the row's others."""
    from transformers.cache_utils import CacheLayerMixin

    class Layer(CacheLayerMixin):  # type: ignore[misc]
        def point(self, parts: tuple[Tensor, ...], at: Tensor, rows: int, width: int) -> None:
            """Write at ``at`` into ``parts`` taken as [rows * heads * capacity, d], and show ``width`` tokens."""
            self._at, self._rows, self._width, self._parts = at, rows, width, parts

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            """Nothing to do: the block is there."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            keys, values = self._parts
            for part, new in ((keys, key_states), (values, value_states)):
                d = part.shape[3]
                part.view(-1, d).index_copy_(0, self._at, new.reshape(-1, d))
            return keys[: self._rows, :, : self._width], values[: self._rows, :, : self._width]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self._width, 0

        def get_seq_length(self) -> int:
            return self._width - 1

        def get_max_length(self) -> int:
            return int(self._parts[0].shape[2])

    return Layer
