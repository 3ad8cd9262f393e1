"""Rewriting the checkpoints of a thread without a message: each stays where it was, under its id, as if it had never
held the message.

Their memories are written anew in the order in which they were made: that of a checkpoint from that of its parent, with
the messages that it consumed since, but those that go. Above the first of them stands a memory that never consumed the
message, or the zero state. Pending writes lose the message too; a task whose result was a memory that is in no
checkpoint loses all its writes, so that it runs again when the thread is resumed.

Whatever has not changed keeps its bytes. All of it is stored in one transaction, if the thread is still as it was read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from langchain_core.messages import BaseMessage
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.types import Overwrite
from sqlalchemy import Connection, delete, select

from agentmem.errors import StateMismatchError
from agentmem.state import MemoryState
from agentmem_governance.message_search import (
    Contents,
    Key,
    Scan,
    contents_of,
    is_said,
    lists,
    marks,
    memories_in,
    memory_in,
    occurs,
)
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.content import Packer, Value, dump
from agentmem_sql.list_tree import HISTORY, history_body, read_history
from agentmem_sql.message_cache import CachedThread
from agentmem_sql.reader import chunks
from agentmem_sql.rows import (
    RESERVED,
    Row,
    decode_writes,
    pack_content,
    seal_checkpoint,
    seal_write,
    unpack_content,
)
from agentmem_sql.saver import SaverParts, plain_serde
from agentmem_sql.schema import exact_key, open_key, thread_key
from agentmem_sql.statements import add_rows

# A memory that says who writes, messages, and the memory to begin with: the memory after it.
Remember = Callable[[MemoryState, Sequence[BaseMessage], MemoryState | None], MemoryState | None]
RowKey = tuple[bytes, bytes]  # a checkpoint's namespace and id, as stored
_GONE = object()


class WentOn(Exception):
    """Something was stored in the thread since it was read."""


class Rewritten(NamedTuple):
    """What is to be stored.

    Attributes:
        checkpoints, writes: new rows, in place of those of the same checkpoints.
        contents: what they refer to.
        rebuilt, notes: as in a receipt.
        seals: of all rows of the thread, as it was read.
    """

    checkpoints: list[Row]
    writes: list[Row]
    contents: dict[bytes, tuple[int, bytes]]
    rebuilt: list[dict[str, Any]]
    notes: list[str]
    seals: set[bytes]


class _ThreadRows(NamedTuple):
    """The rows of a thread, by checkpoint."""

    checkpoints: Mapping[RowKey, Row]
    writes: Mapping[RowKey, list[Row]]
    histories: Mapping[bytes, bytes]

    @property
    def seals(self) -> set[bytes]:
        written = (write for writes in self.writes.values() for write in writes)
        return {bytes(row["seal"]) for row in (*self.checkpoints.values(), *written)}


class Rewriter:
    """Works out what a thread's checkpoints are without some messages."""

    def __init__(self, saver: SQLAlchemySaver, thread: str, ids: Collection[str], remember: Remember) -> None:
        """Read the thread's rows; what is stored after this moment makes `store` raise `WentOn`."""
        self._saver = saver
        self._thread = thread
        self._ids = ids
        self._remember = remember
        self._serde = plain_serde(saver.serde)
        parts = saver.parts
        self._rows = parts.database.run(lambda connection: _rows(connection, parts, thread))
        self._made: dict[str, MemoryState | None] = {}  # by the digest of the memory whose place it takes
        self._old: dict[str, MemoryState] = {}
        self._result = Rewritten([], [], {}, [], [], self._rows.seals)

    def rewrite(self, found: Scan) -> Rewritten:
        """The rows of the checkpoints that are going, rewritten.

        Raises:
            WentOn: one of them is not there any more.
            StorageError: a delta channel holds a message in a form that is not known.
        """
        clean = found.clean
        pending: dict[Key, list[tuple[str, str, Any]]] = {}
        for key in _parents_first(found):
            stored = self._stored(key)
            pending[key] = list(stored.pending_writes or ())
            self._rewrite_checkpoint(found, clean, key, stored)
        for key, writes in pending.items():  # when all memories are known
            self._rewrite_writes(found, clean, key, writes)
        return self._result

    def _stored(self, key: Key) -> CheckpointTuple:
        where = {"thread_id": self._thread, "checkpoint_ns": key[0], "checkpoint_id": key[1]}
        stored = self._saver.get_tuple({"configurable": where})
        if stored is None or _row_key(key) not in self._rows.checkpoints:
            raise WentOn
        return stored

    def _rewrite_checkpoint(self, found: Scan, clean: Collection[str], key: Key, stored: CheckpointTuple) -> None:
        contents = contents_of(self._saver, stored)
        contents.check(self._ids)
        row, protection = self._rows.checkpoints[_row_key(key)], self._saver.parts.protection
        values, emptied = self._values(found, clean, key, contents)
        digests = unpack_content(row["content"]) | self._pack(values)
        for name in emptied:
            digests.pop(name, None)
        new = {**row, "content": pack_content(digests), "history": None}
        if row["history"] is not None:
            left = read_history(self._rows.histories[bytes(row["history"])])
            names = [name for name in left if name not in digests]
            made = self._saver.get_delta_channel_history(config=stored.config, channels=names)
            if kept := {name: left[name] for name in names if not occurs(made[name], self._ids)}:
                body = history_body(kept)
                new["history"] = protection.digest(HISTORY, body)
                self._result.contents[new["history"]] = HISTORY, body
        metadata: dict[str, Any] = dict(stored.metadata)
        if occurs(metadata, self._ids):
            metadata = {name: value for name, value in metadata.items() if not occurs(value, self._ids)}
            new["metadata"] = protection.encrypt(dump(self._serde, metadata, "metadata"))
        new["seal"] = seal_checkpoint(protection, self._thread, new)
        self._result.checkpoints.append(new)

    def _values(
        self, found: Scan, clean: Collection[str], key: Key, contents: Contents
    ) -> tuple[dict[str, Any], list[str]]:
        """The channels that hold something else without the messages, and those that hold nothing."""
        changed, emptied = dict[str, Any](), list[str]()
        messages = lists(contents.values)
        for name, value in contents.values.items():
            note = ""
            if name in found.checkpoints[key].memories:
                state = self._memory(found, clean, key, name, contents)
                if state is None:
                    emptied.append(name)
                elif state.digest != value["digest"]:
                    changed[name] = state.to_dict()
            elif name in contents.deltas or name in messages:
                kept = _without(value, self._ids, ())
                if name in contents.deltas:
                    changed[name] = _DeltaSnapshot(kept)
                elif len(kept) < len(value):
                    changed[name] = kept
            elif self._has(found, name, value) or (remade := self._remade(clean, value)) is _GONE:
                emptied.append(name)
                note = f"the channel {name!r}, which held the message in another form, was emptied"
            elif remade is not value:
                changed[name] = remade
            else:
                note = f"the channel {name!r} was kept; look whether its text was drawn from the message"
            if note and not name.startswith(RESERVED) and note not in self._result.notes:
                self._result.notes.append(note)
        return changed, emptied

    def _memory(
        self, found: Scan, clean: Collection[str], key: Key, name: str, contents: Contents
    ) -> MemoryState | None:
        """The memory that a checkpoint has without the messages; None where there is nothing to write it from."""
        memory = memory_in(contents.values[name])
        assert memory is not None
        self._old[memory.digest] = memory
        if memory.digest in clean:
            return memory
        if memory.digest not in self._made:
            base = self._base(found, key, name, memory)
            recent, told = set(memory.record.recent), dict[str | None, BaseMessage]()
            # A subgraph may have the memory without the messages.
            held = lists(contents.values).values() or [found.history]
            for message in (each for messages in held for each in messages):
                consumed = message.type == "system" or not recent.isdisjoint(marks([message]))
                if consumed and message.id not in self._ids:
                    told[message.id] = message
            state = self._made[memory.digest] = self._remember(memory, list(told.values()), base)
            self._result.rebuilt.append(
                {
                    "thread": thread_key(self._thread).hex(),
                    "checkpoint": key[1],
                    "channel": name,
                    "before": memory.digest,
                    "after": None if state is None else state.digest,
                    "messages": len(told),
                }
            )
        return self._made[memory.digest]

    def _base(self, found: Scan, key: Key, name: str, memory: MemoryState) -> MemoryState | None:
        """The memory that another one is written on from; None for the zero state."""
        parent = found.checkpoints[key].parent
        if parent is None or parent not in found.checkpoints:
            return None
        digest = found.checkpoints[parent].memories.get(name)
        if digest is None:
            return None
        if digest not in self._old:
            before = memory_in(self._stored(parent).checkpoint["channel_values"].get(name))
            if before is None:
                raise WentOn
            self._old[digest] = before
        try:
            self._old[digest].record.merge([memory.record])
        except StateMismatchError:  # it was begun anew
            return None
        return self._made.get(digest, self._old[digest])

    def _rewrite_writes(
        self, found: Scan, clean: Collection[str], key: Key, pending: Sequence[tuple[str, str, Any]]
    ) -> None:
        rows = self._rows.writes.get(_row_key(key), [])
        protection = self._saver.parts.protection
        stored = decode_writes(protection, self._thread, rows)
        ordered = sorted(zip(rows, stored, strict=True), key=lambda pair: pair[1].order)
        if [(write.task, write.channel) for _, write in ordered] != [each[:2] for each in pending]:
            raise WentOn
        again: set[str] = set()  # tasks that run again
        kept: list[tuple[str, Row]] = []
        for (row, _), (task, channel, value) in zip(ordered, pending, strict=True):
            if (memory := memory_in(value)) is not None:
                if memory.digest in clean:
                    kept.append((task, row))
                elif (state := self._made.get(memory.digest)) is not None:
                    kept.append((task, self._write(row, channel, state.to_dict())))
                elif memory.digest not in self._made:
                    again.add(task)
                continue
            new = self._remade(clean, _without(value, self._ids, found.said))
            if new is _GONE and any(each.digest not in clean for each in memories_in(value)):
                again.add(task)
            elif new is not _GONE and not self._has(found, channel, new):
                kept.append((task, row if new is value else self._write(row, channel, new)))
        self._result.writes.extend(row for task, row in kept if task not in again)

    def _remade(self, clean: Collection[str], value: Any) -> Any:
        """A value with the memories within it written anew; itself without any, `_GONE` where one of them cannot be."""
        if value is _GONE or all(memory.digest in clean for memory in memories_in(value)):
            return value
        if (memory := memory_in(value)) is not None:
            state = self._made.get(memory.digest)
            return _GONE if state is None else state.to_dict()
        if type(value) is dict:
            made = {name: self._remade(clean, each) for name, each in value.items()}
            return _GONE if any(each is _GONE for each in made.values()) else made
        if type(value) is list:
            remade = [self._remade(clean, each) for each in value]
            return _GONE if any(each is _GONE for each in remade) else remade
        return _GONE

    def _write(self, row: Row, channel: str, value: Any) -> Row:
        new = {**row, "digest": self._pack({channel: value})[channel]}
        return {**new, "seal": seal_write(self._saver.parts.protection, self._thread, new)}

    def _has(self, found: Scan, channel: str, value: object) -> bool:
        """Whether a message is in a value, or its text in a channel of LangGraph's own, such as that of the input."""
        return occurs(value, self._ids) or (channel.startswith(RESERVED) and is_said(value, found.said))

    def _pack(self, values: Mapping[str, Any]) -> dict[str, bytes]:
        """The digests of values, which become part of the result."""
        packer = Packer(self._serde, self._saver.parts.protection, CachedThread())
        digests = packer.pack([Value(name, value) for name, value in values.items()])
        self._result.contents.update(packer.new)
        return dict(zip(values, digests, strict=True))


