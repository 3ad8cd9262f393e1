"""Taking checkpoints out of a thread, and copying one: what stays means what it meant.

A checkpoint whose parent is taken out gets the nearest ancestor that stays as its parent, or none. What its delta
channels need of the ancestors in between is kept with it first (see `delta_channels`), so that its state is what it
was. Then pending writes, rows and the content that nothing refers to any more go. All this is one transaction that
holds the thread alone: a run that goes on at the same time waits, and finds its checkpoint.

What goes is worked out as a `_Removal` before anything is changed, so it can also be reported without being done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import BindParameter, Connection, bindparam, delete, select, update

from agentmem.errors import StorageError
from agentmem_sql.database import Database
from agentmem_sql.delta_channels import AncestorReader
from agentmem_sql.list_tree import HISTORY, history_body, parse
from agentmem_sql.mark_sweep import Content, Sweeper, referred, unreachable
from agentmem_sql.message_cache import CachedThread, ThreadCache
from agentmem_sql.protection import Protection
from agentmem_sql.reader import Missing, chunks
from agentmem_sql.report import row_bytes, thread_bytes
from agentmem_sql.rows import (
    Row,
    StoredCheckpoint,
    check_seal,
    damaged,
    decode_row,
    decode_write,
    seal_checkpoint,
    seal_write,
)
from agentmem_sql.schema import decode_text, thread_key
from agentmem_sql.statements import add_rows, insert_missing
from agentmem_sql.writer import Locked, Writer

Key = tuple[bytes, bytes]  # a checkpoint's namespace and id
# Given all checkpoints of a thread, and the keys of those that pending writes wait for: the checkpoints that go, or
# None for the thread with all that it has.
Choose = Callable[[Mapping[Key, Row], Collection[Key]], Collection[Key] | None]

# Channels of LangGraph's own that are empty after they were read, and hold a run's input until then.
_RESERVED = ("__", "branch:")

_ATTEMPTS = 3


class UnreadableThreadError(StorageError):
    """Something of a thread is not what was stored, so nothing of it was taken out."""


@dataclass(frozen=True)
class ThreadRetention:
    """What went of a thread, or would.

    Attributes:
        thread_id: its name.
        removed: checkpoints that went.
        kept: checkpoints that stayed.
        deleted: whether the thread went with them: nothing was left, not even writes to a checkpoint yet to come.
        bytes_freed: that content and rows take less, without what the database adds.
    """

    thread_id: str
    removed: int = 0
    kept: int = 0
    deleted: bool = False
    bytes_freed: int = 0


class _Removal(NamedTuple):
    """What taking some of a thread's checkpoints out comes to."""

    victims: Collection[Key]
    relinked: Sequence[Row]  # survivors that get another parent, as they will be
    added: Mapping[bytes, tuple[int, bytes]]  # content that these need: digest -> (kind, body)
    dead: Collection[bytes]  # content that nothing refers to then


