"""One turn as a transaction: messages and a state in, a reply and a new state out, or nothing at all.

The steps (drawn in docs/engine.md): everything is decided (`plan_turn`); new messages that are not shown are written
(`catch_up`); the prompt is read, consumed messages with writes off and new ones with writes on (`prefill`); the reply
is decoded token by token and cut where it ends (`decode`); the tokens that close it are fed, and the state is copied
from the device (`finish`). A turn is a generator that yields between forward passes. It changes nothing but the KV
caches, which only save time.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from agentmem.errors import MissingAdapterError
from agentmem.generation.batch import DecodeBatch
from agentmem.generation.guided import Constraint, Grammars
from agentmem.generation.kv_cache import Prefill, PrefillCache, StaleKVCache
from agentmem.generation.output_parser import (
    Delta,
    Detokenizer,
    InvalidToolCall,
    OutputParser,
    ParsedReply,
    StopFinder,
    Tags,
)
from agentmem.generation.plan import CatchUp, Plan, Request, Truncation, plan_remember, plan_turn
from agentmem.generation.runner import ModelRunner
from agentmem.generation.sampling import Sampler
from agentmem.generation.sequence import DecodeRequest, Sequence, Snapshot, Steps
from agentmem.messages import Message
from agentmem.prompt.transcript import Transcript, sentence_numbers
from agentmem.record import OnEdit
from agentmem.state import MemoryState

Emit = Callable[[Delta], None]
FinishReason = Literal["stop", "length", "tool_calls"]

CHUNK_TOKENS = 1024
"""Most tokens in one forward pass. A constant, so that a prompt is always cut into the same chunks."""
_FEW = 8  # up to so many tokens are read with other sequences; for more, the KV is copied out of the row


@dataclass(frozen=True)
class Usage:
    """Token counts of one turn: shown in the prompt, decoded, and prompt tokens whose KV was reused.

    Of the latter, `carried_tokens` came from an earlier turn (`kv="carry"`), so the reply also depends on an older
    state.
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
        state: the new state; the given one for write="off" and for a turn without memory.
        reasoning: the text between `<think>` and `</think>`.
        invalid_tool_calls: calls that could not be parsed.
        finish_reason: "stop", "length" or "tool_calls".
        usage: token counts.
        written, read: numbers of tokens that were written into the memory, and that were shown without being
            written.
        edits: indices of new messages that come before consumed ones (`on_edit="write"`).
        token_ids: the reply's tokens as they were fed to the model, without the generation prompt and the closing
            tokens.
        deletions: how many consumed messages are missing from the history, although a later consumed one is there.
        truncation: the part of the last message, or of tool results that belong to it, for which the model's
            context had no room; None: nothing was cut. The whole message was written to memory all the same.
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
    deletions: int = 0
    truncation: Truncation | None = None


@dataclass(frozen=True)
class Remembered:
    """The result of a context-only write: the new state, tokens written, edits and deletions as in `Turn`."""

    state: MemoryState
    written: int
    edits: tuple[int, ...]
    deletions: int = 0


@dataclass(frozen=True)
class TurnContext:
    """What all turns of an engine share; nothing that belongs to a single turn.

    Attributes:
        runner: the model.
        batch: decodes single tokens of many sequences at once.
        tokenizer: the tokenizer as loaded.
        transcript: renders messages with the chat template.
        closing_ids: returns the tokens with which the template closes a reply.
        end_ids: tokens that end a reply.
        tags: delimiters of reasoning and tool calls.
        grammars: makes constraints for replies with a format.
        prefills: recent prefills.
        stale_kv: KV of turns with `kv="carry"`.
    """

    runner: ModelRunner
    batch: DecodeBatch
    tokenizer: Any
    transcript: Transcript
    closing_ids: Callable[[], list[int]]
    end_ids: frozenset[int]
    tags: Tags
    grammars: Grammars
    prefills: PrefillCache
    stale_kv: StaleKVCache


@dataclass(frozen=True)
class Prompt:
    """A prompt that was read: its prefill for later use, and how many of its tokens had KV in a cache.

    `carried_tokens` of these came from an earlier turn.
    """

    prefill: Prefill
    cache_read_tokens: int = 0
    carried_tokens: int = 0


@dataclass(frozen=True)
class Reply:
    """A reply that was decoded and cut.

    Attributes:
        text: the whole text, tags and calls included.
        ids: its tokens.
        parsed: the text split into its parts.
        finish_reason: "stop" or "length".
        decoded: how many tokens were chosen, including those that were cut off.
        fed: how many of `ids` the sequence has read.
        start: the position of the sequence before the reply.
    """

    text: str
    ids: list[int]
    parsed: ParsedReply
    finish_reason: Literal["stop", "length"]
    decoded: int
    fed: int
    start: Snapshot


