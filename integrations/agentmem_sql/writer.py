"""What is written, as functions of a connection inside a transaction.

A writer takes a shared lock on the thread's row, which holds the thread's number and epoch. Whoever removes content
from a thread takes that lock exclusively and increases the epoch. So under one epoch nothing disappears, and what the
cache knows is neither looked for nor sent again. Content is inserted sorted by digest, so that two writers of one
thread do not wait for each other in a circle; the rows that refer to it come last.

How a write is done is its `WriteMode`. If that is the wrong one, everything is rolled back, and the call is encoded
again and written in the next mode.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum, auto
from secrets import randbelow
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, bindparam, case, delete, func, insert, null, select, update
from sqlalchemy.exc import IntegrityError

from agentmem.errors import StorageError
from agentmem_sql.content import Packer
from agentmem_sql.list_tree import LEAVES, OWN, parse
from agentmem_sql.protection import Protection
from agentmem_sql.reader import chunks
from agentmem_sql.rows import Encoded, Row, seal_checkpoint, unpack_content, witness
from agentmem_sql.schema import Tables, by, encode_text, thread_key
from agentmem_sql.statements import Prepared, add_rows, insert_all, insert_locked, insertion, kept


class WriteMode(Enum):
    """How a write is done."""

    INSERT = auto()
    """The rows are new and the cache knows the thread: they are inserted if its row has that number and epoch, which
    needs no further statement. If nothing is inserted (the epoch is another, the thread is gone, or a row exists
    already), the next mode is CHECK."""

    CHECK = auto()
    """The thread's row is locked (shared). If a row would be replaced, which may free content, EXCLUSIVE is next."""

    EXCLUSIVE = auto()
    """The thread's row is locked exclusively; rows are replaced, and content without references is deleted."""


class WriteConflict(Exception):
    """Nothing was written; `mode` is the next one to try, and CHECK means that the cache was wrong."""

    def __init__(self, mode: WriteMode) -> None:
        super().__init__(mode)
        self.mode = mode


class Locked(NamedTuple):
    """A thread whose row this transaction has locked."""

    number: int
    epoch: int


