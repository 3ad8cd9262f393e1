"""Keeping a database small: what it holds, what is to go, and getting the space back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial

from agentmem_sql.compaction import Compaction, compact
from agentmem_sql.driven import Driven
from agentmem_sql.retention import Retention, RetentionReport, sweep
from agentmem_sql.sizes import Order, StorageReport, check_arguments, orphans, storage_report
from agentmem_sql.steps import Job, Steps


class Maintenance(Driven):
    """Reports sizes and applies retention policies."""

    def retain(
        self,
        policy: Retention,
        *,
        thread_ids: Sequence[str] | None = None,
        dry_run: bool = False,
        now: datetime | None = None,
    ) -> RetentionReport:
        """Take out what a policy does not let stay.

        Each thread is a transaction of its own: broken off, a sweep has done whole threads. One that has nothing to
        do is not locked. A run that goes on meanwhile is waited for, or waits; the state of what stays does not
        change, delta channels and pending writes included.

        Args:
            policy: what stays.
            thread_ids: the threads to look at; None for all. One that is not there is no error.
            dry_run: only tell what would go. Nothing is changed or locked; the figures are those of a real run, if
                nothing is written in between.
            now: the time that ages are counted from, with a time zone; None for the clock's.

        Raises:
            ConfigError: ``thread_ids`` is one string, or ``now`` has no time zone.
            StorageError: the database refused. A thread that holds something else than was stored stays as it is,
                is named in the report, and the others go on.
        """
        return self._run(self._retain(policy, thread_ids, dry_run, now))

    async def aretain(
        self,
        policy: Retention,
        *,
        thread_ids: Sequence[str] | None = None,
        dry_run: bool = False,
        now: datetime | None = None,
    ) -> RetentionReport:
        """``retain`` for a task."""
        return await self._arun(self._retain(policy, thread_ids, dry_run, now))

    def _retain(
        self, policy: Retention, thread_ids: Sequence[str] | None, dry_run: bool, now: datetime | None
    ) -> Steps[RetentionReport]:
        return sweep(self._store, self._serde, policy, thread_ids=thread_ids, dry_run=dry_run, now=now)

    def storage_report(
        self, *, limit: int | None = None, order: Order = "bytes", orphans: bool = False
    ) -> StorageReport:
        """What the threads take, in a few statements that read every row's lengths but no content.

        Args:
            limit: tell of that many threads only; the sums are over all.
            order: ``bytes`` the largest first, ``checkpoints`` those with most first, ``idle`` those first that were
                not written for longest.
            orphans: also look for content that nothing refers to, which takes a walk through every thread. There
                should be none.

        Raises:
            ConfigError: a limit below 1, or another order.
        """
        return self._run(self._report(limit, order, orphans))

    async def astorage_report(
        self, *, limit: int | None = None, order: Order = "bytes", orphans: bool = False
    ) -> StorageReport:
        """``storage_report`` for a task."""
        return await self._arun(self._report(limit, order, orphans))

    def _report(self, limit: int | None, order: Order, walk: bool) -> Steps[StorageReport]:
        check_arguments(limit, order)
        tables = self._database.tables
        report: StorageReport = yield Job(partial(storage_report, tables=tables, limit=limit, order=order))
        if not walk:
            return report
        after: int | None = 0
        blobs = size = 0
        while after is not None:
            found = yield Job(partial(orphans, tables=tables, sweeper=self._store.sweeper, after=after))
            blobs, size, after = blobs + found[0], size + found[1], found[2]
        return replace(report, orphan_blobs=blobs, orphan_bytes=size)

    def compact(self) -> Compaction:
        """Give the space that deleted rows took back to the disk, or on PostgreSQL to later rows.

        SQLite writes its file anew (VACUUM), for which it needs as much free space as the file takes; readers go on,
        writers wait. PostgreSQL's VACUUM and MySQL's OPTIMIZE TABLE let both go on, on these tables only.

        Raises:
            StorageError: the database refused, or has no space left.
        """
        return self._run(self._compact())

    async def acompact(self) -> Compaction:
        """``compact`` for a task."""
        return await self._arun(self._compact())

    def _compact(self) -> Steps[Compaction]:
        # On SQLite a write, so that it is this process's turn; the others want no transaction.
        work = partial(compact, tables=self._database.tables)
        done: Compaction = yield Job(work, write=self._database.backend == "sqlite")
        return done
