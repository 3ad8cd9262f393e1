"""Conversion between LangGraph's checkpoints and rows.

A row is sealed by one digest over its columns and its thread, so that no change and no move to another place goes
unnoticed: whatever reads one that was changed or damaged since it was written raises the `StorageError` of `damaged`.
The digests of the channels' values are packed into the column `content`, with the channels' names.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from operator import itemgetter
from typing import Any, NamedTuple, cast
from uuid import UUID

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    get_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from agentmem.errors import ConfigError, StorageError
from agentmem_sql.content import Packer, Unpacker, Value, dump, load
from agentmem_sql.list_tree import WITNESS
from agentmem_sql.message_cache import Body, CachedThread, ChannelHeads, DecodeTemplates
from agentmem_sql.protection import Protection
from agentmem_sql.schema import DIGEST_BYTES, decode_text, encode_text, exact_key, open_key, thread_key

_LENGTH = struct.Struct(">I")
# What is sealed of a row.
_of_checkpoint = itemgetter("ns", "id", "ns_name", "parent", "created", "run", "metadata", "body", "content", "history")
_of_write = itemgetter("ns", "checkpoint", "task", "idx", "path", "channel", "digest")

# What the names of LangGraph's own channels begin with. They are empty except for a run's input until it is read.
RESERVED = ("__", "branch:")

Row = Mapping[Any, Any]  # of a table, by column
_UNKNOWN = CachedThread()


def check_id(value: Any, what: str = "thread id") -> str:
    """The id as text. Whole numbers and UUIDs are accepted, as by LangGraph's own savers.

    Raises:
        ConfigError: it is something else, for example None, which would become the id "None".
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"expected a {what} (a string), found {value!r} of type {type(value).__name__}")


def check_ids(values: Any, what: str = "thread id") -> list[str]:
    """The ids as text, in order, each once.

    Raises:
        ConfigError: one of them is not an id, or a single string was passed, which is a sequence of strings, too.
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        kind = type(values).__name__
        raise ConfigError(f"expected a sequence of {what}s, found {values!r} of type {kind}; pass [{values!r}] for one")
    return list(dict.fromkeys(check_id(value, what) for value in values))


def check_count(value: Any, what: str, least: int = 1) -> None:
    """Refuse, by a ConfigError, what is neither None nor a whole number from `least` up."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ConfigError(f"expected {what} to be a number from {least} up, or None, found {value!r}")


