"""What a turn will do, decided before the model is touched: what is shown, what writes, in which passes.

Pure bookkeeping over messages and tokens. A plan follows from the messages, the record of what the state has consumed,
and constants; never from caches or free memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, overload

from agentmem.delta.config import WriteStrategy
from agentmem.errors import ConfigError, WindowError
from agentmem.generation.carry import KV, KVS
from agentmem.generation.reply_format import ReplyFormat
from agentmem.generation.sampling import Sampling
from agentmem.messages import Message
from agentmem.prompt.transcript import Rendered, Transcript
from agentmem.prompt.window import Window, pieces
from agentmem.record import ConsumedRecord, OnEdit

WritePolicy = Literal["all", "input", "off"]
_POLICIES = ("all", "input", "off")

PIECE_TOKENS = 2048
"""Longest context-only pass, where messages are no longer. A constant: a result must not depend on the machine."""


@dataclass(frozen=True)
class Request:
    """One turn as asked for.

    Attributes:
        messages: the history as given, the last one to be answered.
        sampling, window: how to decode, what to show.
        write: "all"; "input" (the reply is recorded, not written); "off" (the state comes back unchanged).
        on_edit: what an edit of consumed history does (see ``record``).
        tools: function descriptions for the chat template.
        memory: False runs the bare model.
        form: what the reply is bound to be; None = whatever the model says.
        timeout: seconds from the call to the whole reply, waiting included; None = any.
        kv: "exact", or "carry": go on from KV that the session's turn before left (see ``carry``).
    """

    messages: Sequence[Message]
    sampling: Sampling = field(default_factory=Sampling)
    window: Window = field(default_factory=Window)
    write: WritePolicy = "all"
    on_edit: OnEdit = "write"
    tools: Sequence[Mapping[str, Any]] = ()
    memory: bool = True
    form: ReplyFormat | None = None
    timeout: float | None = None
    kv: KV = "exact"

    def __post_init__(self) -> None:
        if self.kv not in KVS:
            raise ConfigError(f"kv must be one of {', '.join(KVS)}; found {self.kv!r}")
        if self.write not in _POLICIES:
            raise ConfigError(f"write must be one of {', '.join(_POLICIES)}; found {self.write!r}")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"timeout must be None or seconds above 0; found {self.timeout!r}")


@dataclass(frozen=True)
class Piece:
    """Tokens that go through the model together, with the segment of each (-1 = not written)."""

    ids: list[int]
    segments: list[int]

    @property
    def writes(self) -> list[bool]:
        return [segment >= 0 for segment in self.segments]


@dataclass(frozen=True)
class Plan:
    """The passes of a turn.

    Attributes:
        hidden: context-only passes over new messages that are not shown, oldest first.
        prompt: the shown messages; those already consumed have segment -1.
        opening: the generation prompt's tokens.
        edits: indices of new messages that stand before consumed ones.
        deletions: how many consumed messages the history lacks after one that it has.
        record: what is consumed once these passes are done, the reply not among it.
        rebuild: start from the zero state.
    """

    hidden: list[Piece]
    prompt: Piece
    opening: list[int]
    edits: tuple[int, ...]
    deletions: int
    record: ConsumedRecord
    rebuild: bool

    @property
    def border(self) -> int:
        """Prompt tokens before the first one that writes; they are read in a call of their own."""
        writes = self.prompt.writes
        return writes.index(True) if True in writes else len(writes)


def plan_turn(
    request: Request,
    record: ConsumedRecord,
    transcript: Transcript,
    strategy: WriteStrategy,
    limit: int,
) -> Plan:
    """Decide a turn.

    Args:
        record: what the state has consumed.
        strategy: the adapter's write strategy.
        limit: the model's longest context.

    Raises:
        WindowError, TranscriptError, HistoryEditedError: as their modules say.
    """
    messages = list(request.messages)
    writing = request.memory and request.write != "off"
    alignment = record.align(transcript.history(messages), on_edit=request.on_edit)
    new = set(alignment.new) if writing else set()
    overhead = transcript.overhead(tools=request.tools, add_generation_prompt=True)
    reply = min(request.sampling.max_tokens, limit // 2)
    system = [i for i in alignment.silent if messages[i].role == "system"]
    shown = request.window.clip(limit - reply).visible(messages, _Sizes(messages, transcript), overhead, system)
    visible = [messages[i] for i in shown]
    rendered = transcript.render(
        visible, tools=request.tools, add_generation_prompt=True, sentences=strategy == "sentence"
    )
    end = len(rendered.input_ids) - rendered.owner.count(len(visible))
    segments = _segments(rendered, strategy)
    prompt = Piece(
        rendered.input_ids[:end],
        [
            segment if owner >= 0 and shown[owner] in new else -1
            for owner, segment in zip(rendered.owner[:end], segments[:end], strict=True)
        ],
    )
    unseen = sorted(new - set(shown))
    return Plan(
        hidden=_context_passes(messages, unseen, transcript, strategy, limit),
        prompt=prompt,
        opening=rendered.input_ids[end:],
        edits=tuple(alignment.edits) if writing else (),
        deletions=alignment.deletions if writing else 0,
        record=alignment.record,
        rebuild=alignment.rebuild and writing,
    )


def plan_remember(
    messages: Sequence[Message],
    record: ConsumedRecord,
    transcript: Transcript,
    strategy: WriteStrategy,
    limit: int,
    on_edit: OnEdit,
) -> Plan:
    """Decide a context-only write: every new message in passes of its own, nothing shown, no reply."""
    alignment = record.align(transcript.history(messages), on_edit=on_edit)
    return Plan(
        hidden=_context_passes(messages, alignment.new, transcript, strategy, limit),
        prompt=Piece([], []),
        opening=[],
        edits=tuple(alignment.edits),
        deletions=alignment.deletions,
        record=alignment.record,
        rebuild=alignment.rebuild,
    )


class _Sizes(Sequence[int]):
    """Tokens of each message, counted when asked for: a window asks for those that it may show."""

    def __init__(self, messages: Sequence[Message], transcript: Transcript) -> None:
        self._messages = messages
        self._transcript = transcript

    def __len__(self) -> int:
        return len(self._messages)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self._transcript.size(message) for message in self._messages[index]]
        return self._transcript.size(self._messages[index])


def _context_passes(
    messages: Sequence[Message],
    unseen: Sequence[int],
    transcript: Transcript,
    strategy: WriteStrategy,
    limit: int,
) -> list[Piece]:
    """New messages that no prompt will show, as they stand in the history, in pieces at message borders.

    What templates write for a message depends on its turn, on what comes after, and on whether its turn is the first
    (which may take in the system messages). So the turn before theirs is rendered too, and nothing older.
    """
    if not unseen:
        return []
    questions = (i for i in reversed(range(unseen[0] + 1)) if messages[i].role == "user")
    start = next(islice(questions, 1, None), 0)
    given = [i for i, message in enumerate(messages) if i >= start or message.role == "system"]
    whole = transcript.render([messages[i] for i in given], sentences=strategy == "sentence")
    segments = _segments(whole, strategy)
    numbers = {index: number for number, index in enumerate(given)}
    places: dict[int, list[int]] = {numbers[i]: [] for i in unseen}
    for place, owner in enumerate(whole.owner):
        if owner in places:
            places[owner].append(place)
    passes = []
    for group in pieces([len(places[numbers[i]]) for i in unseen], limit=PIECE_TOKENS):
        taken = [place for n in group for place in places[numbers[unseen[n]]]]
        if len(taken) > limit:
            raise WindowError(
                f"message {unseen[group[0]]} has {len(taken)} tokens, more than the {limit} that the model reads; "
                "split it"
            )
        passes.append(Piece([whole.input_ids[p] for p in taken], [segments[p] for p in taken]))
    return passes


def _segments(rendered: Rendered, strategy: WriteStrategy) -> list[int]:
    return rendered.sentence_segments() if strategy == "sentence" else rendered.message_segments()
