"""Between LangGraph's checkpoints and rows.

A row is sealed: one digest over its columns and its thread, so that nothing in it can be changed, and no row
moved elsewhere, unnoticed. Where the channels' values lie is packed into the column ``content``, name by name.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from operator import itemgetter
from typing import Any, NamedTuple, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    writes_sort_key,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from agentmem.errors import StorageError
from agentmem_sql.cache import Body, Held_by
from agentmem_sql.ids import check_id
from agentmem_sql.keys import (
    DIGEST_BYTES,
    decode_text,
    encode_text,
    exact_key,
    is_hashed,
    open_key,
    thread_key,
)
from agentmem_sql.packing import Packer, Unpacker, dump, load
from agentmem_sql.vault import Vault

_LENGTH = struct.Struct(">I")
# What is sealed of a row.
_of_checkpoint = itemgetter("ns", "id", "ns_name", "parent", "created", "run", "metadata", "body", "content", "history")
_of_write = itemgetter("ns", "checkpoint", "task", "idx", "path", "channel", "digest")

Row = Mapping[Any, Any]  # of a table, by column


class Address(NamedTuple):
    """Where a config points: a thread, a namespace in it, and a checkpoint there or None for the newest."""

    thread: str
    ns: str
    id: str | None

    @classmethod
    def of(cls, config: RunnableConfig) -> Address:
        """Read a config.

        Raises:
            StorageError: it names no thread.
            ConfigError: its thread id or checkpoint id is none, for example None.
        """
        found = config.get("configurable", {})
        if "thread_id" not in found:
            raise StorageError(
                "expected a config with a thread id, found none; "
                "pass {'configurable': {'thread_id': '...'}} to the graph or the checkpointer"
            )
        ns, checkpoint_id = str(found.get("checkpoint_ns", "")), found.get("checkpoint_id")
        named = check_id(checkpoint_id, "checkpoint id") if checkpoint_id else None
        return cls(check_id(found["thread_id"]), ns, named)

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
class StoredWrite:
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
    """A checkpoint as read: its own dictionary without channel values, and where its content lies."""

    address: Address
    id: str
    parent: str | None
    created: int
    metadata: CheckpointMetadata
    body: dict[str, Any]
    digests: dict[str, bytes]  # channel -> content; no empty channels
    history: bytes | None
    writes: list[StoredWrite] = field(default_factory=list)
    contents: Mapping[bytes, Body] = field(default_factory=dict)  # everything that the two refer to

    @property
    def roots(self) -> set[bytes]:
        """The content that the checkpoint and its pending writes name."""
        return {*self.digests.values(), *(write.digest for write in self.writes)}

    @property
    def held(self) -> Held_by:
        """What each channel held."""
        versions: ChannelVersions = self.body["channel_versions"]
        return {name: (version, self.digests.get(name)) for name, version in versions.items()}


def encode_checkpoint(
    packer: Packer,
    serde: SerializerProtocol,
    vault: Vault,
    address: Address,
    checkpoint: Checkpoint,
    metadata: CheckpointMetadata,
    new_versions: ChannelVersions,
    parents: Held_by,
) -> tuple[Row, Held_by]:
    """The row of a checkpoint, and what its channels hold; values go to the packer. ``address``: of its parent.

    A channel that is not in ``new_versions`` holds what it held in the parent at the same version. Where the
    parent does not know that version (there is none, or it is gone) the value that came along is stored.
    """
    values = checkpoint["channel_values"]
    held: dict[str, tuple[str | int | float, bytes | None]] = {}
    for name, version in checkpoint["channel_versions"].items():
        before = parents.get(name)
        if before is not None and name not in new_versions and _same(before[0], version):
            held[name] = before
        else:
            held[name] = version, packer.pack(values[name]) if name in values else None
    ns = open_key(address.ns)
    run = metadata.get("run_id")
    own: dict[str, Any] = {**checkpoint}
    del own["channel_values"], own["id"]
    row: dict[str, Any] = {
        "ns": ns,
        "id": exact_key(checkpoint["id"], "checkpoint id"),
        "ns_name": encode_text(address.ns) if is_hashed(ns) else None,
        "parent": None if address.id is None else exact_key(address.id, "checkpoint id"),
        "created": time.time_ns() // 1_000_000,
        "run": vault.run_key(run) if isinstance(run, str) else None,
        "metadata": vault.close(dump(serde, metadata)),
        "body": vault.close(dump(serde, own)),
        "content": pack_content({name: digest for name, (_, digest) in held.items() if digest is not None}),
        "history": None,
    }
    row["seal"] = seal_checkpoint(vault, address.thread, row)
    return row, held


def encode_writes(
    packer: Packer,
    vault: Vault,
    address: Address,
    writes: Sequence[tuple[str, Any]],
    task_id: str,
    task_path: str,
) -> list[Row]:
    """The rows of the pending writes of a task; values go to the packer.

    Raises:
        StorageError: the address names no checkpoint to hang them on.
    """
    if address.id is None:
        raise StorageError("expected a config with the checkpoint id to store writes under, found none")
    ns, checkpoint = open_key(address.ns), exact_key(address.id, "checkpoint id")
    task, path = exact_key(task_id, "task id"), encode_text(task_path)
    rows: list[Row] = []
    by_index = {
        WRITES_IDX_MAP.get(channel, position): (channel, value) for position, (channel, value) in enumerate(writes)
    }
    for index, (channel, value) in by_index.items():
        row: dict[str, Any] = {
            "ns": ns,
            "checkpoint": checkpoint,
            "task": task,
            "idx": index,
            "path": path,
            "channel": encode_text(channel),
            # What may be replaced has content of its own, so that it can be freed without a look at the whole thread.
            "digest": packer.pack_own(value, _place(ns, checkpoint, task, index))
            if channel in WRITES_IDX_MAP
            else packer.pack(value),
        }
        row["seal"] = seal_write(vault, address.thread, row)
        rows.append(row)
    return rows


def _place(ns: bytes, checkpoint: bytes, task: bytes, index: int) -> bytes:
    """A digest of the key of a pending write, of 32 bytes."""
    return sha256(b"%d %d %d " % (index, len(ns), len(checkpoint)) + ns + checkpoint + task).digest()


def replaces(writes: Sequence[tuple[str, Any]]) -> bool:
    """Whether the writes of a task replace what it wrote before: those to special channels do."""
    return all(channel in WRITES_IDX_MAP for channel, _ in writes)


def decode_row(vault: Vault, serde: SerializerProtocol, thread: str, row: Row) -> StoredCheckpoint:
    """A row of the checkpoints table.

    Raises:
        StorageError: the row was changed or damaged since it was written.
    """
    check_seal(vault, thread, row)
    checkpoint_id = decode_text(row["id"])
    ns = decode_text(row["ns"] if row["ns_name"] is None else row["ns_name"])
    return StoredCheckpoint(
        Address(thread, ns, checkpoint_id),
        checkpoint_id,
        None if row["parent"] is None else decode_text(row["parent"]),
        row["created"],
        load(serde, vault.open(row["metadata"])),
        load(serde, vault.open(row["body"])),
        unpack_content(row["content"]),
        row["history"],
    )


def decode_write(vault: Vault, thread: str, row: Row) -> StoredWrite:
    """A row of the writes table.

    Raises:
        StorageError: the row was changed or damaged since it was written.
    """
    if seal_write(vault, thread, row) != row["seal"]:
        raise damaged(thread, decode_text(row["checkpoint"]), "a pending write")
    return StoredWrite(
        decode_text(row["path"]), decode_text(row["task"]), row["idx"], decode_text(row["channel"]), row["digest"]
    )


def to_tuple(unpacker: Unpacker, stored: StoredCheckpoint) -> CheckpointTuple:
    """What LangGraph gets."""
    values = {name: unpacker.unpack(digest) for name, digest in stored.digests.items()}
    ordered = sorted(stored.writes, key=lambda write: write.order)
    return CheckpointTuple(
        config=stored.address.config(stored.id),
        checkpoint=cast(Checkpoint, {**stored.body, "id": stored.id, "channel_values": values}),
        metadata=stored.metadata,
        parent_config=None if stored.parent is None else stored.address.config(stored.parent),
        pending_writes=[(write.task, write.channel, unpacker.unpack(write.digest)) for write in ordered],
    )


def seal_checkpoint(vault: Vault, thread: str, row: Row) -> bytes:
    """The seal of a checkpoint's row."""
    return vault.seal([thread_key(thread), *_sealed(_of_checkpoint(row))])


