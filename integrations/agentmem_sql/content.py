"""Conversion between LangGraph's values and content.

Everything that calls the serializer on channel values is here, and none of it needs a connection. No pickle is ever
written or read, whatever the serializer's settings. Of an `EncryptedSerializer` only the serializer inside is called;
content is encrypted on its way to the database (see `protection`), so equal values are still stored once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from itertools import pairwise
from pathlib import PurePath
from threading import local
from types import ModuleType
from typing import Any, NamedTuple, TypeGuard, cast

import ormsgpack
from langchain_core.messages import BaseMessage
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer, _create_msgpack_ext_hook
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.store.base import Item

from agentmem.errors import StorageError
from agentmem_sql import list_tree as tree
from agentmem_sql.list_tree import LINK, Inline, Node
from agentmem_sql.message_cache import Body, CachedThread, DecodeTemplates, MessageSnapshot, match_stored, take_snapshot
from agentmem_sql.protection import Protection

_NUMBERS = frozenset({int, float, bool, type(None)})
_WHAT = "value of channel"  # in errors


class Value(NamedTuple):
    """A value to be stored; `place`: the digest of the key of a pending write that may be replaced (see `own_body`)."""

    channel: str
    value: Any
    place: bytes | None = None


def dump(serde: SerializerProtocol, value: Any, *what: str) -> bytes:
    """A value's bytes: the type tag, a zero byte, the serialised value. `what` names the value in errors.

    Raises:
        StorageError: the serializer does not know the value, or fell back to pickle, or the value's own code raised.
    """
    try:
        tag, data = serde.dumps_typed(value)
        if tag != "msgpack":
            _refuse_pickle(tag)
    except Exception as error:
        name = " ".join([what[0], *map(repr, what[1:])])
        advice = "store plain data, messages, dataclasses or pydantic models"
        raise StorageError(f"the {name} cannot be stored: {error}; {advice}") from error
    return tag.encode() + b"\0" + data


def load(serde: SerializerProtocol, body: bytes) -> Any:
    """The value of such bytes; raises `StorageError` for a pickle, and for what the serializer cannot read."""
    try:
        tag, _, data = body.partition(b"\0")
        name = tag.decode()
        _refuse_pickle(name)
        return serde.loads_typed((name, data))
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(
            f"a stored value cannot be read by {type(serde).__name__}: {error}; pass the serde that stored it"
        ) from error


@dataclass
class Packer:
    """Packs the values of one call; equal content once."""

    serde: SerializerProtocol
    protection: Protection
    known: CachedThread  # what is known of the thread
    relies_on_cache: bool = False  # whether something was left out because `known` says that the thread has it
    new: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)  # the rest: digest -> (kind, body)
    # Messages of this call that may be remembered when they are stored.
    snapshots: list[tuple[Any, MessageSnapshot]] = field(default_factory=list)

    def pack(self, values: Sequence[Value]) -> list[bytes]:
        """The digests of the contents of values; raises as `dump`, with the channel's name."""
        return [self._pack(*value) for value in values]

    def _pack(self, channel: str, value: Any, place: bytes | None) -> bytes:
        if place is not None:
            return self._own(place, channel, value)
        # Lists are copied: a node that runs meanwhile may change them.
        if type(value) is list and value:
            return self._list(value.copy(), tree.ITEMS, channel)
        if type(value) is _DeltaSnapshot and type(value.value) is list and value.value:
            return self._list(value.value.copy(), tree.SNAPSHOT, channel)
        return self._value(dump(self.serde, value, _WHAT, channel))

    def _own(self, place: bytes, channel: str, value: Any) -> bytes:
        """Content that only the pending write at this place refers to.

        It is always sent: a writer that replaces the write deletes it without increasing the epoch.
        """
        body = tree.own_body(place, dump(self.serde, value, _WHAT, channel))
        if len(body) > tree.PART_BYTES:
            return self._pack(channel, value, None)
        (digest,) = self.protection.digests(tree.OWN, [body])
        self.new[digest] = tree.OWN, body
        return digest

    def _list(self, values: list[Any], of: int, channel: str) -> bytes:
        entries = self._runs(values, channel)
        if entries is None:
            entries = self._entries(values, channel)
        else:
            of += tree.RUNS
        levels = []  # the entries left over from each level, lowest first
        while len(entries) >= tree.FANOUT:
            full = len(entries) - len(entries) % tree.FANOUT
            levels.append(entries[full:])
            nodes = [b"".join(entries[at : at + tree.FANOUT]) for at in range(0, full, tree.FANOUT)]
            entries = list(map(LINK.__add__, self._add(tree.NODE, nodes)))
        levels.append(entries)
        counts = bytes([len(level) for level in levels[::-1]])
        body = b"".join([entry for level in levels[::-1] for entry in level])
        return self._add(tree.LIST, [tree.LIST_HEAD.pack(of, len(counts)) + counts + body])[0]

    def _runs(self, values: list[Any], channel: str) -> list[bytes] | None:
        """How the lowest level of a list refers to runs of items; None if it is to refer to each item.

        A run costs about as much as one item. It is worth the bytes where items are small, which the first ones tell,
        so that a list that grows stays what it is; messages are kept apart, since the cache knows them by value.
        """
        kinds = set(map(type, values))
        if kinds <= _NUMBERS:
            cuts = [*range(0, len(values), tree.NUMBERS)]
        elif len(values) < tree.RUN or any(issubclass(kind, BaseMessage | ormsgpack.Ext) for kind in kinds):
            return None
        else:
            full = len(values) - len(values) % tree.RUN
            cuts = [*range(0, full, tree.RUN), *range(full, len(values), tree.LAST_RUN)]
        bodies: list[bytes] = []
        for start, end in pairwise([*cuts, len(values)]):
            body = dump(self.serde, values[start:end], _WHAT, channel)
            if len(body) <= tree.RUN_ITEM * (end - start):
                bodies.append(body)
            elif not bodies:
                return None
            else:  # what is large is not written again with those that follow it
                bodies += [dump(self.serde, [value], _WHAT, channel) for value in values[start:end]]
        large = max(map(len, bodies)) > tree.PART_BYTES
        return list(map(LINK.__add__, map(self._value, bodies) if large else self._add(tree.VALUE, bodies)))

    def _entries(self, values: list[Any], channel: str) -> list[bytes]:
        """How the lowest level of a list refers to each item."""
        entries, new = match_stored(values, self.known.messages)
        self.relies_on_cache |= len(new) < len(values)
        for at in new:
            value = values[at]
            snapshot = take_snapshot(value, whole=False)  # before it is serialised, see `CachedThread.add_new`
            # In a list the serializer makes no difference between bytes and bytearrays.
            body = dump(self.serde, bytes(value) if type(value) is bytearray else value, _WHAT, channel)
            entries[at] = self._entry(body)
            if snapshot is not None and len(body) > tree.INLINE:
                snapshot.link, snapshot.digest = entries[at], entries[at][len(LINK) :]
                self.snapshots.append((value, snapshot))
        return entries

    def _entry(self, body: bytes) -> bytes:
        """How a list refers to an item: the item itself if it is short, else its digest."""
        return bytes((len(body),)) + body if len(body) <= tree.INLINE else LINK + self._value(body)

    def _value(self, body: bytes) -> bytes:
        """Store a serialised value, in parts if it is too large for a row."""
        if len(body) <= tree.PART_BYTES:
            return self._add(tree.VALUE, [body])[0]
        parts = [body[at : at + tree.PART_BYTES] for at in range(0, len(body), tree.PART_BYTES)]
        return self._add(tree.SPLIT, [b"".join(self._add(tree.PART, parts))])[0]

    def _add(self, kind: int, bodies: Sequence[bytes]) -> list[bytes]:
        """The digests of bodies, which become part of `new` unless the thread has them."""
        digests = self.protection.digests(kind, bodies)
        for digest, body in zip(digests, bodies, strict=True):
            if digest in self.known.stored:
                self.relies_on_cache = True
            else:
                self.new[digest] = kind, body
        return digests


