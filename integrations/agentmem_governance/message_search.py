"""Where a message is: in which checkpoints of a thread, and which of them have to go, or to be rebuilt, for its sake.

Those are the checkpoints in which the message occurs, in a channel or a pending write, or whose memory has consumed it;
the checkpoint that holds the input that it came with; and every checkpoint that descends from one of them.

The value of a delta channel is not in its checkpoints but follows from earlier writes. Lists of messages are put
together here as LangGraph's own reducer for messages does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import CheckpointTuple, DeltaChannelHistory
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.graph.message import REMOVE_ALL_MESSAGES, _messages_delta_reducer
from pydantic import BaseModel

from agentmem.errors import CorruptStateError, StorageError, TranscriptError
from agentmem.state import MemoryState
from agentmem_langgraph.messages import to_engine
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.audit import is_memory

Key = tuple[str, str]  # a checkpoint's namespace and id
_DIGEST = 8  # bytes of a message's digest in a memory's record


@dataclass
class Checkpoint:
    """What matters of a checkpoint: where it hangs, and whether something that goes is in it.

    Attributes:
        parent: the checkpoint above it.
        holds: whether one of the messages is in it.
        said: whether the text of one is in it, as in an input.
        consumed: what its memories have consumed, as far as it looks like one of the messages.
        memories: the digests of its memories, by channel.
        inner: the digests of all memories in it, those within other values (as in the input of a subgraph) included.
    """

    parent: Key | None
    holds: bool
    said: bool
    consumed: set[bytes]
    memories: Mapping[str, str]
    inner: set[str]


class Scan(NamedTuple):
    """A thread as it was read.

    Attributes:
        checkpoints: all of it, by key.
        going: the keys of those that go, or are rebuilt.
        head: the newest of the main graph, if there is one.
        history: all messages that the thread had on the way to the head, without those that go.
        said: the texts of the messages that go.
        writers: a memory of each model and adapter that wrote one in the thread.
    """

    checkpoints: Mapping[Key, Checkpoint]
    going: set[Key]
    head: CheckpointTuple | None
    history: list[BaseMessage]
    said: set[str]
    writers: list[MemoryState]

    @property
    def clean(self) -> set[str]:
        """The digests of memories that never consumed one of the messages."""
        staying = (one for key, one in self.checkpoints.items() if key not in self.going)
        return {digest for checkpoint in staying for digest in checkpoint.inner}


class Contents(NamedTuple):
    """What is in a checkpoint.

    Attributes:
        values: by channel, with lists of messages in delta channels put together.
        deltas: the names of the delta channels whose values were put together.
        histories: what the other delta channels follow from, and these.
    """

    values: Mapping[str, Any]
    deltas: Sequence[str]
    histories: Mapping[str, DeltaChannelHistory]

    def check(self, ids: Collection[str]) -> None:
        """Whether messages can be taken out of all its delta channels.

        Raises:
            StorageError: one of them holds something else than messages, and one of these within.
        """
        for name, history in self.histories.items():
            if name not in self.deltas and occurs(history, ids):
                raise StorageError(
                    f"expected a list of messages in the delta channel {name!r}, found another value with the message "
                    "in it, and only its graph knows how such values are put together; forget the thread"
                )


def stored_in(saver: SQLAlchemySaver, thread: str) -> Iterator[CheckpointTuple]:
    """The checkpoints of a thread, newest first."""
    return saver.list({"configurable": {"thread_id": thread}})


def contents_of(saver: SQLAlchemySaver, stored: CheckpointTuple) -> Contents:
    """What is in a checkpoint, with its delta channels."""
    values, deltas = dict(stored.checkpoint["channel_values"]), list[str]()
    histories: dict[str, DeltaChannelHistory] = {}
    for name, value in values.items():
        if isinstance(value, _DeltaSnapshot):
            values[name] = value.value
            if isinstance(value.value, list) and all(isinstance(each, BaseMessage) for each in value.value):
                deltas.append(name)
            else:
                histories[name] = DeltaChannelHistory(writes=[], seed=value)
    counted: Mapping[str, Any] = stored.metadata.get("counters_since_delta_snapshot") or {}
    names = [name for name in counted if name in stored.checkpoint["channel_versions"] and name not in values]
    if names:
        histories.update(saver.get_delta_channel_history(config=stored.config, channels=names))
    for name in names:
        if (messages := _replayed(histories[name])) is not None:
            values[name] = messages
            deltas.append(name)
    return Contents(values, deltas, histories)


def _replayed(history: DeltaChannelHistory) -> list[BaseMessage] | None:
    """The messages that a delta channel holds; None if it holds something else."""
    messages = [each for each in _parts(history) if isinstance(each, BaseMessage)]
    # The reducer makes messages of text, and takes no notice of what removes all of them.
    if not messages or any(each.id == REMOVE_ALL_MESSAGES for each in messages):
        return None
    reducer: Callable[[Any, Sequence[Any]], Any] = _messages_delta_reducer  # type: ignore[assignment]  # takes any writes
    try:
        made = DeltaChannel(reducer, list).from_checkpoint(history.get("seed", []))
        made.replay_writes(history["writes"])
    except Exception:  # noqa: BLE001 - whatever a value of another kind makes the reducer raise
        return None
    whole = made.get()
    return whole if isinstance(whole, list) and all(isinstance(each, BaseMessage) for each in whole) else None


def holds_any(saver: SQLAlchemySaver, stored: CheckpointTuple, ids: Collection[str]) -> bool:
    """Whether a message with one of these ids is anywhere in a checkpoint, or in what a channel of it follows from."""
    contents = contents_of(saver, stored)
    return occurs((contents.values, contents.histories, stored.pending_writes, stored.metadata), ids)


def group(saver: SQLAlchemySaver, thread: str, message: str, *, with_reply: bool) -> list[str]:
    """The ids of the messages that go with this one, itself first.

    With the reply: all up to the next human message. Without: the results of the tools that it calls, which would
    answer nothing.

    Raises:
        StorageError: the thread has no such message.
    """
    for stored in stored_in(saver, thread):
        for messages in lists(contents_of(saver, stored).values).values():
            place = next((at for at, each in enumerate(messages) if each.id == message), None)
            if place is None:
                continue
            going = [messages[place]]
            called = {call["id"] for call in getattr(messages[place], "tool_calls", ())}
            for later in messages[place + 1 :]:
                if with_reply and isinstance(later, HumanMessage):
                    break
                if with_reply or (isinstance(later, ToolMessage) and later.tool_call_id in called):
                    going.append(later)
            return [each.id for each in going if each.id]
    raise StorageError(
        f"expected a message with the id {message!r} in thread {thread[:80]!r}, found none in the lists of its "
        "checkpoints; take the id from the graph's state"
    )


def scan(saver: SQLAlchemySaver, thread: str, ids: Sequence[str], made: str | None = None) -> Scan:
    """Read a thread; the checkpoint `made`, to go on from, stays, and what came after it."""
    wanted, gone = set(ids), dict[str, BaseMessage]()
    for stored in stored_in(saver, thread):
        for messages in lists(contents_of(saver, stored).values).values():
            gone.update((each.id, each) for each in messages if each.id in wanted)
    said = {str(message.text) for message in gone.values()} - {""}
    wanted_marks = set(marks(gone.values()))
    checkpoints: dict[Key, Checkpoint] = {}
    writers: dict[str, MemoryState] = {}  # by digest
    head: CheckpointTuple | None = None
    following: str | None = None
    extra: list[list[BaseMessage]] = []  # newest first
    seen: set[str | None] = set(wanted)
    for stored in stored_in(saver, thread):
        ns, own, contents = ns_of(stored), id_of(stored), contents_of(saver, stored)
        if not ns and head is None:
            head, following = stored, own
        if not ns and own == following:
            following = parent_of(stored)
            for messages in lists(contents.values).values():
                new = [each for each in messages if each.id not in seen]
                seen.update(each.id for each in new)
                extra.append(new)
        memories = {name: memory for name, value in contents.values.items() if (memory := memory_in(value))}
        everything = contents.values, contents.histories, stored.pending_writes, stored.metadata
        inner = list(memories_in(everything))
        writers.update((memory.digest, memory) for memory in inner if not _has(writers, memory))
        parent = None if own == made else parent_of(stored)  # which goes
        checkpoints[ns, own] = Checkpoint(
            parent=None if parent is None else (ns, parent),
            holds=occurs(everything, wanted),
            said=is_said((contents.values, stored.pending_writes), said),
            consumed={mark for memory in inner for mark in wanted_marks & set(memory.record.recent)},
            memories={name: memory.digest for name, memory in memories.items()},
            inner={memory.digest for memory in inner},
        )
    history = [message for messages in reversed(extra) for message in messages]
    # Two messages that say the same look the same to a memory.
    only = wanted_marks - set(marks(history))
    for checkpoint in checkpoints.values():
        checkpoint.holds |= not only.isdisjoint(checkpoint.consumed)
    return Scan(checkpoints, _going(checkpoints), head, history, said, list(writers.values()))


def _has(writers: Mapping[str, MemoryState], memory: MemoryState) -> bool:
    own = memory.model_fingerprint, memory.adapter_fingerprint
    return any((each.model_fingerprint, each.adapter_fingerprint) == own for each in writers.values())


def _going(checkpoints: Mapping[Key, Checkpoint]) -> set[Key]:
    children: dict[Key, list[Key]] = {}
    for key, checkpoint in checkpoints.items():
        if checkpoint.parent is not None:
            children.setdefault(checkpoint.parent, []).append(key)
    going: set[Key] = set()
    left = [key for key, checkpoint in checkpoints.items() if checkpoint.holds]
    while left:
        key = left.pop()
        if key in going:
            continue
        going.add(key)
        left += children.get(key, [])
        parent = checkpoints[key].parent
        if parent is not None and parent in checkpoints and checkpoints[parent].said:
            left.append(parent)
    return going


# Values.


def memory_in(value: Any) -> MemoryState | None:
    """The memory that a channel's value is; None if it is something else."""
    try:
        return MemoryState.from_dict(value) if is_memory(value) else None
    except CorruptStateError:
        return None


