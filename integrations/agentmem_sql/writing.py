"""What is written, as functions of a connection inside a transaction.

A writer takes a shared lock on the thread's row, which gives the thread's number and epoch: whoever takes
content out of a thread holds that lock alone and counts the epoch up. Under one epoch nothing disappears, so
what the cache says is there need not be looked for or sent again. Content is inserted sorted by digest, so that
two writers of one thread never wait for each other crosswise; the rows that refer to it come last.

For a thread in the cache the lock costs no statement of its own: the row that is inserted is selected from the
thread's row of that number and epoch, with the lock. If nothing is inserted so (the epoch is another, the thread
is gone, or the row is there already), everything is rolled back and done the slow way.

Replacing a row may leave content that nothing refers to. That is seen only in the middle of the transaction,
which then starts again with the lock taken alone, and ends with a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from secrets import randbelow
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Table, bindparam, cast, delete, insert, select
from sqlalchemy.exc import IntegrityError

from agentmem_sql.cache import Thread
from agentmem_sql.codec import Row, seal_checkpoint
from agentmem_sql.dialects import add_rows, insert_missing
from agentmem_sql.keys import encode_text, thread_key
from agentmem_sql.list_tree import OWN
from agentmem_sql.mark_sweep import Sweeper, referred_contents
from agentmem_sql.onestatement import MOST_CONTENT, MOST_ROWS, insert_all
from agentmem_sql.prepared import Prepared, kept
from agentmem_sql.tables import Tables
from agentmem_sql.vault import Vault

_MYSQL_DUPLICATE = 1062


class StaleCacheError(Exception):
    """The thread is not what the cache says; nothing was written, and the call is to be packed again."""


class NeedsLockError(Exception):
    """Rows are replaced, so the work needs the thread for itself; nothing was written."""


class Locked(NamedTuple):
    """A thread whose row this transaction holds."""

    number: int
    epoch: int


class New(NamedTuple):
    """What a call stores.

    ``known`` is what it was packed with, ``trusting`` whether it relied on that, ``looking`` whether to look for
    rows of the same key first, since inserting without looking has failed.
    """

    thread: str
    contents: Mapping[bytes, tuple[int, bytes]]
    known: Thread
    trusting: bool
    looking: bool

    @property
    def is_known(self) -> bool:
        """Whether the cache knows the thread, so that what is new can be inserted without looking."""
        return self.known.number is not None and not self.looking

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether rows and content go into one statement, where the database can do that."""
        return self.is_known and len(self.contents) <= MOST_CONTENT and 0 < len(rows) <= MOST_ROWS


