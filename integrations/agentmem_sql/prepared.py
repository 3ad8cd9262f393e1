"""Statements of the hot paths, compiled once for each dialect and run on the driver's cursor.

SQLAlchemy looks every statement up in its cache of compiled ones, sets up types for parameters and results and
describes the columns of what comes back. Here everything is bytes and integers, which every driver takes and gives
as they are, so that can be left out: it takes longer than SQLite needs to run the statement. What SQLAlchemy does
about errors (wrapping them, invalidating connections, handlers of the engine's owner) is left to it, and so is the
whole statement on engines that are not ours, or where somebody listens to cursors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from typing import Any, TypeVar

from sqlalchemy import ARRAY, Column, ColumnElement, Connection, Dialect, Executable, Table, any_, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.sql.compiler import SQLCompiler

# An execution option of engines on which statements may go past SQLAlchemy's execution.
DIRECT = "agentmem_direct"

_LIST = "agentmem_list"
_CURSOR = "agentmem_cursor"
_MARKS = {"qmark": "?", "format": "%s"}

T = TypeVar("T")

Rows = Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Text:
    """A compiled statement: its SQL, the order of parameters that have no names, and those that SQLAlchemy adds."""

    sql: str
    order: Sequence[str] | None
    constants: Mapping[str, Any]

    def arrange(self, parameters: Mapping[str, Any]) -> Any:
        """The parameters as the driver takes them."""
        if self.constants:
            parameters = {**self.constants, **parameters}
        return parameters if self.order is None else tuple([parameters[name] for name in self.order])


class Prepared:
    """A statement whose parameters are all given, and no lists."""

    def __init__(self, statement: Executable) -> None:
        self._statement = statement
        self._counting = statement.execution_options(preserve_rowcount=True)
        self._texts: dict[tuple[type[Dialect], str], Text] = {}

    def run(self, connection: Connection, parameters: Mapping[str, Any]) -> int:
        """Execute it once; gives the number of rows that were changed."""
        text = self._text(connection)
        if text is None:
            return connection.execute(self._counting, parameters).rowcount
        return change(connection, text.sql, text.arrange(parameters))

    def run_all(self, connection: Connection, rows: Sequence[Mapping[str, Any]], *, counted: bool = False) -> int:
        """Execute it for every row; gives the number of rows that were changed, surely if ``counted``."""
        if len(rows) == 1:
            return self.run(connection, rows[0])
        text = self._text(connection)
        if counted and connection.dialect.driver == "asyncpg":  # it counts the rows of single statements only
            return sum([self.run(connection, row) for row in rows])
        if text is None:
            return connection.execute(self._counting, rows).rowcount
        return change(connection, text.sql, [text.arrange(row) for row in rows])

    def rows(self, connection: Connection, parameters: Mapping[str, Any]) -> Rows:
        """Execute it once; gives the rows that it selects, by position."""
        text = self._text(connection)
        if text is None:
            return [tuple(row) for row in connection.execute(self._statement, parameters)]
        return fetch(connection, text.sql, text.arrange(parameters))

    def _text(self, connection: Connection) -> Text | None:
        """What the driver is given; None where it depends on the connection."""
        if "schema_translate_map" in connection._execution_options:
            return None
        dialect = connection.dialect
        key = type(dialect), dialect.paramstyle
        found = self._texts.get(key)
        if found is None:
            compiled: Any = self._statement.compile(dialect=dialect)  # type: ignore[attr-defined]
            constants = {name: value for name, value in compiled.params.items() if value is not None}
            found = self._texts[key] = Text(compiled.string, compiled.positiontup, constants)
        return found


class PreparedLookup:
    """A SELECT of the rows whose ``column`` is in a list, which is the statement's last parameter.

    PostgreSQL is given the list as one array, so that the statement is always the same. Other drivers are given as
    many placeholders as there are items.
    """

    def __init__(self, column: Column[bytes], name: str, select: Callable[[ColumnElement[bool]], Executable]) -> None:
        """``select`` makes the statement from the condition; ``name`` is the parameter's."""
        self._name = name
        self._plain = select(column.in_(bindparam(name, expanding=True)))
        self._prepared = Prepared(select(_InList(column, name)))

    def rows(self, connection: Connection, parameters: Mapping[str, Any]) -> Rows:
        """The rows found, by position."""
        text = self._prepared._text(connection)
        dialect = connection.dialect
        if text is not None and dialect.name == "postgresql":
            return fetch(connection, text.sql, text.arrange(parameters))
        if text is None or dialect.paramstyle not in ("pyformat", *_MARKS):
            return [tuple(row) for row in connection.execute(self._plain, parameters)]
        items, before = parameters[self._name], text.arrange(parameters)
        # The list is the last thing in the statement, whatever the tables are called.
        head, _, tail = text.sql.rpartition(_LIST)
        if text.order is None:
            named = {f"{_LIST}_{at}": item for at, item in enumerate(items)}
            return fetch(connection, head + ", ".join([f"%({name})s" for name in named]) + tail, {**before, **named})
        marks = ", ".join([_MARKS[dialect.paramstyle]] * len(items))
        return fetch(connection, head + marks + tail, (*before, *items))


