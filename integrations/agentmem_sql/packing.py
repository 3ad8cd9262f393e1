"""Between LangGraph's values and content.

Everything that calls the serializer on channel values is here, and none of it needs a connection: values are
packed before a transaction begins and unpacked after it has ended. No pickle is ever written or read, whatever
the serializer is set to. With an ``EncryptedSerializer`` the serializer inside it is called; encryption is
between content and the database (see ``vault``), so that equal values are one content all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from agentmem.errors import StorageError
from agentmem_sql import list_tree as trees
from agentmem_sql.cache import Body, Thread
from agentmem_sql.list_tree import FANOUT, INLINE, LEAVES, LIST, NODE, PART, PART_BYTES, RUN, SPLIT, VALUE, Inline, Node
from agentmem_sql.recall import Recalled, Run, recall, recognise
from agentmem_sql.shapes import Shapes
from agentmem_sql.vault import Vault

_NUMBERS = frozenset({int, float, bool, type(None)})
_NO_MESSAGES = Run()


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
        trusting: whether something was left out because ``known`` says that the thread has it.
    """

    def __init__(self, serde: SerializerProtocol, vault: Vault, known: Thread, *, trusting: bool = False) -> None:
        self.new: dict[bytes, tuple[int, bytes]] = {}
        self.trusting = trusting
        self._serde = serde
        self._vault = vault
        self._known = known
        self._recalled: list[Recalled] = []
        self._runs: list[Run] = []

    def pack(self, value: Any) -> bytes:
        """The digest of a value's content.

        Raises:
            StorageError: the serializer would pickle it.
            TypeError: the serializer does not know it.
        """
        # Of a copy: a node that runs meanwhile may change the list.
        if type(value) is list and (items := value.copy()):
            return self._list(items, items, trees.ITEMS)
        if type(value) is _DeltaSnapshot and type(value.value) is list and (items := value.value.copy()):
            return self._list(_DeltaSnapshot(items), items, trees.SNAPSHOT)
        return self._add(VALUE, dump(self._serde, value))

    def pack_own(self, value: Any, place: bytes) -> bytes:
        """The digest of content that only the pending write at this place refers to (32 bytes; see `own_body`).

        It is always sent: a writer that replaces it frees it without counting the epoch up, so what is known of the
        thread does not tell whether it is still there.
        """
        body = trees.own_body(place, dump(self._serde, value))
        if len(body) > PART_BYTES:
            return self.pack(value)
        digest = self._vault.digest(trees.OWN, body)
        self.new[digest] = trees.OWN, body
        return digest

    def remember(self, known: Thread) -> None:
        """Tell the cache what was stored; to be called after the commit."""
        added: list[tuple[bytes, Body]] = [
            (digest, body if kind in LEAVES else trees.parse(kind, body))
            for digest, (kind, body) in self.new.items()
            if kind != trees.OWN
        ]
        known.add_all(added + [(one.digest, one) for one in self._recalled])
        for run in self._runs:
            known.run(run)

    def _list(self, value: Any, items: list[Any], of: int) -> bytes:
        """``value`` is the list, or what holds it."""
        if type(items[0]) in _NUMBERS and all(type(item) in _NUMBERS for item in items):
            if len(items) <= RUN:
                return self._add(VALUE, dump(self._serde, value))
            of += trees.RUNS
            runs = (items[at : at + RUN] for at in range(0, len(items), RUN))
            entries = [trees.link(self._add(VALUE, dump(self._serde, run))) for run in runs]
            levels = self._levels(entries)
        else:
            levels = self._items(items)
        return self._add(LIST, trees.list_body(of, levels[::-1]))

    def _levels(self, entries: list[bytes]) -> list[list[bytes]]:
        """What is left over of each level, lowest first."""
        levels = []
        while len(entries) >= FANOUT:
            nodes = self._nodes(entries)
            levels.append(entries[FANOUT * len(nodes) :])
            entries = nodes
        levels.append(entries)
        return levels

    def _nodes(self, entries: list[bytes]) -> list[bytes]:
        """The entries for the full nodes of a level."""
        full = len(entries) - len(entries) % FANOUT
        return [self._node(tuple(entries[at : at + FANOUT])) for at in range(0, full, FANOUT)]

    def _node(self, group: tuple[bytes, ...]) -> bytes:
        """The entry for a full node; one that was packed before is neither put together nor digested again."""
        known = self._known
        found = known.groups.get(group)
        if found is not None and found[0] in known.stored:
            self.trusting = True
            return found[1]
        digest = self._add(NODE, b"".join(group))
        link = trees.link(digest)
        known.group(group, digest, link)
        return link

    def _items(self, items: Sequence[Any]) -> list[list[bytes]]:
        """The levels of a list of anything."""
        name = getattr(items[0], "id", None)
        run = self._known.runs.get(name) if type(name) is str else None
        if run is None or not run.begins(items):
            run = _NO_MESSAGES
        recalled: list[Recalled] = []
        entries = run.tail + self._entries(items[run.count :], recalled)
        new = self._nodes(entries)
        nodes = run.nodes + new
        if run.count:
            self.trusting = True
        if recalled and len(items) >= FANOUT:
            self._runs.append(run.grown(recalled, nodes))
        return [entries[FANOUT * len(new) :], *self._levels(nodes)] if nodes else [entries]

    def _entries(self, items: Sequence[Any], recalled: list[Recalled]) -> list[bytes]:
        """How a leaf refers to each item. Adds to ``recalled`` the messages by value, while they have one."""
        entries: list[bytes] = []
        unbroken = True
        for item, found in zip(items, recognise(items, self._known.messages), strict=True):
            if found is not None:
                entries.append(found.link)
                self.trusting = True
                one: Recalled | None = found
            else:
                one = self._new_item(item, entries)
            if one is None:
                unbroken = False
            elif unbroken:
                recalled.append(one)
        return entries

    def _new_item(self, item: Any, entries: list[bytes]) -> Recalled | None:
        """Add the entry of an item that was not recognised; its snapshot, if it can be recalled."""
        # A node that runs meanwhile may change the message: it is recalled if it was the same all the time.
        snapshot = recall(item, b"", whole=False)
        # In a list the serializer makes no difference between these two.
        body = dump(self._serde, bytes(item) if isinstance(item, bytearray) else item)
        if len(body) <= INLINE:
            entries.append(trees.inline(body))
            return None
        digest = self._add(VALUE, body)
        entries.append(trees.link(digest))
        if snapshot is None or recognise([item], {snapshot.id: snapshot})[0] is not snapshot:
            return None
        snapshot.digest, snapshot.link = digest, entries[-1]
        self._recalled.append(snapshot)
        return snapshot

    def _add(self, kind: int, body: bytes) -> bytes:
        if len(body) > PART_BYTES and kind == VALUE:
            starts = range(0, len(body), PART_BYTES)
            body = b"".join([self._add(PART, body[at : at + PART_BYTES]) for at in starts])
            kind = SPLIT
        digest = self._vault.digest(kind, body)
        if digest in self._known.stored:
            self.trusting = True
        else:
            self.new[digest] = kind, body
        return digest