class Writer:
    """Writes the tables of one database."""

    def __init__(self, tables: Tables, vault: Vault, sweeper: Sweeper) -> None:
        self._tables = tables
        self._vault = vault
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
        self._before = select(checkpoints.c.content, checkpoints.c.parent, checkpoints.c.history).where(
            checkpoints.c.thread == bindparam("thread"),
            checkpoints.c.ns == bindparam("ns"),
            checkpoints.c.id == bindparam("id"),
        )

    def put_checkpoint(self, connection: Connection, new: New, row: Row, *, alone: bool) -> Locked:
        """Store a checkpoint; one of the same id is replaced, but keeps what its pruned ancestors left it.

        Raises:
            StaleCacheError: the cache was wrong.
            NeedsLockError: there is one of the same id with other content; call again with ``alone``.
        """
        checkpoints = self._tables.checkpoints
        _check_known(new)
        if new.is_known and not alone:
            return self._add_known(connection, new, checkpoints, [row])
        thread = self._begin(connection, new, alone=alone)
        self.add_content(connection, thread.number, new.contents)
        row = {"thread": thread.number, **row}
        if insert_new(connection, checkpoints, row):
            return thread
        before = self._row_before(connection, row, row["id"])
        assert before is not None
        orphans = before.content != row["content"]
        if orphans and not alone:
            raise NeedsLockError
        named = row["parent"]
        relinked = before.parent is not None and named not in (None, before.parent)
        pruned = relinked and self._row_before(connection, row, named) is None
        if pruned or before.history is not None:
            row = {**row, "parent": before.parent, "history": before.history}
            row = {**row, "seal": seal_checkpoint(self._vault, new.thread, row)}
        add_rows(connection, checkpoints, [row], replace=True)
        return self.sweep(connection, thread) if orphans else thread

    def put_writes(
        self, connection: Connection, new: New, rows: Sequence[Row], *, replace: bool, alone: bool
    ) -> Locked | None:
        """Store pending writes; the checkpoint they belong to may arrive later.

        None if content was left out that came along for writes that are there already: the cache must not take it for
        stored.

        Raises:
            StaleCacheError: the cache was wrong.
            NeedsLockError: other content is replaced; call again with ``alone``.
        """
        _check_known(new)
        if new.is_known and rows and not replace:
            return self._add_known(connection, new, self._tables.writes, rows)
        thread = self._begin(connection, new, alone=alone)
        numbered = [{"thread": thread.number, **row} for row in rows]
        before = self._written(connection, numbered)
        if not replace:
            numbered = [row for row in numbered if row["idx"] not in before]
            contents = referred_contents(new.contents, (row["digest"] for row in numbered))
            self.add_content(connection, thread.number, contents)
            add_rows(connection, self._tables.writes, numbered, replace=False)
            left_out = new.contents.keys() - contents.keys()
            return None if any(new.contents[digest][0] != OWN for digest in left_out) else thread
        digests = {row["idx"]: row["digest"] for row in numbered}
        replaced = {digest for idx, digest in before.items() if digests.get(idx, digest) != digest}
        if replaced and not alone:
            raise NeedsLockError
        self.add_content(connection, thread.number, new.contents)
        add_rows(connection, self._tables.writes, numbered, replace=True)
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
        found = self._locked(connection, statement, thread_id)
        if found is None:
            row = {"key": thread_key(thread_id), "name": encode_text(thread_id), "epoch": randbelow(2**48)}
            add_rows(connection, self._tables.threads, [row], replace=False)
            found = self._locked(connection, statement, thread_id)
            assert found is not None
        return found

    def add_content(self, connection: Connection, thread: int, contents: Mapping[bytes, tuple[int, bytes]]) -> None:
        """Store content; what is there already is left alone."""
        if contents:
            rows = [{"thread": thread, **row} for row in self._content_rows(contents)]
            insert_content(connection.dialect.name, self._tables.blobs).run_all(connection, rows)

    def _content_rows(self, contents: Mapping[bytes, tuple[int, bytes]]) -> list[Row]:
        close = self._vault.close
        return [
            {"digest": digest, "kind": kind, "body": close(body)} for digest, (kind, body) in sorted(contents.items())
        ]

    def _add_known(self, connection: Connection, new: New, table: Table, rows: Sequence[Row]) -> Locked:
        """Store new rows and their content if the thread is what the cache says."""
        number, epoch = new.known.number, new.known.epoch
        assert number is not None
        dialect, tables = connection.dialect.name, self._tables
        try:
            if dialect == "postgresql" and new.fits(rows):
                content = self._content_rows(new.contents)
                inserted = insert_all(connection, table, (tables.threads, tables.blobs), (number, epoch), content, rows)
            else:
                self.add_content(connection, number, new.contents)
                numbered = [{"of": number, "in_epoch": epoch, **row} for row in rows]
                inserted = insert_locked(dialect, table, tables.threads).run_all(connection, numbered, counted=True)
        except IntegrityError as error:
            raise StaleCacheError from error
        if inserted != len(rows):
            raise StaleCacheError
        return Locked(number, epoch)

    def _begin(self, connection: Connection, new: New, *, alone: bool) -> Locked:
        thread = self.open_thread(connection, new.thread, alone=alone)
        if new.trusting and (thread.number, thread.epoch) != (new.known.number, new.known.epoch):
            raise StaleCacheError
        return thread

    def _row_before(self, connection: Connection, row: Row, checkpoint_id: bytes) -> Any:
        """What is stored of a checkpoint of the namespace of ``row``; None if there is none."""
        keys = {"thread": row["thread"], "ns": row["ns"], "id": checkpoint_id}
        return connection.execute(self._before, keys).one_or_none()

    def _written(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> dict[int, bytes]:
        """The content of what the task has written already, by index."""
        if not rows:
            return {}
        keys = {name: rows[0][name] for name in ("thread", "ns", "checkpoint", "task")}
        return {row.idx: row.digest for row in connection.execute(self._of_task, keys)}

    def _locked(self, connection: Connection, statement: Any, thread_id: str) -> Locked | None:
        row = connection.execute(statement, {"key": thread_key(thread_id)}).one_or_none()
        return None if row is None else Locked(row.number, row.epoch)


def _check_known(new: New) -> None:
    """Refuse what was packed before a connection was lost: the server that answers now may never have had it."""
    if new.known.void:
        raise StaleCacheError


def insert_new(connection: Connection, table: Table, row: Row) -> bool:
    """Insert a row unless there is one with its key; says whether it was inserted."""
    if connection.dialect.name not in ("mysql", "mariadb"):
        # psycopg tells the number of rows of an INSERT only if asked to.
        statement = insert_missing(connection.dialect.name, table).execution_options(preserve_rowcount=True)
        return connection.execute(statement, row).rowcount == 1
    try:
        connection.execute(insert(table), row)
    except IntegrityError as error:
        # There the count of ON DUPLICATE KEY is the same for both cases; and a failed statement fails alone.
        if error.orig is not None and error.orig.args[:1] == (_MYSQL_DUPLICATE,):
            return False
        raise
    return True


def insert_content(dialect: str, blobs: Table) -> Prepared:
    """INSERT of content, unless it is there."""
    return kept(blobs, ("content", dialect), lambda: Prepared(insert_missing(dialect, blobs)))


def insert_locked(dialect: str, table: Table, threads: Table) -> Prepared:
    """INSERT of a row for the thread of number ``of`` if its epoch is ``in_epoch``, whose row is locked (shared)."""
    return kept(table, ("locked", dialect), lambda: _insert_locked(dialect, table, threads))


def _insert_locked(dialect: str, table: Table, threads: Table) -> Prepared:
    columns = [column for column in table.columns if column.name != "thread"]
    values: list[ColumnElement[Any]] = [bindparam(column.name, type_=column.type) for column in columns]
    if dialect == "postgresql":  # there a parameter that is only selected would be text
        values = [cast(value, value.type) for value in values]
    thread = (
        select(threads.c.number, *values)
        .where(threads.c.number == bindparam("of"), threads.c.epoch == bindparam("in_epoch"))
        .with_for_update(read=True, key_share=True)
    )
    names = ["thread", *(column.name for column in columns)]
    return Prepared(insert(table).from_select(names, thread))
