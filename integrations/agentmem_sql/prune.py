"""Removing checkpoints from a thread, and copying a thread, without changing what is left.

A checkpoint whose parent is removed gets its nearest remaining ancestor as parent, or none. What its delta channels
need from the ancestors in between is first stored with it (see `reader`), so its state stays the same. Then
pending writes, rows and content without references are deleted. All this is one transaction with an exclusive lock on
the thread: a run that goes on at the same time waits, and finds its checkpoint.

What is removed is worked out before anything is changed, so it can also be reported only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import Connection, delete, literal, select

from agentmem.errors import StorageError
from agentmem_sql.audit import Audit, Event
from agentmem_sql.database import Database
from agentmem_sql.list_tree import HISTORY, history_body
from agentmem_sql.message_cache import CachedThread, ThreadCache
from agentmem_sql.reader import Missing, Reader, chunks
from agentmem_sql.rows import (
    RESERVED,
    Row,
    StoredCheckpoint,
    check_seal,
    damaged,
    decode_row,
    decode_writes,
    seal_checkpoint,
    seal_write,
)
from agentmem_sql.schema import by, decode_text, encode_text, thread_key
from agentmem_sql.statements import add_rows, insertion
from agentmem_sql.writer import Locked, Writer, links_of, referred, unreachable

Key = tuple[bytes, bytes]  # a checkpoint's namespace and id
# From a thread's checkpoints, and the keys of those that pending writes wait for: those to remove; None for all.
Choose = Callable[[Mapping[Key, Row], Collection[Key]], Collection[Key] | None]


class UnreadableThreadError(StorageError):
    """Some data of a thread is not what was stored, so nothing was removed."""


@dataclass(frozen=True)
class ThreadRetention:
    """What was removed from a thread, or would be.

    Attributes:
        thread_id: the thread's id.
        removed: number of checkpoints removed.
        kept: number of checkpoints left.
        deleted: whether the whole thread was deleted: nothing was left, not even writes that wait for a checkpoint.
        bytes_freed: by how much content and rows shrink, without the database's own overhead.
    """

    thread_id: str
    removed: int = 0
    kept: int = 0
    deleted: bool = False
    bytes_freed: int = 0


class Pruner:
    """Removes checkpoints, and copies threads, in the tables of one database."""

    def __init__(self, database: Database, cache: ThreadCache, writer: Writer, reader: Reader, audit: Audit) -> None:
        self.database = database
        self.protection = reader.protection
        self._cache = cache
        self._writer = writer
        self._reader = reader
        self._audit = audit
        tables = database.tables
        checkpoints, writes, threads = tables.checkpoints, tables.writes, tables.threads
        self._rows = select(checkpoints).where(by(checkpoints, "thread"))
        self._writes = select(writes).where(by(writes, "thread"))
        self._runs = select(threads.c.name, checkpoints)
        self._runs = self._runs.join_from(checkpoints, threads, checkpoints.c.thread == threads.c.number)

    # On the database.

    def remove(
        self, serde: SerializerProtocol, thread_id: str, choose: Choose, *, dry_run: bool = False
    ) -> ThreadRetention:
        """Remove the checkpoints that `choose` names from a thread, and the thread with them if nothing is left.

        With `dry_run` nothing is changed or locked; the result is what would be removed.

        Raises:
            UnreadableThreadError: something was changed or damaged since it was stored; nothing is removed.
        """

        def take(connection: Connection) -> ThreadRetention:
            while (thread := self._writer.find(connection, thread_id, lock=not dry_run)) is not None:
                try:
                    taken = self._take_from(connection, serde, thread_id, thread, choose, dry_run=dry_run)
                except StorageError as error:
                    # Otherwise something was removed meanwhile.
                    if not dry_run or self._writer.find(connection, thread_id, lock=False) == thread:
                        raise UnreadableThreadError(str(error)) from error
                else:
                    if not dry_run and (taken.removed or taken.deleted):
                        event = Event("pruned", {"checkpoints": taken.removed, "left": taken.kept})
                        self._audit.note(connection, thread_id, event)
                    return taken
            return ThreadRetention(thread_id)

        taken = self.database.run(take, write=not dry_run)
        if taken.deleted and not dry_run:
            self._cache.drop(thread_id)
        return taken

    def delete_runs(self, serde: SerializerProtocol, run_ids: Collection[str]) -> None:
        """Remove the checkpoints of runs from all threads, each thread in a separate transaction."""

        def find(connection: Connection) -> dict[bytes, set[Key]]:
            """Their checkpoints, by thread name."""
            found: defaultdict[bytes, set[Key]] = defaultdict(set)
            for part in chunks(sorted({self.protection.run_key(run) for run in run_ids})):
                of_runs = self._runs.where(self.database.tables.checkpoints.c.run.in_(part))
                for row in connection.execute(of_runs).mappings():
                    stored = decode_row(self.protection, serde, decode_text(row["name"]), row)
                    if stored.metadata.get("run_id") in run_ids:  # the column holds only a part of the digest
                        found[row["name"]].add((row["ns"], row["id"]))
            return found

        for name, keys in self.database.run(find).items():
            self.remove(serde, decode_text(name), lambda rows, _, keys=keys: keys & rows.keys())  # type: ignore[misc]

    def copy_thread(self, source_id: str, target_id: str) -> None:
        """Copy everything in a thread to another; data of the same ids is replaced."""
        if source_id != target_id:
            self.database.run(partial(self._copy, source_id=source_id, target_id=target_id), write=True)

    # In a transaction.

    def _rows_of(self, connection: Connection, thread_id: str, thread: Locked) -> dict[Key, Row]:
        """The checkpoints of a thread."""
        rows = connection.execute(self._rows, {"thread": thread.number}).mappings().all()
        for row in rows:
            check_seal(self.protection, thread_id, row)
        return {(row["ns"], row["id"]): row for row in rows}

    def _take_from(
        self,
        connection: Connection,
        serde: SerializerProtocol,
        thread_id: str,
        thread: Locked,
        choose: Choose,
        *,
        dry_run: bool,
    ) -> ThreadRetention:
        number = thread.number
        sizes, links = self._writer.content(connection, number)  # first, see `Writer`
        rows = self._rows_of(connection, thread_id, thread)
        writes = connection.execute(self._writes, {"thread": number}).mappings().all()
        awaited = {(write["ns"], write["checkpoint"]) for write in writes} - rows.keys()
        chosen = choose(rows, awaited)
        victims = set(rows if chosen is None else chosen)
        kept = len(rows) - len(victims)
        if chosen is not None and not victims:
            return ThreadRetention(thread_id, kept=kept)
        # Writes that wait for a checkpoint belong to a run that has just begun: the thread stays for it.
        if chosen is None or not (kept or awaited):
            own = len(thread_key(thread_id)) + len(encode_text(thread_id))
            size = own + sum(map(_size, [*rows.values(), *writes])) + sum(sizes.values())
            if not dry_run:
                self._writer.delete_thread(connection, thread_id)
            return ThreadRetention(thread_id, len(victims), deleted=True, bytes_freed=size)
        survivors = {key: row for key, row in rows.items() if key not in victims}
        relinked: list[Row] = []  # survivors that get another parent, and content that these need
        added: dict[bytes, tuple[int, bytes]] = {}
        for key, row in survivors.items():
            if (row["ns"], row["parent"]) in victims:
                survivors[key], body = self._relinked(connection, serde, thread_id, thread, rows, victims, row)
                relinked.append(survivors[key])
                if body is not None:
                    added[survivors[key]["history"]] = HISTORY, body
        freed = sum(map(_size, rows.values())) - sum(map(_size, survivors.values()))
        roots = {digest for row in survivors.values() for digest in referred(row)}
        for write in writes:
            if (write["ns"], write["checkpoint"]) in victims:
                freed += _size(write)
            else:
                roots.add(write["digest"])
        dead = unreachable(sizes, {**links, **links_of(added)}, roots)
        freed += sum(sizes[digest] for digest in dead)
        freed -= sum(len(self.protection.encrypt(added[digest][1])) for digest in added.keys() - sizes.keys())
        if not dry_run:
            self._writer.add_content(connection, number, added)
            for part in chunks(relinked):
                add_rows(connection, self.database.tables.checkpoints, part, replace=True)
            self._delete(connection, number, victims)
            self._writer.free(connection, number, dead)
        return ThreadRetention(thread_id, len(victims), kept, bytes_freed=freed)

    def _delete(self, connection: Connection, number: int, victims: Collection[Key]) -> None:
        """Delete the rows of checkpoints, and their pending writes."""
        writes, rows = self.database.tables.writes, self.database.tables.checkpoints
        by_namespace: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for ns, checkpoint_id in victims:
            by_namespace[ns].append(checkpoint_id)
        for ns, ids in by_namespace.items():
            for part in chunks(ids):
                for table, column in ((writes, writes.c.checkpoint), (rows, rows.c.id)):
                    of_namespace = table.c.thread == number, table.c.ns == ns
                    connection.execute(delete(table).where(*of_namespace, column.in_(part)))

    def _relinked(
        self,
        connection: Connection,
        serde: SerializerProtocol,
        thread_id: str,
        thread: Locked,
        rows: Mapping[Key, Row],
        victims: set[Key],
        row: Row,
    ) -> tuple[Row, bytes | None]:
        """The new row of a survivor whose parent is removed, and what its delta channels need of them."""
        ns, parent = row["ns"], row["parent"]
        chain, left = [row], victims & rows.keys()
        while (ns, parent) in left:
            left.remove((ns, parent))  # ends even if a checkpoint was stored as its own ancestor
            chain.append(rows[ns, parent])
            parent = chain[-1]["parent"]
        body = None
        if deltas := _deltas(decode_row(self.protection, serde, thread_id, row)):
            try:
                ancestors = [self._reader.ancestor(connection, thread.number, passed) for passed in chain]
                known = CachedThread(thread.number, thread.epoch)
                histories = self._reader.histories(connection, thread_id, known, ancestors, deltas)
            except Missing:
                raise damaged(thread_id, decode_text(row["id"]), "what ancestors left") from None
            needed = {name: history for name, history in histories.items() if history.writes or history.seed}
            body = history_body(needed) if needed else None
        new = {
            **row,
            "parent": parent if (ns, parent) in rows else None,
            "history": None if body is None else self.protection.digest(HISTORY, body),
        }
        return {**new, "seal": seal_checkpoint(self.protection, thread_id, new)}, body

    def _copy(self, connection: Connection, source_id: str, target_id: str) -> None:
        # All copies lock in the same order, so that no two wait for each other.
        ids = sorted((source_id, target_id))
        locked = {thread_id: self._writer.find(connection, thread_id, lock=True) for thread_id in ids}
        source = locked[source_id]
        if source is None:
            return
        target = locked[target_id] or self._writer.open_thread(connection, target_id, alone=True)
        tables, protection = self.database.tables, self.protection
        into = insertion(connection.dialect.name, tables.blobs, replace=False)
        # Under another name: MariaDB would not know which of the two tables an INSERT ... SELECT means.
        there = tables.blobs.alias("source").c
        number = literal(target.number, there.thread.type)
        contents = select(number, there.digest, there.kind, there.body).where(there.thread == source.number)
        connection.execute(into.from_select(["thread", "digest", "kind", "body"], contents))
        checkpoints = list(self._rows_of(connection, source_id, source).values())
        writes = connection.execute(self._writes, {"thread": source.number}).mappings().all()
        decode_writes(protection, source_id, writes)  # raises if one was changed
        for table, rows, seal in (
            (tables.checkpoints, checkpoints, seal_checkpoint),
            (tables.writes, writes, seal_write),
        ):
            moved = [{**row, "thread": target.number} for row in rows]
            for part in chunks([{**row, "seal": seal(protection, target_id, row)} for row in moved]):
                add_rows(connection, table, part, replace=True)
        self._writer.sweep(connection, target)


def all_but_newest(rows: Mapping[Key, Row], _awaited: Collection[Key] = ()) -> set[Key]:
    """What `keep_latest` removes: all but the newest checkpoint of each namespace."""
    newest: dict[bytes, bytes] = {}
    for ns, checkpoint_id in rows:
        newest[ns] = max(checkpoint_id, newest.get(ns, b""))
    return {(ns, checkpoint_id) for ns, checkpoint_id in rows if newest[ns] != checkpoint_id}


def _size(row: Row) -> int:
    """The bytes of a row's columns, as `retention` counts them."""
    return sum(len(value) for value in row.values() if isinstance(value, bytes))


def _deltas(stored: StoredCheckpoint) -> list[str]:
    """Channels of a checkpoint whose value may follow from earlier writes.

    LangGraph counts their updates in the metadata. Other empty channels are included, in case they were written without
    counters, except those that LangGraph empties itself.
    """
    counted: Mapping[str, Any] = stored.metadata.get("counters_since_delta_snapshot") or {}
    names: Mapping[str, Any] = stored.body["channel_versions"]
    empty = (name for name in names if name not in stored.digests)
    return [name for name in empty if name in counted or not name.startswith(RESERVED)]
