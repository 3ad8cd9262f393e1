"""The memories of a thread, found along the parents of a checkpoint and read page by page.

What is read are the rows of the checkpoints, and of the content the memories: not the messages, and of any other
channel at most the first bytes of one value, to see that it is no memory (where values are encrypted, that value).
Nothing is kept in the saver's cache, where old memories would drive out what the next turn needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from langgraph.checkpoint.serde.base import SerializerProtocol
from numpy.typing import NDArray
from sqlalchemy import Connection, bindparam, case, func, null, select

from agentmem.errors import CorruptStateError, StateMismatchError, StorageError
from agentmem.state import MemoryState
from agentmem_sql.cache import Body, Thread
from agentmem_sql.codec import Address, StoredCheckpoint, damaged, decode_row
from agentmem_sql.keys import DIGEST_BYTES, open_key
from agentmem_sql.packing import Unpacker
from agentmem_sql.reading import Missing
from agentmem_sql.steps import Store
from agentmem_sql.trees import SPLIT, VALUE

# Channels of LangGraph's own; what they hold is never a memory.
_RESERVED = ("__", "branch:")

_FIRST_PAGE, _LARGEST_PAGE = 4, 64  # memories read at once
_PAGE_BYTES = 4 * 2**20

_PEEKED = 48  # bytes of a stored value: its mark, the serializer's tag, and where a dict names its first key
_TAG, _OTHER_TAGS = b"msgpack\0", (b"bytes\0", b"bytearray\0")
_DICTS = frozenset({*range(0x80, 0x90), 0xDE, 0xDF})  # how a msgpack dict may begin
_FIRST_KEY = b"\xa5shape"  # of MemoryState.to_dict()
_FIRST_KEY_BY = 5  # bytes of a dict's beginning, at most


@dataclass(frozen=True)
class MemoryStep:
    """A checkpoint in which a memory is another than in the checkpoint before.

    Attributes:
        checkpoint_id: the checkpoint.
        step: its number in its thread as LangGraph counts, None if its metadata do not say.
        source: what made it: "input", "loop", "update" or "fork"; None likewise.
        time: when it was made; None likewise.
        channel: where the memory is kept.
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
    def digest(self) -> str:
        """The digest of the memory, hexadecimal."""
        return self.state.digest

    @property
    def consumed(self) -> int:
        """How many messages the memory has consumed so far."""
        return self.state.count

    @property
    def norms(self) -> NDArray[np.float64]:
        """The Frobenius norm of each matrix: [layers, heads]."""
        found: NDArray[np.float64] = np.linalg.norm(self.state.matrices.astype(np.float64), axis=(2, 3))
        return found

    @property
    def model_fingerprint(self) -> str:
        """The model that wrote the memory."""
        return self.state.model_fingerprint

    @property
    def adapter_fingerprint(self) -> str:
        """The adapter that wrote the memory."""
        return self.state.adapter_fingerprint


class _Mark(NamedTuple):
    """What a step says of its checkpoint."""

    id: str
    step: int | None
    source: str | None
    time: datetime | None


class _Change(NamedTuple):
    """A checkpoint in which a channel holds other content than in its parent."""

    mark: _Mark
    channel: str
    digest: bytes
    before: bytes | None
    parent: str | None


class Found(NamedTuple):
    """Changes, and the content that they need."""

    changes: Sequence[_Change]
    contents: Mapping[bytes, Body]