def store(connection: Connection, saver: SQLAlchemySaver, thread: str, made: Rewritten) -> None:
    """Store rewritten checkpoints in place of what they were, in the caller's transaction.

    Raises:
        WentOn: the thread is not as it was read.
    """
    parts = saver.parts
    locked = parts.writer.find(connection, thread, lock=True)
    if locked is None or _rows(connection, parts, thread).seals != made.seals:
        raise WentOn
    tables = parts.database.tables
    parts.writer.add_content(connection, locked.number, made.contents)
    by_namespace: defaultdict[bytes, list[bytes]] = defaultdict(list)
    for row in made.checkpoints:
        by_namespace[row["ns"]].append(row["id"])
    for ns, ids in by_namespace.items():
        of_namespace = (tables.writes.c.thread == locked.number, tables.writes.c.ns == ns)
        for part in chunks(ids):
            connection.execute(delete(tables.writes).where(*of_namespace, tables.writes.c.checkpoint.in_(part)))
    for table, rows in ((tables.checkpoints, made.checkpoints), (tables.writes, made.writes)):
        for some in chunks(rows):
            add_rows(connection, table, some, replace=True)
    parts.writer.sweep(connection, locked)


def _rows(connection: Connection, parts: SaverParts, thread: str) -> _ThreadRows:
    tables = parts.database.tables
    locked = parts.writer.find(connection, thread, lock=False)
    if locked is None:
        return _ThreadRows({}, {}, {})
    checkpoints, writes, blobs = tables.checkpoints, tables.writes, tables.blobs
    rows = connection.execute(select(checkpoints).where(checkpoints.c.thread == locked.number)).mappings().all()
    by_checkpoint: defaultdict[RowKey, list[Row]] = defaultdict(list)
    for write in connection.execute(select(writes).where(writes.c.thread == locked.number)).mappings():
        by_checkpoint[bytes(write["ns"]), bytes(write["checkpoint"])].append(dict(write))
    left = select(blobs.c.digest, blobs.c.body).where(blobs.c.thread == locked.number, blobs.c.kind == HISTORY)
    histories = {bytes(digest): parts.protection.decrypt(bytes(body)) for digest, body in connection.execute(left)}
    return _ThreadRows({(bytes(row["ns"]), bytes(row["id"])): dict(row) for row in rows}, by_checkpoint, histories)


