"""Statements of the hot paths, compiled once for each dialect.

SQLAlchemy looks every statement up in its cache of compiled ones and sets up types for parameters and results.
Here all of them are bytes and integers, which every driver takes and gives as they are, so that can be left out:
it takes longer than SQLite needs to run the statement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, CursorResult, Executable


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
        self._texts: dict[str, Text] = {}

    def run(self, connection: Connection, parameters: Mapping[str, Any]) -> CursorResult[Any]:
        """Execute it once."""
        text = self._text(connection)
        if text is None:
            return connection.execute(self._counting, parameters)
        return connection.exec_driver_sql(text.sql, text.arrange(parameters))

    def run_all(self, connection: Connection, rows: Sequence[Mapping[str, Any]], *, counted: bool = False) -> int:
        """Execute it for every row; gives the number of rows that were changed, surely if ``counted``."""
        if len(rows) == 1:
            return self.run(connection, rows[0]).rowcount
        text = self._text(connection)
        if counted and connection.dialect.driver == "asyncpg":  # it counts the rows of single statements only
            return sum([self.run(connection, row).rowcount for row in rows])
        if text is None:
            return connection.execute(self._counting, rows).rowcount
        return connection.exec_driver_sql(text.sql, [text.arrange(row) for row in rows]).rowcount

    def _text(self, connection: Connection) -> Text | None:
        """What the driver is given; None where it depends on the connection."""
        if "schema_translate_map" in connection.get_execution_options():
            return None
        dialect = connection.dialect
        key = f"{dialect.name}+{dialect.driver}"
        found = self._texts.get(key)
        if found is None:
            compiled: Any = self._statement.compile(dialect=dialect)  # type: ignore[attr-defined]
            constants = {name: value for name, value in compiled.params.items() if value is not None}
            found = self._texts[key] = Text(compiled.string, compiled.positiontup, constants)
        return found
