"""What a checkpoint holds: its messages, and how far each moved the memory.

A memory is a value in every checkpoint, so what a turn wrote is the difference between the memory of its checkpoint and
that of the one before. The memory's record names the messages that it consumed in between, by digest: they are found
again among those of the conversation. Messages that were consumed in one step share its difference.

Only a window of the history is read, whatever the length of the thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.messages import BaseMessage
from langgraph.checkpoint.base import CheckpointTuple

from agentmem.errors import AgentMemError, StorageError, TranscriptError
from agentmem.state import MemoryState
from agentmem_langgraph.messages import to_engine
from agentmem_sql import MemoryStep, SQLAlchemySaver
from agentmem_sql.audit import is_memory

if TYPE_CHECKING:
    from agentmem import Engine
    from agentmem_chroma import FactStore

STEPS = 48  # of the memory on one page
_MOST_MESSAGES = 100  # on a page of a checkpoint without a memory
_DIGEST = 8  # bytes of a message's digest in a memory's record
_OTHERS_SHOWN = 2000  # characters of another channel's value
_OWN = ("__", "branch:")


class NotThereError(StorageError):
    """There is no such thread or checkpoint."""


@dataclass(frozen=True)
class Place:
    """A checkpoint that is being looked at.

    Attributes:
        number, thread: the thread, by its number in the database and by its id.
        ns: the namespace, "" for the main graph.
        stored: what is stored.
    """

    number: int
    thread: str
    ns: str
    stored: CheckpointTuple

    @property
    def id(self) -> str:
        """The checkpoint's id."""
        return str(self.stored.config["configurable"]["checkpoint_id"])

    @property
    def parent(self) -> str | None:
        """The id of the checkpoint before."""
        config = self.stored.parent_config
        return None if config is None else str(config["configurable"]["checkpoint_id"])

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """The values of all channels but LangGraph's own."""
        values = self.stored.checkpoint["channel_values"]
        return {name: value for name, value in sorted(values.items()) if not name.startswith(_OWN)}

    @cached_property
    def messages(self) -> Mapping[str, Sequence[BaseMessage]]:
        """The channels that are lists of messages."""
        return {
            name: value
            for name, value in self.values.items()
            if isinstance(value, list) and value and all(isinstance(each, BaseMessage) for each in value)
        }

    @cached_property
    def memories(self) -> Mapping[str, MemoryState]:
        """The channels that are memories.

        Raises:
            CorruptStateError: one is not what was written.
        """
        return {name: MemoryState.from_dict(value) for name, value in self.values.items() if is_memory(value)}

    def others(self) -> list[tuple[str, str]]:
        """The other channels, each with its value as text, which is cut if it is long."""
        return [
            (name, text if len(text) <= _OTHERS_SHOWN else text[:_OTHERS_SHOWN] + " …")
            for name, value in self.values.items()
            if name not in self.messages and not is_memory(value)
            for text in [repr(value)]
        ]


def find(saver: SQLAlchemySaver, number: int, thread: str, ns: str, checkpoint_id: str | None) -> Place:
    """A checkpoint, or the newest of its namespace.

    Raises:
        NotThereError: there is none.
        StorageError: stored data is damaged.
    """
    at = {} if checkpoint_id is None else {"checkpoint_id": checkpoint_id}
    stored = saver.get_tuple({"configurable": {"thread_id": thread, "checkpoint_ns": ns, **at}})
    if stored is None:
        raise NotThereError(f"expected a checkpoint {checkpoint_id or ''} in this thread, found none; it may be pruned")
    return Place(number, thread, ns, stored)


@dataclass(frozen=True)
class Change:
    """A step of the memory, and how far it moved.

    Attributes:
        step: the memory after it, and where.
        before: the memory before it; None for the zero state.
        layers: the Frobenius norm of the difference, by layer.
        norm: the same over all layers.
    """

    step: MemoryStep
    before: MemoryState | None
    layers: tuple[float, ...]
    norm: float


def changes(saver: SQLAlchemySaver, place: Place, channel: str, most: int = STEPS) -> list[Change]:
    """The last steps that led to the memory of a checkpoint, oldest first.

    Raises:
        StorageError, CorruptStateError: stored data is damaged.
    """
    history = saver.memory_history(
        place.thread, checkpoint_ns=place.ns, checkpoint_id=place.id, channel=channel, newest_first=True
    )
    steps = list(islice(history, most + 1))
    return [
        _change(step, before if before is None else before.state)
        for step, before in zip(steps, [*steps[1:], None], strict=True)
        if before is not None or len(steps) <= most
    ][::-1]


def _change(step: MemoryStep, before: MemoryState | None) -> Change:
    if before is not None and before.shape != step.state.shape:
        before = None
    return Change(step, before, *_moved(step.state, before))


def _moved(state: MemoryState, before: MemoryState | None) -> tuple[tuple[float, ...], float]:
    """The norm of the difference between two memories, by layer and over all; None stands for the zero state."""
    now = state.matrices.astype(np.float64)
    moved = now if before is None else now - before.matrices
    layers = np.linalg.norm(moved.reshape(moved.shape[0], -1), axis=1)
    return tuple(map(float, layers)), float(np.linalg.norm(layers))


@dataclass(frozen=True)
class Shown:
    """A fact that was shown to a reply.

    Attributes:
        number: its number in the prompt.
        id: its id in the fact store, if it has one.
        source: where it comes from.
        text: its text; None where the store does not have it any more, or was not opened.
        cited: whether the reply cites it.
    """

    number: int
    id: str | None
    source: str
    text: str | None
    cited: bool


