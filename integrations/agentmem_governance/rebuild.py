"""Forgetting a message: the thread goes on without it, with a memory that never consumed it.

Nothing can be taken out of a matrix. So an engine writes the memory anew, from the zero state, with all messages that
the thread has had on the way to its newest checkpoint but those that go. This state, with the checkpoint that it
belongs to, is in the journal before anything is deleted; the rest can be repeated, and needs no engine.

These checkpoints go: those in which one of the messages occurs, or whose memory has consumed it; the checkpoint that
holds the input that it came with; and every checkpoint that descends from one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.base.id import uuid6
from pydantic import BaseModel
from sqlalchemy import Connection

from agentmem.errors import ConfigError, CorruptStateError, StateMismatchError, StorageError, TranscriptError
from agentmem.state import MemoryState
from agentmem_governance.journal import JournalEntry
from agentmem_langgraph.messages import to_engine
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.audit import is_memory
from agentmem_sql.rows import Row
from agentmem_sql.saver import plain_serde
from agentmem_sql.schema import exact_key, open_key, thread_key

if TYPE_CHECKING:
    from agentmem import Engine

Key = tuple[str, str]  # a checkpoint's namespace and id
_DIGEST = 8  # bytes of a message's digest in a memory's record
_RESERVED = ("__", "branch:")  # channels of LangGraph's own
_ATTEMPTS = 5


class _WentOn(Exception):
    """A checkpoint was stored since the thread was read."""


@dataclass
class _Checkpoint:
    """What matters of a checkpoint: where it hangs, and whether something that goes is in it.

    Attributes:
        parent: the checkpoint above it.
        holds: whether one of the messages is in it.
        said: whether the text of one is in it, as in an input.
        consumed: what its memories have consumed, as far as it looks like one of the messages.
    """

    parent: Key | None
    holds: bool
    said: bool
    consumed: set[bytes]


class _Scan(NamedTuple):
    """A thread as it was read.

    Attributes:
        checkpoints: all of it, by key.
        going: the keys of those that go.
        head: the newest of the main graph, if there is one.
        history: all messages that the thread had on the way to the head, without those that go.
    """

    checkpoints: Mapping[Key, _Checkpoint]
    going: set[Key]
    head: CheckpointTuple | None
    history: list[BaseMessage]


class MessageRemoval:
    """Takes messages out of one thread."""

    def __init__(self, saver: SQLAlchemySaver, engines: Sequence[Engine], thread: str) -> None:
        self._saver = saver
        self._engines = engines
        self._thread = thread
        self._serde = plain_serde(saver.serde)

    def group(self, message: str, *, with_reply: bool) -> list[str]:
        """The ids of the messages that go with this one, itself first.

        With the reply: all up to the next human message. Without: the results of the tools that it calls, which would
        answer nothing.

        Raises:
            StorageError: the thread has no such message.
        """
        for stored in self._stored():
            for messages in _lists(stored.checkpoint["channel_values"]).values():
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
            f"expected a message with the id {message!r} in thread {self._thread[:80]!r}, found none in the lists of "
            "its checkpoints; take the id from the graph's state (those in delta channels cannot be forgotten singly)"
        )

    def plan(self, entry: JournalEntry, messages: Sequence[str]) -> None:
        """Work out what the thread goes on from, and put it into the entry. Changes nothing.

        Raises:
            ConfigError: a memory has to be built anew, and there is no engine.
            StateMismatchError: no engine is the one that wrote it.
        """
        entry.messages = list(messages)
        scan = self._scan(messages)
        entry.head = None if scan.head is None else _id(scan.head)
        entry.rebuilt_checkpoint, entry.rebuilt, entry.notes = None, [], []
        if scan.head is not None and ("", _id(scan.head)) in scan.going:
            self._rebuild(entry, scan, scan.head)

    def complete(self, entry: JournalEntry, write: Callable[[Callable[[Connection], None]], None]) -> None:
        """Store the new checkpoint and remove those that go; may be repeated.

        Args:
            entry: as planned.
            write: does work and stores the entry, in one transaction.

        Raises:
            ConfigError, StateMismatchError: as `plan`, if the thread went on since.
            StorageError: the database reports an error, or the thread goes on all the time.
        """
        for _ in range(_ATTEMPTS):
            new = self._new(entry)
            scan = self._scan(entry.messages, None if new is None else new["checkpoint"]["id"])
            head = None if scan.head is None else _id(scan.head)
            if head != entry.head and ("", head) in scan.going:
                self.plan(entry, entry.messages)
                continue
            self._count(entry, scan.going)
            write(lambda connection: None)
            scanned = {*scan.checkpoints}
            if new is not None and scan.going:
                checkpoint = new["checkpoint"]
                # Below the one that goes: what has not changed is stored already, and stays exactly as it is. When that
                # is removed, the new one is linked to the nearest ancestor that stays.
                where = {"thread_id": self._thread, "checkpoint_ns": "", "checkpoint_id": new["parent"]}
                versions = {name: checkpoint["channel_versions"][name] for name in checkpoint["updated_channels"]}
                self._saver.put({"configurable": where}, checkpoint, new["metadata"], versions)
                scanned.add(("", new["checkpoint"]["id"]))
            try:
                self._remove(scan.going, scanned)
            except _WentOn:
                continue
            self._saver.parts.cache.drop(self._thread)
            return
        raise StorageError(
            f"thread {self._thread[:80]!r} went on {_ATTEMPTS} times while a message was being taken out of it; end "
            "its runs, and call resume()"
        )

    # Reading.

    def _stored(self) -> Iterator[CheckpointTuple]:
        return self._saver.list({"configurable": {"thread_id": self._thread}})

    def _scan(self, ids: Sequence[str], made: str | None = None) -> _Scan:
        """Read the thread; the checkpoint `made`, to go on from, stays, and what came after it."""
        wanted, gone = set(ids), dict[str, BaseMessage]()
        for stored in self._stored():
            for messages in _lists(stored.checkpoint["channel_values"]).values():
                gone.update((each.id, each) for each in messages if each.id in wanted)
        said = {message.text for message in gone.values()} - {""}
        marks = set(_marks(gone.values()))
        checkpoints: dict[Key, _Checkpoint] = {}
        head: CheckpointTuple | None = None
        following: str | None = None
        extra: list[list[BaseMessage]] = []  # newest first
        seen: set[str | None] = set(wanted)
        for stored in self._stored():
            ns, own, values = _ns(stored), _id(stored), stored.checkpoint["channel_values"]
            if not ns and head is None:
                head, following = stored, own
            if not ns and own == following:
                following = _parent(stored)
                for messages in _lists(values).values():
                    new = [each for each in messages if each.id not in seen]
                    seen.update(each.id for each in new)
                    extra.append(new)
            everything = values, stored.pending_writes
            parent = None if own == made else _parent(stored)  # which goes
            checkpoints[ns, own] = _Checkpoint(
                parent=None if parent is None else (ns, parent),
                holds=occurs(everything, wanted),
                said=_said(everything, said),
                consumed={mark for value in values.values() for mark in _consumed(value, marks)},
            )
        history = [message for messages in reversed(extra) for message in messages]
        # Two messages that say the same look the same to a memory.
        only = marks - set(_marks(history))
        for checkpoint in checkpoints.values():
            checkpoint.holds |= not only.isdisjoint(checkpoint.consumed)
        return _Scan(checkpoints, _going(checkpoints), head, history)

    # Building anew.

    def _rebuild(self, entry: JournalEntry, scan: _Scan, head: CheckpointTuple) -> None:
        gone = set(entry.messages)
        values, versions = dict(head.checkpoint["channel_values"]), dict(head.checkpoint["channel_versions"])
        changed = []
        for name, value in head.checkpoint["channel_values"].items():
            if (memory := memory_in(value)) is not None:
                state = self._remember(memory, scan.history)
                entry.rebuilt.append(
                    {
                        "thread": thread_key(self._thread).hex(),
                        "channel": name,
                        "before": memory.digest,
                        "after": None if state is None else state.digest,
                        "messages": len(scan.history),
                    }
                )
                if state is None:
                    del values[name]
                else:
                    values[name] = state.to_dict()
                changed.append(name)
            elif name in _lists(head.checkpoint["channel_values"]):
                values[name] = [message for message in value if message.id not in gone]
                changed.append(name)
            elif occurs(value, gone):
                del values[name]
                changed.append(name)
                entry.notes.append(f"the channel {name!r}, which held the message in another form, was emptied")
            elif not name.startswith(_RESERVED):
                entry.notes.append(f"the channel {name!r} was kept; look whether its text was drawn from the message")
        for name in changed:
            versions[name] = self._saver.get_next_version(versions.get(name), None)
        checkpoint = {
            **head.checkpoint,
            "id": str(uuid6()),
            "ts": datetime.now(UTC).isoformat(),
            "channel_values": values,
            "channel_versions": versions,
            "updated_channels": sorted(changed),
        }
        metadata = {name: value for name, value in head.metadata.items() if name != "writes"}
        metadata |= {"source": "update", "step": int(head.metadata.get("step") or 0) + 1}
        new = {"checkpoint": checkpoint, "metadata": metadata, "parent": _id(head)}
        tag, body = self._serde.dumps_typed(new)
        entry.rebuilt_checkpoint = tag.encode() + b"\0" + body

    def _new(self, entry: JournalEntry) -> dict[str, Any] | None:
        """The checkpoint to go on from."""
        if entry.rebuilt_checkpoint is None:
            return None
        tag, _, body = entry.rebuilt_checkpoint.partition(b"\0")
        new: dict[str, Any] = self._serde.loads_typed((tag.decode(), body))
        return new

    def _remember(self, memory: MemoryState, history: Sequence[BaseMessage]) -> MemoryState | None:
        if not history:
            return None
        mismatch: StateMismatchError | None = None
        for engine in self._engines:
            if not engine.has_memory:
                continue
            zero = engine.zero_state()
            try:
                memory.require(zero.model_fingerprint, zero.adapter_fingerprint, zero.shape)
            except StateMismatchError as error:
                mismatch = error
            else:
                return engine.remember(to_engine(history, engine.message_cache)).state
        if mismatch is not None:
            raise mismatch
        raise ConfigError(
            f"thread {self._thread[:80]!r} has a memory, which has to be written anew without the message; pass "
            "engines=[engine] with the model and adapter that wrote it"
        )

    # Removing.

    def _count(self, entry: JournalEntry, going: Collection[Key]) -> None:
        """Add to the entry what goes now; what went before an interruption is in it already."""
        ids = {each for went in entry.went for each in went["ids"]} | {checkpoint_id for _, checkpoint_id in going}
        ordered = sorted(ids)
        digest = sha256("\n".join(ordered).encode()).hexdigest()
        key = thread_key(self._thread).hex()
        entry.went = [{"thread": key, "checkpoints": len(ids), "ids": ordered, "digest": digest}]

    def _remove(self, going: Collection[Key], scanned: Collection[Key]) -> None:
        if not going:
            return
        read = {(open_key(ns), exact_key(own, "checkpoint id")) for ns, own in scanned}
        victims = {(open_key(ns), exact_key(own, "checkpoint id")) for ns, own in going}

        def choose(rows: Mapping[tuple[bytes, bytes], Row], _awaited: object) -> set[tuple[bytes, bytes]]:
            if rows.keys() - read:
                raise _WentOn
            return victims & rows.keys()

        self._saver.parts.pruner.remove(self._serde, self._thread, choose)


def memory_in(value: Any) -> MemoryState | None:
    """The memory that a channel's value is; None if it is something else."""
    try:
        return MemoryState.from_dict(value) if is_memory(value) else None
    except CorruptStateError:
        return None