def prepare_remember(
    context: TurnContext, messages: abc.Sequence[Message], state: MemoryState | None, on_edit: OnEdit
) -> CatchUp:
    """Decide a write without a reply; the model is not touched."""
    runner = context.runner
    start = runner.zero_state() if state is None else state
    runner.require_fit(start)
    assert runner.strategy is not None
    return plan_remember(messages, start, context.transcript, runner.strategy, runner.context_limit, on_edit)


def run_remember(
    context: TurnContext,
    messages: abc.Sequence[Message],
    state: MemoryState | None,
    on_edit: OnEdit,
    prepared: CatchUp | None = None,
) -> Steps[Remembered]:
    """Write messages without a reply; `prepared`: as in `run_turn`."""
    plan = prepare_remember(context, messages, state, on_edit) if prepared is None else prepared
    sequence = yield from catch_up(context, plan)
    assert sequence.state is not None
    new_state = yield from context.runner.save_state(sequence.state, plan.record)
    return Remembered(new_state, plan.written, plan.edits, plan.deletions)


def prepare_turn(context: TurnContext, request: Request, state: MemoryState | None) -> tuple[Plan, Constraint | None]:
    """Decide a turn, and make the grammar of its reply where it has one; the model is not touched."""
    runner, memory = context.runner, request.options["memory"]
    if state is not None and memory and runner.steered is None:
        raise MissingAdapterError(
            "this engine has no adapter and takes no state; load one with adapter=, or pass memory=False"
        )
    start = None
    if memory and runner.steered is not None:
        start = runner.zero_state() if state is None else state
        runner.require_fit(start)
    plan = plan_turn(request, start, context.transcript, runner.strategy or "token", runner.context_limit)
    guide = None
    if plan.form is not None:
        guide = context.grammars.constraint(plan.form, thinking=plan.thinking, budget=plan.budget)
    return plan, guide


def run_turn(
    context: TurnContext,
    request: Request,
    state: MemoryState | None,
    emit: Emit | None = None,
    prepared: tuple[Plan, Constraint | None] | None = None,
) -> Steps[Turn]:
    """Answer the last message.

    Args:
        emit: is given the reply as it is decoded.
        prepared: what `prepare_turn` gave; None: it is the first step.
    """
    plan, guide = prepare_turn(context, request, state) if prepared is None else prepared
    sequence = yield from catch_up(context, plan)
    prompt = yield from prefill(context, plan, sequence)
    try:
        try:
            reply = yield from decode(context, plan, sequence, guide, emit)
            return (yield from finish(context, plan, sequence, prompt, reply, state))
        finally:
            if sequence.row is not None:
                context.batch.leave(sequence, keep=False)
    except GeneratorExit:
        # Cancelled between two forward passes: if none failed, all layers hold the same tokens.
        _keep_prefill(context, plan, sequence, prompt)
        raise


def catch_up(context: TurnContext, plan: CatchUp) -> Steps[Sequence]:
    """Write new messages that are not shown, in passes with separate KV; returns the turn's sequence."""
    from transformers import DynamicCache

    # Made without the model's config, so that every layer keeps all its KV, even sliding ones, and can be cut back.
    sequence = Sequence(None if plan.start is None else context.runner.load_state(plan.start), DynamicCache())
    for chunk in plan.catch_up_chunks:
        yield from _feed(context, sequence, chunk.ids, chunk.segments, close=chunk.closes, reply_from=len(chunk.ids))
        sequence.cache = DynamicCache()  # the next pass begins at position 0 again
    return sequence


def prefill(context: TurnContext, plan: Plan, sequence: Sequence) -> Steps[Prompt]:
    """Read the prompt and the generation prompt, except for tokens whose KV is in a cache."""
    key, n, length = plan.prefill_key, plan.read_only_prefix_len, 0
    stale = None
    if plan.stale_kv is not None:
        # Only for tokens that are not written: a token that is written must be read with this turn's own state.
        stale = context.stale_kv.find(plan.stale_kv, plan.cache_salt, plan.prompt.ids[:n])
    if stale is not None:
        sequence.cache, length = stale, int(stale.get_seq_length())
    elif (hit := context.prefills.take(key)) is not None:
        sequence.cache, length = hit.cache, hit.length
        if hit.logits is not None:
            sequence.logits, sequence.state, sequence.pending = hit.logits, hit.state, hit.pending
            return Prompt(hit, length)
    # The last token is the first that predicts a token of the reply.
    last = len(key.ids) - 1
    yield from _feed(context, sequence, key.ids[length:n], key.segments[length:n], reply_from=last - length)
    if plan.strategy == "token":
        yield from _feed(context, sequence, key.ids[n:], key.segments[n:], logits=True, reply_from=last - n)
    else:
        # The messages' pass ends with their last token; the reply's pass begins with the generation prompt.
        end = len(plan.prompt.ids)
        yield from _feed(context, sequence, key.ids[n:end], key.segments[n:end], reply_from=last - n)
        yield from _feed(
            context, sequence, key.ids[end:], key.segments[end:], logits=True, close=False, reply_from=last - end
        )
    entry = Prefill(sequence.cache, len(key.ids), sequence.state, sequence.logits, sequence.pending)
    return Prompt(entry, length, 0 if stale is None else length)


