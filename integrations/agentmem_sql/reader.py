"""What is read, as functions of a connection.

No snapshot over several statements is needed, so none is asked of the database. A checkpoint's row and its
pending writes come in one statement. Everything else is content, which never changes: it is there, or it was
taken out together with the checkpoint after the row was read. What is missing is therefore read again, row
first, and only if it is missing a second time is the database damaged.

What this process has written or read before is not fetched again (see `message_cache`).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    and_,
    bindparam,
    cast,
    literal,
    literal_column,
    or_,
    select,
    tuple_,
)

from agentmem.errors import ConfigError, StorageError
from agentmem_sql.content import is_langgraphs
from agentmem_sql.database import Database
from agentmem_sql.list_tree import HISTORY, LEAVES, History, Node, parse, read_history
from agentmem_sql.message_cache import Body, CachedThread, ThreadCache
from agentmem_sql.protection import Protection
from agentmem_sql.rows import (
    Address,
    Row,
    StoredCheckpoint,
    StoredWrite,
    check_count,
    check_id,
    check_seal,
    configurable_of,
    damaged,
    decode_metadata,
    decode_row,
    decode_writes,
    matches,
    metadata_bytes,
    unpack_content,
    witness,
)
from agentmem_sql.schema import Tables, by, decode_text, encode_text, exact_key, open_key, thread_key
from agentmem_sql.statements import Prepared, PreparedLookup, Rows, contains

T = TypeVar("T")

# Parameters of one IN list stay far below every driver's limit.
CHUNK = 1000
# Checkpoints that are completed at once, and rows that are looked for at once.
_PAGE, _MOST_ROWS = 32, 1024
# Pairs of a thread and a digest of which those that are there are looked up in one statement.
_MOST_LOOKUPS = 4096
_ORDER = ("id", "thread", "ns")
_ATTEMPTS = 3
_ANCESTORS = 100  # in one statement
# Columns of a pending write that do not say where it belongs.
_PENDING = ("task", "idx", "path", "channel", "digest", "seal")


# Number of the thread and key of a checkpoint -> the thread's id, and the checkpoint's pending writes.
Holders = dict[tuple[int | None, bytes], tuple[str, list[StoredWrite]]]


class Missing(Exception):
    """Content that a row refers to is not there."""


@dataclass
class Ancestor:
    """A checkpoint on the way to the root: what it contains, and what its own pruned ancestors left."""

    ns: bytes
    id: bytes
    digests: Mapping[str, bytes]
    left: Mapping[str, History]
    writes: list[StoredWrite] = field(default_factory=list)


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Pieces short enough for one IN list."""
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))


