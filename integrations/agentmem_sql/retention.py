"""What threads take, policies for what is kept of them, and the sweep that applies those.

One statement measures the threads; most have nothing to delete and are not locked. What is deleted from a thread is
decided when the thread is locked, from its content at that moment.

Bytes are those of the bodies of content and of the binary columns of rows. What a database adds (keys, indexes, page
headers, free space) its own tools tell.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

from langgraph.checkpoint.base.id import UUID
from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    LargeBinary,
    Select,
    Subquery,
    Table,
    case,
    cast,
    func,
    select,
)

from agentmem.errors import ConfigError
from agentmem_sql.content import load
from agentmem_sql.database import Database
from agentmem_sql.protection import Protection
from agentmem_sql.prune import Key, Pruner, ThreadRetention, UnreadableThreadError
from agentmem_sql.reader import chunks
from agentmem_sql.rows import Row, check_count, check_ids
from agentmem_sql.schema import Tables, decode_text, encode_text, thread_key


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What to keep. At least one rule must be given; a checkpoint is kept if every given rule lets it stay.

    Attributes:
        max_checkpoints: keep this many checkpoints, the newest, in each namespace of a thread (the main graph is a
            namespace, and so is every subgraph).
        max_age: delete checkpoints that were stored longer ago than this, except the newest of each namespace.
        idle: delete threads whose last checkpoint was stored longer ago than this, with everything in them. A thread
            without checkpoints, which has only writes that wait for one, is as old as the id of that checkpoint says.

    A checkpoint of a subgraph's call is deleted together with the checkpoint of the main graph that called it.

    Raises:
        ConfigError: no rule is given, or a value is not above zero.
    """

    max_checkpoints: int | None = None
    max_age: timedelta | None = None
    idle: timedelta | None = None

    def __post_init__(self) -> None:
        check_count(self.max_checkpoints, "`max_checkpoints` (the newest always stays)")
        for name in ("max_age", "idle"):
            span = getattr(self, name)
            if span is not None and not (isinstance(span, timedelta) and span > timedelta(0)):
                raise ConfigError(f"expected `{name}` to be a timedelta above zero, found {span!r}")
        if self.max_checkpoints is None and self.max_age is None and self.idle is None:
            raise ConfigError("expected max_checkpoints, max_age or idle, found none: nothing would ever go")


@dataclass(frozen=True, kw_only=True)
class RetentionReport:
    """What a sweep deleted, or would delete.

    Attributes:
        dry_run: whether nothing was changed.
        threads: the threads from which something was deleted.
        failed: threads whose stored data is damaged, and how; nothing was deleted from them.
        kept: checkpoints that are left in all threads that the sweep covered, also where nothing was deleted.
        threads_kept: how many of these threads are left.
    """

    dry_run: bool
    threads: tuple[ThreadRetention, ...]
    failed: Mapping[str, str]
    kept: int
    threads_kept: int

    @property
    def removed(self) -> int:
        """The number of deleted checkpoints."""
        return sum(thread.removed for thread in self.threads)

    @property
    def threads_deleted(self) -> int:
        """The number of threads that were deleted completely."""
        return sum(thread.deleted for thread in self.threads)

    @property
    def bytes_freed(self) -> int:
        """How many bytes less content and rows take, without the database's own overhead."""
        return sum(thread.bytes_freed for thread in self.threads)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        sums = {name: getattr(self, name) for name in ("removed", "threads_deleted", "bytes_freed")}
        return {**asdict(self), **sums, "threads": [asdict(thread) for thread in self.threads]}


