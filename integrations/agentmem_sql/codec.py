"""Between LangGraph's values and what the tables hold.

Everything that calls the serializer is here, and none of it needs a connection: values are serialised before
a transaction begins and deserialised after it has ended (the checkpoint's own dictionary, which names the
channel versions to fetch, is the exception). A stored value is the serializer's type tag, a zero byte and its
bytes. No pickle is ever written or read, whatever the serializer is set to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

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

from agentmem.errors import StorageError
from agentmem_sql.keys import (
    content_digest,
    decode_text,
    encode_text,
    exact_key,
    is_hashed,
    open_key,
    seal,
    thread_key,
    version_key,
)

# Blob kinds. 0 is a serialised value; others are free for structures made of values.
VALUE = 0

Slot = tuple[bytes, bytes]  # the keys of a channel's name and version


@dataclass(frozen=True)
class Address:
    """Where a config points: a thread, a namespace in it, and a checkpoint there or None for the newest."""

    thread: str
    ns: str
    id: str | None

    @classmethod
    def of(cls, config: RunnableConfig) -> Address:
        """Read a config.

        Raises:
            StorageError: it names no thread.
        """
        found = config.get("configurable", {})
        if "thread_id" not in found:
            raise StorageError(
                "expected a config with a thread id, found none; "
                "pass {'configurable': {'thread_id': '...'}} to the graph or the checkpointer"
            )
        ns, checkpoint_id = str(found.get("checkpoint_ns", "")), found.get("checkpoint_id")
        return cls(str(found["thread_id"]), ns, checkpoint_id or None)

    def config(self, checkpoint_id: str) -> RunnableConfig:
        """The config of a checkpoint in this namespace."""
        return {
            "configurable": {
                "thread_id": self.thread,
                "checkpoint_ns": self.ns,
                "checkpoint_id": checkpoint_id,
            }
        }


@dataclass(frozen=True)
class NewCheckpoint:
    """What ``put`` stores: column values by name, and new content by digest."""

    thread: str
    row: Mapping[str, Any]
    channels: Sequence[Mapping[str, Any]]
    blobs: Mapping[bytes, bytes]


@dataclass(frozen=True)
class NewWrites:
    """What ``put_writes`` stores; ``replace``: rows of the same task and index are overwritten."""

    thread: str
    rows: Sequence[Mapping[str, Any]]
    blobs: Mapping[bytes, bytes]
    replace: bool


@dataclass(frozen=True)
class StoredWrite:
    """A pending write as read."""

    path: str
    task: str
    idx: int
    channel: str
    digest: bytes


@dataclass
class StoredCheckpoint:
    """A checkpoint as read: its own dictionary without channel values, and where its content lies."""

    address: Address
    id: str
    parent: str | None
    metadata: CheckpointMetadata
    body: dict[str, Any]
    digests: dict[str, bytes] = field(default_factory=dict)  # channel -> content; no empty channels
    writes: list[StoredWrite] = field(default_factory=list)
    contents: Mapping[bytes, bytes] = field(default_factory=dict)  # digest -> verified blob body


def dump(serde: SerializerProtocol, value: Any) -> bytes:
    """A value's stored bytes.

    Raises:
        StorageError: the serializer fell back to pickle.
    """
    tag, data = serde.dumps_typed(value)
    _refuse_pickle(tag)
    return tag.encode() + b"\0" + data


def load(serde: SerializerProtocol, body: bytes) -> Any:
    """The value of stored bytes.

    Raises:
        StorageError: the bytes are a pickle.
    """
    tag, _, data = body.partition(b"\0")
    _refuse_pickle(tag.decode())
    return serde.loads_typed((tag.decode(), data))


def encode_checkpoint(
    serde: SerializerProtocol,
    config: RunnableConfig,
    checkpoint: Checkpoint,
    metadata: CheckpointMetadata,
    new_versions: ChannelVersions,
) -> NewCheckpoint:
    """Serialise a checkpoint and the values of the channels in ``new_versions``."""
    address = Address.of(config)
    ns = open_key(address.ns)
    values = checkpoint["channel_values"]
    blobs: dict[bytes, bytes] = {}
    channels = [
        {
            "ns": ns,
            "name": open_key(name),
            "version": version_key(version),
            "digest": _add_blob(blobs, dump(serde, values[name])) if name in values else None,
        }
        for name, version in new_versions.items()
    ]
    own = {key: value for key, value in checkpoint.items() if key not in ("channel_values", "id")}
    row = {
        "ns": ns,
        "id": exact_key(checkpoint["id"], "checkpoint id"),
        "ns_name": encode_text(address.ns) if is_hashed(ns) else None,
        "parent": None if address.id is None else exact_key(address.id, "checkpoint id"),
        "metadata": dump(serde, get_checkpoint_metadata(config, metadata)),
        "body": dump(serde, own),
    }
    return NewCheckpoint(address.thread, {**row, "seal": _seal(address.thread, row)}, channels, blobs)


def encode_writes(
    serde: SerializerProtocol,
    config: RunnableConfig,
    writes: Sequence[tuple[str, Any]],
    task_id: str,
    task_path: str,
) -> NewWrites:
    """Serialise the pending writes of a task.

    Raises:
        StorageError: the config names no checkpoint to hang them on.
    """
    address = Address.of(config)
    if address.id is None:
        raise StorageError("expected a config with the checkpoint id to store writes under, found none")
    blobs: dict[bytes, bytes] = {}
    ns, checkpoint = open_key(address.ns), exact_key(address.id, "checkpoint id")
    task, path = exact_key(task_id, "task id"), encode_text(task_path)
    rows = {
        (index := WRITES_IDX_MAP.get(channel, position)): {
            "ns": ns,
            "checkpoint": checkpoint,
            "task": task,
            "idx": index,
            "path": path,
            "channel": encode_text(channel),
            "digest": _add_blob(blobs, dump(serde, value)),
        }
        for position, (channel, value) in enumerate(writes)
    }
    special_only = all(channel in WRITES_IDX_MAP for channel, _ in writes)
    return NewWrites(address.thread, list(rows.values()), blobs, replace=special_only)


def decode_row(serde: SerializerProtocol, row: Mapping[str, Any]) -> StoredCheckpoint:
    """A row of the checkpoints table, with the thread's ``name``, before its content is fetched.

    Raises:
        StorageError: the row was changed or damaged since it was written.
    """
    thread, checkpoint_id = decode_text(row["name"]), decode_text(row["id"])
    if _seal(thread, row) != row["seal"]:
        raise damaged(thread, checkpoint_id, "the checkpoint's row")
    ns = decode_text(row["ns"] if row["ns_name"] is None else row["ns_name"])
    parent = None if row["parent"] is None else decode_text(row["parent"])
    return StoredCheckpoint(
        Address(thread, ns, checkpoint_id),
        checkpoint_id,
        parent,
        load(serde, row["metadata"]),
        load(serde, row["body"]),
    )


def slots(stored: StoredCheckpoint) -> dict[str, Slot]:
    """Under which keys the channels table has the channels of a checkpoint."""
    versions: ChannelVersions = stored.body["channel_versions"]
    return {name: (open_key(name), version_key(version)) for name, version in versions.items()}


def to_tuple(serde: SerializerProtocol, stored: StoredCheckpoint) -> CheckpointTuple:
    """What LangGraph gets; every value is deserialised anew, so that no two tuples share one."""
    values = {name: load(serde, stored.contents[digest]) for name, digest in stored.digests.items()}
    ordered = sorted(stored.writes, key=lambda write: writes_sort_key(write.path, write.task, write.idx))
    return CheckpointTuple(
        config=stored.address.config(stored.id),
        checkpoint=cast(Checkpoint, {**stored.body, "id": stored.id, "channel_values": values}),
        metadata=stored.metadata,
        parent_config=None if stored.parent is None else stored.address.config(stored.parent),
        pending_writes=[(write.task, write.channel, load(serde, stored.contents[write.digest])) for write in ordered],
    )


def matches(metadata: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether every wanted key is there with exactly that value; ``True`` is not ``1``, a tuple is a list."""
    return all(key in metadata and _same(metadata[key], value) for key, value in wanted.items())


def damaged(thread: str, checkpoint_id: str, what: str) -> StorageError:
    """The error for stored bytes that are not those that were written."""
    return StorageError(
        f"{what} of checkpoint {checkpoint_id!r} in thread {thread[:80]!r} is missing "
        "or is not what was stored (its SHA-256 digest differs): the row was changed from outside "
        "or the disk is damaged; restore the database from a backup, or delete the thread"
    )


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _seal(thread: str, row: Mapping[str, Any]) -> bytes:
    columns = ("ns", "id", "ns_name", "parent", "metadata", "body")
    return seal((thread_key(thread), *(row[name] for name in columns)))


def _add_blob(blobs: dict[bytes, bytes], body: bytes) -> bytes:
    digest = content_digest(VALUE, body)
    blobs[digest] = body
    return digest


def _refuse_pickle(tag: str) -> None:
    # An encrypting serializer appends its cipher: "pickle+aes".
    if tag.partition("+")[0] == "pickle":
        raise StorageError(
            "expected a value that msgpack can hold, found one that the serializer pickles, "
            "and pickles can run code when they are read; "
            "store plain data, messages, dataclasses or pydantic models"
        )
