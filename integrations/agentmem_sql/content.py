"""Between LangGraph's values and content.

Everything that calls the serializer on channel values is here, and none of it needs a connection: values are
packed before a transaction begins and unpacked after it has ended. No pickle is ever written or read, whatever
the serializer is set to. With an `EncryptedSerializer` the serializer inside it is called; encryption is
between content and the database (see `protection`), so that equal values are one content all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from agentmem.errors import StorageError
from agentmem_sql.list_tree import (
    FANOUT,
    INLINE,
    ITEMS,
    LEAVES,
    LINK,
    LIST,
    NODE,
    OWN,
    PART,
    PART_BYTES,
    RUN,
    RUNS,
    SNAPSHOT,
    SNAPSHOT_RUNS,
    SPLIT,
    VALUE,
    Inline,
    Node,
    list_body,
    own_body,
    parse,
    value_of,
)
from agentmem_sql.message_cache import (
    Body,
    CachedThread,
    DecodeTemplates,
    MessageSnapshot,
    copy_messages,
    match_stored,
    still_equal,
    take_snapshot,
    take_snapshots,
)
from agentmem_sql.protection import Protection

_NUMBERS = frozenset({int, float, bool, type(None)})


class Value(NamedTuple):
    """A value to be stored.

    Attributes:
        channel: whose it is.
        value: of any type that the serializer knows.
        place: of a pending write that may be replaced, the digest of its key (see `list_tree.own_body`).
    """

    channel: str
    value: Any
    place: bytes | None = None


def plain_serde(serde: SerializerProtocol) -> SerializerProtocol:
    """The serializer that makes plain bytes."""
    # Not isinstance: for subclasses of a protocol that takes as long as serialising a message.
    return serde.serde if EncryptedSerializer in type(serde).__mro__ else serde  # type: ignore[attr-defined]


def dump(serde: SerializerProtocol, value: Any) -> bytes:
    """A value's bytes: the type tag, a zero byte, the serialised value.

    Raises:
        StorageError: the serializer fell back to pickle.
    """
    tag, data = serde.dumps_typed(value)
    if tag != "msgpack":
        _refuse_pickle(tag)
    return tag.encode() + b"\0" + data


def load(serde: SerializerProtocol, body: bytes) -> Any:
    """The value of such bytes.

    Raises:
        StorageError: the bytes are a pickle.
    """
    tag, _, data = body.partition(b"\0")
    name = tag.decode()
    if name != "msgpack":
        _refuse_pickle(name)
    return serde.loads_typed((name, data))


class Packer:
    """Packs the values of one call; equal content once.

    Attributes:
        new: content that the thread does not have, as far as is known: digest -> (kind, body).
        relies_on_cache: whether something was left out because `known` says that the thread has it.
    """

    def __init__(
        self, serde: SerializerProtocol, protection: Protection, known: CachedThread, *, relies_on_cache: bool = False
    ) -> None:
        self.new: dict[bytes, tuple[int, bytes]] = {}
        self.relies_on_cache = relies_on_cache
        self._serde = serde
        self._digests = protection.digests
        self.known = known
        self._snapshots: list[MessageSnapshot] = []

    def pack(self, values: Iterable[Value]) -> list[bytes]:
        """The digests of the contents of values.

        Raises:
            StorageError: the serializer would pickle a value; names the channel.
            TypeError: the serializer does not know a value; names the channel.
        """
        digests: list[bytes] = []
        plain: list[tuple[int, bytes]] = []  # positions, and bodies that are digested together
        for channel, value, place in values:
            try:
                if place is not None:
                    digests.append(self._own(place, value))
                # Of a copy: a node that runs meanwhile may change the list.
                elif type(value) is list and (items := value.copy()):
                    digests.append(self._list(items, items, ITEMS))
                elif type(value) is _DeltaSnapshot and type(value.value) is list and (items := value.value.copy()):
                    digests.append(self._list(_DeltaSnapshot(items), items, SNAPSHOT))
                else:
                    plain.append((len(digests), dump(self._serde, value)))
                    digests.append(b"")
            except (StorageError, TypeError) as error:
                kind = StorageError if isinstance(error, StorageError) else TypeError
                raise kind(f"the value of channel {channel!r} cannot be stored: {error}") from error
        for (position, _), digest in zip(plain, self._add_values([body for _, body in plain]), strict=True):
            digests[position] = digest
        return digests

    def dump(self, value: Any, what: str) -> bytes:
        """The bytes of something that is no content; `what` names it in the error.

        Raises:
            StorageError: the serializer would pickle it.
            TypeError: the serializer does not know it.
        """
        try:
            return dump(self._serde, value)
        except (StorageError, TypeError) as error:
            kind = StorageError if isinstance(error, StorageError) else TypeError
            raise kind(f"the {what} cannot be stored: {error}") from error

    def remember(self, known: CachedThread) -> None:
        """Tell the cache what was stored; to be called after the commit."""
        contents: list[tuple[bytes, Body]] = [
            (digest, body if kind in LEAVES else parse(kind, body))
            for digest, (kind, body) in self.new.items()
            if kind != OWN  # may be freed at any time
        ]
        known.add(contents + [(snapshot.digest, snapshot) for snapshot in self._snapshots])

    def _own(self, place: bytes, value: Any) -> bytes:
        """Content that only the pending write at this place refers to.

        It is always sent: a writer that replaces it frees it without counting the epoch up, so what is known of the
        thread does not tell whether it is still there.
        """
        body = own_body(place, dump(self._serde, value))
        if len(body) > PART_BYTES:
            return self.pack([Value("", value)])[0]
        (digest,) = self._digests(OWN, [body])
        self.new[digest] = OWN, body
        return digest

    def _list(self, value: Any, items: list[Any], of: int) -> bytes:
        """`value` is the list, or what holds it."""
        if type(items[0]) in _NUMBERS and all(type(item) in _NUMBERS for item in items):
            if len(items) <= RUN:
                return self._add_values([dump(self._serde, value)])[0]
            of += RUNS
            runs = [dump(self._serde, items[at : at + RUN]) for at in range(0, len(items), RUN)]
            entries = [LINK + digest for digest in self._add_values(runs)]
        else:
            entries = self._entries(items)
        levels = []  # what is left over of each level, lowest first
        while len(entries) >= FANOUT:
            full = len(entries) - len(entries) % FANOUT
            levels.append(entries[full:])
            nodes = [b"".join(entries[at : at + FANOUT]) for at in range(0, full, FANOUT)]
            entries = [LINK + digest for digest in self._add(NODE, nodes)]
        levels.append(entries)
        return self._add(LIST, [list_body(of, levels[::-1])])[0]

    def _entries(self, items: Sequence[Any]) -> list[bytes]:
        """How the lowest level refers to each item."""
        stored = match_stored(items, self.known.messages)
        entries = [b"" if match is None else match.link for match in stored]
        new = [at for at, match in enumerate(stored) if match is None]
        if len(new) < len(items):
            self.relies_on_cache = True
        if not new:
            return entries
        new_items = [items[at] for at in new]
        # A node that runs meanwhile may change a message: it is remembered if it was the same all the time.
        snapshots = take_snapshots(new_items)
        # In a list the serializer makes no difference between bytes and bytearrays.
        bodies = [dump(self._serde, bytes(item) if type(item) is bytearray else item) for item in new_items]
        long = [number for number, body in enumerate(bodies) if len(body) > INLINE]
        digests = dict(zip(long, self._add_values([bodies[number] for number in long]), strict=True))
        equal = still_equal(new_items, snapshots)
        for number, at in enumerate(new):
            digest = digests.get(number)
            if digest is None:
                entries[at] = bytes((len(bodies[number]),)) + bodies[number]
                continue
            entries[at] = LINK + digest
            snapshot = snapshots[number]
            if snapshot is not None and equal[number]:
                snapshot.digest, snapshot.link = digest, entries[at]
                self._snapshots.append(snapshot)
        return entries

    def _add_values(self, bodies: Sequence[bytes]) -> list[bytes]:
        """The digests of serialised values; one that is too large for a row is stored in parts."""
        if not any(len(body) > PART_BYTES for body in bodies):
            return self._add(VALUE, bodies)
        digests: list[bytes] = []
        for body in bodies:
            if len(body) <= PART_BYTES:
                digests += self._add(VALUE, [body])
            else:
                parts = [body[at : at + PART_BYTES] for at in range(0, len(body), PART_BYTES)]
                digests += self._add(SPLIT, [b"".join(self._add(PART, parts))])
        return digests

    def _add(self, kind: int, bodies: Sequence[bytes]) -> list[bytes]:
        digests = self._digests(kind, bodies) if bodies else []
        for digest, body in zip(digests, bodies, strict=True):
            if digest in self.known.stored:
                self.relies_on_cache = True
            else:
                self.new[digest] = kind, body
        return digests


class Unpacker:
    """Unpacks values out of content that was fetched; every value anew, so that no two results share one."""

    def __init__(
        self,
        serde: SerializerProtocol,
        contents: Mapping[bytes, Body],
        known: CachedThread,
        templates: DecodeTemplates | None = None,
    ) -> None:
        """`templates` are those of the serializer, if messages may be read without it."""
        self._serde = serde
        self._templates = templates
        self._contents = contents
        self.known = known

    def unpack(self, digest: bytes) -> Any:
        """The value of content."""
        body = self._contents[digest]
        if isinstance(body, MessageSnapshot):
            return body.copy()
        if isinstance(body, bytes):
            return self._value(digest, body)
        if body.kind == SPLIT:
            return load(self._serde, b"".join([self._part(part) for part in body.entries]))
        items = self._list(body)
        return _DeltaSnapshot(items) if body.of in (SNAPSHOT, SNAPSHOT_RUNS) else items

    def _list(self, body: Node) -> list[Any]:
        entries: list[bytes] = []
        start = 0
        for count in body.counts:
            entries = [below for digest in entries for below in self._node(digest).entries]
            entries += body.entries[start : start + count]
            start += count
        if body.of in (RUNS, SNAPSHOT_RUNS):
            return [number for digest in entries for number in self.unpack(digest)]
        bodies: list[Body] = [entry if type(entry) is Inline else self._contents[entry] for entry in entries]
        items: list[Any] = [None] * len(bodies)
        snapshots = [(at, body) for at, body in enumerate(bodies) if isinstance(body, MessageSnapshot)]
        for (at, _), message in zip(snapshots, copy_messages([body for _, body in snapshots]), strict=True):
            items[at] = message
        others = [at for at, body in enumerate(bodies) if type(body) is not MessageSnapshot]
        values = [
            (body if isinstance(body, bytes) else b"", entries[at])
            for at, body in enumerate(bodies)
            if type(body) is not MessageSnapshot
        ]
        done = 0
        while done < len(others):
            # As many as there are templates for; the next one goes through the serializer, and may make a template.
            decoded = [] if self._templates is None else self._templates.fast_decode(values, done)
            for at, (message, _) in zip(others[done:], decoded, strict=False):
                items[at] = message
            self.known.add_messages([snapshot for _, snapshot in decoded])
            done += len(decoded)
            if done < len(others):
                at = others[done]
                inline = entries[at] if type(entries[at]) is Inline else None
                items[at] = self.unpack(entries[at]) if inline is None else load(self._serde, inline)
                done += 1
        return items

    def _value(self, digest: bytes, body: bytes) -> Any:
        value = load(self._serde, value_of(body))
        snapshot = take_snapshot(value, digest, whole=True)
        if snapshot is not None and self._templates is not None:
            self._templates.learn(body, value, snapshot)
        self.known.add([(digest, body if snapshot is None else snapshot)])
        return value

    def _node(self, digest: bytes) -> Node:
        found = self._contents[digest]
        assert isinstance(found, Node)
        return found

    def _part(self, digest: bytes) -> bytes:
        found = self._contents[digest]
        assert isinstance(found, bytes)
        return found


def _refuse_pickle(tag: str) -> None:
    if tag.partition("+")[0] == "pickle":
        raise StorageError(
            "expected a value that msgpack can hold, found one that the serializer pickles, "
            "and pickles can run code when they are read; "
            "store plain data, messages, dataclasses or pydantic models"
        )