@dataclass(frozen=True)
class Said:
    """A message as the page shows it.

    Attributes:
        message, text, calls: the message, its text, and the tools that it calls.
        tokens: what was noted of tokens written and read.
        facts: what was shown to it.
        alone: how far it moves the memory when it is written by itself, by layer; empty where that was not asked for.
    """

    message: BaseMessage
    text: str
    calls: tuple[str, ...]
    tokens: Mapping[str, Any]
    facts: tuple[Shown, ...]
    alone: tuple[float, ...] = ()


@dataclass(frozen=True)
class Group:
    """Messages that one step of the memory consumed; without a step, messages that no shown step consumed."""

    said: tuple[Said, ...]
    change: Change | None


def groups(
    messages: Sequence[BaseMessage], history: Sequence[Change], facts: FactStore | None
) -> tuple[int, list[Group]]:
    """The messages that belong to these steps, grouped by them; and how many earlier ones were left out."""
    owners = _owners(messages, history)
    first = next((at for at, owner in enumerate(owners) if owner is not None), None)
    if not history or history[0].step.consumed == history[0].step.new:  # all of it, from the first message on
        first = 0
    if first is None or not history:
        first = max(0, len(messages) - _MOST_MESSAGES)
    made: list[Group] = []
    for message, owner in zip(messages[first:], owners[first:], strict=True):
        change = None if owner is None else history[owner]
        if made and made[-1].change is change and change is not None:
            made[-1] = Group((*made[-1].said, said(message, facts)), change)
        else:
            made.append(Group((said(message, facts),), change))
    return first, made


def one_by_one(engine: Engine, group: Group) -> Group:
    """The messages of a step, each with how far it moves the memory when an engine writes one after the other.

    The step itself may have moved it otherwise, since it wrote them in one pass, or while the reply was decoded. A step
    of one message is left as it is.

    Raises:
        StateMismatchError: another model or adapter wrote this memory.
    """
    from agentmem import ConsumedRecord

    if group.change is None or len(group.said) < 2:
        return group
    state, written = group.change.before or engine.zero_state(), list[Said]()
    for each in group.said:
        try:
            told = to_engine([each.message])
        except TranscriptError:  # it cannot stand alone, as the result of a call
            written.append(each)
            continue
        # With its record emptied: a message that says what an earlier one said is written again.
        after = engine.remember(told, state.replaced(record=ConsumedRecord.empty())).state
        written.append(replace(each, alone=_moved(after, state)[0]))
        state = after
    return Group(tuple(written), group.change)


def _owners(messages: Sequence[BaseMessage], history: Sequence[Change]) -> list[int | None]:
    """For each message the step that consumed it; a message that comes twice belongs to two steps, in order."""
    places: defaultdict[bytes, list[int]] = defaultdict(list)
    for at, message in enumerate(messages):
        try:
            (plain,) = to_engine([message])
        except TranscriptError:  # no memory can have consumed it
            continue
        if plain.writes:
            places[plain.digest()[:_DIGEST]].append(at)
    owners: list[int | None] = [None] * len(messages)
    # From the end, since of a message that comes more than once the window may hold the last steps only.
    for number in range(len(history) - 1, -1, -1):
        for digest in reversed(history[number].step.new_digests):
            if places.get(digest):
                owners[places[digest].pop()] = number
    return owners


def said(message: BaseMessage, facts: FactStore | None = None) -> Said:
    """A message as the page shows it."""
    calls = tuple(f"{call['name']}({call['args']})" for call in getattr(message, "tool_calls", ()))
    noted = message.response_metadata.get("memory")
    tokens = noted if isinstance(noted, Mapping) else {}
    return Said(message, message.text, calls, tokens, tuple(shown_facts(message, facts)))


def shown_facts(message: BaseMessage, facts: FactStore | None) -> list[Shown]:
    """The facts that a reply's metadata name, in the order of their numbers."""
    noted = message.response_metadata.get("facts")
    notes = [note for note in noted if isinstance(note, Mapping)] if isinstance(noted, list) else []
    if not notes:
        return []
    from agentmem_chroma import cited

    try:
        named = {document.id for document in cited(message)}
    except AgentMemError:  # metadata that a MemoryNode did not write
        named = set()
    ids = [str(note["id"]) for note in notes if note.get("id")]
    texts = {fact.id: fact.text for fact in facts.get(ids)} if facts is not None and ids else {}
    return [
        Shown(
            int(note.get("number") or at),
            note.get("id"),
            str(note.get("source") or ""),
            texts.get(str(note.get("id"))),
            note.get("id") in named,
        )
        for at, note in enumerate(notes, start=1)
    ]


def memory_at(place: Place, channel: str) -> MemoryState:
    """The memory in a channel of a checkpoint.

    Raises:
        NotThereError: there is none.
        CorruptStateError: it is not what was written.
    """
    value = place.values.get(channel)
    if not is_memory(value):
        raise NotThereError(f"expected a memory in the channel {channel!r} of checkpoint {place.id}, found none")
    assert isinstance(value, Mapping)
    return MemoryState.from_dict(value)


def citations(places: Iterable[Place], fact: str) -> list[tuple[Place, Said, bool]]:
    """The replies in these checkpoints to which a fact was shown, and whether each cites it."""
    return [
        (place, said(message), one.cited)
        for place in places
        for messages in place.messages.values()
        for message in messages
        for one in shown_facts(message, None)
        if one.id == fact
    ]
