"""The statements of put and get, and whatever differs between databases.

For every statement SQLAlchemy looks up its compiled form, sets up types for parameters and results and describes the
columns of the result, which takes longer than SQLite needs to run it. Here all values are bytes and integers, which
drivers take and return as they are. So the statements of put and get are compiled once for each dialect and run on the
driver's cursor. SQLAlchemy still handles errors (wraps them, invalidates connections, calls handlers), and runs the
whole statement on engines of the caller's, or if there are listeners for cursors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Executable,
    FromClause,
    Select,
    Table,
    any_,
    bindparam,
    cast,
    column,
    func,
    insert,
    literal_column,
    select,
    true,
    values,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.sql.dml import Insert

DIRECT = "agentmem_direct"  # execution option of engines whose statements may run directly on the cursor

_CURSOR = "agentmem_cursor"
_MARKS = {"qmark": "?", "format": "%s"}

T = TypeVar("T")

Rows = Sequence[tuple[Any, ...]]


class Text(NamedTuple):
    """A compiled statement: its SQL, the order of parameters without names, and those that SQLAlchemy adds."""

    sql: str
    order: Sequence[str] | None
    constants: Mapping[str, Any]

    def arrange(self, parameters: Mapping[str, Any]) -> Any:
        """The parameters as the driver takes them."""
        if self.constants:
            parameters = {**self.constants, **parameters}
        return parameters if self.order is None else tuple([parameters[name] for name in self.order])


class Prepared:
    """A statement without lists as parameters."""

    def __init__(self, statement: Executable) -> None:
        self._statement = statement.execution_options(preserve_rowcount=True)
        self._texts: dict[tuple[type[Dialect], str], Text] = {}

    def run(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Execute it for every row; gives the number of changed rows."""
        text = self.text(connection)
        parameters: Any = rows if text is None else [text.arrange(row) for row in rows]
        if len(parameters) == 1:
            parameters = parameters[0]
        if text is None:
            return connection.execute(self._statement, parameters).rowcount
        return change(connection, text.sql, parameters)

    def rows(self, connection: Connection, parameters: Mapping[str, Any]) -> Rows:
        """Execute it once; gives the selected rows."""
        text = self.text(connection)
        if text is None:
            return [tuple(row) for row in connection.execute(self._statement, parameters)]
        return fetch(connection, text.sql, text.arrange(parameters))

    def text(self, connection: Connection) -> Text | None:
        """What the driver gets; None if that depends on the connection."""
        if "schema_translate_map" in connection._execution_options:
            return None
        dialect = connection.dialect
        key = type(dialect), dialect.paramstyle
        text = self._texts.get(key)
        if text is None:
            compiled: Any = self._statement.compile(dialect=dialect)  # type: ignore[attr-defined]
            constants = {name: value for name, value in compiled.params.items() if value is not None}
            text = self._texts[key] = Text(compiled.string, compiled.positiontup, constants)
        return text


# Says that a column is in the list of a parameter's name: `threads` or `items`.
Among = Callable[[Column[Any], str], ColumnElement[bool]]


class PreparedLookup:
    """A SELECT of rows of some threads, by number, and with some items, which are the last parameter.

    PostgreSQL gets both lists as arrays, so that the statement is always the same. Elsewhere the numbers stand in the
    statement, and as many placeholders as there are items.
    """

    def __init__(self, select: Callable[[Among], Executable]) -> None:
        """`select` makes the statement."""
        self._plain = select(lambda column, name: column.in_(bindparam(name, expanding=True)))
        # No table's name holds a NUL.
        self._marked = Prepared(select(lambda column, name: column.in_([literal_column(f"\0{name}")])))
        self._arrays = Prepared(select(lambda column, name: column == any_(bindparam(name, type_=ARRAY(column.type)))))

    def rows(
        self, connection: Connection, threads: Sequence[int | None], items: Sequence[bytes], **others: Any
    ) -> Rows:
        """The rows found, by position."""
        lists: dict[str, Any] = {"threads": threads, "items": items}
        if connection.dialect.name == "postgresql":
            return self._arrays.rows(connection, others | lists)
        mark, text = _MARKS.get(connection.dialect.paramstyle), self._marked.text(connection)
        if mark is None or text is None:
            return [tuple(row) for row in connection.execute(self._plain, others | lists)]
        sql = text.sql.replace("\0threads", ", ".join(map(str, threads)))
        sql = sql.replace("\0items", ", ".join([mark] * len(items)))
        return fetch(connection, sql, (*text.arrange(others), *items))


