"""Decodes the next token of many sessions in one forward pass.

A session that decodes beside others has a *seat*: a row in a block of KV that it shares with sessions of about its
length. It takes the seat when it first meets others and stands up when it has to do something of its own (read several
tokens, go back); the tokens that it read there then go to its own cache. Between two tokens sessions come and go. Rows
share the weights and nothing else: each has its own state, length and mask, and a row that sits a token out is neither
written nor moved on.

A pass that runs out of memory is split in halves, and for a while no block grows as large again; one that fails is done
again row by row, so that the failure is that of the session that causes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import is_not
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agentmem.errors import ConfigError
from agentmem.steered import mask_for
from agentmem.worker import Shared, Team

if TYPE_CHECKING:
    from agentmem.session import Runtime, Session

_PATIENCE = 64  # full passes after which larger ones are tried again; twice as many each time that they do not fit
_LONGEST_PATIENCE = 8192
_SMALLEST = 256  # tokens that a row holds; each larger kind of block holds twice as many


class Want(Shared):
    """A session's wish to read one token and know what follows it. ``segment`` -1: the token is not written."""

    def __init__(self, team: Decoding, session: Session, token: int, segment: int) -> None:
        super().__init__(team)
        self.session = session
        self.token = token
        self.segment = segment


class Seat:
    """A row in a block, and how many tokens it holds."""

    def __init__(self, block: Block, row: int, length: int) -> None:
        self.block = block
        self.row = row
        self.length = length


class Block:
    """KV and states of some sessions; rows are dense.

    For each layer keys and values [rows, heads, capacity, d]. What is not read yet is zero: attention gives it no
    weight, but no weight times NaN would be NaN.
    """

    def __init__(self, like: Any, capacity: int) -> None:
        from transformers import Cache

        self.capacity = capacity
        self.seats: list[Seat] = []
        self._kv = [
            tuple(part.new_zeros(1, part.shape[1], capacity, part.shape[3]) for part in (layer.keys, layer.values))
            for layer in like.layers
        ]
        self._layers = [_layer_class()() for _ in self._kv]
        self._cache = Cache(layers=self._layers)
        # The states after the last pass, all in one tensor, and the row of it that each session was given.
        self._pool: Tensor | None = None
        self._given: list[Tensor] = []

    def sit(self, own: Any, length: int) -> Seat:
        """Copy a session's cache of ``length`` tokens into a new row."""
        row = len(self.seats)
        if row == self._kv[0][0].shape[0]:
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
        device = self._kv[0][0].device
        lengths = [seat.length for seat in self.seats]
        rows, width = len(lengths), max(lengths) + 1
        places = torch.tensor(lengths, device=device)[:, None]
        behind: dict[tuple[int, torch.device], Tensor] = {}
        for layer, parts in zip(self._layers, self._kv, strict=True):
            heads, at = parts[0].shape[1], parts[0].device
            if (heads, at) not in behind:  # the same for all layers but in odd models
                starts = torch.arange(0, rows * heads * self.capacity, self.capacity, device=at).view(rows, heads)
                behind[heads, at] = (starts + places.to(at)).view(-1)
            layer.point(parts, behind[heads, at], rows, width)
        allowed = torch.arange(width, device=device) <= places
        return self._cache, places, allowed[:, None, None]

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


