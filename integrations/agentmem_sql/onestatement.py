"""Writing to PostgreSQL in one statement, and so in one round trip.

Content, the lock on the thread's row and the rows that refer to the content travel together. A statement is a
transaction, so there is no BEGIN and no COMMIT to wait for either. Other databases have no INSERT inside a WITH;
there, and where there is much to insert, ``writing`` does the same in several statements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import Column, Connection, Select, Table, bindparam, cast, column, insert, select, true, values
from sqlalchemy.dialects.postgresql import insert as insert_or

from agentmem_sql.prepared import Prepared, kept

# Every number of rows is a statement of its own, which the server plans when it is new.
MOST_CONTENT = 12
MOST_ROWS = 4

_CONTENT = "content_"


def insert_all(
    connection: Connection,
    table: Table,
    tables: tuple[Table, Table],
    thread: tuple[int, int],
    content: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> int:
    """Insert rows and the content they need if the thread has this number and epoch; gives the number of rows.

    Args:
        connection: in autocommit mode, or in a transaction.
        table: where ``rows`` go.
        tables: those of threads and of content.
        thread: number and epoch.
        content: rows with digest, kind and body; what is there already is left alone.
        rows: at least one, without the thread's number.
    """
    size = len(content), len(rows)
    adding = kept(table, ("all", size), lambda: _adding(table, *tables, *size))
    values: list[Any] = [*thread]
    for row in content:
        values += adding.of_content(row)
    for row in rows:
        values += adding.of_row(row)
    return adding.statement.run(connection, dict(zip(adding.names, values, strict=True)))


class _Adding(NamedTuple):
    """A statement for a number of rows, the names of its parameters, and what comes into their order from a row."""

    statement: Prepared
    names: Sequence[str]
    of_content: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    of_row: Callable[[Mapping[str, Any]], tuple[Any, ...]]


def _adding(table: Table, threads: Table, blobs: Table, contents: int, rows: int) -> _Adding:
    of_blob, of_table = ([each.name for each in of.columns if each.name != "thread"] for of in (blobs, table))
    names = ["of", "in_epoch"]
    names += [f"{_CONTENT}{name}_{at}" for at in range(contents) for name in of_blob]
    names += [f"{name}_{at}" for at in range(rows) for name in of_table]
    statement = _statement(table, threads, blobs, contents, rows)
    return _Adding(statement, names, itemgetter(*of_blob), itemgetter(*of_table))


def _statement(table: Table, threads: Table, blobs: Table, contents: int, rows: int) -> Prepared:
    of_thread = threads.c.number == bindparam("of"), threads.c.epoch == bindparam("in_epoch")
    locked = select(threads.c.number).where(*of_thread).with_for_update(read=True, key_share=True).cte("locked")

    def given(columns: Sequence[Column[Any]], count: int, prefix: str) -> Select[Any]:
        names = [each.name for each in columns]
        # Cast, since a parameter that is only selected has no type there.
        data = [
            tuple(cast(bindparam(f"{prefix}{each.name}_{at}"), each.type) for each in columns) for at in range(count)
        ]
        new = values(*(column(each.name, each.type) for each in columns), name=f"{prefix}given").data(data)
        return select(locked.c.number, *(new.c[name] for name in names)).select_from(locked.join(new, true()))

    def others(of: Table) -> list[Column[Any]]:
        return [each for each in of.columns if each.name != "thread"]

    columns = others(table)
    adding = insert(table).from_select(["thread", *(each.name for each in columns)], given(columns, rows, ""))
    if contents:
        names = ["thread", *(each.name for each in others(blobs))]
        content = insert_or(blobs).from_select(names, given(others(blobs), contents, _CONTENT))
        adding = adding.add_cte(content.on_conflict_do_nothing().cte("content"))
    return Prepared(adding)