def change(connection: Connection, sql: str, parameters: Any) -> int:
    """Execute a statement, for each of a list of parameters; gives the number of changed rows."""
    if _is_watched(connection):
        return connection.exec_driver_sql(sql, parameters, {"preserve_rowcount": True}).rowcount
    count: int = _on_cursor(connection, sql, parameters, rows=False)
    return count


def fetch(connection: Connection, sql: str, parameters: Any) -> Rows:
    """Execute a statement; gives its rows."""
    if _is_watched(connection):
        return [tuple(row) for row in connection.exec_driver_sql(sql, parameters)]
    rows: Rows = _on_cursor(connection, sql, parameters, rows=True)
    return rows


def kept(table: Table, key: Hashable, make: Callable[[], T]) -> T:
    """An object that is made once for a table."""
    made: T | None = table.info.get(key)
    if made is None:
        made = table.info[key] = make()
    return made


def _is_watched(connection: Connection) -> bool:
    if not connection._execution_options.get(DIRECT, False):
        return True
    if not (connection._has_events or connection.engine._has_events):
        return False
    events = connection.dispatch
    return bool(events.before_cursor_execute or events.after_cursor_execute)


def _on_cursor(connection: Connection, sql: str, parameters: Any, *, rows: bool) -> Any:
    """The rows of a statement, or the number of rows that it changed.

    A cursor of psycopg is kept for the next change: making it and deciding how to send parameters takes a quarter of
    the time of a statement. It is not kept after a read, as it would keep the rows.
    """
    dialect, cursor = connection.dialect, None
    try:
        proxy = connection.connection
        keep = not rows and dialect.driver == "psycopg"
        cursor = (proxy.info.pop(_CURSOR, None) if keep else None) or proxy.cursor()
        if isinstance(parameters, list):
            dialect.do_executemany(cursor, sql, parameters)
        else:
            dialect.do_execute(cursor, sql, parameters)
        result = cursor.fetchall() if rows else cursor.rowcount
        if keep:
            proxy.info[_CURSOR] = cursor
        else:
            cursor.close()
        return result
    except BaseException as error:  # noqa: BLE001
        # This raises. Without the statement it wraps only the driver's errors.
        statement = sql if isinstance(error, dialect.loaded_dbapi.Error) else None
        connection._handle_dbapi_exception(error, statement, None, cursor, None)


def contains(dialect: str, column: ColumnElement[bytes], name: str) -> ColumnElement[bool]:
    """Whether the bytes of a parameter are somewhere in a column."""
    find = func.pg_catalog.position if dialect == "postgresql" else func.instr
    return find(column, bindparam(name, type_=column.type)) > literal_column("0")


# Inserts that differ by database.


def add_rows(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], *, replace: bool) -> None:
    """Insert rows; those that exist are replaced or left alone."""
    if rows:
        # To make a statement takes longer than to run it.
        dialect = connection.dialect.name
        statement = kept(table, ("insert", dialect, replace), lambda: insertion(dialect, table, replace=replace))
        connection.execute(statement, list(rows))


def insertion(dialect: str, table: Table, *, replace: bool) -> Insert:
    """INSERT for rows of which those whose primary key (or unique key) exists are replaced or left alone."""
    others = [column.name for column in table.columns if not column.primary_key]
    if dialect in ("mysql", "mariadb"):
        of_mysql = mysql.insert(table)
        # Not INSERT IGNORE, which also truncates values without an error.
        first = next(iter(table.primary_key))
        new = {name: of_mysql.inserted[name] for name in others} if replace else {first.name: first}
        return of_mysql.on_duplicate_key_update(new)
    inserting = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    if not replace:
        return inserting.on_conflict_do_nothing()
    new = {name: inserting.excluded[name] for name in others}
    return inserting.on_conflict_do_update(index_elements=list(table.primary_key), set_=new)