class Reader:
    """Reads the tables of one database; its statements are built once, which takes longer than running them."""

    def __init__(self, tables: Tables, protection: Protection, cache: ThreadCache) -> None:
        self.protection = protection
        self._cache = cache
        self.tables = tables
        threads, checkpoints, writes, blobs = tables.threads, tables.checkpoints, tables.writes, tables.blobs
        self._row_columns = (threads.c.name, threads.c.number, threads.c.epoch, *checkpoints.c)
        pending = and_(
            writes.c.thread == checkpoints.c.thread,
            writes.c.ns == checkpoints.c.ns,
            writes.c.checkpoint == checkpoints.c.id,
        )
        own = [column for column in checkpoints.c if column.name not in ("thread", "ns")]
        self._own = tuple(column.name for column in own)

        def last(column: Any, where: ColumnElement[bool]) -> Any:
            found = select(column).where(column.table.c.thread == threads.c.number, where)
            return found.order_by(column.desc()).limit(literal_column("1")).correlate(threads).scalar_subquery()

        others, of_thread = checkpoints.alias().c, checkpoints.c.thread == threads.c.number
        witnessed = last(blobs.c.digest, blobs.c.digest.between(bindparam("first"), bindparam("last")))
        selected = select(threads.c.number, threads.c.epoch, *own, *(writes.c[name] for name in _PENDING), witnessed)
        self._named, self._newest = (
            Prepared(
                selected.select_from(threads)
                .outerjoin(checkpoints, of_thread & by(checkpoints, "ns") & chosen)
                .outerjoin(writes, pending)
                .where(by(threads, "key"))
            )
            for chosen in (by(checkpoints, "id"), checkpoints.c.id == last(others.id, others.ns == bindparam("ns")))
        )
        begins = by(checkpoints, "thread") & by(checkpoints, "ns") & (checkpoints.c.id >= bindparam("id"))
        self._from = select(checkpoints.c.id).where(begins).order_by(checkpoints.c.id).limit(1)
        listed = select(*self._row_columns).join_from(checkpoints, threads, of_thread)
        self._listed = listed.order_by(*(checkpoints.c[name].desc() for name in _ORDER)).limit(bindparam("size"))
        after = tuple_(*(bindparam(f"last_{name}", type_=checkpoints.c[name].type) for name in _ORDER))
        # What a listing may be limited to, by the name of a parameter.
        self._limits: dict[str, ColumnElement[bool]] = {
            "key": by(threads, "key"),
            "ns": by(checkpoints, "ns"),
            "id": by(checkpoints, "id"),
            "end": checkpoints.c.id < bindparam("end"),
            # The first condition is one that an index of the thread's checkpoints can begin at.
            "last_id": and_(
                checkpoints.c.id <= bindparam("last_id"), tuple_(*(checkpoints.c[name] for name in _ORDER)) < after
            ),
        }
        self._searches: dict[Hashable, Prepared] = {}
        of_page = (writes.c.thread == threads.c.number, writes.c.ns == bindparam("ns"))
        self._pending = PreparedLookup(
            lambda among: (
                select(threads.c.epoch, threads.c.number, *writes.c)  # a row without a write where there are none
                .outerjoin_from(threads, writes, and_(*of_page, among(writes.c.checkpoint, "items")))
                .where(among(threads.c.number, "threads"))
            )
        )
        content = select(blobs.c.thread, blobs.c.digest, blobs.c.kind, blobs.c.body)
        self._content = PreparedLookup(
            lambda among: content.where(among(blobs.c.thread, "threads"), among(blobs.c.digest, "items"))
        )
        here = by(checkpoints, "thread", "ns")
        start = select(*own, cast(literal(0), Integer).label("depth"))
        chain = start.where(here, checkpoints.c.id == bindparam("id")).cte("ancestors", recursive=True)
        step = select(*own, chain.c.depth + 1)
        step = step.where(here, checkpoints.c.id == chain.c.parent, chain.c.depth < _ANCESTORS - 1)
        self._chain = select(chain.union_all(step)).order_by("depth")
        self._history = select(blobs.c.kind, blobs.c.body).where(by(blobs, "thread", "digest"))

    def find(self, connection: Connection, serde: SerializerProtocol, address: Address) -> StoredCheckpoint | None:
        """The checkpoint that an address names, or the newest of its namespace; None where there is none.

        Raises:
            StorageError: it was changed or damaged since it was stored, or is pruned again and again.
        """
        before = None
        for _ in range(_ATTEMPTS):
            stored = self.row(connection, serde, address)
            if stored is None:
                return None
            # Under one epoch only what a pending write held may go, when it is replaced: its row names another.
            if before == (stored.known.epoch, stored.id, _roots(stored)):
                raise damaged(address.thread, stored.id, "a stored value")
            before = stored.known.epoch, stored.id, _roots(stored)
            with suppress(Missing):
                stored.contents = self.collect(connection, stored.known, before[-1])
                return stored
        raise StorageError(
            f"thread {address.thread[:80]!r} was pruned {_ATTEMPTS} times while it was being read; try again"
        )

    def locate(self, connection: Connection, address: Address) -> tuple[CachedThread, bytes] | None:
        """What is known of a thread, and the key of the checkpoint that an address names; None if there is none."""
        rows = self._rows(connection, address)
        if not rows:
            return None
        number, epoch, *values = rows[0]
        return self._cache.at(address.thread, number, epoch), values[self._own.index("id")]

    def row(self, connection: Connection, serde: SerializerProtocol, address: Address) -> StoredCheckpoint | None:
        """As `find`, without the content."""
        rows = self._rows(connection, address)
        if not rows:
            return None
        ns, width = open_key(address.ns), 2 + len(self._own)
        number, epoch, *values = rows[0]
        own = dict(zip(self._own, values, strict=False), ns=ns)
        stored = decode_row(self.protection, serde, address.thread, own)
        same = {"ns": ns, "checkpoint": own["id"]}
        pending = [dict(zip(_PENDING, row[width:-1], strict=True), **same) for row in rows if row[width] is not None]
        stored.writes += decode_writes(self.protection, address.thread, pending)
        heads = stored.heads
        stored.known = self._cache.at(address.thread, number, epoch)
        stored.known.remember_channels(address.ns, stored.id, heads)
        return stored

    def _rows(self, connection: Connection, address: Address) -> Rows:
        """The row of a checkpoint after the thread's number and epoch, once for each of its pending writes.

        Raises:
            StorageError: what was stored last is not found under its keys, though its witness is there.
        """
        ns, statement = open_key(address.ns), self._newest
        keys = {"key": thread_key(address.thread), "ns": ns, "first": witness(ns), "last": witness(ns, b"\xff" * 24)}
        if address.id is not None:
            statement, keys["id"] = self._named, exact_key(address.id, "checkpoint id")
            keys["first"] = keys["last"] = witness(ns, keys["id"])
        rows = statement.rows(connection, keys)
        found, last = (rows[0][2 + self._own.index("id")], rows[0][-1]) if rows else (None, None)
        if last is not None and (type(found) is not bytes or witness(ns, found) < last):
            begun = last[8:].rstrip(b"\0")
            other = connection.execute(self._from, {"thread": rows[0][0], "ns": ns, "id": begun}).scalar()
            if address.id is None or other is None or witness(ns, bytes(other)) != last:  # it is no other id's, too
                raise damaged(address.thread, address.id or begun.decode(errors="replace") + "...", "the row")
        return [] if found is None else rows

    def collect(self, connection: Connection, known: CachedThread, roots: Iterable[bytes]) -> dict[bytes, Body]:
        """Content and all content that it refers to, level by level, each read once and compared with its digest.

        Raises:
            Missing: some of it is not there, or is not what was stored.
        """
        found = self._collect_all(connection, [(known, roots)])[0]
        if found is None:
            raise Missing
        return found

    def _collect_all(
        self, connection: Connection, wanted: Sequence[tuple[CachedThread, Iterable[bytes]]]
    ) -> list[dict[bytes, Body] | None]:
        """As `collect`, for several threads at once; None for one of which something is missing."""
        found: list[dict[bytes, Body] | None] = []
        missing: list[tuple[int, CachedThread, dict[bytes, Body], set[bytes]]] = []
        for at, (known, roots) in enumerate(wanted):
            contents, lacking = known.collect(roots)
            found.append(contents)
            if lacking:
                missing.append((at, known, contents, lacking))
        while missing:
            level, missing = missing, []
            rows = self._fetch(connection, {known.number: lacking for _, known, _, lacking in level})
            for at, known, contents, lacking in level:
                fetched = self._checked(known, [row for row in rows[known.number] if row[0] in lacking])
                if len(fetched) < len(lacking):
                    found[at] = None
                    continue
                contents.update(fetched)
                nodes = [body for body in fetched.values() if type(body) is Node]
                entries = {entry for node in nodes for entry in node.entries if type(entry) is bytes}  # not inline
                below, lacking = known.collect(entries - contents.keys())
                contents.update(below)
                if lacking := lacking - contents.keys():
                    missing.append((at, known, contents, lacking))
        return found

    def _fetch(self, connection: Connection, wanted: Mapping[int | None, set[bytes]]) -> dict[int | None, list[Any]]:
        """Rows of content by thread, and perhaps some that were not asked for."""
        rows: dict[int | None, list[Any]] = {thread: [] for thread in wanted}
        together = set().union(*wanted.values())
        few = len(wanted) * len(together) <= _MOST_LOOKUPS
        for threads, digests in [([*wanted], together)] if few else (([each], wanted[each]) for each in wanted):
            for part in chunks(sorted(digests)):
                for thread, *row in self._content.rows(connection, threads, part):
                    rows[thread].append(row)
        return rows

    def _checked(self, known: CachedThread, rows: Iterable[Sequence[Any]]) -> dict[bytes, Body]:
        """The content of rows of a thread, without what is not what was stored."""
        decrypt, digest_of = self.protection.decrypt, self.protection.digest
        bodies = [(digest, kind, decrypt(stored)) for digest, kind, stored in rows]
        intact = [(digest, kind, body) for digest, kind, body in bodies if digest_of(kind, body) == digest]
        nodes = {digest: parse(kind, body) for digest, kind, body in intact if kind not in LEAVES}
        known.add(nodes.items())
        # Leaves go into the cache when they are unpacked, most of them as something else.
        return {**nodes, **{digest: body for digest, kind, body in intact if kind in LEAVES}}

    def complete(
        self, connection: Connection, serde: SerializerProtocol, listed: Sequence[StoredCheckpoint]
    ) -> list[StoredCheckpoint]:
        """Fetch pending writes and content of a page; checkpoints that were taken out meanwhile are left out."""
        by_thread: defaultdict[int | None, list[StoredCheckpoint]] = defaultdict(list)
        by_ns: defaultdict[bytes, Holders] = defaultdict(dict)
        for item in listed:
            address, number = item.address, item.known.number
            by_thread[number].append(item)
            by_ns[open_key(address.ns)][number, encode_text(item.id)] = address.thread, item.writes
        epochs: defaultdict[int | None, set[int]] = defaultdict(set)
        for ns, holders in by_ns.items():
            for number, epoch in self.add_writes(connection, ns, holders):
                epochs[number].add(epoch)
        # If something was taken out of a thread meanwhile, it may have been these writes.
        threads = [items for number, items in by_thread.items() if epochs[number] == {i.known.epoch for i in items}]
        intact: set[int | None] = set()
        roots = [{root for item in items for root in _roots(item)} for items in threads]
        wanted = [(items[0].known, each) for items, each in zip(threads, roots, strict=True)]
        for items, contents in zip(threads, self._collect_all(connection, wanted), strict=True):
            if contents is not None:  # otherwise taken out or replaced meanwhile, or damaged: `find` tells
                intact.add(items[0].known.number)
                for item in items:
                    item.contents = contents
        found = (item if item.known.number in intact else self.find(connection, serde, item.address) for item in listed)
        return [item for item in found if item is not None]

    def add_writes(self, connection: Connection, ns: bytes, holders: Holders) -> set[tuple[int, int]]:
        """Fetch the pending writes of checkpoints of a namespace; gives numbers and epochs of the threads meanwhile."""
        numbers, ids = ([*{*each}] for each in zip(*holders, strict=True))
        rows = self._pending.rows(connection, numbers, ids, ns=ns)
        for _, number, *values in rows:
            row = dict(zip(self.tables.writes.c.keys(), values, strict=True))
            if row["thread"] is None:
                continue
            holder = holders.get((number, row["checkpoint"]))
            if holder is not None:
                holder[1].extend(decode_writes(self.protection, holder[0], [row]))
            elif row["checkpoint"] not in ids:  # the index that found the row says something else than the row
                thread, _ = next(iter(holders.values()))
                raise damaged(thread, decode_text(row["checkpoint"]), "a pending write")
        return {(number, epoch) for epoch, number, *_ in rows}

    def search(
        self, connection: Connection, given: Mapping[str, Any], parts: Sequence[tuple[bytes, ...]]
    ) -> list[dict[str, Any]]:
        """Rows of checkpoints and of their threads, newest first.

        `given`: how many at most, and values of what limits them. `parts`: one of each is somewhere in the metadata.
        """
        dialect = connection.dialect.name
        shape = dialect, *given, *map(len, parts)
        search = self._searches.get(shape)
        names = [[f"part_{at}_{n}" for n in range(len(part))] for at, part in enumerate(parts)]
        if search is None:
            metadata = self.tables.checkpoints.c.metadata
            found = (or_(*(contains(dialect, metadata, name) for name in each)) for each in names)
            limits = (self._limits[name] for name in given if name in self._limits)
            search = self._searches[shape] = Prepared(self._listed.where(*limits, *found))
        values = dict(zip(chain(*names), chain(*parts), strict=True))
        columns = [column.name for column in self._row_columns]
        return [dict(zip(columns, row, strict=True)) for row in search.rows(connection, {**given, **values})]

    def decode(self, serde: SerializerProtocol, row: Row, wanted: Mapping[str, Any]) -> StoredCheckpoint | None:
        """A row of a search; None where its metadata are not those wanted."""
        thread = decode_text(row["name"])
        metadata = decode_metadata(self.protection, serde, thread, row)
        if not matches(metadata, wanted):
            return None
        stored = decode_row(self.protection, serde, thread, row, metadata)
        stored.known = self._cache.at(thread, row["number"], row["epoch"])
        return stored

    # Delta channels: values that checkpoints do not contain, but that follow from earlier writes. LangGraph stores such
    # a channel's value now and then (the seed) and asks for the writes since then, along the parents of a checkpoint.
    # One recursive statement reads the rows of up to a hundred parents, another reads their writes with the thread's
    # epoch: if that has changed since the first row was read, something was removed, and all is read again.
    #
    # When ancestors are pruned, what they wrote since the last seed is kept with their nearest survivor as its HISTORY:
    # the seed and the writes in order, by reference.

    def delta_histories(
        self, connection: Connection, address: Address, channels: Sequence[str]
    ) -> tuple[dict[str, History], dict[bytes, Body], CachedThread] | None:
        """For each channel the nearest seed among a checkpoint's ancestors and the writes since; and the content.

        None if there is no such checkpoint.
        """
        before = None
        while (located := self.locate(connection, address)) is not None:
            known, start = located
            try:
                ancestors = self._ancestors(connection, address, known, start, channels)
                histories = self.histories(connection, address.thread, known, ancestors, channels)
                wanted = {digest for history in histories.values() for digest in history.digests}
                return histories, self.collect(connection, known, wanted), known
            except Missing:
                if before == (known.epoch, start):
                    raise damaged(address.thread, decode_text(start), "a value of an ancestor") from None
                before = known.epoch, start
        return None

    def ancestor_rows(self, connection: Connection, keys: Mapping[str, Any]) -> list[Row]:
        """A checkpoint, given by `thread`, `ns` and `id`, and its ancestors: at most a hundred rows."""
        return [{**row, "ns": keys["ns"]} for row in connection.execute(self._chain, keys).mappings()]

    @staticmethod
    def ancestor_pages(
        read: Callable[[Mapping[str, Any]], list[Row]], thread: int | None, ns: str, start: bytes
    ) -> Iterator[list[Row]]:
        """A checkpoint and all its ancestors, page by page, by something that gives `ancestor_rows`."""
        seen: set[bytes] = set()
        following: bytes | None = start
        while following is not None:
            rows = read({"thread": thread, "ns": open_key(ns), "id": following})
            following = rows[-1]["parent"] if len(rows) == _ANCESTORS else None
            page = {row["id"]: row for row in rows if row["id"] not in seen}
            seen |= page.keys()
            yield list(page.values())
            if len(page) < len(rows):  # it was stored as its own ancestor
                return

    def ancestor(self, connection: Connection, thread: int | None, row: Row) -> Ancestor:
        """A checkpoint with what pruned ancestors left with it, still without its writes; raises `Missing`."""
        left: dict[str, History] = {}
        if row["history"] is not None:
            stored = connection.execute(self._history, {"thread": thread, "digest": row["history"]}).one_or_none()
            if stored is None or stored.kind != HISTORY:
                raise Missing
            body = self.protection.decrypt(stored.body)
            if self.protection.digest(HISTORY, body) != row["history"]:
                raise Missing
            left = read_history(body)
        return Ancestor(row["ns"], row["id"], unpack_content(row["content"]), left)

    def _ancestors(
        self, connection: Connection, address: Address, known: CachedThread, start: bytes, channels: Sequence[str]
    ) -> list[Ancestor]:
        """The checkpoint itself and its ancestors, until every channel is found; raises `Missing`."""
        ancestors: list[Ancestor] = []
        missing = set(channels)
        pages = self.ancestor_pages(partial(self.ancestor_rows, connection), known.number, address.ns, start)
        for row in chain.from_iterable(pages):
            check_seal(self.protection, address.thread, row)
            ancestor = self.ancestor(connection, known.number, row)
            if ancestors:  # the checkpoint's own values do not count
                missing -= ancestor.digests.keys()
            missing -= {name for name, history in ancestor.left.items() if history.seed is not None}
            ancestors.append(ancestor)
            if not missing:
                break
        if not ancestors:
            raise Missing
        return ancestors

    def histories(
        self,
        connection: Connection,
        thread_id: str,
        known: CachedThread,
        ancestors: Sequence[Ancestor],
        channels: Sequence[str],
    ) -> dict[str, History]:
        """The seed and writes of each channel, along a checkpoint and its ancestors (the checkpoint stands first).

        Raises:
            Missing: something was removed from the thread meanwhile.
        """
        for part in chunks(ancestors[1:]):
            holders: Holders = {(known.number, ancestor.id): (thread_id, ancestor.writes) for ancestor in part}
            if self.add_writes(connection, ancestors[0].ns, holders) != {(known.number, known.epoch)}:
                raise Missing
        return {name: _fold(ancestors, name) for name in channels}


