"""What is written, as functions of a connection inside a transaction.

A writer takes a shared lock on the thread's row, which gives the thread's number and epoch: whoever takes
content out of a thread holds that lock alone and counts the epoch up. Under one epoch nothing disappears, so
what the cache says is there need not be looked for or sent again. Content is inserted sorted by digest, so that
two writers of one thread never wait for each other crosswise; the rows that refer to it come last.

How a write goes about it is its `WriteMode`. If it turns out to be the wrong one, everything is rolled back, and the
call is packed again and written in the next mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from secrets import randbelow
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, bindparam, delete, select
from sqlalchemy.exc import IntegrityError

from agentmem_sql.content import Packer
from agentmem_sql.list_tree import OWN
from agentmem_sql.mark_sweep import Sweeper, referred_contents
from agentmem_sql.protection import Protection
from agentmem_sql.rows import Encoded, Row, seal_checkpoint
from agentmem_sql.schema import Tables, encode_text, thread_key
from agentmem_sql.statements import add_rows, insert_all, insert_content, insert_locked, insert_new


class WriteMode(Enum):
    """How a write is done."""

    INSERT = auto()
    """The rows are new and the cache knows the thread: they are inserted out of the thread's row of that number and
    epoch, which costs no statement of its own. If nothing is inserted so (the epoch is another, the thread is gone, or
    a row is there already), the next mode is CHECK."""

    CHECK = auto()
    """The thread's row is locked (shared), and rows of the same keys are looked for first. Where one would be replaced
    and so leave content that nothing refers to, the next mode is EXCLUSIVE."""

    EXCLUSIVE = auto()
    """The thread's row is locked by this transaction alone; rows are replaced, and the thread is swept at the end."""


class WriteConflict(Exception):
    """Nothing was written.

    Attributes:
        mode: the next one to try; CHECK says that the cache was wrong.
    """

    def __init__(self, mode: WriteMode) -> None:
        super().__init__(mode)
        self.mode = mode


class Locked(NamedTuple):
    """A thread whose row this transaction holds."""

    number: int
    epoch: int