class _Limits(NamedTuple):
    """A policy at one moment. Times are as in the column `created`; what is below is too old; 0 for no limit."""

    most: int
    oldest: int
    alive: int
    protection: Protection
    serde: SerializerProtocol

    def may_concern(self, thread: Any) -> bool:
        """Whether checkpoints of a thread may have to go, going by what `_measure` says of it."""
        if thread.checkpoints is None:  # there are only writes that wait for one: `choose` looks at them
            return self.alive > 0
        return thread.newest < self.alive or thread.most > self.most or (thread.oldest or sys.maxsize) < self.oldest

    def choose(self, rows: Mapping[Key, Row], awaited: Collection[Key]) -> Collection[Key] | None:
        """The checkpoints to delete, out of all checkpoints of a thread; None to delete the whole thread."""
        times = [row["created"] for row in rows.values()] or [_made_at(name) for _, name in awaited]
        if max(times, default=0) < self.alive:
            return None
        namespaces: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for ns, checkpoint_id in sorted(rows, reverse=True):
            namespaces[ns].append(checkpoint_id)
        gone = {
            (ns, checkpoint_id)
            for ns, newest_first in namespaces.items()
            for position, checkpoint_id in enumerate(newest_first)
            if position and (position >= self.most or rows[ns, checkpoint_id]["created"] < self.oldest)
        }
        oldest_left = min((key for key in rows if key[0] == b"" and key not in gone), default=None)
        for ns, newest_first in namespaces.items():
            caller = self._caller(rows[ns, newest_first[0]])
            # A caller that is not there had its turn if all that is left came later; else it is not stored yet.
            if caller is not None and (caller in gone or (oldest_left is not None and caller < oldest_left)):
                gone.update((ns, checkpoint_id) for checkpoint_id in newest_first)
        return gone

    def _caller(self, row: Row) -> Key | None:
        """The checkpoint of the main graph that called this row's subgraph; None if the row is of no such call."""
        ns = decode_text(row["ns"] if row["ns_name"] is None else row["ns_name"])
        if ":" not in ns.rpartition("|")[2]:  # a subgraph with a thread of its own: the namespace is its name alone
            return None
        metadata: Mapping[str, Any] = load(self.serde, self.protection.decrypt(row["metadata"]))
        caller = (metadata.get("parents") or {}).get("")
        return (b"", encode_text(caller)) if isinstance(caller, str) else None


def sweep(
    pruner: Pruner,
    serde: SerializerProtocol,
    policy: Retention,
    *,
    thread_ids: Sequence[str] | None,
    dry_run: bool,
    now: datetime | None,
) -> RetentionReport:
    """See `SQLAlchemySaver.retain`."""
    if not isinstance(policy, Retention):
        raise ConfigError(f"expected a policy, Retention(...), found {policy!r}")
    if not isinstance(now, datetime | None) or (now is not None and now.tzinfo is None):
        raise ConfigError(f"expected `now` with a time zone, found {now!r}; use datetime.now(UTC)")
    at = datetime.now(UTC) if now is None else now
    oldest, alive = _earlier(at, policy.max_age), _earlier(at, policy.idle)
    limits = _Limits(policy.max_checkpoints or sys.maxsize, oldest, alive, pruner.protection, serde)
    named = None if thread_ids is None else [thread_key(thread_id) for thread_id in check_ids(thread_ids)]
    results: list[ThreadRetention] = []
    failed: dict[str, str] = {}
    kept = threads_kept = 0
    for keys in [None] if named is None else chunks(named):
        for row in pruner.database.run(partial(_measure, tables=pruner.database.tables, keys=keys)):
            left, deleted = row.checkpoints or 0, False
            if limits.may_concern(row):
                thread_id = decode_text(row.name)
                try:
                    taken = pruner.remove(serde, thread_id, limits.choose, dry_run=dry_run)
                except UnreadableThreadError as error:
                    failed[thread_id] = str(error)
                else:
                    left, deleted = taken.kept, taken.deleted
                    if taken.removed or taken.deleted:  # otherwise the thread was written or swept meanwhile
                        results.append(taken)
            kept, threads_kept = kept + left, threads_kept + (not deleted)
    return RetentionReport(dry_run=dry_run, threads=tuple(results), failed=failed, kept=kept, threads_kept=threads_kept)


def _earlier(now: datetime, span: timedelta | None) -> int:
    """The time before `now` in milliseconds since 1970; a datetime could not hold `timedelta.max`."""
    epoch = datetime.fromtimestamp(0, UTC)
    return 0 if span is None else (now - epoch) // timedelta(milliseconds=1) - span // timedelta(milliseconds=1)


def _made_at(checkpoint_id: bytes) -> int:
    """When a checkpoint was made, in milliseconds since 1970, read from LangGraph's ids (UUIDs of version 6 or 7).

    0 for an id without a time: writes that wait for such a checkpoint do not keep a thread.
    """
    try:
        made = UUID(checkpoint_id.decode())
    except ValueError:
        return 0
    if made.version == 6:  # 100 ns since 15 October 1582
        return (made.time - 0x01B21DD213814000) // 10_000
    return made.time if made.version == 7 else 0