class _InList(ColumnElement[bool]):
    """Whether a column's value is in a list."""

    inherit_cache = False

    def __init__(self, column: Column[bytes], name: str) -> None:
        self.column = column
        self.name = name


@compiles(_InList)
def _marked(element: _InList, compiler: SQLCompiler, **options: Any) -> str:
    return f"{compiler.process(element.column, **options)} IN ({_LIST})"


@compiles(_InList, "postgresql")
def _array(element: _InList, compiler: SQLCompiler, **options: Any) -> str:
    items = bindparam(element.name, type_=ARRAY(element.column.type))
    return compiler.process(element.column == any_(items), **options)


def change(connection: Connection, sql: str, parameters: Any) -> int:
    """Execute a statement, for every one of a list of parameters; gives the number of rows that were changed."""
    if _is_watched(connection):
        return connection.exec_driver_sql(sql, parameters, {"preserve_rowcount": True}).rowcount
    count: int = _on_cursor(connection, sql, parameters, _count)
    return count


def fetch(connection: Connection, sql: str, parameters: Any) -> Rows:
    """Execute a statement; gives its rows."""
    if _is_watched(connection):
        return [tuple(row) for row in connection.exec_driver_sql(sql, parameters)]
    rows: Rows = _on_cursor(connection, sql, parameters, _all)
    return rows


def kept(table: Table, key: Hashable, make: Callable[[], T]) -> T:
    """What is made once for a table, and forgotten with it."""
    found: T | None = table.info.get(key)
    if found is None:
        found = table.info[key] = make()
    return found


def _is_watched(connection: Connection) -> bool:
    if not connection._execution_options.get(DIRECT, False):
        return True
    if not (connection._has_events or connection.engine._has_events):
        return False
    events = connection.dispatch
    return bool(events.before_cursor_execute or events.after_cursor_execute)


def _on_cursor(connection: Connection, sql: str, parameters: Any, result: Callable[[Any], Any]) -> Any:
    dialect, cursor = connection.dialect, None
    try:
        if result is _count and dialect.driver == "psycopg" and not dialect.is_async:
            return _on_kept_cursor(connection.connection, sql, parameters)
        cursor = connection.connection.cursor()
        if isinstance(parameters, list):
            dialect.do_executemany(cursor, sql, parameters)
        else:
            dialect.do_execute(cursor, sql, parameters)
        found = result(cursor)
        cursor.close()
        return found
    except BaseException as error:  # noqa: BLE001
        # It raises. Without the statement it wraps the errors of the driver only.
        statement = sql if isinstance(error, dialect.loaded_dbapi.Error) else None
        connection._handle_dbapi_exception(error, statement, None, cursor, None)


def _on_kept_cursor(connection: PoolProxiedConnection, sql: str, parameters: Any) -> int:
    """The number of rows that were changed, by a cursor of psycopg's that is kept for the next statement.

    Making one and finding out anew how parameters are sent takes a quarter of the time of a statement. One that
    rows were read with is not kept, since it holds them.
    """
    info = connection.info
    cursor = info.pop(_CURSOR, None) or connection.cursor()
    if isinstance(parameters, list):
        cursor.executemany(sql, parameters)
    else:
        cursor.execute(sql, parameters)
    info[_CURSOR] = cursor
    count: int = cursor.rowcount
    return count


_count, _all = attrgetter("rowcount"), methodcaller("fetchall")
