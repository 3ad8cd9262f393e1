"""Forgetting a message: the thread goes on without it, with a memory that never consumed it.

Nothing can be taken out of a matrix. So an engine writes the memory anew, in one of two ways:

- The checkpoints that have to go (see `message_search`) are removed, and the thread goes on from a new one. Its memory
  is written from the zero state with all messages that the thread has had on the way to its newest checkpoint but those
  that go. This state, with the checkpoint that it belongs to, is in the journal before anything is deleted; the rest
  can be repeated, and needs no engine.
- They are kept and rewritten (see `rewrite`), all in one transaction, so that nothing was done if it did not end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from langchain_core.messages import BaseMessage
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from sqlalchemy import Connection

from agentmem.errors import ConfigError, StateMismatchError, StorageError
from agentmem.state import MemoryState
from agentmem_governance.journal import JournalEntry
from agentmem_governance.message_search import (
    Key,
    Scan,
    contents_of,
    group,
    id_of,
    lists,
    memories_in,
    memory_in,
    ns_of,
    occurs,
    scan,
    stored_in,
)
from agentmem_governance.rewrite import Rewriter, WentOn, store
from agentmem_langgraph.messages import to_engine
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.rows import RESERVED, Row
from agentmem_sql.saver import plain_serde
from agentmem_sql.schema import exact_key, open_key, thread_key

if TYPE_CHECKING:
    from agentmem import Engine

_ATTEMPTS = 5


class MessageRemoval:
    """Takes messages out of one thread."""

    def __init__(self, saver: SQLAlchemySaver, engines: Sequence[Engine], thread: str) -> None:
        self._saver = saver
        self._engines = engines
        self._thread = thread
        self._serde = plain_serde(saver.serde)

    def plan(self, entry: JournalEntry, message: str, *, with_reply: bool) -> None:
        """Work out which messages go and what the thread goes on from, and put it into the entry. Changes nothing.

        Raises:
            ConfigError: a memory has to be built anew, and there is no engine.
            StateMismatchError: no engine is the one that wrote it.
            StorageError: the thread has no such message, or a delta channel holds it in a form that is not known.
        """
        entry.messages = group(self._saver, self._thread, message, with_reply=with_reply)
        self._plan(entry)

    def _plan(self, entry: JournalEntry) -> None:
        found = scan(self._saver, self._thread, entry.messages)
        entry.head = None if found.head is None else id_of(found.head)
        if entry.keep_checkpoints:
            # Whatever can stop it stops it before it is written down.
            for stored in stored_in(self._saver, self._thread):
                if (ns_of(stored), id_of(stored)) in found.going:
                    contents_of(self._saver, stored).check(entry.messages)
            going = (found.checkpoints[key] for key in found.going)
            if {digest for each in going for digest in each.memories.values()} - found.clean:
                for memory in found.writers:
                    self._engine_of(memory)
            return
        entry.rebuilt_checkpoint, entry.rebuilt, entry.notes = None, [], []
        if found.head is not None and ("", id_of(found.head)) in found.going:
            self._rebuild(entry, found, found.head)

    def complete(self, entry: JournalEntry, write: Callable[[Callable[[Connection], None]], None]) -> None:
        """Store what is built anew and remove what goes; may be repeated.

        Args:
            entry: as planned.
            write: does work and stores the entry, in one transaction.

        Raises:
            ConfigError, StateMismatchError: as `plan`, if the thread went on since, or checkpoints are rewritten.
            StorageError: the database reports an error, or the thread goes on all the time.
        """
        for _ in range(_ATTEMPTS):
            try:
                if (self._rewrite if entry.keep_checkpoints else self._replace)(entry, write):
                    self._saver.parts.cache.drop(self._thread)
                    return
            except WentOn:
                continue
        raise StorageError(
            f"thread {self._thread[:80]!r} went on {_ATTEMPTS} times while a message was being taken out of it; end "
            "its runs, and call resume()"
        )

    def _replace(self, entry: JournalEntry, write: Callable[[Callable[[Connection], None]], None]) -> bool:
        """Store the new checkpoint and remove those that go; False if all is to be planned again."""
        new = self._new(entry)
        found = scan(self._saver, self._thread, entry.messages, None if new is None else new["checkpoint"]["id"])
        head = None if found.head is None else id_of(found.head)
        if head != entry.head and ("", head) in found.going:
            self._plan(entry)
            return False
        self._count(entry, found.going)
        write(lambda connection: None)
        scanned = {*found.checkpoints}
        if new is not None and found.going:
            checkpoint = new["checkpoint"]
            # Below the one that goes: what has not changed is stored already, and stays exactly as it is. When that
            # is removed, the new one is linked to the nearest ancestor that stays.
            where = {"thread_id": self._thread, "checkpoint_ns": "", "checkpoint_id": new["parent"]}
            versions = {name: checkpoint["channel_versions"][name] for name in checkpoint["updated_channels"]}
            self._saver.put({"configurable": where}, checkpoint, new["metadata"], versions)
            scanned.add(("", new["checkpoint"]["id"]))
        self._remove(found.going, scanned)
        return True

    def _rewrite(self, entry: JournalEntry, write: Callable[[Callable[[Connection], None]], None]) -> bool:
        """Rewrite the checkpoints that hold a message, all in one transaction with the entry."""
        rewriter = Rewriter(self._saver, self._thread, set(entry.messages), self._remember)
        found = scan(self._saver, self._thread, entry.messages)
        if not found.going:  # it was done before an interruption
            return True
        made = rewriter.rewrite(found)
        key = thread_key(self._thread).hex()
        entry.rebuilt, entry.notes = made.rebuilt, made.notes
        ids = sorted({checkpoint_id for _, checkpoint_id in found.going})
        entry.went = [{"thread": key, "checkpoints": 0, "ids": [], "digest": _digest([]), "rewritten": ids}]
        write(lambda connection: store(connection, self._saver, self._thread, made))
        return True

    # Building anew.

    def _rebuild(self, entry: JournalEntry, found: Scan, head: CheckpointTuple) -> None:
        gone = set(entry.messages)
        contents = contents_of(self._saver, head)
        contents.check(gone)
        values, versions = dict(head.checkpoint["channel_values"]), dict(head.checkpoint["channel_versions"])
        changed = []
        for name, value in contents.values.items():
            if (memory := memory_in(value)) is not None:
                state = self._remember(memory, found.history)
                entry.rebuilt.append(
                    {
                        "thread": thread_key(self._thread).hex(),
                        "channel": name,
                        "before": memory.digest,
                        "after": None if state is None else state.digest,
                        "messages": len(found.history),
                    }
                )
                if state is None:
                    del values[name]
                else:
                    values[name] = state.to_dict()
                changed.append(name)
            elif name in contents.deltas or name in lists(contents.values):
                kept = [message for message in value if message.id not in gone]
                values[name] = _DeltaSnapshot(kept) if name in contents.deltas else kept
                changed.append(name)
            elif occurs(value, gone) or any(memory.digest not in found.clean for memory in memories_in(value)):
                del values[name]
                changed.append(name)
                entry.notes.append(f"the channel {name!r}, which held the message in another form, was emptied")
            elif not name.startswith(RESERVED):
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
        new = {"checkpoint": checkpoint, "metadata": metadata, "parent": id_of(head)}
        tag, body = self._serde.dumps_typed(new)
        entry.rebuilt_checkpoint = tag.encode() + b"\0" + body

    def _new(self, entry: JournalEntry) -> dict[str, Any] | None:
        """The checkpoint to go on from."""
        if entry.rebuilt_checkpoint is None:
            return None
        tag, _, body = entry.rebuilt_checkpoint.partition(b"\0")
        new: dict[str, Any] = self._serde.loads_typed((tag.decode(), body))
        return new

    def _remember(
        self, memory: MemoryState, history: Sequence[BaseMessage], base: MemoryState | None = None
    ) -> MemoryState | None:
        """What the writer of a memory makes of messages after a base; None where there is neither."""
        if not history:
            return base
        engine = self._engine_of(memory)
        return engine.remember(to_engine(history, engine.message_cache), base).state

    def _engine_of(self, memory: MemoryState) -> Engine:
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
                return engine
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
        key = thread_key(self._thread).hex()
        entry.went = [{"thread": key, "checkpoints": len(ids), "ids": ordered, "digest": _digest(ordered)}]

    def _remove(self, going: Collection[Key], scanned: Collection[Key]) -> None:
        if not going:
            return
        read = {(open_key(ns), exact_key(own, "checkpoint id")) for ns, own in scanned}
        victims = {(open_key(ns), exact_key(own, "checkpoint id")) for ns, own in going}

        def choose(rows: Mapping[tuple[bytes, bytes], Row], _awaited: object) -> set[tuple[bytes, bytes]]:
            if rows.keys() - read:
                raise WentOn
            return victims & rows.keys()

        self._saver.parts.pruner.remove(self._serde, self._thread, choose)


def _digest(ids: Sequence[str]) -> str:
    return sha256("\n".join(ids).encode()).hexdigest()
