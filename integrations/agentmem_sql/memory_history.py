"""The memories of a thread, along the parents of a checkpoint.

Of the content only memories are read. If no channel is named, the latest value of each channel other than a list is
decoded once, to see whether it is a memory. Nothing is kept in the saver's cache, where old memories would displace
what the next turn needs. Between pages nothing is held open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import Connection, select

from agentmem.errors import CorruptStateError, StateMismatchError, StorageError
from agentmem.state import MemoryState
from agentmem_sql.audit import is_memory
from agentmem_sql.content import Unpacker, dump
from agentmem_sql.database import Database
from agentmem_sql.list_tree import LIST, VALUE
from agentmem_sql.message_cache import Body, CachedThread
from agentmem_sql.reader import Missing, Reader
from agentmem_sql.rows import RESERVED, Address, StoredCheckpoint, damaged, decode_row

_FIRST_PAGE, _PAGE = 4, 32  # memories read at once


@dataclass(frozen=True)
class MemoryStep:
    """A checkpoint whose memory differs from that of the checkpoint before.

    Attributes:
        checkpoint_id: the checkpoint.
        step: LangGraph's number of the checkpoint; None if its metadata have none.
        source: what made it: "input", "loop", "update" or "fork"; None likewise.
        time: when it was made; None likewise.
        channel: the channel of the memory.
        state: the memory.
        new: how many messages it consumed since the checkpoint before; all of them if it was restarted.
        new_digests: the 8-byte digests of those messages, oldest first; of more than 256 the last 256.
        restarted: it does not continue the memory of the checkpoint before, but was rebuilt or replaced.
    """

    checkpoint_id: str
    step: int | None
    source: str | None
    time: datetime | None
    channel: str
    state: MemoryState
    new: int
    new_digests: tuple[bytes, ...]
    restarted: bool

    @property
    def consumed(self) -> int:
        """How many messages the memory has consumed so far."""
        return self.state.count


class _Change(NamedTuple):
    """A checkpoint in which a channel holds other content than in its parent."""

    stored: StoredCheckpoint
    channel: str
    digest: bytes
    before: bytes | None
    parent: str | None


@dataclass
class MemoryWalk:
    """The way from a checkpoint to its first ancestor."""

    database: Database
    reader: Reader
    serde: SerializerProtocol
    address: Address
    channel: str | None  # None looks for memories in every channel
    memories: dict[str, bool] = field(default_factory=dict)  # by channel
    thread: CachedThread = field(default_factory=CachedThread)  # its number and epoch, no content

    def steps(self, *, newest_first: bool) -> Iterator[MemoryStep]:
        """See `SQLAlchemySaver.memory_history`."""
        changes = self.changes()
        if not newest_first:
            changes = reversed(list(changes))
        sizes = chain([_FIRST_PAGE], repeat(_PAGE))
        while page := list(islice(changes, next(sizes))):
            # Where each memory stands.
            wanted = {each.before: (each.channel, str(each.parent)) for each in page if each.before is not None}
            wanted |= {each.digest: (each.channel, each.stored.id) for each in page}
            contents = self.database.run(partial(self.collect, wanted=wanted))
            # Without those that were taken out together with their checkpoints meanwhile.
            found = wanted.keys() & contents.keys()
            states = {digest: self.state(digest, contents, *wanted[digest]) for digest in found}
            for change in page:
                state, before = states.get(change.digest), states.get(change.before or b"")
                if state is not None and state != before:
                    yield _step(change, state, before)

    def changes(self) -> Iterator[_Change]:
        """Where the memories change, newest first; of one channel, or of every channel that holds memories."""
        latest: dict[str, tuple[StoredCheckpoint, bytes]] = {}  # channel -> the earliest checkpoint yet of this content
        for stored in chain(self._rows(), [None]):
            digests = {} if stored is None else stored.digests
            held = {name: digest for name, digest in digests.items() if self.memories.get(name, name == self.channel)}
            for name, (at, digest) in sorted(latest.items(), reverse=True):
                if held.get(name) != digest:
                    yield _Change(at, name, digest, held.get(name), None if stored is None else stored.id)
            latest = {} if stored is None else {name: (stored, digest) for name, digest in held.items()}

    def _rows(self) -> Iterator[StoredCheckpoint]:
        """The checkpoint and its ancestors, read many at a time."""
        thread, ns, named = self.address
        located = self.database.run(partial(self.reader.locate, address=self.address))
        if located is None and named is not None:
            raise StorageError(
                f"expected the checkpoint {named!r} in namespace {ns!r} of thread {thread[:80]!r}, found none; "
                "leave checkpoint_id out for the newest"
            )
        if located is None:
            return
        self.thread = CachedThread(located[0].number, located[0].epoch)
        protection = self.reader.protection
        read = self.reader.ancestor_rows
        for rows in self.reader.ancestor_pages(
            lambda keys: self.database.run(partial(read, keys=keys)), self.thread.number, ns, located[1]
        ):
            page = [decode_row(protection, self.serde, thread, row) for row in rows]
            if self.channel is None:
                self.database.run(partial(self._classify, page=page))
            yield from page

    def _classify(self, connection: Connection, page: Sequence[StoredCheckpoint]) -> None:
        """Note of the channels met for the first time whether their latest value that is not None is a memory."""
        none = self.reader.protection.digest(VALUE, dump(self.serde, None, "an empty memory"))
        latest: dict[str, tuple[bytes, str]] = {}
        for stored in page:
            for name, digest in stored.digests.items():
                if name not in self.memories and digest != none and not name.startswith(RESERVED):
                    latest.setdefault(name, (digest, stored.id))
        if not latest:
            return
        # Lists are no memories, and may be long: only their kind is read.
        blobs = self.reader.tables.blobs
        is_list = (blobs.c.thread == self.thread.number, blobs.c.kind == LIST)
        digests = {digest for digest, _ in latest.values()}
        lists = set(connection.execute(select(blobs.c.digest).where(*is_list, blobs.c.digest.in_(digests))).scalars())
        wanted = {digest: (name, at) for name, (digest, at) in latest.items() if digest not in lists}
        contents = self.collect(connection, wanted)
        for name, (digest, _) in latest.items():
            if digest in lists or digest in contents:  # else it was taken out meanwhile: an earlier value tells
                self.memories[name] = digest not in lists and is_memory(self._unpack(digest, contents))

    def _unpack(self, digest: bytes, contents: Mapping[bytes, Body]) -> Any:
        return Unpacker(self.serde, contents, CachedThread()).unpack_all([digest])[0]

    def collect(self, connection: Connection, wanted: Mapping[bytes, tuple[str, str]]) -> dict[bytes, Body]:
        """The content of values, given with their channels and checkpoints; without those taken out meanwhile."""
        thread, ns, _ = self.address
        try:
            # Of a thread that is not the saver's own: nothing is remembered of what is read.
            unknown = CachedThread(self.thread.number, self.thread.epoch)
            return self.reader.collect(connection, unknown, wanted)
        except (Missing, StorageError):
            if len(wanted) > 1:  # one after the other, to leave out or to name the one that is at fault
                parts = (self.collect(connection, {digest: place}) for digest, place in wanted.items())
                return {digest: body for part in parts for digest, body in part.items()}
            [(channel, at)] = wanted.values()
            if self.reader.locate(connection, Address(thread, ns, at)) is None:
                return {}
            raise damaged(thread, at, f"the value of channel {channel!r}") from None

    def state(self, digest: bytes, contents: Mapping[bytes, Body], channel: str, at: str) -> MemoryState | None:
        """The memory in content; None where it holds none, unless the channel was named."""
        value = self._unpack(digest, contents)
        if value is None or not (self.channel or is_memory(value)):
            return None
        try:
            return MemoryState.from_dict(value)
        except CorruptStateError as error:
            where = f"channel {channel!r} of checkpoint {at!r} in thread {self.address.thread[:80]!r}"
            raise CorruptStateError(f"{where} holds no sound memory: {error}") from error


def _step(change: _Change, state: MemoryState, before: MemoryState | None) -> MemoryStep:
    new, restarted = state.count, False
    if before is not None:
        try:
            before.record.merge([state.record])
        except StateMismatchError:
            restarted = True
        else:
            new -= before.count
    recent = state.record.recent
    digests = recent[len(recent) - min(new, len(recent)) :]
    stored = change.stored
    try:
        time = datetime.fromisoformat(stored.body["ts"])
    except (KeyError, TypeError, ValueError):
        time = None
    step, source = stored.metadata.get("step"), stored.metadata.get("source")
    return MemoryStep(stored.id, step, source, time, change.channel, state, new, digests, restarted)