class Unpacker:
    """Unpacks values out of content that was fetched; every value anew, so that no two results share one."""

    def __init__(
        self,
        serde: SerializerProtocol,
        contents: Mapping[bytes, Body],
        known: Thread,
        shapes: Shapes | None = None,
    ) -> None:
        """``shapes`` are those of the serializer, if messages may be read without it."""
        self._serde = serde
        self._shapes = shapes
        self._contents = contents
        self._known = known

    def unpack(self, digest: bytes) -> Any:
        """The value of content."""
        body = self._contents[digest]
        if isinstance(body, Recalled):
            return body.copy()
        if isinstance(body, bytes):
            return self._value(digest, body)
        if body.kind == SPLIT:
            return load(self._serde, b"".join([self._part(part) for part in body.entries]))
        items = self._list(body)
        return _DeltaSnapshot(items) if body.of in (trees.SNAPSHOT, trees.SNAPSHOT_RUNS) else items

    def _list(self, body: Node) -> list[Any]:
        entries: list[bytes] = []
        start = 0
        for count in body.counts:
            entries = [below for digest in entries for below in self._node(digest).entries]
            entries += body.entries[start : start + count]
            start += count
        if body.of in (trees.RUNS, trees.SNAPSHOT_RUNS):
            return [number for digest in entries for number in self.unpack(digest)]
        contents, shapes = self._contents, self._shapes
        items: list[Any] = []
        revived: list[Recalled] = []
        for entry in entries:
            if type(entry) is Inline:
                items.append(load(self._serde, entry))
                continue
            found = contents[entry]
            if type(found) is Recalled:
                items.append(found.copy())
            elif shapes is not None and type(found) is bytes and (both := shapes.revive(found, entry)) is not None:
                items.append(both[0])
                revived.append(both[1])
            else:
                items.append(self.unpack(entry))
        self._known.revived(revived)
        return items

    def _value(self, digest: bytes, body: bytes) -> Any:
        value = load(self._serde, trees.value_of(body))
        snapshot = recall(value, digest, whole=True)
        if snapshot is not None and self._shapes is not None:
            self._shapes.learn(body, value, snapshot)
        self._known.add(digest, body if snapshot is None else snapshot)
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