def memories_in(value: object) -> Iterator[MemoryState]:
    """The memories anywhere in a value."""
    return (memory for each in _parts(value) if (memory := memory_in(each)) is not None)


def occurs(value: object, ids: Collection[str]) -> bool:
    """Whether a message with one of these ids is anywhere in a value."""
    return any(isinstance(each, BaseMessage) and each.id in ids for each in _parts(value))


def is_said(value: object, texts: Collection[str]) -> bool:
    """Whether one of these texts is in a value, as a text of its own: an input has no ids yet."""
    return bool(texts) and any(isinstance(each, str) and each in texts for each in _parts(value))


def _parts(value: object) -> Iterator[object]:
    """A value and everything in it."""
    left = [value]
    while left:
        each = left.pop()
        yield each
        if isinstance(each, Mapping):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            left += each
        elif isinstance(each, BaseMessage):
            if each.id is None:  # of an input; what else says the same is another message
                left.append(each.content)
        elif isinstance(each, BaseModel):
            left += [getattr(each, name) for name in type(each).model_fields]
        elif is_dataclass(each) and not isinstance(each, type):
            left += [getattr(each, field.name) for field in fields(each)]
        elif hasattr(each, "arg"):  # a Send
            left.append(each.arg)


def lists(values: Mapping[str, Any]) -> dict[str, list[BaseMessage]]:
    """The channels that hold lists of messages."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, list) and value and all(isinstance(each, BaseMessage) for each in value)
    }


def marks(messages: Iterable[BaseMessage]) -> Iterator[bytes]:
    """What the record of a memory that has consumed these messages holds."""
    for message in messages:
        try:
            (plain,) = to_engine([message])
        except TranscriptError:  # no memory can have consumed it
            continue
        if plain.writes:
            yield plain.digest()[:_DIGEST]


def ns_of(stored: CheckpointTuple) -> str:
    """The namespace of a checkpoint."""
    return str(stored.config["configurable"].get("checkpoint_ns", ""))


def id_of(stored: CheckpointTuple) -> str:
    """The id of a checkpoint."""
    return str(stored.config["configurable"]["checkpoint_id"])


def parent_of(stored: CheckpointTuple) -> str | None:
    """The id of the checkpoint above; None for a first one."""
    return None if stored.parent_config is None else str(stored.parent_config["configurable"]["checkpoint_id"])