def decode(
    context: TurnContext, plan: Plan, sequence: Sequence, guide: Constraint | None, emit: Emit | None
) -> Steps[Reply]:
    """Sample until an end token, a stop string or the limit; then cut the text, and rewind the sequence to the cut.

    Text is emitted as soon as no stop string can begin in it any more.
    """
    end_ids, segment, budget = context.end_ids, plan.reply_segment, plan.budget
    json_text = plan.form is not None and plan.form.schema is not None
    parser = OutputParser(
        context.tags, plan.call_id_seed, "reasoning" if plan.thinking else "text", json_text=json_text
    )
    detokenizer, stops = Detokenizer(context.tokenizer), StopFinder(plan.sampling.stop)
    ids, ends = detokenizer.ids, detokenizer.ends
    sampler = Sampler(plan.sampling)
    start = Snapshot(len(plan.prefill_key.ids), sequence.state, sequence.pending)
    # Positions before and between the tokens that may still be cut off, oldest first.
    snapshots = [start]
    fed = shown = 0
    finish_reason: Literal["stop", "length"] = "stop"
    sequence.sampler = sampler if guide is None else None
    ended = False
    while not ended:
        # Tokens forced by a grammar are held back until there is a choice, and are then read together.
        token = guide.follow() if guide is not None else None
        if token is None:
            if fed < len(ids):
                if guide is None:
                    yield DecodeRequest(sequence, ids[fed], segment)
                else:
                    yield from _read(context, sequence, ids[fed:], segment)
                fed = len(ids)
                snapshots.append(Snapshot(start.length + fed, sequence.state, sequence.pending))
            assert sequence.logits is not None
            if guide is None:
                token = sampler.choose(sequence.logits, sequence.next_token)
            else:
                token = guide.take(sampler.choose(guide.mask(sequence.logits)))
        # `length`: number of characters that remain in the reply whatever follows.
        if token in end_ids:
            ended, length = True, len(detokenizer.text)
        else:
            detokenizer.push(token)
            cut = stops.find(detokenizer.text)
            if cut is not None:
                ended, length = True, cut
            elif len(ids) >= budget:
                ended, length, finish_reason = True, len(detokenizer.text), "length"
            else:
                length = stops.safe(detokenizer.text)
        kept = detokenizer.tokens_within(length)
        for index in range(shown, kept):
            piece = detokenizer.text[ends[index - 1] if index else 0 : ends[index]]
            for delta in parser.push(ids[index], piece):
                if emit is not None:
                    emit(delta)
        shown = max(shown, kept)
        while len(snapshots) > 1 and snapshots[1].length <= start.length + shown:
            del snapshots[0]
    sequence.sampler = None
    if guide is not None and guide.closing:
        finish_reason = "length"

    # A cut may go through a token; the part of it that remains is tokenised anew.
    text = detokenizer.text[:length]
    remainder = text[ends[kept - 1] if kept else 0 :]
    rest = _encode(context, remainder) if remainder else []
    for delta in [*parser.push(-1, remainder), *parser.finish()]:
        if emit is not None:
            emit(delta)
    if fed > kept:  # the sequence read past the cut: go back, and let `finish` feed what remains
        place = next(snapshot for snapshot in reversed(snapshots) if snapshot.length <= start.length + kept)
        fed = place.length - start.length
        context.batch.leave(sequence, keep=True)
        sequence.rewind(place)
    return Reply(text, [*ids[:kept], *rest], parser.parsed(), finish_reason, len(ids), fed, start)


