"""What is read, as functions of a connection.

No snapshot over several statements is needed, so none is asked of the database. A checkpoint's row and its
pending writes come in one statement. Everything else is content, which never changes: it is there, or it was
taken out together with the checkpoint after the row was read. What is missing is therefore read again, row
first, and only if it is missing a second time is the database damaged.

What this process has written or read before is not fetched again (see `message_cache`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import Connection, RowMapping, and_, bindparam, literal_column, or_, select

from agentmem.errors import StorageError
from agentmem_sql.list_tree import LEAVES, Node, parse
from agentmem_sql.message_cache import Body, CachedThread, ThreadCache
from agentmem_sql.protection import Protection
from agentmem_sql.rows import Address, StoredCheckpoint, damaged, decode_row, decode_write, decode_writes, matches
from agentmem_sql.schema import Tables, decode_text, encode_text, exact_key, open_key, thread_key
from agentmem_sql.statements import Prepared, PreparedLookup, Rows

T = TypeVar("T")

# Parameters of one IN list stay far below every driver's limit.
CHUNK = 1000
_PAGE = 32
_ATTEMPTS = 3
# Columns of a pending write that do not say where it belongs.
_PENDING = ("task", "idx", "path", "channel", "digest", "seal")


class LoadedCheckpoint(NamedTuple):
    """A checkpoint, and what this process knows of its thread."""

    checkpoint: StoredCheckpoint
    known: CachedThread


class Missing(Exception):
    """Content that a row refers to is not there."""


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Pieces short enough for one IN list."""
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))