class Pruner:
    """Removes checkpoints, and copies threads, in the tables of one database."""

    def __init__(
        self,
        database: Database,
        protection: Protection,
        cache: ThreadCache,
        writer: Writer,
        ancestors: AncestorReader,
        sweeper: Sweeper,
    ) -> None:
        self._database = database
        self._protection = protection
        self._cache = cache
        self._writer = writer
        self._ancestors = ancestors
        self._sweeper = sweeper
        tables = database.tables
        checkpoints, writes, threads = tables.checkpoints, tables.writes, tables.threads
        thread: BindParameter[int] = bindparam("of")
        ns: BindParameter[bytes] = bindparam("in_ns")
        ids: BindParameter[Any] = bindparam("ids", expanding=True)
        self._rows = select(checkpoints).where(checkpoints.c.thread == thread)
        self._of_run = (
            select(threads.c.name, checkpoints)
            .join_from(checkpoints, threads, checkpoints.c.thread == threads.c.number)
            .where(checkpoints.c.run.in_(bindparam("runs", expanding=True)))
        )
        self._relink = (
            update(checkpoints)
            .where(checkpoints.c.thread == thread, checkpoints.c.ns == ns, checkpoints.c.id == bindparam("of_id"))
            .values(parent=bindparam("to_parent"), history=bindparam("to_history"), seal=bindparam("to_seal"))
        )
        self._remove_writes = delete(writes).where(
            writes.c.thread == thread, writes.c.ns == ns, writes.c.checkpoint.in_(ids)
        )
        self._remove_rows = delete(checkpoints).where(
            checkpoints.c.thread == thread, checkpoints.c.ns == ns, checkpoints.c.id.in_(ids)
        )
        self._write_sizes = select(
            writes.c.ns, writes.c.checkpoint, writes.c.digest, row_bytes(writes).label("size")
        ).where(writes.c.thread == thread)
        self._written_to = select(writes.c.ns, writes.c.checkpoint).where(writes.c.thread == thread).distinct()
        self._all_writes = select(writes).where(writes.c.thread == thread)
        # Under another name: MariaDB would not know which of the two tables an INSERT ... SELECT means.
        source = tables.blobs.alias("source")
        self._contents = select(
            bindparam("to", type_=source.c.thread.type), source.c.digest, source.c.kind, source.c.body
        ).where(source.c.thread == thread)
        self._find = select(threads.c.number, threads.c.epoch).where(threads.c.key == bindparam("key"))
        self._bytes = thread_bytes(tables, thread)

    # On the database.

    def remove(
        self, serde: SerializerProtocol, thread_id: str, choose: Choose, *, dry_run: bool = False
    ) -> ThreadRetention:
        """Take the checkpoints that `choose` names out of a thread, and the thread with them if nothing is left.

        With `dry_run` nothing is changed or locked, and the answer is what would go.

        Raises:
            UnreadableThreadError: something was changed or damaged since it was stored; nothing is taken out.
        """
        work = self._preview if dry_run else self._take
        taken = self._database.run(partial(work, thread_id=thread_id, serde=serde, choose=choose), write=not dry_run)
        if taken is None:
            return ThreadRetention(thread_id)
        if taken.deleted and not dry_run:
            self._cache.drop(thread_id)
        return taken

    def delete_runs(self, serde: SerializerProtocol, run_ids: Collection[str]) -> None:
        """Take the checkpoints of runs out of all threads, each thread in a transaction of its own.

        Raises:
            StorageError: one was changed or damaged since it was stored.
        """
        of_runs = self._database.run(partial(self._threads_of_runs, serde=serde, run_ids=set(run_ids)))
        for name, keys in of_runs.items():

            def choose(rows: Mapping[Key, Row], _awaited: Collection[Key], keys: set[Key] = keys) -> set[Key]:
                return keys & rows.keys()

            self.remove(serde, decode_text(name), choose)

    def copy_thread(self, source_id: str, target_id: str) -> None:
        """Copy everything of a thread to another; what the other has under the same ids is replaced.

        Raises:
            StorageError: something was changed or damaged since it was stored; nothing is copied.
        """
        if source_id != target_id:
            self._database.run(partial(self._copy, source_id=source_id, target_id=target_id), write=True)

    # In a transaction.

    def _rows_of(self, connection: Connection, thread_id: str, thread: Locked) -> dict[Key, Row]:
        """The checkpoints of a thread.

        Raises:
            StorageError: one was changed or damaged since it was stored.
        """
        rows = connection.execute(self._rows, {"of": thread.number}).mappings().all()
        for row in rows:
            check_seal(self._protection, thread_id, row)
        return {(row["ns"], row["id"]): row for row in rows}

    def _threads_of_runs(
        self, connection: Connection, serde: SerializerProtocol, run_ids: set[str]
    ) -> dict[bytes, set[Key]]:
        """The checkpoints of runs, by thread name."""
        threads: defaultdict[bytes, set[Key]] = defaultdict(set)
        for part in chunks(sorted({self._protection.run_key(run) for run in run_ids})):
            for row in connection.execute(self._of_run, {"runs": part}).mappings():
                stored = decode_row(self._protection, serde, decode_text(row["name"]), row)
                if stored.metadata.get("run_id") in run_ids:  # the column has only the beginning of a digest
                    threads[row["name"]].add((row["ns"], row["id"]))
        return threads

    def _take(self, connection: Connection, thread_id: str, **how: Any) -> ThreadRetention | None:
        thread = self._writer.lock(connection, thread_id)
        if thread is None:
            return None
        taken, removal = self._plan(connection, thread_id, thread, **how)
        if taken.deleted:
            self._writer.delete_thread(connection, thread_id)
        elif removal is not None:
            self._apply(connection, thread, removal)
        return taken

    def _preview(self, connection: Connection, thread_id: str, **how: Any) -> ThreadRetention | None:
        taken = None
        for attempt in range(1, _ATTEMPTS + 1):
            thread = self._unlocked(connection, thread_id)
            if thread is None:
                return None
            try:
                content = self._sweeper.content(connection, thread.number)
                taken, _ = self._plan(connection, thread_id, thread, content=content, **how)
            except UnreadableThreadError:  # or something was taken out meanwhile
                if attempt == _ATTEMPTS:
                    raise
                continue
            if self._unlocked(connection, thread_id) == thread:
                break  # else it is looked at again; where it is pruned time and again, this is as good as any answer
        return taken

    def _unlocked(self, connection: Connection, thread_id: str) -> Locked | None:
        row = connection.execute(self._find, {"key": thread_key(thread_id)}).one_or_none()
        return None if row is None else Locked(row.number, row.epoch)

    def _plan(
        self,
        connection: Connection,
        thread_id: str,
        thread: Locked,
        serde: SerializerProtocol,
        choose: Choose,
        content: Content | None = None,
    ) -> tuple[ThreadRetention, _Removal | None]:
        """What taking out comes to; without `content` it is read, which wants the thread locked.

        Raises:
            UnreadableThreadError: something was changed or damaged since it was stored.
        """
        number = thread.number
        try:
            rows = self._rows_of(connection, thread_id, thread)
            written_to = connection.execute(self._written_to, {"of": number})
            awaited = {(write.ns, write.checkpoint) for write in written_to} - rows.keys()
            chosen = choose(rows, awaited)
            victims = set(rows if chosen is None else chosen)
            kept = len(rows) - len(victims)
            if chosen is not None and not victims:
                return ThreadRetention(thread_id, kept=kept), None
            # Where writes wait for a checkpoint that has yet to arrive, a run has just begun: the thread stays for it.
            if chosen is None or not (kept or awaited):
                size = int(connection.execute(self._bytes, {"of": number}).scalar_one())
                return ThreadRetention(thread_id, len(victims), deleted=True, bytes_freed=size), None
            if content is None:
                content = self._sweeper.content(connection, number)
            survivors = {key: row for key, row in rows.items() if key not in victims}
            relinked: list[Row] = []
            added: dict[bytes, tuple[int, bytes]] = {}
            for key, row in survivors.items():
                if (row["ns"], row["parent"]) in victims:
                    survivors[key], body = self._relinked(connection, serde, thread_id, thread, rows, victims, row)
                    relinked.append(survivors[key])
                    if body is not None:
                        added[survivors[key]["history"]] = HISTORY, body
        except StorageError as error:
            raise UnreadableThreadError(str(error)) from error
        freed = sum(map(_size, rows.values())) - sum(map(_size, survivors.values()))
        roots = {digest for row in survivors.values() for digest in referred(row["content"], row["history"])}
        for write in connection.execute(self._write_sizes, {"of": number}):
            if (write.ns, write.checkpoint) in victims:
                freed += int(write.size)
            else:
                roots.add(write.digest)
        links = {digest: frozenset(parse(kind, body).links) for digest, (kind, body) in added.items()}
        dead = unreachable(Content(content.digests, {**content.links, **links}), roots)
        freed += self._sweeper.weigh(connection, number, dead)
        freed -= sum(
            len(self._protection.encrypt(body)) for digest, (_, body) in added.items() if digest not in content.digests
        )
        taken = ThreadRetention(thread_id, len(victims), kept, bytes_freed=freed)
        return taken, _Removal(victims, relinked, added, dead)

    def _apply(self, connection: Connection, thread: Locked, removal: _Removal) -> None:
        number = thread.number
        self._writer.add_content(connection, number, removal.added)
        for row in removal.relinked:
            values = {"to_parent": row["parent"], "to_history": row["history"], "to_seal": row["seal"]}
            connection.execute(self._relink, {"of": number, "in_ns": row["ns"], "of_id": row["id"], **values})
        by_namespace: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for ns, checkpoint_id in removal.victims:
            by_namespace[ns].append(checkpoint_id)
        for ns, ids in by_namespace.items():
            for part in chunks(ids):
                keys = {"of": number, "in_ns": ns, "ids": part}
                connection.execute(self._remove_writes, keys)
                connection.execute(self._remove_rows, keys)
        self._sweeper.free(connection, number, removal.dead)

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
        """A survivor with another parent, and what its delta channels need of the ancestors that go."""
        ns, parent = row["ns"], row["parent"]
        chain, left = [row], victims & rows.keys()
        while (ns, parent) in left:
            left.remove((ns, parent))  # a checkpoint that was stored as its own ancestor comes once
            chain.append(rows[ns, parent])
            parent = chain[-1]["parent"]
        body = None
        if deltas := _deltas(decode_row(self._protection, serde, thread_id, row)):
            try:
                ancestors = [self._ancestors.ancestor(connection, thread.number, passed) for passed in chain]
                known = CachedThread(thread.number, thread.epoch)
                histories = self._ancestors.histories(connection, thread_id, known, ancestors, deltas)
            except Missing:
                raise damaged(thread_id, decode_text(row["id"]), "what ancestors left") from None
            needed = {name: history for name, history in histories.items() if history.writes or history.seed}
            body = history_body(needed) if needed else None
        new = {
            **row,
            "parent": parent if (ns, parent) in rows else None,
            "history": None if body is None else self._protection.digest(HISTORY, body),
        }
        return {**new, "seal": seal_checkpoint(self._protection, thread_id, new)}, body

    def _copy(self, connection: Connection, source_id: str, target_id: str) -> None:
        # Both are locked in an order that all copies keep to, so that no two wait for each other.
        locked = {thread_id: self._writer.lock(connection, thread_id) for thread_id in sorted((source_id, target_id))}
        if locked[source_id] is None:
            return
        source = self._writer.open_thread(connection, source_id, alone=True)
        target = self._writer.open_thread(connection, target_id, alone=True)
        tables, protection = self._database.tables, self._protection
        into = insert_missing(connection.dialect.name, tables.blobs)
        copying = into.from_select(["thread", "digest", "kind", "body"], self._contents)
        connection.execute(copying, {"of": source.number, "to": target.number})
        checkpoints: list[Row] = []
        for row in self._rows_of(connection, source_id, source).values():
            new = {**row, "thread": target.number}
            checkpoints.append({**new, "seal": seal_checkpoint(protection, target_id, new)})
        writes: list[Row] = []
        for row in connection.execute(self._all_writes, {"of": source.number}).mappings().all():
            decode_write(protection, source_id, row)  # refuses one that was changed
            new = {**row, "thread": target.number}
            writes.append({**new, "seal": seal_write(protection, target_id, new)})
        for table, rows in ((tables.checkpoints, checkpoints), (tables.writes, writes)):
            for part in chunks(rows):
                add_rows(connection, table, part, replace=True)
        self._writer.sweep(connection, target)


def all_but_newest(rows: Mapping[Key, Row], _awaited: Collection[Key] = ()) -> set[Key]:
    """What `keep_latest` takes out: all but the newest checkpoint of each namespace."""
    newest: dict[bytes, bytes] = {}
    for ns, checkpoint_id in rows:
        newest[ns] = max(checkpoint_id, newest.get(ns, b""))
    return {(ns, checkpoint_id) for ns, checkpoint_id in rows if newest[ns] != checkpoint_id}


def _size(row: Row) -> int:
    """The bytes of a row's columns, as `report` counts them."""
    return sum(len(value) for value in row.values() if isinstance(value, bytes))


def _deltas(stored: StoredCheckpoint) -> list[str]:
    """Channels of a checkpoint whose value may follow from what was written before it.

    LangGraph counts their updates in the metadata. Others that hold nothing are kept as well, in case they were
    written without counters, except those that LangGraph empties itself.
    """
    counted: Mapping[str, Any] = stored.metadata.get("counters_since_delta_snapshot") or {}
    names: Mapping[str, Any] = stored.body["channel_versions"]
    empty = (name for name in names if name not in stored.digests)
    return [name for name in empty if name in counted or not name.startswith(_RESERVED)]