class Writer:
    """Writes the tables of one database; raises `WriteConflict` if a write is to be done in another mode."""

    def __init__(self, tables: Tables, protection: Protection) -> None:
        self._tables = tables
        self._protection = protection
        threads, checkpoints, writes, blobs = tables.threads, tables.checkpoints, tables.writes, tables.blobs
        self._find = select(threads.c.number, threads.c.epoch).where(by(threads, "key"))
        self._lock = self._find.with_for_update()
        self._share = self._find.with_for_update(read=True, key_share=True)
        of_task = by(writes, "thread", "ns", "checkpoint", "task")
        self._of_task = select(writes.c.idx, writes.c.digest).where(of_task)
        stored = select(checkpoints.c.content, checkpoints.c.parent, checkpoints.c.history)
        self._stored = stored.where(by(checkpoints, "thread", "ns", "id"))
        chosen = by(blobs, "thread") & blobs.c.digest.in_(bindparam("digests", expanding=True))
        counted_up = update(threads).where(threads.c.number == bindparam("thread"))
        self._count_up = counted_up.values(epoch=threads.c.epoch + 1)
        named = (checkpoints.c[name] for name in ("ns", "id", "content", "history"))
        self._referring = select(*named).where(by(checkpoints, "thread"))
        self._written = select(writes.c.digest).where(by(writes, "thread")).distinct()
        body = case((blobs.c.kind.not_in(LEAVES), blobs.c.body), else_=null())
        self._all = select(blobs.c.digest, blobs.c.kind, body, func.length(blobs.c.body)).where(by(blobs, "thread"))
        self._own = select(blobs.c.digest).where(chosen, blobs.c.kind == OWN)
        self._free = delete(blobs).where(chosen)

    def put_checkpoint(
        self, connection: Connection, thread_id: str, new: Encoded, mode: WriteMode, *, in_one: bool
    ) -> Locked:
        """Store a checkpoint; one of the same id is replaced, but keeps the history of its pruned ancestors.

        `in_one`: insert rows and content in one statement, where the database can do that.
        """
        checkpoints, (row,) = self._tables.checkpoints, new.rows
        if mode is WriteMode.INSERT:
            return self._insert(connection, checkpoints, new, in_one)
        thread = self._begin(connection, thread_id, new.packer, mode)
        self.add_content(connection, thread.number, new.packer.new)
        row = {"thread": thread.number, **row}
        stored = self._stored_row(connection, row, row["id"]) if mode is WriteMode.EXCLUSIVE else None
        if stored is None:
            try:
                connection.execute(insert(checkpoints), row)
            except IntegrityError as error:
                raise WriteConflict(WriteMode.EXCLUSIVE) from error
            return thread
        parent = row["parent"]
        relinked = stored.parent is not None and parent not in (None, stored.parent)
        pruned = relinked and self._stored_row(connection, row, parent) is None
        if pruned or stored.history is not None:
            row = {**row, "parent": stored.parent, "history": stored.history}
            row = {**row, "seal": seal_checkpoint(self._protection, thread_id, row)}
        add_rows(connection, checkpoints, [row], replace=True)
        return thread if stored.content == row["content"] else self.sweep(connection, thread)

    def put_writes(
        self, connection: Connection, thread_id: str, new: Encoded, mode: WriteMode, *, in_one: bool
    ) -> Locked | None:
        """Store pending writes; their checkpoint may arrive later.

        None if content was left out because its writes exist already: the cache must not count it as stored.
        """
        if mode is WriteMode.INSERT:
            return self._insert(connection, self._tables.writes, new, in_one)
        thread = self._begin(connection, thread_id, new.packer, mode)
        rows = [{"thread": thread.number, **row} for row in new.rows]
        # The content of what the task has written already, by index.
        keys = {name: rows[0][name] for name in ("thread", "ns", "checkpoint", "task")}
        stored = {row.idx: row.digest for row in connection.execute(self._of_task, keys)}
        if any(row["idx"] >= 0 for row in rows):  # only special channels replace what the task wrote before
            rows = [row for row in rows if row["idx"] not in stored]
            contents = new.packer.new
            left_out = unreachable(contents, links_of(contents), (row["digest"] for row in rows))
            self.add_content(connection, thread.number, {each: contents[each] for each in contents.keys() - left_out})
            add_rows(connection, self._tables.writes, rows, replace=False)
            return None if any(contents[digest][0] != OWN for digest in left_out) else thread
        digests = {row["idx"]: row["digest"] for row in rows}
        replaced = {digest for idx, digest in stored.items() if digests.get(idx, digest) != digest}
        if replaced and mode is not WriteMode.EXCLUSIVE:
            raise WriteConflict(WriteMode.EXCLUSIVE)
        self.add_content(connection, thread.number, new.packer.new)
        add_rows(connection, self._tables.writes, rows, replace=True)
        return self._free_replaced(connection, thread, replaced) if replaced else thread

    def delete_thread(self, connection: Connection, thread_id: str) -> bool:
        """Delete every row of a thread, if it exists; gives whether it did."""
        thread = self.find(connection, thread_id, lock=True)
        if thread is not None:
            tables = self._tables
            for table in (tables.writes, tables.checkpoints, tables.blobs):
                connection.execute(delete(table).where(table.c.thread == thread.number))
            connection.execute(delete(tables.threads).where(tables.threads.c.number == thread.number))
        return thread is not None

    def find(self, connection: Connection, thread_id: str, *, lock: bool) -> Locked | None:
        """The number and epoch of a thread, which `lock` locks exclusively; None if there is no such thread."""
        return self._locked(connection, self._lock if lock else self._find, thread_id)

    def open_thread(self, connection: Connection, thread_id: str, *, alone: bool) -> Locked:
        """Lock a thread, exclusively if `alone`; it is created if it does not exist."""
        statement = self._lock if alone else self._share
        thread = self._locked(connection, statement, thread_id)
        if thread is None:
            row = {"key": thread_key(thread_id), "name": encode_text(thread_id), "epoch": randbelow(2**48)}
            add_rows(connection, self._tables.threads, [row], replace=False)
            thread = self._locked(connection, statement, thread_id)
            assert thread is not None
        return thread

    def add_content(self, connection: Connection, thread: int, contents: Mapping[bytes, tuple[int, bytes]]) -> None:
        """Store content that is not there yet."""
        if contents:
            name, blobs, rows = connection.dialect.name, self._tables.blobs, self._content_rows(contents, thread=thread)
            adding = kept(blobs, ("content", name), lambda: Prepared(insertion(name, blobs, replace=False)))
            adding.run(connection, rows)

    def _content_rows(self, contents: Mapping[bytes, tuple[int, bytes]], **same: int) -> list[Row]:
        encrypt = self._protection.encrypt
        return [
            {**same, "digest": digest, "kind": kind, "body": encrypt(body)}
            for digest, (kind, body) in sorted(contents.items())
        ]

    def _insert(self, connection: Connection, table: Table, new: Encoded, in_one: bool) -> Locked:
        """Store new rows and their content if the cache is right about the thread."""
        dialect, tables, contents, known = connection.dialect.name, self._tables, new.packer.new, new.packer.known
        assert known.number is not None
        if known.void:  # the server that answers now may lack what the cache knows
            raise WriteConflict(WriteMode.CHECK)
        thread = Locked(known.number, known.epoch)
        try:
            if dialect == "postgresql" and in_one:
                content = self._content_rows(contents)
                inserted = insert_all(connection, table, (tables.threads, tables.blobs), thread, content, new.rows)
            else:
                rows = [{"of": thread.number, "in_epoch": thread.epoch, **row} for row in new.rows]
                self.add_content(connection, thread.number, contents)
                inserted = insert_locked(dialect, table, tables.threads).run(connection, rows)
        except IntegrityError as error:
            raise WriteConflict(WriteMode.CHECK) from error
        if inserted != len(new.rows):
            raise WriteConflict(WriteMode.CHECK)
        return thread

    def _begin(self, connection: Connection, thread_id: str, packer: Packer, mode: WriteMode) -> Locked:
        """Lock the thread, created if needed, and check that it is the one that the packer relies on."""
        thread = self.open_thread(connection, thread_id, alone=mode is WriteMode.EXCLUSIVE)
        known = packer.known
        if known.void or (packer.relies_on_cache and thread != (known.number, known.epoch)):
            raise WriteConflict(WriteMode.CHECK)
        return thread

    def _stored_row(self, connection: Connection, row: Row, checkpoint_id: bytes) -> Any:
        """What is stored of a checkpoint of the namespace of `row`; None if there is none."""
        keys = {"thread": row["thread"], "ns": row["ns"], "id": checkpoint_id}
        return connection.execute(self._stored, keys).one_or_none()

    def _locked(self, connection: Connection, statement: Any, thread_id: str) -> Locked | None:
        row = connection.execute(statement, {"key": thread_key(thread_id)}).one_or_none()
        return None if row is None else Locked(*row)

    # Garbage collection: content without references is deleted by mark and sweep over one thread. Content refers to
    # content (a list to its nodes, those to items), so it is marked from the thread's checkpoints and pending writes.
    #
    # To report what would be deleted, no lock is needed if content is read before the rows that refer to it: both are
    # committed together, so while the epoch stays the same, nothing that was read can have lost its reference.

    def _free_replaced(self, connection: Connection, thread: Locked, replaced: Collection[bytes]) -> Locked:
        """Delete the content of replaced pending writes, if need be by a sweep of the thread.

        Content of one write only (see `list_tree.own_body`) is simply deleted: no process relies on it, so the epoch
        stays the same. Older versions stored other content too, and so do values that are too large for one row.
        """
        given = {"thread": thread.number, "digests": sorted(replaced)}
        if set(connection.execute(self._own, given).scalars()) != replaced:
            return self.sweep(connection, thread)
        connection.execute(self._free, given)
        return thread

    def sweep(self, connection: Connection, thread: Locked) -> Locked:
        """Delete content that nothing refers to, in a transaction that has locked the thread exclusively."""
        sizes, links = self.content(connection, thread.number)
        of = {"thread": thread.number}
        roots: set[bytes] = set(connection.execute(self._written, of).scalars())
        for row in connection.execute(self._referring, of).mappings():
            roots.update(referred(row))
        self.free(connection, thread.number, unreachable(sizes, links, roots))
        return Locked(thread.number, thread.epoch + 1)

    def free(self, connection: Connection, thread: int, dead: Collection[bytes]) -> None:
        """Delete content that nothing refers to, and increase the thread's epoch."""
        for part in chunks(sorted(dead)):
            connection.execute(self._free, {"thread": thread, "digests": part})
        connection.execute(self._count_up, {"thread": thread})

    def content(self, connection: Connection, thread: int) -> tuple[dict[bytes, int], dict[bytes, Collection[bytes]]]:
        """All content of a thread: the bytes that each takes as stored, and the references of those that have any.

        Raises:
            StorageError: some content cannot be read, so that its references are unknown.
        """
        rows = connection.execute(self._all, {"thread": thread}).all()
        links: dict[bytes, Collection[bytes]] = {}
        for digest, kind, stored, _ in rows:
            if stored is None:
                continue
            body = self._protection.decrypt(stored)
            if self._protection.digest(kind, body) != digest:  # otherwise what it refers to would count as unreachable
                raise StorageError(
                    "a stored list of the thread is not what was stored (its digest differs), so what it refers to is "
                    "unknown and nothing was taken out; restore the database from a backup, or delete the thread"
                )
            links[digest] = frozenset(parse(kind, body).links)
        return {digest: size for digest, _, _, size in rows}, links


def referred(row: Row) -> Iterable[bytes]:
    """The content that a checkpoint's row refers to, and its witness."""
    yield witness(row["ns"], row["id"])
    yield from unpack_content(row["content"]).values()
    if row["history"] is not None:
        yield row["history"]


def links_of(contents: Mapping[bytes, tuple[int, bytes]]) -> dict[bytes, frozenset[bytes]]:
    """The references in new content, given as digest -> (kind, body)."""
    inner = {digest: content for digest, content in contents.items() if content[0] not in LEAVES}
    return {digest: frozenset(parse(*content).links) for digest, content in inner.items()}


def unreachable(
    digests: Iterable[bytes], links: Mapping[bytes, Collection[bytes]], roots: Iterable[bytes]
) -> set[bytes]:
    """The part of content, given with its references, that cannot be reached from the roots."""
    alive: set[bytes] = set()
    pending = set(roots)
    while pending:
        alive |= pending
        pending = {link for digest in pending for link in links.get(digest, ())} - alive
    return set(digests) - alive