class Reader:
    """Reads the tables of one database; its statements are built once, which takes longer than running them."""

    def __init__(self, tables: Tables, protection: Protection, cache: ThreadCache) -> None:
        self._protection = protection
        self._cache = cache
        self.tables = tables
        threads, checkpoints, writes, blobs = tables.threads, tables.checkpoints, tables.writes, tables.blobs
        self._row_columns = (threads.c.name, threads.c.number, threads.c.epoch, *checkpoints.c)
        pending = and_(
            writes.c.thread == checkpoints.c.thread,
            writes.c.ns == checkpoints.c.ns,
            writes.c.checkpoint == checkpoints.c.id,
        )
        in_namespace = and_(threads.c.key == bindparam("key"), checkpoints.c.ns == bindparam("ns"))
        own = [column for column in checkpoints.c if column.name not in ("thread", "ns")]
        self._own = tuple(column.name for column in own)
        with_writes = (
            select(threads.c.number, threads.c.epoch, *own, *(writes.c[name] for name in _PENDING))
            .select_from(threads)
            .join(checkpoints, checkpoints.c.thread == threads.c.number)
            .outerjoin(writes, pending)
            .where(in_namespace)
        )
        others = checkpoints.alias()
        newest = (
            select(others.c.id)
            .where(others.c.thread == threads.c.number, others.c.ns == bindparam("ns"))
            .order_by(others.c.id.desc())
            .limit(literal_column("1"))
            .correlate(threads)
            .scalar_subquery()
        )
        self._named = Prepared(with_writes.where(checkpoints.c.id == bindparam("id")))
        self._newest = Prepared(with_writes.where(checkpoints.c.id == newest))
        self._listed = (
            select(*self._row_columns)
            .join_from(checkpoints, threads, checkpoints.c.thread == threads.c.number)
            .order_by(checkpoints.c.id.desc(), checkpoints.c.thread.desc(), checkpoints.c.ns.desc())
        )
        self._pending = select(writes).where(
            writes.c.thread == bindparam("thread"),
            writes.c.ns == bindparam("ns"),
            writes.c.checkpoint.in_(bindparam("ids", expanding=True)),
        )
        self._epoch = select(threads.c.epoch).where(threads.c.number == bindparam("thread"))
        self._content = PreparedLookup(
            blobs.c.digest,
            "digests",
            select(blobs.c.digest, blobs.c.kind, blobs.c.body).where(blobs.c.thread == bindparam("thread")).where,
        )

    def find(self, connection: Connection, serde: SerializerProtocol, address: Address) -> LoadedCheckpoint | None:
        """The checkpoint that an address names, or the newest of its namespace; None where there is none.

        Raises:
            StorageError: it was changed or damaged since it was stored, or is pruned again and again.
        """
        before = None
        for _ in range(_ATTEMPTS):
            loaded = self.row(connection, serde, address)
            if loaded is None:
                return None
            try:
                stored, known = loaded
                stored.contents = self.collect(connection, known, _roots(stored))
                return loaded
            except Missing:
                # Under one epoch only what a pending write held may go, when it is replaced: its row names another.
                if before == (known.epoch, stored.id, _roots(stored)):
                    break
                before = known.epoch, stored.id, _roots(stored)
        else:
            raise StorageError(
                f"thread {address.thread[:80]!r} was pruned {_ATTEMPTS} times while it was being read; try again"
            )
        raise damaged(address.thread, stored.id, "a stored value")

    def locate(self, connection: Connection, address: Address) -> tuple[CachedThread, bytes] | None:
        """What is known of a thread, and the key of the checkpoint that an address names; None if there is none."""
        rows = self._rows(connection, address)
        if not rows:
            return None
        number, epoch, *values = rows[0]
        return self._cache.at(address.thread, number, epoch), values[self._own.index("id")]

    def row(self, connection: Connection, serde: SerializerProtocol, address: Address) -> LoadedCheckpoint | None:
        """As `find`, without the content."""
        rows = self._rows(connection, address)
        if not rows:
            return None
        ns, width = open_key(address.ns), 2 + len(self._own)
        number, epoch, *values = rows[0]
        own = dict(zip(self._own, values, strict=False), ns=ns)
        stored = decode_row(self._protection, serde, address.thread, own)
        same = {"ns": ns, "checkpoint": own["id"]}
        pending = [dict(zip(_PENDING, row[width:], strict=True), **same) for row in rows if row[width] is not None]
        stored.writes += decode_writes(self._protection, address.thread, pending)
        heads = stored.heads
        known = self._cache.at(address.thread, number, epoch)
        known.remember_channels(address.ns, stored.id, heads)
        return LoadedCheckpoint(stored, known)

    def _rows(self, connection: Connection, address: Address) -> Rows:
        """The row of a checkpoint after the thread's number and epoch, once for each of its pending writes."""
        keys = {"key": thread_key(address.thread), "ns": open_key(address.ns)}
        if address.id is None:
            return self._newest.rows(connection, keys)
        return self._named.rows(connection, keys | {"id": exact_key(address.id, "checkpoint id")})

    def collect(self, connection: Connection, known: CachedThread, roots: Iterable[bytes]) -> dict[bytes, Body]:
        """Content and all content that it refers to, level by level, each read once and compared with its digest.

        Raises:
            Missing: some of it is not there, or is not what was stored.
        """
        contents, missing = known.collect(roots)
        while missing:
            fetched = self._fetch(connection, known, sorted(missing))
            if len(fetched) < len(missing):
                raise Missing
            contents.update(fetched)
            nodes = [body for body in fetched.values() if type(body) is Node]
            entries = {entry for node in nodes for entry in node.entries if type(entry) is bytes}  # not what is inline
            below, missing = known.collect(entries - contents.keys())
            contents.update(below)
            missing -= contents.keys()
        return contents

    def _fetch(self, connection: Connection, known: CachedThread, digests: Sequence[bytes]) -> dict[bytes, Body]:
        rows: list[Any] = []
        for part in chunks(digests):
            rows += self._content.rows(connection, {"thread": known.number, "digests": part})
        decrypt, digest_of = self._protection.decrypt, self._protection.digest
        bodies = [(digest, kind, decrypt(stored)) for digest, kind, stored in rows]
        intact = [(digest, kind, body) for digest, kind, body in bodies if digest_of(kind, body) == digest]
        nodes = {digest: parse(kind, body) for digest, kind, body in intact if kind not in LEAVES}
        known.add(nodes.items())
        # Leaves go into the cache when they are unpacked, most of them as something else.
        return {**nodes, **{digest: body for digest, kind, body in intact if kind in LEAVES}}

    def complete(
        self, connection: Connection, serde: SerializerProtocol, listed: Sequence[LoadedCheckpoint]
    ) -> list[LoadedCheckpoint]:
        """Fetch pending writes and content of checkpoints; those that were taken out meanwhile are left out.

        Raises:
            StorageError: one was changed or damaged since it was stored.
        """
        groups: defaultdict[tuple[int, str], dict[bytes, LoadedCheckpoint]] = defaultdict(dict)
        for item in listed:
            assert item.known.number is not None
            groups[item.known.number, item.checkpoint.address.ns][encode_text(item.checkpoint.id)] = item
        completed: dict[tuple[str, str, str], LoadedCheckpoint | None] = {}
        for (thread, ns), members in groups.items():
            for part in chunks(list(members)):
                keys = {"thread": thread, "ns": open_key(ns), "ids": part}
                for row in connection.execute(self._pending, keys).mappings():
                    holder = members.get(row["checkpoint"])
                    if holder is None:  # the index that found the row says something else than the row
                        of = members[part[0]].checkpoint.address.thread
                        raise damaged(of, decode_text(row["checkpoint"]), "a pending write")
                    stored = holder.checkpoint
                    stored.writes.append(decode_write(self._protection, stored.address.thread, row))
            epoch = connection.execute(self._epoch, {"thread": thread}).scalar_one_or_none()
            for item in members.values():
                address = item.checkpoint.address
                # If something was taken out of the thread meanwhile, it may have been these writes.
                intact = item.known.epoch == epoch and self._fill(connection, item)
                completed[address.thread, address.ns, item.checkpoint.id] = (
                    item if intact else self.find(connection, serde, address)
                )
        in_order = (
            completed[item.checkpoint.address.thread, item.checkpoint.address.ns, item.checkpoint.id] for item in listed
        )
        return [item for item in in_order if item is not None]

    def _fill(self, connection: Connection, item: LoadedCheckpoint) -> bool:
        stored, known = item
        try:
            stored.contents = self.collect(connection, known, _roots(stored))
        except Missing:  # taken out or replaced meanwhile, or damaged: `find` tells
            return False
        return True

    def decode(self, serde: SerializerProtocol, row: RowMapping) -> LoadedCheckpoint:
        """A row of a listing."""
        thread = decode_text(row["name"])
        stored = decode_row(self._protection, serde, thread, row)
        return LoadedCheckpoint(stored, self._cache.at(thread, row["number"], row["epoch"]))