def _measure(connection: Connection, tables: Tables, keys: Sequence[bytes] | None) -> Sequence[Any]:
    """The threads, or those with these keys, and what tells whether a policy concerns them (see `may_concern`).

    Of one without checkpoints all but number and name are None.
    """
    threads, stored = tables.threads, tables.checkpoints.c
    size = func.count().label("size")
    times = func.min(stored.created).label("oldest"), func.max(stored.created).label("newest")
    spaces = select(stored.thread, size, *times).group_by(stored.thread, stored.ns).subquery().c
    counts = cast(func.sum(spaces.size), BigInteger).label("checkpoints"), func.max(spaces.size).label("most")
    # Only what has a newer one beside it may be too old.
    times = func.min(case((spaces.size > 1, spaces.oldest))).label("oldest"), func.max(spaces.newest).label("newest")
    measured = select(spaces.thread, *counts, *times).group_by(spaces.thread).subquery()
    query = select(threads.c.number, threads.c.name, *(column for column in measured.c if column.name != "thread"))
    query = query.outerjoin_from(threads, measured, measured.c.thread == threads.c.number).order_by(threads.c.number)
    return connection.execute(query if keys is None else query.where(threads.c.key.in_(keys))).all()


# What threads take.


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What a thread takes, or several do.

    Attributes:
        checkpoints: number of checkpoints, in all namespaces.
        pending_writes: number of pending writes.
        blobs: number of distinct pieces of content, and of witnesses (see `list_tree`).
        content_bytes: size of their bodies, as stored.
        row_bytes: size of the rows.
    """

    checkpoints: int
    pending_writes: int
    blobs: int
    content_bytes: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        """Size of content and rows."""
        return self.content_bytes + self.row_bytes


@dataclass(frozen=True, kw_only=True)
class ThreadSize(_Sizes):
    """The size of a thread.

    Attributes:
        thread_id: the thread's id.
        newest: when its newest checkpoint was stored; None if it has none.
    """

    thread_id: str
    newest: datetime | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the time is ISO 8601."""
        return {**asdict(self), "bytes": self.bytes, "newest": self.newest and self.newest.isoformat()}


@dataclass(frozen=True, kw_only=True)
class StorageReport(_Sizes):
    """The size of the threads in a database; all sums are over all threads.

    Attributes:
        threads: the first threads, up to `limit`.
        thread_count: number of all threads.
    """

    threads: tuple[ThreadSize, ...]
    thread_count: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "bytes": self.bytes, "threads": [thread.to_dict() for thread in self.threads]}


def storage_report(database: Database, limit: int | None) -> StorageReport:
    """See `SQLAlchemySaver.storage_report`."""
    check_count(limit, "`limit`")
    query, counted = _statement(database.tables), [field.name for field in fields(_Sizes)]
    sizes = [
        ThreadSize(
            thread_id=decode_text(row["name"]),
            newest=None if row["newest"] is None else datetime.fromtimestamp(row["newest"] / 1000, UTC),
            **{name: int(row[name]) for name in counted},
        )
        for row in database.run(lambda connection: connection.execute(query).mappings().all())
    ]
    return StorageReport(
        threads=tuple(sorted(sizes, key=lambda size: -size.bytes)[:limit]),
        thread_count=len(sizes),
        **{name: sum(getattr(size, name) for size in sizes) for name in counted},
    )


def _row_bytes(table: Table) -> ColumnElement[int]:
    """The bytes of a row's columns."""
    binary = (column for column in table.columns if isinstance(column.type, LargeBinary))
    return reduce(add, (func.coalesce(func.length(column), 0) for column in binary))


def _statement(tables: Tables) -> Select[Any]:
    threads, checkpoints, writes, blobs = tables.threads, tables.checkpoints, tables.writes, tables.blobs

    def by_thread(table: Table, size: ColumnElement[int], *others: ColumnElement[Any]) -> Subquery:
        columns = (table.c.thread, func.count().label("rows"), func.sum(size).label("bytes"), *others)
        return select(*columns).group_by(table.c.thread).subquery()

    stored = by_thread(checkpoints, _row_bytes(checkpoints), func.max(checkpoints.c.created).label("newest"))
    pending, content = by_thread(writes, _row_bytes(writes)), by_thread(blobs, func.length(blobs.c.body))
    row_sizes = (_row_bytes(threads), func.coalesce(stored.c.bytes, 0), func.coalesce(pending.c.bytes, 0))
    counted = {
        "checkpoints": stored.c.rows,
        "pending_writes": pending.c.rows,
        "blobs": content.c.rows,
        "content_bytes": content.c.bytes,
        "row_bytes": reduce(add, row_sizes),
    }
    columns = (func.coalesce(column, 0).label(name) for name, column in counted.items())
    query = select(threads.c.name, stored.c.newest, *columns).order_by(threads.c.number)
    for part in (stored, pending, content):
        query = query.outerjoin_from(threads, part, part.c.thread == threads.c.number)
    return query