def _roots(stored: StoredCheckpoint) -> set[bytes]:
    """The content that a checkpoint and its pending writes name."""
    return {*stored.digests.values(), *[write.digest for write in stored.writes]}


def _fold(ancestors: Sequence[Ancestor], channel: str) -> History:
    newest_first: list[tuple[str, bytes]] = []
    for distance, ancestor in enumerate(ancestors):
        if distance:  # the checkpoint's own value and pending writes do not count
            own = [write for write in ancestor.writes if write.channel == channel]
            own.sort(key=lambda write: write.order, reverse=True)
            newest_first += [(write.task, write.digest) for write in own]
            if channel in ancestor.digests:
                return History(ancestor.digests[channel], newest_first[::-1])
        left = ancestor.left.get(channel)
        if left is not None:
            newest_first += reversed(left.writes)
            if left.seed is not None:
                return History(left.seed, newest_first[::-1])
    return History(None, newest_first[::-1])


def listing(
    database: Database,
    reader: Reader,
    serde: SerializerProtocol,
    config: RunnableConfig | None,
    *,
    filter: Mapping[str, Any] | None,
    before: RunnableConfig | None,
    limit: int | None,
) -> Iterator[StoredCheckpoint]:
    """Checkpoints, newest first, page by page: between pages nothing is held open.

    `config` None lists every thread; a config without `checkpoint_ns` every namespace of its thread.

    The order has no index, which every `put` would pay for: a search looks through all rows that may be listed. So few
    searches are made, each for more rows, and what a search found is completed page by page.
    """
    check_count(limit, "`limit`", 0)
    if not isinstance(filter, Mapping | None):
        raise ConfigError(f"expected `filter` to be a dict of metadata keys and values, found {filter!r}")
    wanted, left = filter or {}, sys.maxsize if limit is None else limit
    # What the database can look for.
    parts = metadata_bytes(serde, wanted) if is_langgraphs(serde) and not reader.protection.encrypts else []
    given: dict[str, Any] = {}
    if config is not None:
        address = Address.of(config)
        given["key"] = thread_key(address.thread)
        if config["configurable"].get("checkpoint_ns") is not None:
            given["ns"] = open_key(address.ns)
        if address.id is not None:
            given["id"] = exact_key(address.id, "checkpoint id")
    if end := before and configurable_of(before).get("checkpoint_id"):
        given["end"] = encode_text(check_id(end, "checkpoint id"))
    size = min(left, _MOST_ROWS) if len(parts) == len(wanted) and (limit or wanted) else _PAGE
    # A search is not given up half-way as often as a thread is.
    page = 2 * _PAGE if wanted else _PAGE
    while left > 0:
        rows = database.run(partial(reader.search, given={"size": size, **given}, parts=parts))
        matching = (item for row in rows if (item := reader.decode(serde, row, wanted)) is not None)
        while listed := list(islice(matching, min(left, page))):
            completed = database.run(partial(reader.complete, serde=serde, listed=listed))
            left -= len(completed)  # one that was taken out meanwhile makes room for the next that matches
            yield from completed
        if len(rows) < size:
            return
        given |= {f"last_{name}": rows[-1][name] for name in _ORDER}
        size = min(4 * size, _MOST_ROWS)
