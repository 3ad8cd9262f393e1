"""What a process remembers of the threads that it wrote and read: channels, content, and messages by value.

LangGraph passes the whole list of messages to every checkpoint, so a thread of a thousand messages would be serialised
a thousand times. A `MessageSnapshot` holds what a stored message looked like: its class and its fields, by value. A
message counts as stored if its class and fields are the same now; one that was changed in place, however deep, does
not, even if it is the same object. A snapshot also makes new messages, equal to deserialised ones, much faster.

Fields that are strings, None or empty are compared directly. Others are compared as msgpack, which distinguishes what
Python's equality does not: `1`, `True` and `1.0`, the two zeros, a string and an equal enum member, the order of keys.
Only messages of langchain-core's own classes with plain data are remembered; others are serialised every time.

A `CachedThread` is valid for one number and one epoch of a thread: all that it names was committed, and nothing has
been removed from the thread since, or its epoch would have changed. Entries are only made after a commit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, TypeVar, cast

import ormsgpack
from langchain_core.messages import BaseMessage
from langgraph.checkpoint.serde.jsonplus import EXT_PYDANTIC_V2
from pydantic import BaseModel

from agentmem_sql.list_tree import LEAVES, LINK, OWN, Node, parse

_CLASSES_OF = "langchain_core.messages."
# Anything but exactly a string, a number, bytes, a list or a dictionary is an error, and its message not remembered.
_EXACT = (
    ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
)

# What msgpack raises for other than plain data, and arrays and tensors for a comparison.
_NOT_PLAIN = (TypeError, ValueError, RuntimeError)

_pack, _unpack = ormsgpack.packb, ormsgpack.unpackb
_new = object.__new__
# The slots of a message are set through their descriptors, in half the time that setting by name takes.
_set_fields, _set_assigned, _set_extra, _set_private = (
    BaseModel.__dict__[name].__set__
    for name in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
)

_COST = 1000  # bytes of memory that a snapshot takes beside its strings, roughly

# Stand for empty fields in snapshots; never handed out.
_EMPTY: Mapping[type, Any] = {list: [], dict: {}}

T = TypeVar("T", bound=Hashable)


@dataclass(slots=True, eq=False)
class MessageSnapshot:
    """A stored message by value.

    Attributes:
        id: the message's id.
        kind: its class.
        fields: its fields, never handed out; as msgpack, if one is not a string, None or empty.
        link: how a list refers to the message's content; one object, so that it is hashed once.
        empty: the empty fields, of which every copy needs its own, with their types.
        assigned: pydantic's names of the fields that were set.
        whole: deserialised, so that copies may be handed out. A caller's may differ from what the serializer makes.
        cost: bytes of memory, roughly.
        digest: the content it is stored as.
    """

    id: str
    kind: type[BaseMessage]
    fields: dict[str, Any] | bytes
    link: bytes
    empty: tuple[tuple[str, type], ...]
    assigned: frozenset[str]
    whole: bool
    cost: int
    digest: bytes

    def like(self, digest: bytes, fields: dict[str, Any], size: int) -> tuple[BaseMessage, MessageSnapshot] | None:
        """Another stored message with fields of the same types, and its snapshot; the message takes over `fields`.

        None if a field that is empty here is not empty there. `size`: of the stored message, in bytes.
        """
        own = fields.copy()
        for field, of in self.empty:
            if fields[field]:
                return None
            own[field] = _EMPTY[of]
        same = self.empty, self.assigned, True
        snapshot = MessageSnapshot(own["id"], self.kind, own, LINK + digest, *same, _COST + size, digest)
        return _message(self.kind, fields, self.assigned), snapshot

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
    """A message with exactly these fields."""
    message = _new(kind)
    _set_fields(message, fields)
    _set_assigned(message, set(assigned))
    _set_extra(message, {})
    _set_private(message, None)
    return message


def take_snapshot(message: object, digest: bytes = b"", *, whole: bool) -> MessageSnapshot | None:
    """The snapshot of a message that is stored as `digest`; None if it is not to be remembered."""
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
            return MessageSnapshot(name, kind, packed, LINK + digest, (), assigned, whole, 600 + len(packed), digest)
    return MessageSnapshot(name, kind, fields, LINK + digest, _shared(tuple(empty)), assigned, whole, size, digest)


def match_stored(items: Iterable[Any], stored: Mapping[str, MessageSnapshot]) -> tuple[list[bytes], list[int]]:
    """How a list refers to each item that equals a stored message (b"" for others), and the positions of the others."""
    links: list[bytes] = []
    new: list[int] = []
    add, get = links.append, stored.get
    for item in items:  # a thousand times for one checkpoint of a long thread: no function of ours is called in here
        fields = getattr(item, "__dict__", None)
        name = None if fields is None else fields.get("id")
        match = get(name) if type(name) is str else None
        if match is not None:
            try:
                expected = match.fields
                same = (fields if type(expected) is dict else _pack(fields, option=_EXACT)) == expected
            except _NOT_PLAIN:  # and so was not there
                same = False
            if same and type(item) is match.kind and not item.__pydantic_extra__:
                add(match.link)
                continue
        new.append(len(links))
        add(b"")
    return links, new


@lru_cache(maxsize=256)
def _shared(value: T) -> T:
    """One object for all equal ones, of which messages have few: thousands would slow the garbage collector down."""
    return value


# Decoding by template. To decode a message, a serializer imports its class and calls it, and pydantic validates every
# field: most of the time of reading a long thread. A message's class and the types of its fields are its template. The
# first message of a template goes through the serializer. If that changes nothing, further ones whose lists and
# dictionaries are empty are made directly from their fields.

_Template = tuple[Any, ...]

_MOST = 1000  # templates; there are hardly more than classes

# Where the data of an msgpack extension begins, by its first byte; extensions of 1 to 16 bytes are no messages.
_TAG = b"msgpack\0"
_HEADERS = {_TAG + bytes((first,)): len(_TAG) + length for first, length in ((0xC7, 3), (0xC8, 4), (0xC9, 6))}


class DecodeTemplates:
    """The templates whose messages one serializer is known to leave unchanged."""

    def __init__(self) -> None:
        self._templates: dict[_Template, MessageSnapshot | None] = {}

    def decode(self, digest: bytes, body: bytes) -> tuple[BaseMessage, MessageSnapshot] | None:
        """The message in a stored body, and its snapshot; None if its template is not known."""
        parsed = _parse_message(body)
        template = None if parsed is None else self._templates.get(parsed[0])
        return None if parsed is None or template is None else template.like(digest, parsed[1], len(body))

    def learn(self, body: bytes, message: BaseMessage, snapshot: MessageSnapshot) -> None:
        """Learn a template from what the serializer made of a body."""
        parsed = _parse_message(body)
        if parsed is None or parsed[0] in self._templates or len(self._templates) >= _MOST:
            return
        template, fields = parsed
        plain = isinstance(snapshot.fields, dict) and list(message.__dict__.items()) == list(fields.items())
        if plain or not any(fields[name] for name in fields if type(fields[name]) in (list, dict)):
            self._templates[template] = snapshot if plain else None


def _parse_message(body: bytes) -> tuple[_Template, dict[str, Any]] | None:
    """Template and fields of a body that is a single pydantic object, as messages are."""
    start = _HEADERS.get(body[: len(_TAG) + 1])
    if start is None or body[start - 1] != EXT_PYDANTIC_V2:
        return None
    try:
        module, name, fields, method = ormsgpack.unpackb(body[start:])
    except ValueError:  # it contains another object
        return None
    return (module, name, method, *fields, *map(type, fields.values())), fields


# What is known of threads.

# channel -> its version at a checkpoint, and the digest of its value; None if the channel was empty.
ChannelHeads = Mapping[str, tuple[str | int | float, bytes | None]]
Body = bytes | Node | MessageSnapshot
Unparsed = tuple[int, bytes]  # kind and body of a `Node` to be: most are followed by another before they are read

# Bytes of memory, roughly: of a digest in a set, a value besides its bytes, parsed content, a channel at a checkpoint.
_DIGEST_COST = 120
_VALUE_COST = 130
_NODE_COST = 1800
_CHANNEL_COST = 250
_THREAD_COST = 3000
# Kept of a thread at most: checkpoints whose channels are known, and bytes of values other than messages.
_CHECKPOINTS = 16
_VALUE_BYTES = 2**20
_CALLS_BETWEEN_SUMS = 32


class CachedThread:
    """What is known of a thread."""

    def __init__(self, number: int | None = None, epoch: int = 0) -> None:
        """An empty cache of the thread with this number; without a number the thread is unknown."""
        self.number = number
        self.epoch = epoch
        self.void = False  # whether a connection was lost since: another server may lack the last commits
        self.stored: set[bytes] = set()  # digests of content that the thread has
        self.bodies: dict[bytes, Node | MessageSnapshot | Unparsed] = {}  # some of it
        self.messages: dict[str, MessageSnapshot] = {}  # by the message's id
        self.size = 0
        self._values: OrderedDict[bytes, bytes] = OrderedDict()
        self._value_bytes = 0
        self.heads: OrderedDict[tuple[str, str], ChannelHeads] = OrderedDict()  # by namespace and checkpoint
        self._lock = Lock()

    def remember_channels(self, ns: str, checkpoint_id: str, channels: ChannelHeads) -> None:
        """Remember the channels of a checkpoint."""
        with self._lock:
            self.heads[ns, checkpoint_id] = channels
            self.heads.move_to_end((ns, checkpoint_id))
            if len(self.heads) > _CHECKPOINTS:
                self.heads.popitem(last=False)

    def collect(self, roots: Iterable[bytes]) -> tuple[dict[bytes, Body], set[bytes]]:
        """Content and all that it refers to, as far as it is known; and the digests of what is not."""
        contents: dict[bytes, Body] = {}
        missing: set[bytes] = set()
        pending = list(roots)
        bodies, values = self.bodies, self._values
        while pending:
            digest = pending.pop()
            if digest in contents or digest in missing:
                continue
            stored = bodies.get(digest)
            body = cast(Body | None, stored)
            if type(stored) is tuple:
                body = bodies[digest] = parse(*stored)
            if body is None or (type(body) is MessageSnapshot and not body.whole):
                body = values.get(digest)
            if body is None:
                missing.add(digest)
                continue
            contents[digest] = body
            if type(body) is Node:
                pending += [entry for entry in body.entries if type(entry) is bytes]  # not what is inline
        return contents, missing

    def add_new(
        self, contents: Mapping[bytes, tuple[int, bytes]], snapshots: Iterable[tuple[Any, MessageSnapshot]]
    ) -> None:
        """`add` what was stored, digest -> (kind, body), and messages that still equal their snapshots.

        A node that runs meanwhile may have changed a message while it was serialised. A write's own content is left
        out, as it may be deleted at any time, and so are witnesses.
        """
        same = [(each.digest, each) for message, each in snapshots if not match_stored([message], {each.id: each})[1]]
        stored = contents.items()
        self.add([(digest, body if kind in LEAVES else (kind, body)) for digest, (kind, body) in stored if kind < OWN])
        self.add(same)

    def add(self, contents: Iterable[tuple[bytes, Body | Unparsed]]) -> None:
        """Remember content that the thread has."""
        stored, bodies, messages, values = self.stored, self.bodies, self.messages, self._values
        size = 0
        with self._lock:
            for digest, body in contents:
                if digest not in stored:
                    stored.add(digest)
                    size += _DIGEST_COST
                known = bodies.get(digest)
                if type(body) is MessageSnapshot:
                    messages[body.id] = body
                    if values and body.whole and digest in values:
                        self._value_bytes -= _VALUE_COST + len(values.pop(digest))
                    size += 0 if known else body.cost
                elif isinstance(body, bytes):
                    if digest not in values and (known is None or (type(known) is MessageSnapshot and not known.whole)):
                        values[digest] = body
                        self._value_bytes += _VALUE_COST + len(body)
                    continue
                else:
                    size += 0 if known else _NODE_COST
                bodies[digest] = body
            self.size += size
            while self._value_bytes > _VALUE_BYTES and len(values) > 1:
                _, oldest = values.popitem(last=False)
                self._value_bytes -= _VALUE_COST + len(oldest)

    @property
    def cost(self) -> int:
        """Bytes of memory, roughly."""
        channels = sum(map(len, list(self.heads.values())))
        return _THREAD_COST + self.size + self._value_bytes + _CHANNEL_COST * channels


class ThreadCache:
    """The known threads of one database, up to a budget in bytes: the least recently used go first. Thread-safe."""

    def __init__(self, budget: int) -> None:
        """`budget` 0 remembers nothing from one call to the next."""
        self._budget = budget
        self._threads: OrderedDict[str, CachedThread] = OrderedDict()
        self._calls = 0
        self._lock = Lock()

    def forget_all(self) -> None:
        """Forget all threads: the server that answers after a lost connection may lack the last commits."""
        with self._lock:
            for thread in self._threads.values():
                thread.void = True
            self._threads.clear()

    def after_fork(self) -> None:
        """Forget all threads, in a process that was just forked: another thread may have been changing the cache."""
        self._lock = Lock()
        self._threads.clear()

    def get(self, thread_id: str) -> CachedThread:
        """What is known of a thread; an empty `CachedThread` if nothing is."""
        with self._lock:
            return self._threads.get(thread_id) or CachedThread()

    def at(self, thread_id: str, number: int, epoch: int) -> CachedThread:
        """What is known of a thread that has this number and epoch in the database."""
        if not self._budget:
            return CachedThread(number, epoch)
        with self._lock:
            thread = self._threads.get(thread_id)
            if thread is None or (thread.number, thread.epoch) != (number, epoch):
                thread = self._threads[thread_id] = CachedThread(number, epoch)
            self._threads.move_to_end(thread_id)
            self._calls += 1
            if self._calls % _CALLS_BETWEEN_SUMS == 0:
                total = sum(each.cost for each in self._threads.values())
                while total > self._budget and self._threads:  # the costs may have changed since the sum
                    _, oldest = self._threads.popitem(last=False)
                    total -= oldest.cost
            return thread

    def drop(self, thread_id: str) -> None:
        """Forget a thread."""
        with self._lock:
            self._threads.pop(thread_id, None)
