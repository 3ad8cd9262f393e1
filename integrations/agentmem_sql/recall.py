"""Recognising messages that were stored before, and handing out messages that were read before.

LangGraph passes the whole list of messages to every checkpoint, and a thread of a thousand messages would be
serialised a thousand times over. A ``Recalled`` is what a stored message looked like: its class and its fields,
by value. A message is recognised if its class and fields are the same now; changed in place, however deep, it is
not, whatever object it is. The same snapshot yields new messages, equal to what deserialising gives and sharing
nothing that can be changed, at a fraction of the time.

Fields that are all strings, None or empty are compared as they are. Others are compared as msgpack, which tells
apart what Python's equality does not: ``1``, ``True`` and ``1.0``, the two zeros, a string and the member of an
enum that equals it, the order of keys. Only messages of langchain-core's own classes whose fields are plain data
are recalled, others are serialised and deserialised every time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, TypeVar

import ormsgpack
from langchain_core.messages import BaseMessage
from pydantic import BaseModel

from agentmem_sql.list_tree import FANOUT, LINK

_CLASSES_OF = "langchain_core.messages."
# What is not exactly a string, a number, bytes, a list or a dictionary is an error, and its message not recalled.
_EXACT = (
    ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
)

# What msgpack makes of something that is no plain data, and what arrays and tensors make of a comparison.
_NOT_PLAIN = (TypeError, ValueError, RuntimeError)

_pack, _unpack = ormsgpack.packb, ormsgpack.unpackb
_new = object.__new__
# The slots of a message are set by their descriptors, which takes half the time of looking each up by its name.
_set_fields, _set_assigned, _set_extra, _set_private = (
    BaseModel.__dict__[name].__set__
    for name in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
)
_fields_of, _extra_of = attrgetter("__dict__"), attrgetter("__pydantic_extra__")

_COST = 1000  # bytes of memory that a snapshot takes beside its strings, roughly

# In the place of what is empty in a snapshot; never handed out.
_EMPTY: Mapping[type, Any] = {list: [], dict: {}}

T = TypeVar("T", bound=Hashable)


@dataclass(slots=True, eq=False)
class Recalled:
    """A stored message by value.

    Attributes:
        digest: the content it is stored as.
        id: the message's id.
        kind: its class.
        fields: its fields, never handed out; or as msgpack, where one is not a string, None or empty.
        empty: those of ``fields`` that every copy needs an object of its own for, and its type.
        assigned: pydantic's names of the fields that were set.
        whole: deserialised, so that copies may be handed out; one made from a caller's message may differ
            from that in what the serializer or pydantic make of it.
        cost: bytes of memory, roughly.
        link: how a list refers to it; one object, so that it is hashed once.
    """

    digest: bytes
    id: str
    kind: type[BaseMessage]
    fields: dict[str, Any] | bytes
    empty: tuple[tuple[str, type], ...]
    assigned: frozenset[str]
    whole: bool
    cost: int
    link: bytes

    def like(self, digest: bytes, fields: dict[str, Any], size: int) -> tuple[BaseMessage, Recalled] | None:
        """Another stored message whose fields are of the same types, and what it looks like; it takes ``fields``.

        None if one that is empty here is not empty there. ``size``: the bytes that it is stored as.
        """
        own = fields.copy()
        for field, of in self.empty:
            if fields[field]:
                return None
            own[field] = _EMPTY[of]
        kind, assigned = self.kind, self.assigned
        one = Recalled(digest, own["id"], kind, own, self.empty, assigned, True, _COST + size, LINK + digest)
        return _message(kind, fields, assigned), one

    def copy(self) -> BaseMessage:
        """A new message with these fields."""
        if isinstance(self.fields, dict):
            fields = self.fields.copy()
            for name, make in self.empty:
                fields[name] = make()
        else:
            fields = _unpack(self.fields)
        return _message(self.kind, fields, self.assigned)


def _message(kind: type[BaseMessage], fields: dict[str, Any], assigned: frozenset[str]) -> BaseMessage:
    """A message of these fields, which are taken as they are."""
    message = _new(kind)
    _set_fields(message, fields)
    _set_assigned(message, set(assigned))
    _set_extra(message, {})
    _set_private(message, None)
    return message


def recall(message: object, digest: bytes, *, whole: bool) -> Recalled | None:
    """The snapshot of a message that is stored as ``digest``; None if it is not one to be recalled."""
    if not (type(message).__module__.startswith(_CLASSES_OF) and isinstance(message, BaseMessage)):
        return None
    kind = type(message)
    name = message.__dict__.get("id")
    if type(name) is not str or message.__pydantic_extra__ != {} or message.__pydantic_private__ is not None:
        return None
    assigned = _shared(frozenset(message.__pydantic_fields_set__))
    fields = message.__dict__.copy()
    empty: list[tuple[str, type]] = []
    size = _COST
    for field, value in fields.items():
        of = type(value)
        if of is str:
            size += len(value)
        elif (of is list or of is dict) and not value:
            fields[field] = _EMPTY[of]
            empty.append((field, of))
        elif value is not None:
            try:
                packed = _pack(fields, option=_EXACT)
            except TypeError:
                return None
            return Recalled(digest, name, kind, packed, (), assigned, whole, 600 + len(packed), LINK + digest)
    return Recalled(digest, name, kind, fields, _shared(tuple(empty)), assigned, whole, size, LINK + digest)


def recognise(items: Iterable[Any], known: Mapping[str, Recalled]) -> list[Recalled | None]:
    """For each item of a list the stored message that it equals, or None."""
    found: list[Recalled | None] = []
    add, get = found.append, known.get
    for item in items:  # a thousand times for one checkpoint of a long thread: no function of ours is called in here
        fields = getattr(item, "__dict__", None)
        name = None if fields is None else fields.get("id")
        one = get(name) if type(name) is str else None
        if one is not None:
            try:
                known_fields = one.fields
                same = (fields if type(known_fields) is dict else _pack(fields, option=_EXACT)) == known_fields
            except _NOT_PLAIN:  # and so was not there
                same = False
            if not same or type(item) is not one.kind or item.__pydantic_extra__:
                one = None
        add(one)
    return found


class Run:
    """The messages that a stored list begins with, field by field, and the full nodes that they make.

    A thousand messages are compared in a few steps of the interpreter, where looking at each takes some thousands.
    Never changed: a list that has grown gets a new one.

    Attributes:
        count: how many messages.
        first: the id of the first; "" where there is none.
        nodes: how the list refers to the nodes.
        tail: how it refers to the messages that are in no full node.
    """

    __slots__ = ("_fields", "_kinds", "_packed", "count", "first", "nodes", "tail")

    def __init__(self) -> None:
        """Of no messages."""
        self.count = 0
        self.first = ""
        self.nodes: list[bytes] = []
        self.tail: list[bytes] = []
        self._fields: list[dict[str, Any] | bytes] = []
        self._kinds: list[type[BaseMessage]] = []
        self._packed: list[int] = []

    def grown(self, recalled: Sequence[Recalled], nodes: list[bytes]) -> Run:
        """The run of a longer list: this one's messages and those; of its nodes the ones that hold nothing else."""
        new = Run()
        new.count = self.count + len(recalled)
        new.first = self.first or recalled[0].id
        new.nodes = nodes[: new.count // FANOUT]
        new.tail = (self.tail + [one.link for one in recalled])[FANOUT * (len(new.nodes) - len(self.nodes)) :]
        new._fields = self._fields + [one.fields for one in recalled]
        new._kinds = self._kinds + [one.kind for one in recalled]
        packed = [at for at, one in enumerate(recalled, self.count) if type(one.fields) is bytes]
        new._packed = self._packed + packed
        return new

    def begins(self, items: Sequence[Any]) -> bool:
        """Whether a list begins with messages that equal these."""
        start = items[: self.count]
        if list(map(type, start)) != self._kinds:
            return False
        now: list[Any] = list(map(_fields_of, start))
        try:
            for at in self._packed:
                now[at] = _pack(now[at], option=_EXACT)
            return now == self._fields and not any(map(_extra_of, start))
        except _NOT_PLAIN:  # and so was not there
            return False


@lru_cache(maxsize=256)
def _shared(value: T) -> T:
    """One object for all that are equal: messages of a class mostly have the same.

    Thousands of small objects would cost a collection of garbage more than they cost memory.
    """
    return value
