"""Taking checkpoints out of a thread, as functions of a connection.

A checkpoint whose parent is taken out gets the nearest ancestor that stays as its parent, or none. What its
delta channels need of the ancestors in between is kept with it first (see ``deltas``), so that its state is
what it was. Then pending writes, rows and the content that nothing refers to any more go, all in one
transaction that holds the thread alone: a run that goes on at the same time waits, and finds its checkpoint.

What goes is worked out as a ``Removal`` before anything is changed, so it can also be told without doing it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import BindParameter, Connection, bindparam, delete, select, update

from agentmem.errors import StorageError
from agentmem_sql.codec import (
    Row,
    StoredCheckpoint,
    check_seal,
    damaged,
    decode_row,
    seal_checkpoint,
    unpack_content,
)
from agentmem_sql.deltas import Ancestor, Walker, add_write, fold
from agentmem_sql.keys import decode_text, thread_key
from agentmem_sql.reading import Missing, chunks
from agentmem_sql.sizes import row_bytes, thread_bytes
from agentmem_sql.sweeping import Content, Sweeper, named, unreachable
from agentmem_sql.tables import Tables
from agentmem_sql.trees import HISTORY, History, history_body, parse
from agentmem_sql.vault import Vault
from agentmem_sql.writing import Locked, Writer

Key = tuple[bytes, bytes]  # a checkpoint's namespace and id
# Of all checkpoints of a thread, those that go; None for the thread with all that it has.
Choose = Callable[[Mapping[Key, Row]], Collection[Key] | None]

# Channels of LangGraph's own that are empty after they were read, and hold a run's input until then.
_RESERVED = ("__", "branch:")

_ATTEMPTS = 3


class UnreadableThreadError(StorageError):
    """Something of a thread is not what was stored, so nothing of it was taken out."""


class Taken(NamedTuple):
    """What was, or would be, taken out of a thread.

    Attributes:
        removed: checkpoints.
        kept: checkpoints that are left.
        deleted: whether nothing is left, not even writes to a checkpoint yet to come, and the thread goes as well.
        bytes: that its content and rows take less, without what the database adds.
    """

    removed: int
    kept: int
    deleted: bool
    bytes: int


@dataclass(frozen=True)
class Removal:
    """What taking some of a thread's checkpoints out comes to.

    Attributes:
        victims: the checkpoints.
        relinked: rows of survivors that get another parent, as they will be.
        added: content that these need: digest -> (kind, body).
        dead: content that nothing refers to then.
        row_bytes: that rows take less.
    """

    victims: Collection[Key]
    relinked: Sequence[Row]
    added: Mapping[bytes, tuple[int, bytes]]
    dead: Collection[bytes]
    row_bytes: int


class Pruner:
    """Removes checkpoints in the tables of one database."""

    def __init__(self, tables: Tables, vault: Vault, writer: Writer, walker: Walker, sweeper: Sweeper) -> None:
        self._tables = tables
        self._vault = vault
        self._writer = writer
        self._walker = walker
        self._sweeper = sweeper
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
        self._pending = select(writes).where(writes.c.thread == thread, writes.c.ns == ns, writes.c.checkpoint.in_(ids))
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
        self._naming = select(writes.c.ns, writes.c.checkpoint, writes.c.digest, row_bytes(writes).label("size")).where(
            writes.c.thread == thread
        )
        self._written_to = select(writes.c.ns, writes.c.checkpoint).where(writes.c.thread == thread).distinct()
        self._find = select(threads.c.number, threads.c.epoch).where(threads.c.key == bindparam("key"))
        self._whole = thread_bytes(tables, thread)

    def rows(self, connection: Connection, thread_id: str, thread: Locked) -> dict[Key, Row]:
        """The checkpoints of a thread.

        Raises:
            StorageError: one was changed or damaged since it was stored.
        """
        found = connection.execute(self._rows, {"of": thread.number}).mappings().all()
        for row in found:
            check_seal(self._vault, thread_id, row)
        return {(row["ns"], row["id"]): row for row in found}

    def threads_of_runs(
        self, connection: Connection, serde: SerializerProtocol, run_ids: Collection[str]
    ) -> dict[bytes, set[Key]]:
        """The checkpoints of runs, by thread name.

        Raises:
            StorageError: one was changed or damaged since it was stored.
        """
        found: defaultdict[bytes, set[Key]] = defaultdict(set)
        for part in chunks(sorted({self._vault.run_key(run) for run in run_ids})):
            for row in connection.execute(self._of_run, {"runs": part}).mappings():
                stored = decode_row(self._vault, serde, decode_text(row["name"]), row)
                if stored.metadata.get("run_id") in run_ids:
                    found[row["name"]].add((row["ns"], row["id"]))
        return found

    def take(self, connection: Connection, serde: SerializerProtocol, thread_id: str, choose: Choose) -> Taken:
        """Take the checkpoints that ``choose`` names out of a thread, and the thread with them if nothing is left.

        Raises:
            UnreadableThreadError: something was changed or damaged since it was stored; nothing is taken out.
        """
        thread = self._writer.lock(connection, thread_id)
        if thread is None:
            return Taken(0, 0, False, 0)
        taken, removal = self._plan(connection, serde, thread_id, thread, choose)
        if taken.deleted:
            self._writer.delete_thread(connection, thread_id)
        elif removal is not None:
            self._apply(connection, thread, removal)
        return taken

    def preview(self, connection: Connection, serde: SerializerProtocol, thread_id: str, choose: Choose) -> Taken:
        """What ``take`` would do; nothing is changed or locked.

        Raises:
            UnreadableThreadError: something was changed or damaged since it was stored.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            thread = self._unlocked(connection, thread_id)
            if thread is None:
                break
            try:
                content = self._sweeper.content(connection, thread.number)
                taken, _ = self._plan(connection, serde, thread_id, thread, choose, content)
            except UnreadableThreadError:  # or something was taken out meanwhile
                if attempt == _ATTEMPTS:
                    raise
            else:
                # Taken out of meanwhile, a thread is looked at again; time and again, this is as good as any answer.
                if attempt == _ATTEMPTS or self._unlocked(connection, thread_id) == thread:
                    return taken
        return Taken(0, 0, False, 0)

    def _unlocked(self, connection: Connection, thread_id: str) -> Locked | None:
        row = connection.execute(self._find, {"key": thread_key(thread_id)}).one_or_none()
        return None if row is None else Locked(row.number, row.epoch)

    def _plan(
        self,
        connection: Connection,
        serde: SerializerProtocol,
        thread_id: str,
        thread: Locked,
        choose: Choose,
        content: Content | None = None,
    ) -> tuple[Taken, Removal | None]:
        """What taking out comes to; without ``content`` it is read, which wants the thread locked.

        Raises:
            UnreadableThreadError: something was changed or damaged since it was stored.
        """
        try:
            rows = self.rows(connection, thread_id, thread)
            chosen = choose(rows)
            victims = set(rows if chosen is None else chosen)
            kept = len(rows) - len(victims)
            if not victims:
                return Taken(0, kept, False, 0), None
            if chosen is None or not (kept or self._is_awaited(connection, thread, rows)):
                size = connection.execute(self._whole, {"of": thread.number}).scalar_one()
                return Taken(len(victims), 0, True, int(size)), None
            if content is None:
                content = self._sweeper.content(connection, thread.number)
            removal = self._removal(connection, serde, thread_id, thread, content, rows, victims)
        except StorageError as error:
            raise UnreadableThreadError(str(error)) from error
        new = {digest: body for digest, (_, body) in removal.added.items() if digest not in content.digests}
        freed = self._sweeper.weigh(connection, thread.number, removal.dead)
        freed += removal.row_bytes - sum(len(self._vault.close(body)) for body in new.values())
        return Taken(len(victims), kept, False, freed), removal

    def _is_awaited(self, connection: Connection, thread: Locked, rows: Mapping[Key, Row]) -> bool:
        """Whether there are writes whose checkpoint has yet to arrive: a run has just begun."""
        found = connection.execute(self._written_to, {"of": thread.number})
        return any((write.ns, write.checkpoint) not in rows for write in found)

    def _removal(
        self,
        connection: Connection,
        serde: SerializerProtocol,
        thread_id: str,
        thread: Locked,
        content: Content,
        rows: Mapping[Key, Row],
        victims: set[Key],
    ) -> Removal:
        after = {key: row for key, row in rows.items() if key not in victims}
        relinked: list[Row] = []
        added: dict[bytes, tuple[int, bytes]] = {}
        for key, row in after.items():
            if (row["ns"], row["parent"]) in victims:
                new, history = self._detached(connection, serde, thread_id, thread, rows, victims, row)
                relinked.append(new)
                after[key] = new
                if history is not None:
                    added[new["history"]] = HISTORY, history
        roots = {digest for row in after.values() for digest in named(row["content"], row["history"])}
        freed = sum(map(_size, rows.values())) - sum(map(_size, after.values()))
        for write in connection.execute(self._naming, {"of": thread.number}):
            if (write.ns, write.checkpoint) in victims:
                freed += int(write.size)
            else:
                roots.add(write.digest)
        links = {digest: frozenset(parse(kind, body).links) for digest, (kind, body) in added.items()}
        dead = unreachable(Content(content.digests, {**content.links, **links}), roots)
        return Removal(victims, relinked, added, dead, freed)

    def _apply(self, connection: Connection, thread: Locked, removal: Removal) -> None:
        self._writer.add_content(connection, thread.number, removal.added)
        for row in removal.relinked:
            values = {"to_parent": row["parent"], "to_history": row["history"], "to_seal": row["seal"]}
            connection.execute(self._relink, {"of": thread.number, "in_ns": row["ns"], "of_id": row["id"], **values})
        by_namespace: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for ns, checkpoint_id in removal.victims:
            by_namespace[ns].append(checkpoint_id)
        for ns, gone in by_namespace.items():
            for part in chunks(gone):
                keys = {"of": thread.number, "in_ns": ns, "ids": part}
                connection.execute(self._remove_writes, keys)
                connection.execute(self._remove_rows, keys)
        self._sweeper.free(connection, thread.number, removal.dead)

    def _detached(
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
        chain, gone = [row], victims & rows.keys()
        while (ns, parent) in gone:
            gone.remove((ns, parent))  # one that was stored as its own ancestor comes once
            chain.append(rows[ns, parent])
            parent = chain[-1]["parent"]
        if (ns, parent) not in rows:
            parent = None
        kept: dict[str, History] = {}
        if deltas := _deltas(decode_row(self._vault, serde, thread_id, row)):
            ancestors = [self._ancestor(connection, thread_id, thread, one) for one in chain]
            self._add_writes(connection, thread_id, thread, ns, ancestors[1:])
            kept = {name: one for name, one in fold(ancestors, deltas).items() if one.writes or one.seed}
        body = history_body(kept) if kept else None
        new = {**row, "parent": parent, "history": None if body is None else self._vault.digest(HISTORY, body)}
        return {**new, "seal": seal_checkpoint(self._vault, thread_id, new)}, body

    def _ancestor(self, connection: Connection, thread_id: str, thread: Locked, row: Row) -> Ancestor:
        try:
            left: dict[str, History] = self._walker.left(connection, thread.number, row["history"])
        except Missing:
            raise damaged(thread_id, decode_text(row["id"]), "what ancestors left") from None
        return Ancestor(row["id"], row["parent"], unpack_content(row["content"]), left)

    def _add_writes(
        self, connection: Connection, thread_id: str, thread: Locked, ns: bytes, ancestors: Iterable[Ancestor]
    ) -> None:
        by_id = {one.id: one for one in ancestors}
        for part in chunks(list(by_id)):
            keys = {"of": thread.number, "in_ns": ns, "ids": part}
            for row in connection.execute(self._pending, keys).mappings():
                add_write(self._vault, thread_id, by_id, row)


def all_but_newest(rows: Mapping[Key, Row]) -> set[Key]:
    """What ``keep_latest`` takes out: all but the newest checkpoint of each namespace."""
    newest: dict[bytes, bytes] = {}
    for ns, checkpoint_id in rows:
        newest[ns] = max(checkpoint_id, newest.get(ns, b""))
    return {(ns, checkpoint_id) for ns, checkpoint_id in rows if newest[ns] != checkpoint_id}


def _size(row: Row) -> int:
    """The bytes of a row's columns, as ``sizes`` counts them."""
    return sum(len(value) for value in row.values() if isinstance(value, bytes))


def _deltas(stored: StoredCheckpoint) -> list[str]:
    """Channels of a checkpoint whose value may follow from what was written before it.

    LangGraph counts their updates in the metadata. Others that hold nothing are kept as well, in case they were
    written without counters, but for those that LangGraph empties itself.
    """
    counted: Mapping[str, Any] = stored.metadata.get("counters_since_delta_snapshot") or {}
    names: Mapping[str, Any] = stored.body["channel_versions"]
    empty = (name for name in names if name not in stored.digests)
    return [name for name in empty if name in counted or not name.startswith(_RESERVED)]