def check_seal(vault: Vault, thread: str, row: Row) -> None:
    """Compare a checkpoint's row with its seal.

    Raises:
        StorageError: the row was changed or damaged since it was written.
    """
    if seal_checkpoint(vault, thread, row) != row["seal"]:
        raise damaged(thread, decode_text(row["id"]), "the checkpoint's row")


def seal_write(vault: Vault, thread: str, row: Row) -> bytes:
    """The seal of a pending write's row."""
    return vault.seal([thread_key(thread), *_sealed(_of_write(row))])


def pack_content(digests: Mapping[str, bytes]) -> bytes:
    """The column ``content``: each channel's name with its length before, and its digest."""
    return b"".join([_packed_name(name) + digest for name, digest in digests.items()])


@lru_cache(maxsize=1024)
def _packed_name(channel: str) -> bytes:
    name = encode_text(channel)
    return _LENGTH.pack(len(name)) + name


def unpack_content(packed: bytes) -> dict[str, bytes]:
    """The inverse of ``pack_content``."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(packed):
        start = at + _LENGTH.size
        end = start + _LENGTH.unpack_from(packed, at)[0]
        at = end + DIGEST_BYTES
        found[decode_text(packed[start:end])] = packed[end:at]
    return found


def matches(metadata: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether every wanted key is there with exactly that value; ``True`` is not ``1``, a tuple is a list."""
    return all(key in metadata and _same(metadata[key], value) for key, value in wanted.items())


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


def _sealed(values: tuple[Any, ...]) -> list[bytes | None]:
    return [value if value is None or type(value) is bytes else _spelled(value) for value in values]


def _spelled(value: object) -> bytes:
    return b"%d" % value if isinstance(value, int) else repr(value).encode()  # what a damaged file gives