class Writer:
    """Writes the tables of one database."""

    def __init__(self, tables: Tables, protection: Protection, sweeper: Sweeper) -> None:
        self._tables = tables
        self._protection = protection
        self._sweeper = sweeper
        threads, checkpoints, writes = tables.threads, tables.checkpoints, tables.writes
        find = select(threads.c.number, threads.c.epoch).where(threads.c.key == bindparam("key"))
        self._lock = find.with_for_update()
        self._share = find.with_for_update(read=True, key_share=True)
        self._of_task = select(writes.c.idx, writes.c.digest).where(
            writes.c.thread == bindparam("thread"),
            writes.c.ns == bindparam("ns"),
            writes.c.checkpoint == bindparam("checkpoint"),
            writes.c.task == bindparam("task"),
        )
        self._stored = select(checkpoints.c.content, checkpoints.c.parent, checkpoints.c.history).where(
            checkpoints.c.thread == bindparam("thread"),
            checkpoints.c.ns == bindparam("ns"),
            checkpoints.c.id == bindparam("id"),
        )

    def put_checkpoint(
        self, connection: Connection, thread_id: str, new: Encoded, mode: WriteMode, *, in_one: bool
    ) -> Locked:
        """Store a checkpoint; one of the same id is replaced, but keeps what its pruned ancestors left it.

        `in_one`: whether rows and content go into one statement, where the database can do that.

        Raises:
            WriteConflict: the write is to be done in another mode.
        """
        checkpoints, (row,) = self._tables.checkpoints, new.rows
        if mode is WriteMode.INSERT:
            return self._insert(connection, checkpoints, new, in_one)
        thread = self._begin(connection, thread_id, new.packer, mode)
        self.add_content(connection, thread.number, new.packer.new)
        row = {"thread": thread.number, **row}
        if insert_new(connection, checkpoints, row):
            return thread
        stored = self._stored_row(connection, row, row["id"])
        assert stored is not None
        orphans = stored.content != row["content"]
        if orphans and mode is not WriteMode.EXCLUSIVE:
            raise WriteConflict(WriteMode.EXCLUSIVE)
        parent = row["parent"]
        relinked = stored.parent is not None and parent not in (None, stored.parent)
        pruned = relinked and self._stored_row(connection, row, parent) is None
        if pruned or stored.history is not None:
            row = {**row, "parent": stored.parent, "history": stored.history}
            row = {**row, "seal": seal_checkpoint(self._protection, thread_id, row)}
        add_rows(connection, checkpoints, [row], replace=True)
        return self.sweep(connection, thread) if orphans else thread

    def put_writes(
        self, connection: Connection, thread_id: str, new: Encoded, mode: WriteMode, *, in_one: bool
    ) -> Locked | None:
        """Store pending writes; the checkpoint they belong to may arrive later.

        None if content was left out that came along for writes that are there already: the cache must not take it for
        stored.

        Raises:
            WriteConflict: the write is to be done in another mode.
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
            contents = referred_contents(new.packer.new, (row["digest"] for row in rows))
            self.add_content(connection, thread.number, contents)
            add_rows(connection, self._tables.writes, rows, replace=False)
            left_out = new.packer.new.keys() - contents.keys()
            return None if any(new.packer.new[digest][0] != OWN for digest in left_out) else thread
        digests = {row["idx"]: row["digest"] for row in rows}
        replaced = {digest for idx, digest in stored.items() if digests.get(idx, digest) != digest}
        if replaced and mode is not WriteMode.EXCLUSIVE:
            raise WriteConflict(WriteMode.EXCLUSIVE)
        self.add_content(connection, thread.number, new.packer.new)
        add_rows(connection, self._tables.writes, rows, replace=True)
        if replaced and self._sweeper.free_replaced(connection, thread.number, replaced):
            return Locked(thread.number, thread.epoch + 1)
        return thread

    def delete_thread(self, connection: Connection, thread_id: str) -> None:
        """Remove every row of a thread; one that is not there is no error."""
        thread = self.lock(connection, thread_id)
        if thread is not None:
            tables = self._tables
            for table in (tables.writes, tables.checkpoints, tables.blobs):
                connection.execute(delete(table).where(table.c.thread == thread.number))
            connection.execute(delete(tables.threads).where(tables.threads.c.number == thread.number))

    def lock(self, connection: Connection, thread_id: str) -> Locked | None:
        """Take a thread for this transaction alone; None if there is no such thread."""
        return self._locked(connection, self._lock, thread_id)

    def sweep(self, connection: Connection, thread: Locked) -> Locked:
        """Free what nothing refers to, in a transaction that holds the thread alone."""
        self._sweeper.sweep(connection, thread.number)
        return Locked(thread.number, thread.epoch + 1)

    def open_thread(self, connection: Connection, thread_id: str, *, alone: bool) -> Locked:
        """Lock a thread, which is made if it is not there."""
        statement = self._lock if alone else self._share
        thread = self._locked(connection, statement, thread_id)
        if thread is None:
            row = {"key": thread_key(thread_id), "name": encode_text(thread_id), "epoch": randbelow(2**48)}
            add_rows(connection, self._tables.threads, [row], replace=False)
            thread = self._locked(connection, statement, thread_id)
            assert thread is not None
        return thread

    def add_content(self, connection: Connection, thread: int, contents: Mapping[bytes, tuple[int, bytes]]) -> None:
        """Store content; what is there already is left alone."""
        if contents:
            rows = self._content_rows(contents, thread=thread)
            insert_content(connection.dialect.name, self._tables.blobs).run(connection, rows)

    def _content_rows(self, contents: Mapping[bytes, tuple[int, bytes]], **same: int) -> list[Row]:
        encrypt = self._protection.encrypt
        return [
            {**same, "digest": digest, "kind": kind, "body": encrypt(body)}
            for digest, (kind, body) in sorted(contents.items())
        ]

    def _insert(self, connection: Connection, table: Table, new: Encoded, in_one: bool) -> Locked:
        """Store new rows and their content if the thread is what the cache says."""
        dialect, tables, contents, known = connection.dialect.name, self._tables, new.packer.new, new.packer.known
        assert known.number is not None
        if known.void:  # the server that answers now may never have had what the cache says
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
        """Lock the thread, which is made if it is not there and must be the one that the packer relies on."""
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
