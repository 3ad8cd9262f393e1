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

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agentmem.delta.model import SteeredModel
from agentmem.delta.passes import Pending, joined_ids, row_of
from agentmem.errors import ConfigError
from agentmem.generation.batch_cache import Block
from agentmem.generation.cuda_graph import CannotCapture, Captures, Replay, bare, replays
from agentmem.generation.sampling import Sampler, choose_all
from agentmem.generation.scheduler import Shared, Team

if TYPE_CHECKING:
    from agentmem.generation.session import Runtime, Session

_logger = logging.getLogger(__name__)
_PATIENCE = 64  # full passes after which larger ones are tried again; twice as many each time that they do not fit
_LONGEST_PATIENCE = 8192
_TRIES = 2  # captures one after another that may fail, as when another thread waits for the device meanwhile
_IDLE = 16  # this part of a device's memory may hold rows in which nobody sits
_SMALLEST = 256  # tokens that a row holds; each larger kind of block holds twice as many


class Want(Shared):
    """A session's wish to read one token and know what follows it. ``segment`` -1: the token is not written."""

    def __init__(self, team: Decoding, session: Session, token: int, segment: int) -> None:
        super().__init__(team)
        self.session = session
        self.token = token
        self.segment = segment


class Decoding(Team):
    """The sessions of one engine that decode, in blocks by kind and length.

    Attributes:
        replays: whether they decode in fixed buffers; not any more once these could not be captured.
    """

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
        self.replays = self._together and not runtime.gathers and replays(runtime.device) and _on_one_device(runtime)
        self._captures = Captures(runtime.device)
        self._failed = 0  # captures, since one did not

    def run(self, wants: Sequence[Shared]) -> None:
        """Read a token for each; what goes wrong with one is noted with it."""
        mine = [want for want in wants if isinstance(want, Want)]
        if not self._together or (len(mine) == 1 and not self.replays):
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
                self.release()
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
                self._emptied(seat.block)

    def _emptied(self, block: Block) -> None:
        """Give up a block in which nobody sits; where its passes were captured it may stay, for those who come next."""
        idle = [one for blocks in self._blocks.values() for one in blocks if not one.seats]
        if block.replays and self._may_stay(idle):
            return
        # A pass knows its block, and the block its passes: without this their memory would wait for the collector.
        block.replays.clear()
        for blocks in self._blocks.values():
            if block in blocks:
                blocks.remove(block)

    def _may_stay(self, idle: Sequence[Block]) -> bool:
        device = self._runtime.device
        if device.type == "cuda":
            return sum(one.nbytes for one in idle) <= torch.cuda.get_device_properties(device).total_memory // _IDLE
        return sum(one.tokens for one in idle) <= self._runtime.kv_cache_tokens

    def release(self) -> None:
        """Give up all that is kept for later."""
        for blocks in self._blocks.values():
            for one in blocks:
                one.replays.clear()
            blocks[:] = [one for one in blocks if one.seats]
        if self._runtime.device.type == "cuda":
            torch.cuda.empty_cache()

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
            failed: Exception | None = None
        except Exception as error:  # noqa: BLE001 - whose fault it is comes out when each is alone
            failed = error.with_traceback(None)  # this and where it comes from would keep what the pass held
            failed.__cause__ = failed.__context__ = None
        if failed is None:
            self._failed = 0
            self._grow(len(block.seats))
        elif isinstance(failed, torch.OutOfMemoryError):
            self._halved(block, wants)
        elif isinstance(failed, CannotCapture):
            self._failed += 1
            if self._failed >= _TRIES:
                _logger.warning("decoding goes on without CUDA graphs: a pass cannot be captured (%s)", failed)
                self.replays = False
            self.release()
            self._pass(block, wants)
        else:
            for want in wants:
                self._alone(want)

    def _halved(self, block: Block, wants: Sequence[Want]) -> None:
        """A pass did not fit: in two, for it takes the whole block, so that one half moves to another."""
        self.release()
        if len(wants) == 1:
            self._alone(wants[0])
            return
        half = len(wants) // 2
        self._shrink(half)
        others = [want for want in wants[half:] if self._stood_up(want)]
        self._pass(block, wants[:half])
        self._batch(others)

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
        one_each = [wants.get(row) for row in range(len(block.seats))]
        if self.replays:
            last = self._replayed(block, one_each)
        else:
            kv, positions, allowed = block.view()
            ids = [[0 if want is None else want.token] for want in one_each]
            tokens = torch.tensor(ids, device=runtime.device)
            if next(iter(wants.values())).session.state is None:
                last = bare(runtime.model, tokens, kv, positions, allowed)
            else:
                last = self._steered(block, one_each, tokens, kv, positions, allowed)[:, -1]
        rows = last.unbind()
        chosen = _chosen(last, [None if want is None else want.session.sampler for want in one_each])
        for row, want in wants.items():
            want.session.logits, want.session.chosen = rows[row], chosen[row]
            block.seats[row].length += 1

    def _replayed(self, block: Block, wants: Sequence[Want | None]) -> Tensor:
        """The pass in fixed buffers; gives the logits [rows, V]."""
        like = next(want.session.state for want in wants if want is not None)
        kind = rows, width = 1 << (len(wants) - 1).bit_length(), block.width
        found = block.replays.get(kind) or Replay(self._runtime, block, rows, width, like, self._captures)
        tokens = [0 if want is None else want.token for want in wants]
        places = [seat.length for seat in block.seats]
        if like is None:
            logits, _ = found.run(tokens, places, [False] * len(wants), None)
            block.replays[kind] = found
            return logits
        states, given = block.states([None if want is None else want.session.state for want in wants])
        writes = [want is not None and want.segment >= 0 for want in wants]
        logits, after = found.run(tokens, places, writes, states)
        block.replays[kind] = found
        assert after is not None
        _hand_out(after, wants, writes, given)
        block.keep(after, given)
        return logits

    def _steered(
        self, block: Block, wants: Sequence[Want | None], tokens: Tensor, kv: Any, positions: Tensor, allowed: Tensor
    ) -> Tensor:
        """The same pass with memory: states of all rows, those that write moved on; gives the logits."""
        steered = self._runtime.steered
        assert steered is not None
        if self._runtime.gathers:
            return self._gathered(block, steered, wants, tokens, kv, positions, allowed)
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
            _hand_out(out.state, wants, writes, given)
        block.keep(out.state, given)
        assert out.logits is not None
        logits: Tensor = out.logits
        return logits

    def _gathered(
        self,
        block: Block,
        steered: SteeredModel,
        wants: Sequence[Want | None],
        tokens: Tensor,
        kv: Any,
        positions: Tensor,
        allowed: Tensor,
    ) -> Tensor:
        """The pass of an adapter that writes by message or sentence: states stay, open sums are moved on."""
        states, given = block.states([None if want is None else want.session.state for want in wants])
        opened: list[Pending | None] = [None if want is None else want.session.pending for want in wants]
        before, opened = block.sums(opened, [want is None for want in wants])
        segments = [-1 if want is None else want.segment for want in wants]
        out = steered(
            tokens,
            states,
            position_ids=positions,
            segments=torch.tensor(segments, device=tokens.device)[:, None],
            cache=kv,
            attention_bias=allowed,
            logits_to_keep=1,
            pending=before,
            close=False,
        )
        # Where this fails half-way, the pass is done again, so nobody is given anything before all is there.
        moved: list[tuple[int, Session, Pending]] = []
        for row, (want, segment) in enumerate(zip(wants, segments, strict=True)):
            if want is not None and segment >= 0:
                assert out.pending is not None
                own = joined_ids([segment], want.session.pending)
                moved.append((row, want.session, row_of(out.pending, row, own)))
        for row, session, pending in moved:
            session.pending = opened[row] = pending
        block.keep(out.state, given)
        block.keep_sums(out.pending, opened)
        assert out.logits is not None
        logits: Tensor = out.logits
        return logits