class Walk:
    """The way from a checkpoint to its first ancestor. Between pages nothing is held open."""

    def __init__(
        self, store: Store, serde: SerializerProtocol, address: Address, channel: str | None, *, newest_first: bool
    ) -> None:
        self.finished = False
        self._store = store
        self._serde = serde
        self._address = address
        self._named = channel is not None
        self._newest_first = newest_first
        self._known: Thread | None = None  # its number and epoch, no content
        self._next: bytes | None = None  # the checkpoint to go on with
        self._walked = False
        self._seen: set[str] = set()
        self._is_memory: dict[str, bool] = {} if channel is None else {channel: True}
        self._runs: dict[str, tuple[_Mark, bytes]] = {}  # channel -> earliest checkpoint so far with its content
        self._changes: list[_Change] = []  # newest first, not read yet
        self._page = _FIRST_PAGE
        self._states: dict[bytes, MemoryState | None] = {}  # of the page before
        blobs = store.reader.tables.blobs
        body = blobs.c.body if store.vault.encrypts else func.substr(blobs.c.body, 1, _PEEKED, type_=blobs.c.body.type)
        value = case((blobs.c.kind.in_((VALUE, SPLIT)), body), else_=null())
        self._beginnings = select(blobs.c.digest, blobs.c.kind, value).where(
            blobs.c.thread == bindparam("thread"), blobs.c.digest.in_(bindparam("digests", expanding=True))
        )

    # In a connection. Work may be run again from its beginning, so it changes nothing before its last statement.

    def next_page(self, connection: Connection) -> Found:
        """Follow some ancestors, or read some memories; may find nothing although the walk is not ``finished``."""
        if not (self._walked or (self._newest_first and len(self._changes) > self._page)):
            self._follow(connection)
            return Found((), {})
        if self._newest_first:
            page, rest = self._changes[: self._page], self._changes[self._page :]
        else:
            page, rest = self._changes[-self._page :][::-1], self._changes[: -self._page]
        found = self._read(connection, page)
        self._changes = rest
        self.finished = self._walked and not rest
        return found

    def _follow(self, connection: Connection) -> None:
        known, at = self._known, self._next
        if known is None:
            located = self._store.reader.locate(connection, self._address)
            if located is None:
                self._require_newest()
                self._walked = self.finished = True
                return
            known, at = Thread(located[0].number, located[0].epoch), located[1]
        ns = open_key(self._address.ns)
        keys = {"thread": known.number, "ns": ns, "id": at}
        rows = connection.execute(self._store.walker.chain, keys).mappings().all()
        vault, thread = self._store.vault, self._address.thread
        ancestors = [decode_row(vault, self._serde, thread, {**row, "ns": ns}) for row in rows]
        if not self._named:
            self._is_memory = self._is_memory | self._classify(connection, known, ancestors)
        self._known = known
        self._next = rows[-1]["parent"] if rows else None
        for stored in ancestors:
            if stored.id in self._seen:  # it was stored again below one of its own descendants
                self._next = None
                break
            self._seen.add(stored.id)
            self._pass(stored)
        if self._next is None:
            self._end_runs({}, None)
            self._walked = True
            self.finished = not self._changes

    def _require_newest(self) -> None:
        if self._address.id is not None:
            raise StorageError(
                f"expected the checkpoint {self._address.id!r} in namespace {self._address.ns!r} of thread "
                f"{self._address.thread[:80]!r}, found none; leave checkpoint_id out for the newest"
            )

    def _pass(self, stored: StoredCheckpoint) -> None:
        held = {name: digest for name, digest in stored.digests.items() if self._is_memory.get(name)}
        self._end_runs(held, stored.id)
        mark = _mark(stored)
        self._runs = {name: (mark, digest) for name, digest in held.items()}

    def _end_runs(self, held: Mapping[str, bytes], at: str | None) -> None:
        """Note what changed after a checkpoint that holds ``held``."""
        for name, (mark, digest) in sorted(self._runs.items(), reverse=not self._newest_first):
            if held.get(name) != digest:
                self._changes.append(_Change(mark, name, digest, held.get(name), at))

    def _classify(
        self, connection: Connection, known: Thread, ancestors: Sequence[StoredCheckpoint]
    ) -> dict[str, bool]:
        """Which of the channels met for the first time hold memories, by the latest value of each that is not None."""
        found: dict[str, bool] = {}
        passed: set[bytes] = set()  # None, serialised
        while True:
            latest: dict[str, tuple[bytes, str]] = {}
            for stored in ancestors:
                for name, digest in stored.digests.items():
                    decided = name in self._is_memory or name in found or name.startswith(_RESERVED)
                    if not decided and digest not in passed:
                        latest.setdefault(name, (digest, stored.id))
            if not latest:
                return found
            beginnings = self._begin(connection, known, {digest for digest, _ in latest.values()})
            for name, (digest, at) in latest.items():
                memory = _begins_like_memory(*beginnings.get(digest, (VALUE, b"")))
                if memory is None:
                    memory = self._is_memory_whole(connection, known, name, digest, at)
                if memory is None:
                    passed.add(digest)
                else:
                    found[name] = memory

    def _begin(self, connection: Connection, known: Thread, digests: set[bytes]) -> dict[bytes, tuple[int, bytes]]:
        """How values begin: their kind and, of those that are no lists, the first bytes."""
        keys = {"thread": known.number, "digests": sorted(digests)}
        found: dict[bytes, tuple[int, bytes]] = {}
        for digest, kind, stored in connection.execute(self._beginnings, keys).all():
            try:
                found[digest] = kind, b"" if stored is None else self._store.vault.open(stored)
            except StorageError:
                continue  # reading it whole says where it is
        firsts = {body[:DIGEST_BYTES]: digest for digest, (kind, body) in found.items() if kind == SPLIT}
        if firsts:
            parts = self._begin(connection, known, set(firsts))
            found.update({firsts[part]: (VALUE, body) for part, (_, body) in parts.items()})
        return found

    def _is_memory_whole(
        self, connection: Connection, known: Thread, channel: str, digest: bytes, at: str
    ) -> bool | None:
        """The same for what does not begin as expected: None, damaged, or of another serializer."""
        contents = self._content(connection, Thread(known.number, known.epoch), digest, channel, at)
        value = None if contents is None else Unpacker(self._serde, contents, known).unpack(digest)
        return None if value is None else _looks_like_memory(value)

    def _read(self, connection: Connection, page: Sequence[_Change]) -> Found:
        """The content of changes; those whose checkpoint was taken out meanwhile are left out."""
        assert self._known is not None
        fresh = Thread(self._known.number, self._known.epoch)
        wanted = {digest for one in page for digest in (one.digest, one.before) if digest is not None}
        try:
            return Found(page, self._store.reader.collect(connection, fresh, wanted - self._states.keys()))
        except (Missing, StorageError):
            left: list[_Change] = []
            contents: dict[bytes, Body] = {}
            for one in page:
                own = self._content(connection, fresh, one.digest, one.channel, one.mark.id)
                if own is None:
                    continue
                before = None
                if one.before is not None:
                    before = self._content(connection, fresh, one.before, one.channel, str(one.parent))
                contents.update(own | (before or {}))
                left.append(one if before is not None else one._replace(before=None))
            return Found(left, contents)

    def _content(
        self, connection: Connection, fresh: Thread, digest: bytes, channel: str, at: str
    ) -> dict[bytes, Body] | None:
        """The content of one value; None if its checkpoint was taken out.

        Raises:
            StorageError: it is damaged; names the checkpoint.
        """
        what = f"the value of channel {channel!r}"
        thread, ns = self._address.thread, self._address.ns
        try:
            return self._store.reader.collect(connection, fresh, {digest} - self._states.keys())
        except Missing:
            if self._store.reader.locate(connection, Address(thread, ns, at)) is not None:
                raise damaged(thread, at, what) from None
            return None
        except StorageError as error:
            raise StorageError(f"{what} of checkpoint {at!r} in thread {thread[:80]!r}: {error}") from error

    # Afterwards: the caller's serializer is not called inside a transaction.

    def steps(self, found: Found) -> Iterator[MemoryStep]:
        """What was read, as steps."""
        states: dict[bytes, MemoryState | None] = {}
        for one in found.changes:
            for digest, at in ((one.before, one.parent), (one.digest, one.mark.id)):
                if digest is not None and digest not in states:
                    known = digest in self._states
                    states[digest] = self._states[digest] if known else self._state(digest, found, one.channel, at)
            before = None if one.before is None else states[one.before]
            state = states[one.digest]
            if state is not None and state != before:
                yield _step(one, state, before)
        sizes = [len(state.data) for state in states.values() if state is not None]
        if sizes:
            self._page = max(1, min(_LARGEST_PAGE, _PAGE_BYTES // max(sizes)))
            self._states = states

    def _state(self, digest: bytes, found: Found, channel: str, at: str | None) -> MemoryState | None:
        value = Unpacker(self._serde, found.contents, Thread()).unpack(digest)
        if value is None or not (self._named or _looks_like_memory(value)):
            return None
        try:
            return MemoryState.from_dict(value)
        except CorruptStateError as error:
            thread = self._address.thread[:80]
            raise CorruptStateError(
                f"channel {channel!r} of checkpoint {at!r} in thread {thread!r} holds no sound memory: {error}"
            ) from error


def _mark(stored: StoredCheckpoint) -> _Mark:
    try:
        time = datetime.fromisoformat(stored.body["ts"])
    except (KeyError, TypeError, ValueError):
        time = None
    return _Mark(stored.id, stored.metadata.get("step"), stored.metadata.get("source"), time)


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
    return MemoryStep(*change.mark, change.channel, state, new, digests, restarted)


def _begins_like_memory(kind: int, plain: bytes) -> bool | None:
    """Whether a value of this beginning is a memory; None if only the whole value can tell."""
    if kind not in (VALUE, SPLIT) or plain.startswith(_OTHER_TAGS):
        return False
    if not plain.startswith(_TAG):
        return None
    rest = plain[len(_TAG) :]
    return rest[:1] != b"" and rest[0] in _DICTS and _FIRST_KEY in rest[: _FIRST_KEY_BY + len(_FIRST_KEY)]


def _looks_like_memory(value: Any) -> bool:
    return isinstance(value, Mapping) and {"shape", "data", "digest"} <= value.keys()