@dataclass
class Unpacker:
    """Unpacks values from content that was fetched; each value anew, so that results share nothing."""

    serde: SerializerProtocol
    contents: Mapping[bytes, Body]
    known: CachedThread
    templates: DecodeTemplates | None = None  # those of the serializer, if messages may be read without it
    _read: list[tuple[bytes, Body]] = field(default_factory=list)

    def unpack_all(self, digests: Sequence[bytes]) -> list[Any]:
        """The values of contents; the cache remembers what was read."""
        values = [self._value(digest) for digest in digests]
        self.known.add(self._read)
        self._read = []
        return values

    def _value(self, digest: bytes) -> Any:
        body = self.contents[digest]
        if isinstance(body, MessageSnapshot):
            return body.copy()
        if isinstance(body, bytes):
            return self._load(digest, body)
        if body.kind == tree.SPLIT:
            return load(self.serde, b"".join([cast(bytes, self.contents[part]) for part in body.entries]))
        items = self._list(body)
        return _DeltaSnapshot(items) if body.of in (tree.SNAPSHOT, tree.SNAPSHOT_RUNS) else items

    def _list(self, node: Node) -> list[Any]:
        entries: list[bytes] = []
        start = 0
        for count in node.counts:
            entries = [below for digest in entries for below in cast(Node, self.contents[digest]).entries]
            entries += node.entries[start : start + count]
            start += count
        if node.of in (tree.RUNS, tree.SNAPSHOT_RUNS):
            return [item for digest in entries for item in self._value(digest)]
        items: list[Any] = []
        contents, templates = self.contents, self.templates
        for entry in entries:
            body: Body = entry if type(entry) is Inline else contents[entry]
            if type(body) is MessageSnapshot:
                items.append(body.copy())
            elif type(entry) is Inline:
                items.append(load(self.serde, entry))
            elif templates and isinstance(body, bytes) and (decoded := templates.decode(entry, body)):
                items.append(decoded[0])
                self._read.append((entry, decoded[1]))
            else:  # by the serializer, which may make a template
                items.append(self._value(entry))
        return items

    def _load(self, digest: bytes, body: bytes) -> Any:
        value = load(self.serde, tree.value_of(body))
        snapshot = take_snapshot(value, digest, whole=True)
        if snapshot is not None and self.templates is not None:
            self.templates.learn(body, value, snapshot)
        self._read.append((digest, body if snapshot is None else snapshot))
        return value