def _chosen(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[int | None]:
    """The token that follows in every row, for all at once: on a GPU every number that is fetched is a wait.

    None where that is not asked for or fails: by now the token is read and written, and must not be read again.
    """
    try:
        return choose_all(logits, samplers)
    except Exception:  # noqa: BLE001 - each session finds it again when it chooses alone
        return [None] * len(samplers)


def _hand_out(states: Tensor, wants: Sequence[Want | None], writes: Sequence[bool], given: list[Tensor]) -> None:
    """Give the states after a pass to those who wrote; the others have the very ones that they had."""
    for row, state in enumerate(torch.split(states, 1)):
        want = wants[row]
        if writes[row] and want is not None:
            want.session.state = given[row] = state


def _on_one_device(runtime: Runtime) -> bool:
    """Whether all weights lie where the tokens are."""
    memory = runtime.steered.memory.parameters() if runtime.steered is not None else ()
    return all(one.device == runtime.device for one in (*runtime.model.parameters(), *memory))


def _can_share(runtime: Runtime) -> bool:
    """Whether rows of one pass can have masks of their own here.

    Attention over windows and flash attention take no mask like ours; some rotary embeddings depend on the longest
    position of a pass. There sessions take turns.
    """
    config = runtime.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    implementation = runtime.model.config._attn_implementation
    rotary = getattr(config, "rope_parameters", None) or {}
    types = {str(one.get("rope_type")) for one in (rotary, *rotary.values()) if isinstance(one, dict)}
    plain = kinds == {"full_attention"} and not windowed and not types & {"longrope", "dynamic"}
    return plain and implementation in ("sdpa", "eager")
