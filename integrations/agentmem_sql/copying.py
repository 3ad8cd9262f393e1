"""Copying a thread, as functions of a connection inside a transaction that holds both threads alone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BindParameter, Connection, bindparam, select

from agentmem_sql.codec import Row, decode_write, seal_checkpoint, seal_write
from agentmem_sql.dialects import add_rows, insert_missing
from agentmem_sql.pruning import Pruner
from agentmem_sql.reading import chunks
from agentmem_sql.tables import Tables
from agentmem_sql.vault import Vault
from agentmem_sql.writing import Locked, Writer


class Copier:
    """Copies threads in the tables of one database."""

    def __init__(self, tables: Tables, vault: Vault, writer: Writer, pruner: Pruner) -> None:
        self._tables = tables
        self._vault = vault
        self._writer = writer
        self._pruner = pruner
        writes, blobs = tables.writes, tables.blobs
        thread: BindParameter[int] = bindparam("of")
        self._all_writes = select(writes).where(writes.c.thread == thread)
        # Under another name: MariaDB would not know which of the two tables an INSERT ... SELECT means.
        source = blobs.alias("source")
        self._contents = select(
            bindparam("to", type_=blobs.c.thread.type), source.c.digest, source.c.kind, source.c.body
        ).where(source.c.thread == thread)

    def copy(self, connection: Connection, source_id: str, target_id: str) -> None:
        """Copy everything of a thread to another; what the other has under the same ids is replaced.

        Raises:
            StorageError: something was changed or damaged since it was stored; nothing is copied.
        """
        if source_id == target_id or not self._exists(connection, source_id, target_id):
            return
        source = self._writer.open_thread(connection, source_id, alone=True)
        target = self._writer.open_thread(connection, target_id, alone=True)
        tables = self._tables
        into = insert_missing(connection.dialect.name, tables.blobs)
        copying = into.from_select(["thread", "digest", "kind", "body"], self._contents)
        connection.execute(copying, {"of": source.number, "to": target.number})
        held = self._pruner.rows(connection, source_id, source).values()
        rows = [self._moved(row, target, target_id) for row in held]
        for part in chunks(rows):
            add_rows(connection, tables.checkpoints, part, replace=True)
        pending = connection.execute(self._all_writes, {"of": source.number}).mappings().all()
        moved = []
        for row in pending:
            decode_write(self._vault, source_id, row)  # refuses one that was changed
            new: dict[str, Any] = {**row, "thread": target.number}
            moved.append({**new, "seal": seal_write(self._vault, target_id, new)})
        for part in chunks(moved):
            add_rows(connection, tables.writes, part, replace=True)
        self._writer.sweep(connection, target)

    def _exists(self, connection: Connection, *thread_ids: str) -> bool:
        """Whether the first of the threads exists; all are locked, in an order that all copies keep to."""
        there = {name: self._writer.lock(connection, name) for name in sorted(thread_ids)}
        return there[thread_ids[0]] is not None

    def _moved(self, row: Row, target: Locked, target_id: str) -> Row:
        new = {**row, "thread": target.number}
        return {**new, "seal": seal_checkpoint(self._vault, target_id, new)}
