"""What the public classes of this package have in common: a database, a store, and a way to drive steps.

Methods come in pairs that drive the same steps (see ``steps``): ``_run`` in this thread, ``_arun`` in this task.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self, TypeVar

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import Connection

from agentmem_sql.database import Database
from agentmem_sql.driving import adrive, drive
from agentmem_sql.packing import plain_serde
from agentmem_sql.steps import Steps, Store

T = TypeVar("T")


class Driven(BaseCheckpointSaver[str]):
    """A checkpointer on a database; what it can do is in its subclasses."""

    _store: Store
    _database: Database

    @property
    def _serde(self) -> SerializerProtocol:
        return plain_serde(self.serde)

    def _run(self, steps: Steps[T]) -> T:
        return drive(steps, lambda job: self._database.run(job.work, write=job.write, single=job.single))

    async def _arun(self, steps: Steps[T]) -> T:
        return await adrive(steps, lambda job: self._database.arun(job.work, write=job.write, single=job.single))

    # Opening and closing. Clones made by `with_allowlist` share the database, and close it for each other.

    def setup(self) -> None:
        """Make the tables now instead of on first use."""
        self._database.run(_nothing)

    async def asetup(self) -> None:
        """``setup`` for a task."""
        await self._database.arun(_nothing)

    def close(self) -> None:
        """Close every connection; later calls raise. Works in and outside an event loop."""
        self._database.close()

    async def aclose(self) -> None:
        """``close`` for a task."""
        await self._database.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _nothing(_connection: Connection) -> None:
    """The work of a transaction that is only begun and ended."""
