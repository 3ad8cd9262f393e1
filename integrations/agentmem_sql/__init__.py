"""agentmem_sql: LangGraph threads in a SQL database.

`SQLAlchemySaver` is a LangGraph checkpointer, synchronous and asynchronous in one class, on SQLite, PostgreSQL,
MySQL and MariaDB. It needs the extra `sql` and imports no torch. See docs/checkpointer.md.
"""

from __future__ import annotations

from importlib import import_module

from agentmem.errors import MissingExtraError

try:
    for needed in ("sqlalchemy", "langgraph.checkpoint.base"):
        import_module(needed)
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "sqlalchemy", "sql") from error

from agentmem_sql.memory_history import MemoryStep
from agentmem_sql.prune import ThreadRetention
from agentmem_sql.retention import Retention, RetentionReport, StorageReport, ThreadSize
from agentmem_sql.saver import SQLAlchemySaver
from agentmem_sql.schema import metadata
from agentmem_sql.transfer import TransferError, TransferReport, acopy_threads, copy_threads

__all__ = [
    "MemoryStep",
    "Retention",
    "RetentionReport",
    "SQLAlchemySaver",
    "StorageReport",
    "ThreadRetention",
    "ThreadSize",
    "TransferError",
    "TransferReport",
    "acopy_threads",
    "copy_threads",
    "metadata",
]
