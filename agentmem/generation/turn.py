"""One turn as a transaction: messages and a state in, a reply and a new state out, or nothing at all.

The walk (docs/engine.md draws it): context-only passes over new messages that are not shown; the prompt, consumed
messages read with writes off and new ones written; the reply, decoded token by token; its text cut where it ends; the
tokens that close it. A turn is a generator that yields between forward passes. It changes nothing but the cache of
prefills, which can only save time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from agentmem.delta.config import WriteStrategy
from agentmem.errors import MissingAdapterError
from agentmem.generation.detokenize import Detokenizer, StopFinder
from agentmem.generation.guided import Constraint
from agentmem.generation.kv_cache import Prefill, Prompt
from agentmem.generation.output_parser import Delta, InvalidToolCall, OutputParser
from agentmem.generation.plan import Plan, Request, plan_remember, plan_turn
from agentmem.generation.sampling import Sampler
from agentmem.generation.scheduler import Steps
from agentmem.generation.session import Runtime, Session, Snapshot
from agentmem.messages import Message
from agentmem.prompt.sentences import sentence_numbers
from agentmem.record import ConsumedRecord, OnEdit
from agentmem.state import MemoryState

Emit = Callable[[Delta], None]
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Usage:
    """Tokens of one turn: shown in the prompt, decoded, and prompt tokens whose KV was at hand.

    ``carried_tokens`` of the latter came from an earlier turn (``kv="carry"``): the reply rests on an older state too.
    """

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    carried_tokens: int = 0


@dataclass(frozen=True)
class Turn:
    """What a turn returns.

    Attributes:
        message: the reply; its content is the text outside reasoning and calls.
        state: the new state; the one given for write="off", and for a turn without memory.
        reasoning: what stood between ``<think>`` and ``</think>``.
        invalid_tool_calls: calls that could not be read.
        finish_reason: "stop", "length" or "tool_calls".
        usage: token counts.
        written, read: tokens written into the memory, and shown without being written.
        edits: indices of messages that were new before consumed ones (``on_edit="write"``).
        token_ids: the reply's tokens as the model was fed them, without the generation prompt and the closing tokens.
    """

    message: Message
    state: MemoryState | None
    reasoning: str
    invalid_tool_calls: tuple[InvalidToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    written: int
    read: int
    edits: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Remembered:
    """What a context-only write returns: the new state, tokens written, and edits as in ``Turn``."""

    state: MemoryState
    written: int
    edits: tuple[int, ...]


def run_remember(
    runtime: Runtime, messages: Sequence[Message], state: MemoryState | None, on_edit: OnEdit
) -> Steps[Remembered]:
    """Write messages without a reply."""
    given = runtime.zero_state() if state is None else state
    session = Session(runtime, runtime.to_tensor(given))
    plan = plan_remember(messages, given.record, runtime.transcript, _strategy(runtime), runtime.limit, on_edit)
    yield from _write_hidden(runtime, session, plan)
    assert session.state is not None
    new_state = yield from runtime.to_state(session.state, plan.record.extend(plan.new))
    return Remembered(new_state, _written(plan), plan.edits)


def run_turn(runtime: Runtime, request: Request, state: MemoryState | None, emit: Emit) -> Steps[Turn]:
    """Answer the last message."""
    if state is not None and request.memory and runtime.steered is None:
        raise MissingAdapterError(
            "this engine has no adapter and takes no state; load one with adapter=, or pass memory=False"
        )
    steered = runtime.steered is not None and request.memory
    given = (state if state is not None else runtime.zero_state()) if steered else None
    session = Session(runtime, runtime.to_tensor(given) if given is not None else None)
    record = given.record if given is not None else ConsumedRecord.empty()
    if not steered:
        request = replace(request, memory=False)
    plan = plan_turn(request, record, runtime.transcript, _strategy(runtime), runtime.limit)
    constraint = _constraint(runtime, request, plan)
    yield from _write_hidden(runtime, session, plan)
    speaks = steered and request.write == "all"
    key = _key(given, plan, _voice(runtime, speaks))
    prefill, hit, carried = yield from _prefill(runtime, session, plan, key, _carried(runtime, request, given, plan))
    reply = _Reply(runtime, request, session, plan, speaks, emit, constraint)
    whole = True  # the session's own cache has all that was read, or what was read before the reply
    try:
        try:
            yield from reply.decode()
            if speaks:
                yield from reply.commit()
            if request.kv == "carry":
                whole = session.stand_up()
        finally:
            session.stop_sharing()
    except GeneratorExit:
        # Cancelled between two forward passes: if none failed, every layer holds the same tokens.
        if not session.torn and not carried:
            runtime.prefix.put(key, prefill)
        raise
    parsed = reply.parser.parsed()
    message = Message("assistant", parsed.content, parsed.tool_calls)
    out = state
    if session.state is not None and request.write != "off":
        out = yield from runtime.to_state(session.state, plan.record.extend([*plan.new, message]))
    if out is not None and steered and whole and request.kv == "carry":
        runtime.carried.put(out.digest, [*key.ids, *reply.ids, *runtime.transcript.closing_ids()], session.cache)
    # After an error inside a forward pass the KV may be torn between layers; then it is dropped.
    if whole and not carried:
        runtime.prefix.put(key, prefill)
    finish = "tool_calls" if parsed.tool_calls and reply.finish == "stop" else reply.finish
    return Turn(
        message=message,
        state=out,
        reasoning=parsed.reasoning,
        invalid_tool_calls=parsed.invalid_tool_calls,
        finish_reason=finish,
        usage=Usage(len(plan.prompt.ids) + len(plan.opening), len(reply.decoder.ids), hit, carried),
        written=_written(plan) + reply.written,
        read=plan.prompt.writes.count(False) if steered else 0,
        edits=plan.edits,
        token_ids=tuple(reply.ids),
    )


def _budget(runtime: Runtime, request: Request, plan: Plan) -> int:
    """Most tokens of the reply: as many as asked for and the model can still take; closing tokens need some places."""
    return min(request.sampling.max_tokens, runtime.limit - len(plan.prompt.ids) - len(plan.opening) - 8)


def _thinks(runtime: Runtime, plan: Plan) -> bool:
    """Whether the prompt ends within a region of reasoning."""
    opening: str = runtime.tokenizer.decode(plan.opening)
    return opening.rstrip().endswith("<think>")


def _constraint(runtime: Runtime, request: Request, plan: Plan) -> Constraint | None:
    if request.form is None:
        return None
    thinking, budget = _thinks(runtime, plan), _budget(runtime, request, plan)
    return runtime.grammars.constraint(request.form, thinking=thinking, budget=budget)


def _written(plan: Plan) -> int:
    return sum(sum(piece.writes) for piece in [*plan.hidden, plan.prompt])


def _strategy(runtime: Runtime) -> WriteStrategy:
    return runtime.steered.config.write_strategy if runtime.steered is not None else "token"


def _write_hidden(runtime: Runtime, session: Session, plan: Plan) -> Steps[None]:
    """The context-only passes, each with KV of its own."""
    if plan.rebuild and runtime.steered is not None:
        session.state = runtime.steered.zeros()
    for piece in plan.hidden:
        yield from session.feed(piece.ids, piece.segments)
        session.fresh_cache()


def _voice(runtime: Runtime, speaks: bool) -> int:
    """The segment of a reply's tokens while it is decoded: 0, or -1 where they only read.

    Sentences are known only when the reply is whole; until then a sentence adapter only reads.
    """
    return 0 if speaks and _strategy(runtime) != "sentence" else -1


def _key(given: MemoryState | None, plan: Plan, voice: int) -> Prompt:
    """What the prefill follows from. Matrices stay on the device: those it starts from follow from what is given."""
    segments = [*plan.prompt.segments, *([voice] * len(plan.opening))]
    start = hashlib.sha256(b"bare" if given is None else b"zeros" if plan.rebuild else given.data)
    for piece in plan.hidden:
        start.update(repr((piece.ids, piece.segments)).encode())
    return Prompt(start.digest(), (*plan.prompt.ids, *plan.opening), tuple(segments), plan.border)


def _carried(runtime: Runtime, request: Request, given: MemoryState | None, plan: Plan) -> Any:
    """KV of an earlier turn for what the prompt begins with, where that is asked for and at hand.

    Only for what is not written: a token that writes has to be read with this turn's own state.
    """
    if request.kv != "carry" or given is None:
        return None
    return runtime.carried.find(given.digest, plan.prompt.ids[: plan.border])


def _prefill(
    runtime: Runtime, session: Session, plan: Plan, key: Prompt, carried: Any
) -> Steps[tuple[Prefill, int, int]]:
    """Read the prompt and the generation prompt.

    Returns:
        The prefill, how many of its tokens were at hand, and how many of these were carried from an earlier turn.
    """
    border, prompt, hit = plan.border, plan.prompt, 0
    if carried is not None:
        session.cache, hit = carried, int(carried.get_seq_length())
    elif (found := runtime.prefix.take(key)) is not None:
        session.cache, hit = found.cache, found.length
        if found.logits is not None:
            session.logits, session.state, session.pending = found.logits, found.state, found.pending
            return found, hit, 0
    yield from session.feed(prompt.ids[hit:border], prompt.segments[hit:border])
    if _strategy(runtime) == "token":
        yield from session.feed(key.ids[border:], key.segments[border:], logits=True)
    else:
        end = len(prompt.ids)
        yield from session.feed(key.ids[border:end], key.segments[border:end])
        yield from session.feed(key.ids[end:], key.segments[end:], logits=True, close=False)
    prefill = Prefill(session.cache, len(key.ids), session.state, session.logits, session.pending)
    return prefill, hit, hit if carried is not None else 0


class _Reply:
    """Decodes one reply and, where the policy says so, leaves the state as if exactly its tokens had been fed."""

    def __init__(
        self,
        runtime: Runtime,
        request: Request,
        session: Session,
        plan: Plan,
        speaks: bool,
        emit: Emit,
        constraint: Constraint | None,
    ) -> None:
        self._runtime = runtime
        self._request = request
        self._session = session
        self._opening = plan.opening
        self._emit = emit
        self._late = _strategy(runtime) == "sentence"
        self._segment = _voice(runtime, speaks)
        self.decoder = Detokenizer(runtime.tokenizer)
        # Ids of calls follow from what was consumed before them, so that they are known when a call begins.
        seed = hashlib.sha256(plan.record.extend(plan.new).chain).digest()
        self.parser = OutputParser(
            runtime.tags,
            seed,
            "reasoning" if _thinks(runtime, plan) else "text",
            json_text=request.form is not None and request.form.schema is not None,
        )
        self._constraint = constraint
        self._most = _budget(runtime, request, plan)
        self.ids: list[int] = []
        self.finish: Literal["stop", "length"] = "stop"
        self.written = 0
        self._text = ""
        self._fed = 0
        self._shown = 0
        self._start = session.snapshot()
        # Where the session stood before and between the tokens that may still be cut off.
        self._held: dict[int, Snapshot] = {0: self._start}

    def decode(self) -> Steps[None]:
        """Sample until an end token, a stop string, or a limit; then settle text and tokens."""
        sampling, decoder, session, constraint = self._request.sampling, self.decoder, self._session, self._constraint
        sampler = Sampler(sampling)
        stops = StopFinder(sampling.stop)
        session.sampler = sampler if constraint is None else None
        cut: int | None = None
        while True:
            # What has to come waits until it is known what else does, and is then read at once.
            token = constraint.follow() if constraint is not None else None
            if token is None:
                yield from self._read()
                assert session.logits is not None
                if constraint is None:
                    token = sampler.choose(session.logits, session.chosen)
                else:
                    token = constraint.take(sampler.choose(constraint.mask(session.logits)))
            if token in self._runtime.end_ids:
                break
            decoder.push(token)
            cut = stops.find(decoder.text)
            if cut is not None:
                break
            self._show(stops.safe(decoder.text))
            if len(decoder.ids) >= self._most:
                self.finish = "length"
                break
        session.sampler = None
        if constraint is not None and constraint.closing:
            self.finish = "length"
        self._settle(len(decoder.text) if cut is None else cut)

    def _read(self) -> Steps[None]:
        """Feed the tokens that the model has not seen yet."""
        waiting = self.decoder.ids[self._fed :]
        if waiting:
            yield from self._session.read(waiting, self._segment)
            self._fed += len(waiting)
            self._held[self._fed] = self._session.snapshot()

    def commit(self) -> Steps[None]:
        """Feed what is left of the reply and the tokens that close it; the reply is then written."""
        session, runtime = self._session, self._runtime
        closing = runtime.transcript.closing_ids()
        if self._late:
            session.rewind(self._start)
            numbers = sentence_numbers(self._text, self.ids, self._encode)
            yield from session.feed([*self.ids, *closing], [*numbers, *(-1 for _ in closing)])
            self.written = len(numbers)
        else:
            rest = [*self.ids[self._fed :], *closing]
            yield from session.feed(rest, [self._segment] * len(rest))
            self.written = len(self._opening) + len(self.ids) + len(closing)

    def _settle(self, length: int) -> None:
        """Cut the reply to its first ``length`` characters: text, tokens, and the place of the session."""
        decoder = self.decoder
        kept = decoder.tokens_within(length)
        self._text = decoder.text[:length]
        self._show(length)
        # What a cut leaves of the token that it goes through.
        remainder = self._text[decoder.ends[kept - 1] if kept else 0 :]
        rest = self._encode(remainder) if remainder else []
        self._deliver([*self.parser.push(-1, remainder), *self.parser.finish()])
        self.ids = [*decoder.ids[:kept], *rest]
        if self._fed > kept:  # what of it is kept after all is fed again
            self._fed = max(place for place in self._held if place <= kept)
            self._session.rewind(self._held[self._fed])

    def _show(self, safe: int) -> None:
        """Hand on the tokens whose text can no longer be cut, and forget the places before them."""
        decoder = self.decoder
        whole = decoder.tokens_within(safe)
        for index in range(self._shown, whole):
            start = decoder.ends[index - 1] if index else 0
            self._deliver(self.parser.push(decoder.ids[index], decoder.text[start : decoder.ends[index]]))
        self._shown = max(self._shown, whole)
        last = max(place for place in self._held if place <= self._shown)
        self._held = {place: held for place, held in self._held.items() if place >= last}

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self._emit(delta)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._runtime.tokenizer.encode(text, add_special_tokens=False)
        return ids