def _row_key(key: Key) -> RowKey:
    return open_key(key[0]), exact_key(key[1], "checkpoint id")


def _parents_first(found: Scan) -> Iterator[Key]:
    """The checkpoints that are going, by id, but none before its parent."""
    left = dict.fromkeys(sorted(found.going, key=lambda key: (key[1], key[0])))
    while left:
        way = [next(iter(left))]
        while (parent := found.checkpoints[way[-1]].parent) in left and parent not in way:
            way.append(parent)
        for key in reversed(way):
            del left[key]
            yield key


def _without(value: Any, ids: Collection[str], said: Collection[str]) -> Any:
    """A value without the messages in it; itself if they are not, `_GONE` if it is one of them.

    What a node writes may be a message that has no id yet, or what LangGraph makes one of: those that say the text go.
    """

    def goes(each: Any) -> bool:
        if isinstance(each, BaseMessage) and each.id is not None:
            return each.id in ids
        return isinstance(each, BaseMessage | tuple | list | Mapping) and is_said(each, said)

    if isinstance(value, Overwrite | _DeltaSnapshot):
        inner = _without(value.value, ids, said)
        if inner is value.value or inner is _GONE:
            return value if inner is value.value else _GONE
        return replace(value, value=inner) if isinstance(value, Overwrite) else _DeltaSnapshot(inner)
    if isinstance(value, list):
        kept = [each for each in value if not goes(each)]
        return kept if len(kept) < len(value) else value
    return _GONE if isinstance(value, BaseMessage) and goes(value) else value