def finish(
    context: TurnContext, plan: Plan, sequence: Sequence, prompt: Prompt, reply: Reply, state: MemoryState | None
) -> Steps[Turn]:
    """Feed the rest of the reply, keep KV for later turns, and copy the state from the device."""
    written = plan.written
    closing = context.closing_ids() if plan.writes_reply or plan.keeps_kv else []
    if plan.writes_reply and plan.strategy == "sentence":
        context.batch.leave(sequence, keep=True)
        sequence.rewind(reply.start)
        numbers = sentence_numbers(reply.text, reply.ids, lambda text: _encode(context, text))
        yield from _feed(context, sequence, [*reply.ids, *closing], [*numbers, *(-1 for _ in closing)])
        written += len(numbers)
    elif plan.writes_reply:
        rest = [*reply.ids[reply.fed :], *closing]
        yield from _feed(context, sequence, rest, [plan.reply_segment] * len(rest))
        written += len(plan.generation_prompt) + len(reply.ids) + len(closing)
    if sequence.row is not None:
        try:
            context.batch.leave(sequence, keep=plan.keeps_kv)
        except torch.OutOfMemoryError:  # no memory for the KV read in its row; the turn itself has succeeded
            sequence.cache_valid = False

    message = Message("assistant", reply.parsed.content, reply.parsed.tool_calls)
    new_state = state
    if plan.returns_new_state and sequence.state is not None:
        new_state = yield from context.runner.save_state(sequence.state, plan.record.extend([message]))
    if new_state is not None and plan.keeps_kv and sequence.cache_valid:
        read = [*plan.prefill_key.ids, *reply.ids, *closing]
        context.stale_kv.put(new_state.digest, plan.cache_salt, read, sequence.cache)
    _keep_prefill(context, plan, sequence, prompt)
    finish_reason: FinishReason = reply.finish_reason
    if message.tool_calls and finish_reason == "stop":
        finish_reason = "tool_calls"
    usage = Usage(len(plan.prefill_key.ids), reply.decoded, prompt.cache_read_tokens, prompt.carried_tokens)
    return Turn(
        message=message,
        state=new_state,
        reasoning=reply.parsed.reasoning,
        invalid_tool_calls=reply.parsed.invalid_tool_calls,
        finish_reason=finish_reason,
        usage=usage,
        written=written,
        read=plan.read,
        edits=plan.edits,
        deletions=plan.deletions,
        token_ids=tuple(reply.ids),
        truncation=plan.truncation,
    )


def _feed(
    context: TurnContext,
    sequence: Sequence,
    ids: abc.Sequence[int],
    segments: abc.Sequence[int],
    *,
    logits: bool = False,
    close: bool = True,
    reply_from: int = 0,
) -> Steps[None]:
    """Read tokens of one sequence in passes of its own; yields after each pass.

    Args:
        ids: the tokens; there may be none.
        segments: a segment for each token, -1 = not written; for token adapters only the sign matters.
        logits: whether to store the logits of the last token in `sequence.logits`.
        close: for message and sentence adapters, whether the pass ends here.
        reply_from: the first of the tokens that predict a reply; `len(ids)` or more if none does.
    """
    closes = close and context.runner.writes_at_close and sequence.state is not None
    if sequence.row is not None and len(ids) <= _FEW and not logits and not closes:
        # The few tokens that close a reply are read in the pass of the decoding sequences, even if no other sequence is
        # left there: among the jobs with steps of their own, this one would have to wait for all the others.
        for token, segment in zip(ids, segments, strict=True):
            yield DecodeRequest(sequence, token, segment)
        return
    if sequence.row is not None:
        context.batch.leave(sequence, keep=True)
    for begin in range(0, len(ids), CHUNK_TOKENS):
        end = min(begin + CHUNK_TOKENS, len(ids))
        last = end == len(ids)
        context.runner.extend(
            sequence,
            ids[begin:end],
            segments[begin:end],
            logits=logits and last,
            close=close and last,
            reply_from=max(0, reply_from - begin),
        )
        yield None


def _read(context: TurnContext, sequence: Sequence, ids: abc.Sequence[int], segment: int) -> Steps[None]:
    """Read tokens of a reply; the logits after them are kept, and the pass stays open.

    A single token is read together with other sequences; several tokens are read in a pass of their own, unless the
    sequence has a row: leaving the row and joining again costs more than reading token by token.
    """
    if len(ids) > 1 and sequence.row is None:
        yield from _feed(context, sequence, ids, [segment] * len(ids), logits=True, close=False)
        return
    for token in ids:
        yield DecodeRequest(sequence, token, segment)


def _keep_prefill(context: TurnContext, plan: Plan, sequence: Sequence, prompt: Prompt) -> None:
    """Keep the prefill of the prompt. After a failed pass the layers of the KV may differ; then it is dropped."""
    if sequence.cache_valid and not prompt.carried_tokens:
        context.prefills.put(plan.prefill_key, prompt.prefill)


def _encode(context: TurnContext, text: str) -> list[int]:
    ids: list[int] = context.tokenizer.encode(text, add_special_tokens=False)
    return ids