def occurs(value: object, ids: Collection[str]) -> bool:
    """Whether a message with one of these ids is anywhere in a value."""
    return any(isinstance(each, BaseMessage) and each.id in ids for each in _parts(value))


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


def _said(value: object, texts: Collection[str]) -> bool:
    """Whether one of these texts is in a value, as a text of its own: an input has no ids yet."""
    return bool(texts) and any(isinstance(each, str) and each in texts for each in _parts(value))


def _going(checkpoints: Mapping[Key, _Checkpoint]) -> set[Key]:
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


def _lists(values: Mapping[str, Any]) -> dict[str, list[BaseMessage]]:
    """The channels that hold lists of messages."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, list) and value and all(isinstance(each, BaseMessage) for each in value)
    }


def _marks(messages: Iterable[BaseMessage]) -> Iterator[bytes]:
    """What the record of a memory that has consumed these messages holds."""
    for message in messages:
        try:
            (plain,) = to_engine([message])
        except TranscriptError:  # no memory can have consumed it
            continue
        if plain.writes:
            yield plain.digest()[:_DIGEST]


def _consumed(value: object, marks: set[bytes]) -> set[bytes]:
    """Those of the marks that a value, if it is a memory, has consumed."""
    memory = memory_in(value) if marks else None
    return set() if memory is None else marks & set(memory.record.recent)


def _ns(stored: CheckpointTuple) -> str:
    return str(stored.config["configurable"].get("checkpoint_ns", ""))


def _id(stored: CheckpointTuple) -> str:
    return str(stored.config["configurable"]["checkpoint_id"])


def _parent(stored: CheckpointTuple) -> str | None:
    return None if stored.parent_config is None else str(stored.parent_config["configurable"]["checkpoint_id"])
