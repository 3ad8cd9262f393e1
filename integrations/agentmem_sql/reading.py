"""What is read, as functions of a connection inside one transaction, which is one snapshot.

A checkpoint takes four statements, whatever it holds: its row, its channels, its pending writes, and the
content of both; a page of a listing takes four for each namespace on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import Connection, RowMapping, and_, bindparam, or_, select

from agentmem_sql.codec import (
    Address,
    Slot,
    StoredCheckpoint,
    StoredWrite,
    damaged,
    decode_row,
    matches,
    slots,
)
from agentmem_sql.keys import content_digest, decode_text, encode_text, exact_key, open_key, thread_key
from agentmem_sql.tables import blobs, channels, checkpoints, threads, writes

T = TypeVar("T")

# Parameters of one IN list stay far below every driver's limit.
_CHUNK = 400
_PAGE = 32

# Built once: building a statement takes SQLAlchemy longer than running it takes SQLite.
_IN_THREAD = threads.c.key == bindparam("thread_key")
_IN_NS = checkpoints.c.ns == bindparam("ns")
_WITH_ID = checkpoints.c.id == bindparam("id")
_ROWS = (
    select(threads.c.name, *checkpoints.columns)
    .join_from(checkpoints, threads, checkpoints.c.thread == threads.c.number)
    .order_by(checkpoints.c.id.desc(), checkpoints.c.thread.desc(), checkpoints.c.ns.desc())
)
_ONE = _ROWS.where(_IN_THREAD, _IN_NS, _WITH_ID)
_NEWEST = _ROWS.where(_IN_THREAD, _IN_NS).limit(1)
_CHANNELS = select(channels.c.name, channels.c.version, channels.c.digest).where(
    channels.c.thread == bindparam("thread"),
    channels.c.ns == bindparam("ns"),
    channels.c.version.in_(bindparam("versions", expanding=True)),
    channels.c.digest.is_not(None),
)
_WRITES = select(writes).where(
    writes.c.thread == bindparam("thread"),
    writes.c.ns == bindparam("ns"),
    writes.c.checkpoint.in_(bindparam("ids", expanding=True)),
)
_CONTENT = select(blobs.c.digest, blobs.c.kind, blobs.c.body).where(
    blobs.c.thread == bindparam("thread"), blobs.c.digest.in_(bindparam("digests", expanding=True))
)


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Pieces short enough for one IN list."""
    return (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))


def find(connection: Connection, serde: SerializerProtocol, address: Address) -> StoredCheckpoint | None:
    """The checkpoint that an address names, or the newest of its namespace; None where there is none.

    Raises:
        StorageError: it was changed or damaged since it was stored.
    """
    row = connection.execute(_NEWEST if address.id is None else _ONE, _keys(address)).mappings().one_or_none()
    if row is None:
        return None
    found = decode_row(serde, dict(row))
    _complete(connection, [(row, found)])
    return found