def _roots(stored: StoredCheckpoint) -> set[bytes]:
    """The content that a checkpoint and its pending writes name."""
    return {*stored.digests.values(), *[write.digest for write in stored.writes]}


class Listing:
    """A listing, newest first, page by page: between pages nothing is held open.

    `config` None lists every thread; a config without `checkpoint_ns` every namespace of its thread.
    """

    def __init__(
        self,
        reader: Reader,
        serde: SerializerProtocol,
        config: RunnableConfig | None,
        *,
        filter: Mapping[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> None:
        self._reader = reader
        self._serde = serde
        self._filter = filter or {}
        self._left = limit
        self._page_size = _PAGE if limit is None or self._filter else min(limit, _PAGE)
        checkpoints = reader.tables.checkpoints
        query = reader._listed.limit(self._page_size)
        if config is not None:
            address = Address.of(config)
            query = query.where(reader.tables.threads.c.key == thread_key(address.thread))
            if "checkpoint_ns" in config["configurable"]:
                query = query.where(checkpoints.c.ns == open_key(address.ns))
            if address.id is not None:
                query = query.where(checkpoints.c.id == exact_key(address.id, "checkpoint id"))
        end = None if before is None else before["configurable"].get("checkpoint_id")
        if end:
            query = query.where(checkpoints.c.id < encode_text(end))
        self._query = query
        self._last: RowMapping | None = None
        self.finished = limit is not None and limit <= 0

    def next_page(self, connection: Connection) -> list[LoadedCheckpoint]:
        """The next checkpoints that match; may be none although the listing is not `finished`."""
        query = self._query if self._last is None else self._query.where(self._after(self._last))
        rows = connection.execute(query).mappings().all()
        listed = [(row, self._reader.decode(self._serde, row)) for row in rows]
        matching = [(row, item) for row, item in listed if matches(item.checkpoint.metadata, self._filter)]
        wanted = matching if self._left is None else matching[: self._left]
        completed = self._reader.complete(connection, self._serde, [item for _, item in wanted])
        if self._left is not None:
            self._left -= len(completed)
        # One that was taken out meanwhile makes room for the next that matches, on this page or another.
        rest = len(wanted) < len(matching)
        self.finished = (len(rows) < self._page_size and not rest) or self._left == 0
        if rows:
            self._last = wanted[-1][0] if rest else rows[-1]
        return completed

    def _after(self, last: RowMapping) -> Any:
        """The rows that follow one in the order of a listing."""
        columns = self._reader.tables.checkpoints.c
        return or_(
            columns.id < last["id"],
            and_(columns.id == last["id"], columns.thread < last["thread"]),
            and_(columns.id == last["id"], columns.thread == last["thread"], columns.ns < last["ns"]),
        )