def _refuse_pickle(tag: str) -> None:
    if tag.partition("+")[0] == "pickle":
        raise StorageError("expected a value that msgpack can hold, found a pickle, and pickles can run code when read")


# The serializer that a saver has where none is given: LangGraph's, whose default imports and calls whatever a stored
# value names, but rows of a database run no code. A value that names a type outside of LangGraph's list of safe ones is
# made only if the type is of a kind that LangGraph stores, and loaded already; otherwise an error says how to allow it.

_KINDS = Enum, PurePath, Item, set, frozenset
# Of pydantic's models and secrets, attrs' and named tuples: what LangGraph knows them by.
_MARKS = "model_fields", "__fields__", "get_secret_value", "_asdict"
_refused = local()


class CheckedSerializer(JsonPlusSerializer):
    """LangGraph's serializer that makes only what it may have stored."""

    def __init__(self, allowed: Iterable[tuple[str, ...] | type] = ()) -> None:
        """`allowed`: types that may be imported, too."""
        super().__init__()
        self._named = {(each.__module__, each.__name__) if isinstance(each, type) else tuple(each) for each in allowed}
        # It asks only whether a module and a name are in this.
        self._unpack_ext_hook = _create_msgpack_ext_hook(self)  # type: ignore[arg-type]

    def __contains__(self, key: tuple[str, str]) -> bool:
        module, name = key
        if key in self._named:
            return True
        if module in sys.modules:
            found = sys.modules[module]
            kind = vars(found).get(name)
            # What is not there cannot be called: LangGraph gives its data. But a module may have more than it holds.
            plain = type(found) is ModuleType and not hasattr(ModuleType, name) and "__getattr__" not in vars(found)
            if kind is None and plain:
                return True
            if isinstance(kind, type) and (
                is_dataclass(kind) or issubclass(kind, _KINDS) or any(hasattr(kind, mark) for mark in _MARKS)
            ):
                return True
        _refused.key = key
        return False

    def with_msgpack_allowlist(self, extra_allowlist: Iterable[tuple[str, ...] | type]) -> CheckedSerializer:
        """A serializer that may import these types, too."""
        return CheckedSerializer([*self._named, *extra_allowlist])

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """The value.

        Raises:
            StorageError: it names a type that is not allowed.
        """
        _refused.key = None
        value = super().loads_typed(data)
        if _refused.key is not None:
            module, name = _refused.key
            raise StorageError(
                f"a stored value names {module}.{name}, which is no loaded type of a kind that LangGraph stores "
                "(pydantic models, dataclasses, named tuples, enums), and may run code; if it is yours, import its "
                f"module first, or pass serde=JsonPlusSerializer(allowed_msgpack_modules=[({module!r}, {name!r})])"
            )
        return value


def is_langgraphs(serde: SerializerProtocol) -> TypeGuard[JsonPlusSerializer]:
    """Whether a serializer stores and reads values as LangGraph's default does, and does nothing of the caller's."""
    return type(serde) in (JsonPlusSerializer, CheckedSerializer)