class Listing:
    """A listing, newest first, page by page: between pages nothing is held open.

    ``config`` None lists every thread; a config without ``checkpoint_ns`` every namespace of its thread.
    """

    def __init__(
        self,
        serde: SerializerProtocol,
        config: RunnableConfig | None,
        *,
        filter: Mapping[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> None:
        self._serde = serde
        self._filter = filter or {}
        self._left = limit
        self._page_size = _PAGE if limit is None or self._filter else min(limit, _PAGE)
        self._query = _ROWS.limit(self._page_size)
        self._keys: dict[str, bytes] = {}
        if config is not None:
            address = Address.of(config)
            self._keys = _keys(address)
            self._query = self._query.where(_IN_THREAD)
            if "checkpoint_ns" in config["configurable"]:
                self._query = self._query.where(_IN_NS)
            if address.id is not None:
                self._query = self._query.where(_WITH_ID)
        end = None if before is None else before["configurable"].get("checkpoint_id")
        if end:
            self._query = self._query.where(checkpoints.c.id < encode_text(end))
        self._last: RowMapping | None = None
        self.finished = limit is not None and limit <= 0

    def next_page(self, connection: Connection) -> list[StoredCheckpoint]:
        """The next checkpoints that match; may be none although the listing is not ``finished``."""
        query = self._query if self._last is None else self._query.where(_after(self._last))
        rows = connection.execute(query, self._keys).mappings().all()
        matching = []
        for row in rows:
            stored = decode_row(self._serde, dict(row))
            if matches(stored.metadata, self._filter):
                matching.append((row, stored))
        if self._left is not None:
            matching = matching[: self._left]
            self._left -= len(matching)
        self.finished = len(rows) < self._page_size or self._left == 0
        self._last = rows[-1] if rows else None
        _complete(connection, matching)
        return [stored for _, stored in matching]


def _keys(address: Address) -> dict[str, bytes]:
    """The parameters of the statements above; a value that a statement does not name is ignored."""
    keys = {"thread_key": thread_key(address.thread), "ns": open_key(address.ns)}
    return keys if address.id is None else {**keys, "id": exact_key(address.id, "checkpoint id")}


def _after(last: RowMapping) -> Any:
    """The rows that follow one in the order of a listing."""
    ids, numbers, spaces = checkpoints.c.id, checkpoints.c.thread, checkpoints.c.ns
    return or_(
        ids < last["id"],
        and_(ids == last["id"], numbers < last["thread"]),
        and_(ids == last["id"], numbers == last["thread"], spaces < last["ns"]),
    )


def _complete(connection: Connection, found: Iterable[tuple[RowMapping, StoredCheckpoint]]) -> None:
    """Fetch channels, pending writes and content of checkpoints."""
    groups: defaultdict[tuple[int, bytes], list[tuple[bytes, StoredCheckpoint]]] = defaultdict(list)
    for row, stored in found:
        groups[row["thread"], row["ns"]].append((row["id"], stored))
    for (thread, ns), members in groups.items():
        _fetch_channels(connection, thread, ns, [stored for _, stored in members])
        _fetch_writes(connection, thread, ns, dict(members))
        _fetch_content(connection, thread, [stored for _, stored in members])


def _fetch_channels(connection: Connection, thread: int, ns: bytes, stored: Sequence[StoredCheckpoint]) -> None:
    wanted = [slots(one) for one in stored]
    held: dict[Slot, bytes] = {}
    for part in chunks(sorted({version for each in wanted for _, version in each.values()})):
        keys = {"thread": thread, "ns": ns, "versions": part}
        for name, version, digest in connection.execute(_CHANNELS, keys):
            held[name, version] = digest
    for one, each in zip(stored, wanted, strict=True):
        one.digests = {channel: held[slot] for channel, slot in each.items() if slot in held}


def _fetch_writes(connection: Connection, thread: int, ns: bytes, stored: Mapping[bytes, StoredCheckpoint]) -> None:
    for part in chunks(list(stored)):
        for row in connection.execute(_WRITES, {"thread": thread, "ns": ns, "ids": part}).mappings():
            stored[row["checkpoint"]].writes.append(
                StoredWrite(
                    decode_text(row["path"]),
                    decode_text(row["task"]),
                    row["idx"],
                    decode_text(row["channel"]),
                    row["digest"],
                )
            )


def _fetch_content(connection: Connection, thread: int, stored: Sequence[StoredCheckpoint]) -> None:
    """Content is read once however many checkpoints point to it, and compared with its digest."""
    needed = {one.id: {*one.digests.values(), *(write.digest for write in one.writes)} for one in stored}
    contents: dict[bytes, bytes] = {}
    for part in chunks(sorted(set().union(*needed.values()))):
        for digest, kind, body in connection.execute(_CONTENT, {"thread": thread, "digests": part}):
            if content_digest(kind, body) == digest:
                contents[digest] = body
    for one in stored:
        if not needed[one.id] <= contents.keys():
            raise damaged(one.address.thread, one.id, "a stored value")
        one.contents = contents