def insert_locked(dialect: str, table: Table, threads: Table) -> Prepared:
    """INSERT of a row for thread number `of` if its epoch is `in_epoch`; locks the thread's row (shared)."""

    def make() -> Prepared:
        columns = _columns(table)
        values: list[ColumnElement[Any]] = [bindparam(column.name, type_=column.type) for column in columns]
        if dialect == "postgresql":  # where a parameter that is only selected would be text
            values = [cast(value, value.type) for value in values]
        of_thread = threads.c.number == bindparam("of"), threads.c.epoch == bindparam("in_epoch")
        thread = select(threads.c.number, *values).where(*of_thread).with_for_update(read=True, key_share=True)
        return Prepared(insert(table).from_select(["thread", *columns], thread))

    return kept(table, ("locked", dialect), make)


def _columns(table: Table) -> list[Column[Any]]:
    """Those that are not the thread's number."""
    return [column for column in table.columns if column.name != "thread"]


# PostgreSQL's write in one statement: content, the lock on the thread's row and the rows that refer to the content take
# one round trip, without BEGIN and COMMIT. Other databases have no INSERT inside a WITH; there, and if there is much to
# insert, the writer uses several statements.

# All content is three arrays, but every number of rows needs another statement, which the server has to plan.
MOST_CONTENT, MOST_ROWS = 64, 4


def insert_all(
    connection: Connection,
    table: Table,
    tables: tuple[Table, Table],
    thread: tuple[int, int],
    content: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> int:
    """Insert rows of a table and their content if the thread has this number and epoch; gives the number of rows.

    `tables`: of threads and of content. `content`: rows with digest, kind and body; existing ones are left alone.
    `rows`: at least one, without the thread's number.
    """
    shape = bool(content), len(rows)
    statement, names, of_row = kept(table, ("all", shape), lambda: _insert_all(table, *tables, *shape))
    parameters: dict[str, Any] = dict(zip(names, chain(thread, *map(of_row, rows)), strict=True))
    if content:
        parameters |= {name: [row[name] for row in content] for name in ("digest", "kind", "body")}
    return statement.run(connection, [parameters])


def _insert_all(
    table: Table, threads: Table, blobs: Table, has_content: bool, rows: int
) -> tuple[Prepared, Sequence[str], itemgetter[Any]]:
    """A statement for so many rows, the names of its first parameters, and how to get those in order from a row."""
    of_thread = threads.c.number == bindparam("of"), threads.c.epoch == bindparam("in_epoch")
    locked = select(threads.c.number).where(*of_thread).with_for_update(read=True, key_share=True).cte("locked")
    columns, of_content = _columns(table), _columns(blobs)

    def given(new: FromClause) -> Select[Any]:
        return select(locked.c.number, *new.c).select_from(locked.join(new, true()))

    # Cast, since a parameter that is only selected has no type there.
    data = [tuple(cast(bindparam(f"{each.name}_{at}"), each.type) for each in columns) for at in range(rows)]
    new = values(*(column(each.name, each.type) for each in columns), name="given").data(data)
    adding = insert(table).from_select(["thread", *columns], given(new))
    if has_content:
        arrays = func.unnest(*(bindparam(each.name, type_=ARRAY(each.type)) for each in of_content))
        content = given(arrays.table_valued(*(each.name for each in of_content)).render_derived(name="new"))
        missing = postgresql.insert(blobs).from_select(["thread", *of_content], content).on_conflict_do_nothing()
        adding = adding.add_cte(missing.cte("content"))
    names = ["of", "in_epoch", *(f"{each.name}_{at}" for at in range(rows) for each in columns)]
    return Prepared(adding), names, itemgetter(*(each.name for each in columns))
