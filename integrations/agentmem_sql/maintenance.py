"""Keeping a database small: what it holds, and what is to go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from functools import partial

from agentmem_sql.driven import Driven
from agentmem_sql.report import Order, StorageReport, check_arguments, storage_report
from agentmem_sql.retention import Retention, RetentionReport, sweep


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
            ConfigError: `thread_ids` is one string or holds something that is no id, or `now` has no time zone.
            StorageError: the database refused. A thread that holds something else than was stored stays as it is,
                is named in the report, and the others go on.
        """
        return sweep(self._database, self._store, self._serde, policy, thread_ids=thread_ids, dry_run=dry_run, now=now)

    async def aretain(
        self,
        policy: Retention,
        *,
        thread_ids: Sequence[str] | None = None,
        dry_run: bool = False,
        now: datetime | None = None,
    ) -> RetentionReport:
        """`retain` for a task."""
        return await asyncio.to_thread(self.retain, policy, thread_ids=thread_ids, dry_run=dry_run, now=now)

    def storage_report(self, *, limit: int | None = None, order: Order = "bytes") -> StorageReport:
        """What the threads take, in a few statements that read every row's lengths but no content.

        Args:
            limit: tell of that many threads only; the sums are over all.
            order: `bytes` the largest first, `checkpoints` those with most first, `idle` those first that were
                not written for longest.

        Raises:
            ConfigError: a limit below 1, or another order.
        """
        check_arguments(limit, order)
        tables = self._database.tables
        return self._database.run(partial(storage_report, tables=tables, limit=limit, order=order))

    async def astorage_report(self, *, limit: int | None = None, order: Order = "bytes") -> StorageReport:
        """`storage_report` for a task."""
        return await asyncio.to_thread(self.storage_report, limit=limit, order=order)