class Decoding(Team):
    """The sessions of one engine that decode, in blocks by kind and length."""

    def __init__(self, runtime: Runtime, max_batch: int) -> None:
        """``max_batch``: sessions in one pass; further ones are in another.

        Raises:
            ConfigError: not 1 or more.
        """
        if max_batch < 1:
            raise ConfigError(f"max_batch must be 1 or more; found {max_batch}")
        self._runtime = runtime
        self._limit = self._most = max_batch
        self._patience = _PATIENCE
        self._fitted = 0  # passes of as many rows as may be now, since that last changed
        self._grew = False  # whether it then became more
        self._blocks: dict[tuple[bool, int], list[Block]] = {}
        self._together = max_batch > 1 and _can_share(runtime)

    def run(self, wants: Sequence[Shared]) -> None:
        """Read a token for each; what goes wrong with one is noted with it."""
        mine = [want for want in wants if isinstance(want, Want)]
        if len(mine) == 1 or not self._together:
            for want in mine:
                self._alone(want)
            return
        self._batch(mine)

    def _batch(self, wants: Sequence[Want]) -> None:
        by_block: dict[int, tuple[Block, list[Want]]] = {}
        for want in wants:
            if not self._moved(want):
                continue
            try:
                block = self._seated(want.session)
            except torch.OutOfMemoryError:  # the session's own cache is as it was
                self._alone(want)
                continue
            by_block.setdefault(id(block), (block, []))[1].append(want)
        for block, group in by_block.values():
            self._pass(block, group)

    def leave(self, session: Session, *, keep: bool) -> None:
        """Stand up; ``keep``: what was read in the seat is wanted."""
        seat = session.seat
        if seat is None:
            return
        session.seat = None
        try:
            if keep:
                seat.block.read(seat, session.cache)
        finally:
            seat.block.free(seat)
            if not seat.block.seats:
                for blocks in self._blocks.values():
                    if seat.block in blocks:
                        blocks.remove(seat.block)

    def _seated(self, session: Session) -> Block:
        """The block that a session sits in, with room for one more token."""
        if session.seat is not None:
            return session.seat.block
        length, capacity = session.length, _SMALLEST
        while capacity <= length + 1:
            capacity *= 2
        blocks = self._blocks.setdefault((session.state is not None, capacity), [])
        block = next((one for one in blocks if len(one.seats) < self._most), None)
        made = Block(session.cache, capacity) if block is None else block
        session.seat = made.sit(session.cache, length)
        if block is None:  # only now: where there was no room for the session, nothing is kept for it
            blocks.append(made)
        return made

    def _moved(self, want: Want) -> bool:
        """Let a session that has outgrown its row stand up; a failure is its own. Says whether it can go on.

        A place is kept free: a pass writes behind the last token of every row, also of those that sit it out.
        """
        seat = want.session.seat
        if seat is None or seat.length + 1 < seat.block.capacity:
            return True
        return self._stood_up(want)

    def _stood_up(self, want: Want) -> bool:
        try:
            self.leave(want.session, keep=True)
        except Exception as error:  # noqa: BLE001 - what was read in the seat is lost with it
            want.session.torn = True
            want.error = error
            return False
        return True

    def _pass(self, block: Block, wants: Sequence[Want]) -> None:
        """One forward pass over all rows of a block, of which ``wants`` go on."""
        try:
            self._forward(block, {want.session.seat.row: want for want in wants if want.session.seat is not None})
        except torch.OutOfMemoryError:
            if self._runtime.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(wants) == 1:
                self._alone(wants[0])
                return
            # A pass takes the whole block, so one half moves to another.
            half = len(wants) // 2
            self._shrink(half)
            others = [want for want in wants[half:] if self._stood_up(want)]
            self._pass(block, wants[:half])
            self._batch(others)
        except Exception:  # noqa: BLE001 - whose fault it is comes out when each is alone
            for want in wants:
                self._alone(want)
        else:
            self._grow(len(block.seats))

    def _shrink(self, rows: int) -> None:
        """More than so many did not fit: no block grows larger for now, and for longer where that was tried in vain."""
        if self._grew:
            self._patience = min(2 * self._patience, _LONGEST_PATIENCE)
        self._most, self._fitted, self._grew = max(1, min(self._most, rows)), 0, False

    def _grow(self, rows: int) -> None:
        """So many did fit: when all that may be often did, those who come may sit down in larger blocks again."""
        if rows < self._most or self._most == self._limit:
            return
        self._fitted += 1
        if self._fitted >= self._patience:
            self._most, self._fitted, self._grew = min(2 * self._most, self._limit), 0, True

    def _alone(self, want: Want) -> None:
        if not self._stood_up(want):
            return
        try:
            want.session.forward([want.token], [want.segment], logits=True, close=False)
        except Exception as error:  # noqa: BLE001 - the session's job gets it
            want.session.torn = True
            want.error = error

    def _forward(self, block: Block, wants: dict[int, Want]) -> None:
        runtime = self._runtime
        kv, positions, allowed = block.view()
        count = len(block.seats)
        one_each = [wants.get(row) for row in range(count)]
        tokens = torch.tensor([[0 if want is None else want.token] for want in one_each], device=runtime.device)
        if next(iter(wants.values())).session.state is None:
            out = runtime.model(
                input_ids=tokens,
                attention_mask=mask_for(runtime.model, allowed),
                position_ids=positions,
                past_key_values=kv,
                use_cache=True,
            )
            logits = out.logits
        else:
            logits = self._steered(block, one_each, tokens, kv, positions, allowed)
        last = logits[:, -1].unbind()
        for row, want in wants.items():
            want.session.logits = last[row]
            block.seats[row].length += 1

    def _steered(
        self, block: Block, wants: Sequence[Want | None], tokens: Tensor, kv: Any, positions: Tensor, allowed: Tensor
    ) -> Tensor:
        """The same pass with memory: states of all rows, those that write moved on; gives the logits."""
        steered = self._runtime.steered
        assert steered is not None
        states, given = block.states([None if want is None else want.session.state for want in wants])
        writes = [want is not None and want.segment >= 0 for want in wants]
        out = steered(
            tokens,
            states,
            position_ids=positions,
            write=all(writes) or (any(writes) and torch.tensor(writes, device=tokens.device)[:, None]),
            cache=kv,
            attention_bias=allowed,
            logits_to_keep=1,
        )
        if any(writes):
            for row, state in enumerate(torch.split(out.state, 1)):
                want = wants[row]
                if writes[row] and want is not None:  # elsewhere the state is the very one that was given
                    want.session.state = given[row] = state
        block.keep(out.state, given)
        assert out.logits is not None
        logits: Tensor = out.logits
        return logits


def _can_share(runtime: Runtime) -> bool:
    """Whether rows of one pass can have masks of their own here, and states that are whole after every token.

    Attention over windows and flash attention take no mask like ours; some rotary embeddings depend on the longest
    position of a pass; adapters that write by message or sentence keep sums of an open pass. There sessions take turns.
    """
    config = runtime.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    by_token = runtime.steered is None or runtime.steered.config.write_strategy == "token"
    implementation = runtime.model.config._attn_implementation
    rotary = getattr(config, "rope_parameters", None) or {}
    types = {str(one.get("rope_type")) for one in (rotary, *rotary.values()) if isinstance(one, dict)}
    plain = kinds == {"full_attention"} and not windowed and not types & {"longrope", "dynamic"}
    return by_token and plain and implementation in ("sdpa", "eager")