def checked_metadata(config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> CheckpointMetadata:
    """The metadata of a checkpoint, with its config's; a ConfigError names the argument that cannot be meant."""
    given = {"config['configurable']": configurable_of(config), "config['metadata']": config.get("metadata") or {}}
    given |= {"`metadata`": metadata, "`new_versions`": new_versions, "`checkpoint`": checkpoint}
    if isinstance(checkpoint, Mapping):
        given |= {f"checkpoint[{name!r}]": checkpoint.get(name) for name in ("channel_values", "channel_versions")}
    for what, value in given.items():
        named = isinstance(value, Mapping) and (what == "`metadata`" or all(isinstance(key, str) for key in value))
        if not named:
            raise ConfigError(f"expected {what} to be a dict with strings as keys, found {value!r:.200}")
    if not isinstance(checkpoint.get("id") or None, str):
        raise ConfigError(f"expected a checkpoint id (a string) in `checkpoint`, found {checkpoint.get('id')!r}")
    return get_checkpoint_metadata(config, metadata)


def check_writes(writes: Any) -> list[tuple[str, Any]]:
    """Pending writes as a list; a ConfigError for something else."""
    listed: list[Any] = [writes] if isinstance(writes, Mapping) or not isinstance(writes, Iterable) else list(writes)
    for write in listed:
        if not isinstance(write, tuple | list) or len(write) != 2 or not isinstance(write[0], str):
            raise ConfigError(f"expected `writes` of pairs, a channel and a value, found {write!r:.200} among them")
    return listed


def configurable_of(config: Any) -> Mapping[str, Any]:
    """What a config says of threads and checkpoints; a ConfigError if it is no config, but an id, for example."""
    part = config.get("configurable", {}) if isinstance(config, Mapping) else None
    if not isinstance(part, Mapping):
        raise ConfigError(f"expected a config, {{'configurable': {{'thread_id': '...'}}}}, found {config!r}")
    return part


class Address(NamedTuple):
    """What a config names: a thread, a namespace, and a checkpoint, or None for the newest."""

    thread: str
    ns: str
    id: str | None

    @classmethod
    def of(cls, config: RunnableConfig) -> Address:
        """Read a config.

        Raises:
            StorageError: it names no thread.
            ConfigError: it is no config, or its thread id, namespace or checkpoint id is not an id.
        """
        configurable = configurable_of(config)
        if "thread_id" not in configurable:
            raise StorageError(
                "expected a config with a thread id, found none; "
                "pass {'configurable': {'thread_id': '...'}} to the graph or the checkpointer"
            )
        thread, checkpoint_id = configurable["thread_id"], configurable.get("checkpoint_id")
        if type(thread) is not str:
            thread = check_id(thread)
        if checkpoint_id is not None and type(checkpoint_id) is not str:
            checkpoint_id = check_id(checkpoint_id, "checkpoint id")
        ns = configurable.get("checkpoint_ns")
        if ns is not None and type(ns) is not str:
            ns = check_id(ns, "checkpoint namespace")
        return cls(thread, ns or "", checkpoint_id or None)

    def config(self, checkpoint_id: str) -> RunnableConfig:
        """The config of a checkpoint in this namespace."""
        return {"configurable": {"thread_id": self.thread, "checkpoint_ns": self.ns, "checkpoint_id": checkpoint_id}}


class StoredWrite(NamedTuple):
    """A pending write as read."""

    path: str
    task: str
    idx: int
    channel: str
    digest: bytes

    @property
    def order(self) -> Any:
        """What LangGraph sorts writes by."""
        return writes_sort_key(self.path, self.task, self.idx)


@dataclass
class StoredCheckpoint:
    """A checkpoint as read: its own dictionary without channel values, and the digests of its content."""

    address: Address
    id: str
    parent: str | None
    created: int
    metadata: CheckpointMetadata
    body: dict[str, Any]
    digests: dict[str, bytes]  # channel -> content; no empty channels
    history: bytes | None
    known: CachedThread = _UNKNOWN  # what this process knows of its thread, where a reader says it
    writes: list[StoredWrite] = field(default_factory=list)
    contents: Mapping[bytes, Body] = field(default_factory=dict)  # everything that the two refer to

    @property
    def heads(self) -> ChannelHeads:
        """What each channel held."""
        versions: ChannelVersions = self.body["channel_versions"]
        return {name: (version, self.digests.get(name)) for name, version in versions.items()}


class Encoded(NamedTuple):
    """What a call stores: content, rows that refer to it (without the thread's number), and a checkpoint's heads."""

    packer: Packer
    rows: Sequence[Row]
    heads: ChannelHeads | None


def witness(ns: bytes, checkpoint: bytes = b"") -> bytes:
    """The digest of a WITNESS: of a namespace, then 24 bytes of the id, so that they sort as ids do. LangGraph's ids
    differ there; others may share a witness."""
    return sha256(ns).digest()[:8] + checkpoint[:24].ljust(24, b"\0")


def encode_checkpoint(
    serde: SerializerProtocol,
    protection: Protection,
    checkpoint: Checkpoint,
    metadata: CheckpointMetadata,
    new_versions: ChannelVersions,
    address: Address,
    known: CachedThread,
    parents: ChannelHeads,
) -> Encoded:
    """A checkpoint to be stored; `address` is that of its parent.

    A channel that is not in `new_versions` has the parent's value, if the parent has that version. Otherwise (it has
    another, or is gone) the value that was passed is stored.
    """
    values = checkpoint["channel_values"]
    heads: dict[str, tuple[str | int | float, bytes | None]] = {}
    new: list[Value] = []
    for name, version in checkpoint["channel_versions"].items():
        in_parent = parents.get(name)
        if in_parent is not None and name not in new_versions and in_parent[0] == version:
            heads[name] = in_parent
            continue
        heads[name] = version, None
        if name in values:
            new.append(Value(name, values[name]))
    packer = Packer(serde, protection, known, relies_on_cache=bool(parents))
    ns, spelled, key = open_key(address.ns), encode_text(address.ns), exact_key(checkpoint["id"], "checkpoint id")
    packer.new[witness(ns, key)] = WITNESS, b""
    for value, digest in zip(new, packer.pack(new), strict=True):
        heads[value.channel] = heads[value.channel][0], digest
    own: dict[str, Any] = {**checkpoint}
    del own["channel_values"], own["id"]
    metadata_body, own_body = dump(serde, metadata, "metadata"), dump(serde, own, "checkpoint")
    content = pack_content({name: digest for name, (_, digest) in heads.items() if digest is not None})
    row: dict[str, Any] = {
        "ns": ns,
        "id": key,
        "ns_name": None if ns == spelled else spelled,
        "parent": None if address.id is None else exact_key(address.id, "checkpoint id"),
        "created": time.time_ns() // 1_000_000,
        "run": protection.run_key(run) if isinstance(run := metadata.get("run_id"), str) else None,
        "metadata": protection.encrypt(metadata_body),
        "body": protection.encrypt(own_body),
        "content": content,
        "history": None,
    }
    row["seal"] = seal_checkpoint(protection, address.thread, row)
    return Encoded(packer, [row], heads)


def encode_writes(
    serde: SerializerProtocol,
    protection: Protection,
    writes: Sequence[tuple[str, Any]],
    task_id: str,
    task_path: str,
    address: Address,
    known: CachedThread,
) -> Encoded:
    """The pending writes of a task, to be stored.

    Raises:
        StorageError: the address names no checkpoint.
        ConfigError: the task id is not an id, or its path not a string.
    """
    if address.id is None:
        raise StorageError("expected a config with the checkpoint id to store writes under, found none")
    ns, checkpoint = open_key(address.ns), exact_key(address.id, "checkpoint id")
    if type(task_id) is not str:
        task_id = check_id(task_id, "task id")
    if not isinstance(task_path, str):
        raise ConfigError(f"expected `task_path` to be a string, found {task_path!r}")
    task, path = exact_key(task_id, "task id"), encode_text(task_path)
    by_index = {
        WRITES_IDX_MAP.get(channel, position): (channel, value) for position, (channel, value) in enumerate(writes)
    }
    # What may be replaced has content of its own, so that it can be deleted without a sweep of the thread.
    values = [
        Value(channel, value, _place(ns, checkpoint, task, index) if channel in WRITES_IDX_MAP else None)
        for index, (channel, value) in by_index.items()
    ]
    packer = Packer(serde, protection, known)
    same = {"ns": ns, "checkpoint": checkpoint, "task": task, "path": path}
    rows: list[dict[str, Any]] = [
        {**same, "idx": index, "channel": _channel_bytes(value.channel), "digest": digest}
        for index, value, digest in zip(by_index, values, packer.pack(values), strict=True)
    ]
    for row in rows:
        row["seal"] = seal_write(protection, address.thread, row)
    return Encoded(packer, rows, None)


def _place(ns: bytes, checkpoint: bytes, task: bytes, index: int) -> bytes:
    """A digest of the key of a pending write, of 32 bytes."""
    return sha256(b"%d %d %d " % (index, len(ns), len(checkpoint)) + ns + checkpoint + task).digest()


def decode_metadata(protection: Protection, serde: SerializerProtocol, thread: str, row: Row) -> CheckpointMetadata:
    """The metadata of a row of the checkpoints table, whose seal is checked."""
    check_seal(protection, thread, row)
    return cast(CheckpointMetadata, load(serde, protection.decrypt(row["metadata"])))


def decode_row(
    protection: Protection, serde: SerializerProtocol, thread: str, row: Row, read: CheckpointMetadata | None = None
) -> StoredCheckpoint:
    """A row of the checkpoints table; `read`: its metadata, where they were read before."""
    metadata = decode_metadata(protection, serde, thread, row) if read is None else read
    checkpoint_id = decode_text(row["id"])
    address = Address(thread, decode_text(row["ns"] if row["ns_name"] is None else row["ns_name"]), checkpoint_id)
    parent = None if row["parent"] is None else decode_text(row["parent"])
    body, digests = load(serde, protection.decrypt(row["body"])), unpack_content(row["content"])
    return StoredCheckpoint(address, checkpoint_id, parent, row["created"], metadata, body, digests, row["history"])


def decode_writes(protection: Protection, thread: str, rows: Sequence[Row]) -> list[StoredWrite]:
    """Rows of the writes table."""
    for row in rows:
        if seal_write(protection, thread, row) != row["seal"]:
            raise damaged(thread, decode_text(row["checkpoint"]), "a pending write")
    return [
        StoredWrite(
            decode_text(row["path"]), decode_text(row["task"]), row["idx"], _channel_name(row["channel"]), row["digest"]
        )
        for row in rows
    ]


def to_tuple(stored: StoredCheckpoint, serde: SerializerProtocol, templates: DecodeTemplates | None) -> CheckpointTuple:
    """A checkpoint as LangGraph gets it; `templates` as for an `Unpacker`."""
    config, parent = stored.address.config(stored.id), stored.parent
    parent_config = None if parent is None else stored.address.config(parent)
    writes = sorted(stored.writes, key=lambda write: write.order) if len(stored.writes) > 1 else stored.writes
    digests = [*stored.digests.values(), *[write.digest for write in writes]]
    values = Unpacker(serde, stored.contents, stored.known, templates).unpack_all(digests)
    channel_values = dict(zip(stored.digests, values, strict=False))
    pending = zip(writes, values[len(channel_values) :], strict=True)
    return CheckpointTuple(
        config=config,
        checkpoint=cast(Checkpoint, {**stored.body, "id": stored.id, "channel_values": channel_values}),
        metadata=stored.metadata,
        parent_config=parent_config,
        pending_writes=[(write.task, write.channel, value) for write, value in pending],
    )


def seal_checkpoint(protection: Protection, thread: str, row: Row) -> bytes:
    """The seal of a checkpoint's row."""
    return protection.row_mac((thread_key(thread), *_of_checkpoint(row)))


def check_seal(protection: Protection, thread: str, row: Row) -> None:
    """Compare a checkpoint's row with its seal."""
    if seal_checkpoint(protection, thread, row) != row["seal"]:
        raise damaged(thread, decode_text(row["id"]), "the checkpoint's row")


def seal_write(protection: Protection, thread: str, row: Row) -> bytes:
    """The seal of a pending write's row."""
    return protection.row_mac((thread_key(thread), *_of_write(row)))


def pack_content(digests: Mapping[str, bytes]) -> bytes:
    """The column `content`: each channel's name with its length before, and its digest."""
    return b"".join([_packed_name(name) + digest for name, digest in digests.items()])


@lru_cache(maxsize=1024)
def _packed_name(channel: str) -> bytes:
    name = encode_text(channel)
    return _LENGTH.pack(len(name)) + name


# The names of channels are few, and come again with every checkpoint.
_channel_bytes, _channel_name = lru_cache(maxsize=1024)(encode_text), lru_cache(maxsize=1024)(decode_text)


def unpack_content(packed: bytes) -> dict[str, bytes]:
    """The inverse of `pack_content`."""
    digests: dict[str, bytes] = {}
    at = 0
    while at < len(packed):
        start = at + _LENGTH.size
        end = start + _LENGTH.unpack_from(packed, at)[0]
        at = end + DIGEST_BYTES
        digests[_channel_name(packed[start:end])] = packed[end:at]
    return digests


def matches(metadata: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether every wanted key is there with exactly that value; `True` is not `1`, a tuple is a list."""
    return all(key in metadata and _same(metadata[key], value) for key, value in wanted.items())


# Heads of msgpack's extensions that something which equals a number may be: an IntEnum, a Decimal.
_EXTENSIONS = b"\xc7", b"\xc8", b"\xd7", b"\xd8"


def metadata_bytes(serde: SerializerProtocol, wanted: Mapping[str, Any]) -> list[tuple[bytes, ...]]:
    """For wanted values what stands, one or another, in the bytes of metadata that have them: the key and the value.

    Metadata where it stands need not have the value. Values that may be spelled in many ways have no entry.
    """
    found = []
    for key, value in wanted.items():
        if type(key) is not str or type(value) not in (str, int, bool, type(None)):
            continue
        spelled = [value]
        if type(value) is int:
            if not -(2**53) <= value <= 2**53:
                continue
            spelled.append(float(value))
        # Without the head of the map.
        entries = [dump(serde, {key: each}, "value of `filter`").partition(b"\0")[2][1:] for each in spelled]
        if type(value) is int:
            name = serde.dumps_typed({key: None})[1][1:-1]
            entries += [name + head for head in _EXTENSIONS]
        found.append(tuple(entries))
    return found


def damaged(thread: str, checkpoint_id: str, what: str) -> StorageError:
    """The error for stored bytes that are not those that were written."""
    return StorageError(
        f"{what} of checkpoint {checkpoint_id!r} in thread {thread[:80]!r} is missing "
        "or is not what was stored (its digest differs): the row was changed from outside "
        "or the disk is damaged; restore the database from a backup, or delete the thread"
    )


def _same(left: Any, right: Any) -> bool:
    if type(left) is str and type(right) is str:  # as most are
        return left == right
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)
