"""What a turn is to do, decided completely before the model runs.

`TurnOptions` lists the options of a turn; a `Request` is a history with all options set. The `Plan` is computed from
it: what is shown, what is written, in which passes, and how the reply ends. Later steps read only the plan.

Only messages and token ids are handled here. A plan depends on the request, the state, the model's template and limits,
and constants; never on caches or free memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import groupby, islice
from typing import Any, Final, Literal, TypedDict, get_args, overload

from agentmem.delta.config import WriteStrategy
from agentmem.errors import ConfigError, WindowError
from agentmem.generation.kv_cache import PrefillKey
from agentmem.generation.reply_format import ReplyFormat
from agentmem.generation.sampling import Sampling
from agentmem.messages import Message
from agentmem.prompt.transcript import Rendered, Transcript, Window, pieces, tool_groups
from agentmem.record import ConsumedRecord, OnEdit
from agentmem.state import MemoryState

WritePolicy = Literal["all", "input", "off"]
KVReuse = Literal["exact", "carry"]

PIECE_TOKENS = 2048
"""Longest context-only pass, unless one message is longer. A constant: results must not depend on the machine."""
_LEAST_SHOWN = 16  # tokens that are kept of a message that is cut
_SIZED_AT_ONCE = 8  # messages
_CLOSING_ROOM = 8  # tokens reserved for those that close the reply


class TurnOptions(TypedDict, total=False):
    """Options of a turn; each has a default.

    Attributes:
        sampling: how to decode; greedy, at most 512 tokens.
        window: what the prompt shows; by default the last 4,096 tokens.
        write: "all" (the default), "input" (the reply is recorded but not written) or "off" (the given state is
            returned).
        on_edit: what happens when consumed history was edited: "write" (the default), "error" or "rebuild".
        tools: function descriptions in OpenAI form.
        memory: False runs the bare model; the given state is returned.
        form: the format of the reply, a call or JSON (see `ReplyFormat`); None = no constraint.
        timeout: seconds from the call to the complete reply, waiting included; checked between forward passes.
        kv: "exact" (the default), or "carry": start from the KV of the turn that returned the state, where it is
            still kept and the prompt begins in the same way. Faster, but no longer exactly what defines the turn.
        cache_salt: KV is reused only between turns with the same salt, so that `cache_read_tokens` reveals nothing
            about other users' prompts. None (the default) is a salt like any other: turns without one share their
            KV.
    """

    sampling: Sampling
    window: Window
    write: WritePolicy
    on_edit: OnEdit
    tools: Sequence[Mapping[str, Any]]
    memory: bool
    form: ReplyFormat | None
    timeout: float | None
    kv: KVReuse
    cache_salt: str | None


DEFAULTS: Final[TurnOptions] = {
    "sampling": Sampling(),
    "window": Window(),
    "write": "all",
    "on_edit": "write",
    "tools": (),
    "memory": True,
    "form": None,
    "timeout": None,
    "kv": "exact",
    "cache_salt": None,
}


@dataclass(frozen=True)
class Request:
    """A turn as it was requested.

    Attributes:
        messages: the whole history; the last message is the one to answer.
        options: all options; those not given have their defaults.

    Raises:
        ConfigError: an option is unknown or out of range.
    """

    messages: Sequence[Message]
    options: TurnOptions

    def __post_init__(self) -> None:
        for name in self.options.keys() - DEFAULTS.keys():
            close = get_close_matches(name, DEFAULTS)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(DEFAULTS)}"
            raise ConfigError(f"a turn has no option {name!r}; {hint}")
        options: TurnOptions = {**DEFAULTS, **self.options}
        for value, name, policies in (
            (options["kv"], "kv", get_args(KVReuse)),
            (options["write"], "write", get_args(WritePolicy)),
        ):
            if value not in policies:
                raise ConfigError(f"{name} must be one of {', '.join(policies)}; found {value!r}")
        timeout = options["timeout"]
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"timeout must be None or seconds above 0; found {timeout!r}")
        if not isinstance(options["cache_salt"], str | None):
            raise ConfigError(f"cache_salt must be None or a string; found {options['cache_salt']!r}")
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class Chunk:
    """Tokens that go through the model together, with the segment of each (-1 = not written).

    `closes`: whether the pass ends after them, for adapters that write at the end of a pass; a pass may take several
    chunks.
    """

    ids: list[int]
    segments: list[int]
    closes: bool = True


@dataclass(frozen=True)
class Truncation:
    """The parts of always-shown messages for which the model's context has no room.

    Attributes:
        messages: the indices of the cut messages.
        tokens: how many of their tokens are not shown.
        rule: "middle": each shows its first and last tokens, equally many of both; the longest messages are cut
            first.
    """

    messages: tuple[int, ...]
    tokens: int
    rule: Literal["middle"] = "middle"


@dataclass(frozen=True)
class CatchUp:
    """What is written before the prompt is read; for a write without a reply this is the whole plan.

    Attributes:
        start: the memory that the passes begin with, or the zero state for a rebuild; None: the bare model.
        catch_up_chunks: context-only passes over new messages that are not shown, oldest first.
        record: what the memory will have consumed, without the reply.
        written: number of tokens that are written before the reply.
        edits: indices of new messages that come before consumed ones.
        deletions: how many consumed messages are missing from the history, although a later consumed one is there.
    """

    start: MemoryState | None
    catch_up_chunks: list[Chunk]
    record: ConsumedRecord
    written: int
    edits: tuple[int, ...]
    deletions: int


@dataclass(frozen=True)
class Plan(CatchUp):
    """A complete turn.

    Attributes:
        strategy: the adapter's write strategy; "token" without memory.
        prompt: the shown messages; consumed ones have segment -1.
        read: how many of their tokens are only read; 0 without memory.
        truncation: what the prompt leaves out of them; None: nothing.
        generation_prompt: the tokens that open the reply.
        read_only_prefix_len: prompt tokens before the first one that is written; they are read in a call of their
            own.
        writes_reply: whether the reply is written.
        reply_segment: the segment of a reply's tokens during decoding: 0, or -1 where they are only read.
        prefill_key: identifies the prefill.
        stale_kv: digest of the state whose turn's KV may replace the beginning of the prompt; None: no KV may.
        keeps_kv: whether this turn's KV is kept for later turns.
        returns_new_state: False: the given state is returned.
        sampling, form: as requested.
        thinking: whether the prompt ends inside a reasoning block.
        budget: most tokens in the reply.
        call_id_seed: the seed of tool-call ids.
        cache_salt: as requested.
    """

    strategy: WriteStrategy
    prompt: Chunk
    read: int
    truncation: Truncation | None
    generation_prompt: list[int]
    read_only_prefix_len: int
    writes_reply: bool
    reply_segment: int
    prefill_key: PrefillKey
    stale_kv: str | None
    keeps_kv: bool
    returns_new_state: bool
    sampling: Sampling
    form: ReplyFormat | None
    thinking: bool
    budget: int
    call_id_seed: bytes
    cache_salt: str | None


def plan_turn(
    request: Request, state: MemoryState | None, transcript: Transcript, strategy: WriteStrategy, limit: int
) -> Plan:
    """Decide a turn.

    Args:
        request: the request.
        state: the memory at the start; None: the bare model.
        transcript: renders messages with the chat template.
        strategy: the adapter's write strategy; without memory it has no effect.
        limit: the model's longest context, in tokens.

    Raises:
        WindowError, TranscriptError, HistoryEditedError: see these classes.
    """
    messages, options = list(request.messages), request.options
    strategy = "token" if state is None else strategy
    writes = state is not None and options["write"] != "off"
    start = state
    record = ConsumedRecord.empty() if state is None else state.record
    alignment = record.align(transcript.history(messages), on_edit=options["on_edit"])
    if writes and alignment.rebuild and state is not None:
        start = MemoryState.zeros(state.shape, state.model_fingerprint, state.adapter_fingerprint)
    new = set(alignment.new) if writes else set()

    sampling, tools = options["sampling"], options["tools"]
    overhead = transcript.overhead(tools=tools, add_generation_prompt=True)
    room = limit - min(sampling.max_tokens, limit // 2)
    window, sizes = options["window"].clip(room), _Sizes(messages, transcript)
    system = [i for i in alignment.silent if messages[i].role == "system"]
    most: int | None = None
    try:
        shown = window.visible(messages, sizes, overhead, system)
    except WindowError:
        # What a wider window could show is up to the caller. What no window could show is cut to fit.
        shown = sorted([*system, *next(tool_groups(messages), [])])
        if window.tokens is None or overhead + sum(sizes[i] for i in shown) <= room:
            raise
        most = _most_of_each(shown, system, sizes, window.tokens - overhead)
        if most is None:
            raise
    rendered = transcript.render(
        [messages[i] for i in shown], tools=tools, add_generation_prompt=True, sentences=strategy == "sentence"
    )
    truncation = None
    if most is not None:
        rendered, truncation = _cut_middles(rendered, shown, system, most)
    # Messages that are not shown, or only cut, are written before the prompt, and so is everything before them.
    written_before = max(truncation.messages, default=-1) if truncation is not None else -1
    written_here = {i for i in new.intersection(shown) if i > written_before}
    end = len(rendered.input_ids) - rendered.owner.count(len(shown))
    prompt = Chunk(
        rendered.input_ids[:end],
        [
            segment if owner >= 0 and shown[owner] in written_here else -1
            for owner, segment in zip(rendered.owner[:end], _segments(rendered, strategy)[:end], strict=True)
        ],
    )
    generation_prompt = rendered.input_ids[end:]
    read_only = next((place for place, segment in enumerate(prompt.segments) if segment >= 0), end)

    chunks = _catch_up_chunks(messages, sorted(new - written_here), transcript, strategy, limit)
    writes_reply = state is not None and options["write"] == "all"
    # Sentences are known only when the reply is complete; until then a sentence adapter only reads.
    reply_segment = 0 if writes_reply and strategy != "sentence" else -1
    carries = options["kv"] == "carry" and state is not None
    return Plan(
        start=start,
        catch_up_chunks=chunks,
        record=alignment.record,
        written=_count_written([*chunks, prompt]),
        edits=tuple(alignment.edits) if writes else (),
        deletions=alignment.deletions if writes else 0,
        strategy=strategy,
        prompt=prompt,
        read=0 if state is None else len(prompt.ids) - _count_written([prompt]),
        truncation=truncation,
        generation_prompt=generation_prompt,
        read_only_prefix_len=read_only,
        writes_reply=writes_reply,
        reply_segment=reply_segment,
        prefill_key=PrefillKey(
            _start_digest(start, chunks, options["cache_salt"]),
            tuple(rendered.input_ids),
            (*prompt.segments, *([reply_segment] * len(generation_prompt))),
            read_only,
        ),
        # A memory that is rebuilt must not depend on the old one.
        stale_kv=state.digest if carries and state is not None and start is state else None,
        keeps_kv=carries,
        returns_new_state=writes,
        sampling=sampling,
        form=options["form"],
        thinking=bool(generation_prompt) and rendered.text.rstrip().endswith("<think>"),
        budget=min(sampling.max_tokens, limit - len(rendered.input_ids) - _CLOSING_ROOM),
        # The ids of calls depend only on what was consumed before, so they are known when a call begins.
        call_id_seed=hashlib.sha256(alignment.record.chain).digest(),
        cache_salt=options["cache_salt"],
    )


def plan_remember(
    messages: Sequence[Message],
    state: MemoryState,
    transcript: Transcript,
    strategy: WriteStrategy,
    limit: int,
    on_edit: OnEdit = "write",
) -> CatchUp:
    """Plan a context-only write: passes over all new messages, nothing shown, no reply."""
    alignment = state.record.align(transcript.history(messages), on_edit=on_edit)
    if alignment.rebuild:
        state = MemoryState.zeros(state.shape, state.model_fingerprint, state.adapter_fingerprint)
    chunks = _catch_up_chunks(messages, alignment.new, transcript, strategy, limit)
    return CatchUp(
        start=state,
        catch_up_chunks=chunks,
        record=alignment.record,
        written=_count_written(chunks),
        edits=tuple(alignment.edits),
        deletions=alignment.deletions,
    )


class _Sizes(Sequence[int]):
    """The token count of each message, computed a few at a time: a window asks for the newest first."""

    def __init__(self, messages: Sequence[Message], transcript: Transcript) -> None:
        self._messages = messages
        self._transcript = transcript
        self._sizes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._messages)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        if index not in self._sizes:
            for place in range(max(0, index - _SIZED_AT_ONCE + 1), index + 1):
                self._sizes[place] = self._transcript.size(self._messages[place])
        return self._sizes[index]


def _catch_up_chunks(
    messages: Sequence[Message], unseen: Sequence[int], transcript: Transcript, strategy: WriteStrategy, limit: int
) -> list[Chunk]:
    """New messages that no prompt will show, rendered as part of the history and cut between messages.

    A message longer than the model's context is cut inside; for adapters that write at the end of a pass, its chunks
    still form one pass.

    How a template renders a message depends on its turn, on what comes after, and on whether its turn is the first
    (which may include the system messages). So the turn before is rendered too, and nothing older.
    """
    if not unseen:
        return []
    questions = (i for i in reversed(range(unseen[0] + 1)) if messages[i].role == "user")
    start = next(islice(questions, 1, None), 0)
    context = [i for i, message in enumerate(messages) if i >= start or message.role == "system"]
    rendered = transcript.render([messages[i] for i in context], sentences=strategy == "sentence")
    segments = _segments(rendered, strategy)
    numbers = {index: number for number, index in enumerate(context)}
    places: dict[int, list[int]] = {numbers[i]: [] for i in unseen}
    for place, owner in enumerate(rendered.owner):
        if owner in places:
            places[owner].append(place)
    chunks = []
    most = min(PIECE_TOKENS, limit)
    for group in pieces([len(places[numbers[i]]) for i in unseen], limit=most):
        taken = [place for n in group for place in places[numbers[unseen[n]]]]
        step = most if len(taken) > limit else len(taken)
        for begin in range(0, len(taken), step):
            part = taken[begin : begin + step]
            closes = begin + step >= len(taken)
            chunks.append(Chunk([rendered.input_ids[p] for p in part], [segments[p] for p in part], closes))
    return chunks


def _most_of_each(shown: Sequence[int], system: Sequence[int], sizes: Sequence[int], room: int) -> int | None:
    """The most tokens per shown message with which all fit, system messages uncut; None: too few to be useful."""
    left = room - sum(sizes[i] for i in system)
    others = sorted(sizes[i] for i in shown if i not in set(system))
    for place, size in enumerate(others):
        most = left // (len(others) - place)
        if size > most:  # this message and all longer ones
            return most if most >= _LEAST_SHOWN else None
        left -= size
    return None


def _cut_middles(
    rendered: Rendered, shown: Sequence[int], system: Sequence[int], most: int
) -> tuple[Rendered, Truncation | None]:
    """Remove tokens from the middle of each message that has more than `most`, except system messages."""
    long = {n for n, size in enumerate(rendered.sizes()) if size > most and shown[n] not in set(system)}
    places: list[int] = []
    for owner, run in groupby(range(len(rendered.owner)), key=rendered.owner.__getitem__):
        of_message = list(run)
        if owner in long and len(of_message) > most:
            of_message = [*of_message[: most - most // 2], *of_message[-(most // 2) :]]
        places += of_message
    if len(places) == len(rendered.owner):
        return rendered, None
    cut = replace(
        rendered,
        input_ids=[rendered.input_ids[place] for place in places],
        owner=[rendered.owner[place] for place in places],
        sentences=None if rendered.sentences is None else [rendered.sentences[place] for place in places],
    )
    return cut, Truncation(tuple(shown[n] for n in sorted(long)), len(rendered.owner) - len(places))


def _segments(rendered: Rendered, strategy: WriteStrategy) -> list[int]:
    return rendered.sentence_segments() if strategy == "sentence" else rendered.message_segments()


def _start_digest(start: MemoryState | None, chunks: Sequence[Chunk], salt: str | None) -> bytes:
    """Digest of what determines the matrices at the prompt's start; the matrices themselves stay on the device."""
    digest = hashlib.sha256(b"bare" if start is None else start.data)
    for chunk in chunks:
        digest.update(repr((chunk.ids, chunk.segments)).encode())
    digest.update(repr(salt).encode())
    return digest.digest()


def _count_written(chunks: Sequence[Chunk]) -> int:
    return sum(len(chunk.segments) - chunk.segments.count(-1) for chunk in chunks)
