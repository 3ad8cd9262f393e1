"""Retention: policies for how long threads and checkpoints are kept, and the sweep that applies them.

One statement finds the threads in which something has to be deleted; most have nothing to delete and are not locked.
What is deleted from a thread is decided when the thread is locked, from its content at that moment.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from langgraph.checkpoint.base.id import UUID
from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import ColumnElement, Connection, case, exists, false, func, null, or_, select

from agentmem.errors import ConfigError
from agentmem_sql.content import load
from agentmem_sql.protection import Protection
from agentmem_sql.prune import Key, Pruner, ThreadRetention, UnreadableThreadError
from agentmem_sql.reader import chunks
from agentmem_sql.rows import Row, check_ids
from agentmem_sql.schema import Tables, decode_text, encode_text, thread_key

_PAGE = 500


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
        count = self.max_checkpoints
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigError(
                f"expected `max_checkpoints` to be a number from 1 up (the newest always stays), found {count!r}"
            )
        for name in ("max_age", "idle"):
            span = getattr(self, name)
            if span is not None and not (isinstance(span, timedelta) and span > timedelta(0)):
                raise ConfigError(f"expected `{name}` to be a timedelta above zero, found {span!r}")
        if count is None and self.max_age is None and self.idle is None:
            raise ConfigError("expected max_checkpoints, max_age or idle, found none: nothing would ever go")


@dataclass(frozen=True, kw_only=True)
class RetentionReport:
    """What a sweep deleted, or would delete.

    Attributes:
        dry_run: whether nothing was changed.
        threads: the threads from which something was deleted.
        failed: threads whose stored data is damaged, and how; nothing was deleted from them.
        kept: checkpoints that are left in all threads that the sweep covered, including those without anything to
            delete.
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


@dataclass(frozen=True)
class _Limits:
    """A policy at one moment. Times are as in the column `created`; what is below is too old; 0 for no limit."""

    count: int
    oldest: int
    alive: int
    protection: Protection
    serde: SerializerProtocol

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
            if position and (position >= self.count or rows[ns, checkpoint_id]["created"] < self.oldest)
        }
        oldest_left = min((key for key in rows if key[0] == b"" and key not in gone), default=None)
        for ns, newest_first in namespaces.items():
            caller = self._caller(rows[ns, newest_first[0]])
            # A caller that is not stored any more had its turn if all that is left came later. One that came after
            # them is not stored yet.
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
    if now is not None and now.tzinfo is None:
        raise ConfigError(f"expected `now` with a time zone, found {now!r}; use datetime.now(UTC)")
    at = datetime.now(UTC) if now is None else now
    oldest, alive = _earlier(at, policy.max_age), _earlier(at, policy.idle)
    limits = _Limits(policy.max_checkpoints or sys.maxsize, oldest, alive, pruner.protection, serde)
    database, tables = pruner.database, pruner.database.tables
    keys = None if thread_ids is None else [thread_key(thread_id) for thread_id in check_ids(thread_ids)]
    scopes: list[Sequence[bytes] | None] = [None] if keys is None else list(chunks(keys))
    results: list[ThreadRetention] = []
    failed: dict[str, str] = {}
    for scope in scopes:
        after: int | None = 0
        while after is not None:
            page, after = database.run(partial(_page, tables=tables, limits=limits, keys=scope, after=after))
            for thread_id in page:
                try:
                    taken = pruner.remove(serde, thread_id, limits.choose, dry_run=dry_run)
                except UnreadableThreadError as error:
                    failed[thread_id] = str(error)
                else:
                    if taken.removed or taken.deleted:  # otherwise the thread was written or swept meanwhile
                        results.append(taken)
    counts = [database.run(partial(_count, tables=tables, keys=scope)) for scope in scopes]
    threads_kept, kept = sum(threads for threads, _ in counts), sum(checkpoints for _, checkpoints in counts)
    if dry_run:
        kept -= sum(result.removed for result in results)
        threads_kept -= sum(result.deleted for result in results)
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


def _page(
    connection: Connection, tables: Tables, limits: _Limits, keys: Sequence[bytes] | None, after: int
) -> tuple[list[str], int | None]:
    """One page of the threads that have something to delete, and the number to continue after (None: no more)."""
    threads, checkpoints, writes = tables.threads, tables.checkpoints, tables.writes
    stored = exists().where(checkpoints.c.thread == threads.c.number)
    # Not `max`, which PostgreSQL lacks for bytes. LangGraph's ids sort by time.
    waiting = select(writes.c.checkpoint).where(writes.c.thread == threads.c.number)
    newest = waiting.order_by(writes.c.checkpoint.desc()).limit(1).correlate(threads).scalar_subquery()
    awaited = case((~stored, newest), else_=null())
    query = (
        select(threads.c.number, threads.c.name, stored.label("stored"), awaited.label("awaited"))
        .where(threads.c.number > after, or_(false(), *_conditions(tables, limits)))
        .order_by(threads.c.number)
        .limit(_PAGE)
    )
    rows = connection.execute(query if keys is None else query.where(threads.c.key.in_(keys))).all()
    # Writes that wait for a checkpoint may belong to a run that has just begun.
    due = [row for row in rows if row.stored or _made_at(row.awaited or b"") < limits.alive]
    return [decode_text(row.name) for row in due], rows[-1].number if len(rows) == _PAGE else None


def _conditions(tables: Tables, limits: _Limits) -> Iterator[ColumnElement[bool]]:
    """The conditions for a thread to have something to delete; they need only indexes, no rows."""
    threads, checkpoints = tables.threads, tables.checkpoints
    newer = checkpoints.alias()
    here = checkpoints.c.thread == threads.c.number
    if limits.alive > 0:
        newest = select(func.max(checkpoints.c.created)).where(here).correlate(threads).scalar_subquery()
        yield func.coalesce(newest, 0) < limits.alive  # 0: no checkpoint, see `_page`
    if limits.oldest > 0:
        same = (newer.c.thread == checkpoints.c.thread) & (newer.c.ns == checkpoints.c.ns)
        has_newer = exists().where(same, newer.c.id > checkpoints.c.id)
        old = select(checkpoints.c.id).where(here, checkpoints.c.created < limits.oldest, has_newer)
        yield old.correlate(threads).exists()
    if limits.count < sys.maxsize:
        full = select(checkpoints.c.ns).where(here).group_by(checkpoints.c.ns)
        yield full.having(func.count() > limits.count).correlate(threads).exists()


def _count(connection: Connection, tables: Tables, keys: Sequence[bytes] | None) -> tuple[int, int]:
    """The number of threads, and the number of their checkpoints."""
    threads, checkpoints = tables.threads, tables.checkpoints
    counted = select(func.count(threads.c.number.distinct()), func.count(checkpoints.c.id))
    counted = counted.outerjoin_from(threads, checkpoints, checkpoints.c.thread == threads.c.number)
    row = connection.execute(counted if keys is None else counted.where(threads.c.key.in_(keys))).one()
    return row[0], row[1]
