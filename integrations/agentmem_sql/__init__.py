"""agentmem_sql: LangGraph threads in a SQL database.

``SQLAlchemySaver`` is a LangGraph checkpointer, synchronous and asynchronous in one class, on SQLite. It
needs the extra ``sql`` and imports no torch. See docs/checkpointer.md.
"""

from __future__ import annotations

from importlib import import_module

from agentmem.errors import MissingExtraError

try:
    for needed in ("sqlalchemy", "greenlet", "langgraph.checkpoint.base"):
        import_module(needed)
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "sqlalchemy", "sql") from error

from agentmem_sql.saver import SQLAlchemySaver

__all__ = ["SQLAlchemySaver"]
