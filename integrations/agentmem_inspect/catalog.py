"""Threads and checkpoints as lists: what can be told from rows, without reading what a checkpoint holds.

So a thread of ten thousand checkpoints is shown as fast as one of ten. Links between checkpoints are read for all of a
thread (an id and its parent each); metadata only for those on a page, whose seals are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, select

from agentmem_sql import SQLAlchemySaver
from agentmem_sql.rows import decode_row, unpack_content
from agentmem_sql.saver import plain_serde
from agentmem_sql.schema import HASHED, decode_text, encode_text, open_key, thread_key
from agentmem_sql.statements import contains

PAGE = 50
_OWN = ("__", "branch:")  # what the names of LangGraph's own channels begin with


@dataclass(frozen=True)
class ListedThread:
    """A thread in the list: its number in the database, its id, how many checkpoints, and when one was stored last."""

    number: int
    name: str
    checkpoints: int
    newest: datetime | None


@dataclass(frozen=True)
class ThreadPage:
    """A page of threads, and how many there are on all pages."""

    threads: tuple[ListedThread, ...]
    total: int


class Link(NamedTuple):
    """A checkpoint and its parent, and when it was stored, in milliseconds since 1970."""

    id: str
    parent: str | None
    created: int

    @property
    def time(self) -> datetime | None:
        """When it was stored."""
        return _time(self.created)


@dataclass(frozen=True)
class Described:
    """What the row of a checkpoint tells.

    Attributes:
        step: LangGraph's number of it; None if it has none.
        source: what made it: "input", "loop", "update" or "fork"; "" if its metadata do not say.
        changed: the channels whose content is not that of its parent, without LangGraph's own.
    """

    step: int | None
    source: str
    changed: tuple[str, ...]


class Catalog:
    """Reads lists from the tables of a saver."""

    def __init__(self, saver: SQLAlchemySaver) -> None:
        self._parts = saver.parts
        self._tables = saver.parts.database.tables
        self._serde = plain_serde(saver.serde)

    def threads(self, part: str = "", *, page: int = 0) -> ThreadPage:
        """Threads whose id contains `part`, those written last first; pages count from 0."""
        threads, checkpoints = self._tables.threads, self._tables.checkpoints
        # By the index of threads and times: one look for each thread.
        newest = select(func.max(checkpoints.c.created)).where(checkpoints.c.thread == threads.c.number)
        last = func.coalesce(newest.correlate(threads).scalar_subquery(), 0).label("last")

        def read(connection: Connection) -> ThreadPage:
            listed, counted = select(threads.c.number, threads.c.name, last), select(func.count()).select_from(threads)
            values: dict[str, Any] = {}
            if part:
                found = contains(connection.dialect.name, threads.c.name, "part")
                listed, counted, values = listed.where(found), counted.where(found), {"part": encode_text(part)}
            listed = listed.order_by(last.desc(), threads.c.number.desc()).limit(PAGE).offset(page * PAGE)
            rows = connection.execute(listed, values).all()
            of_these = checkpoints.c.thread.in_([row.number for row in rows])
            sizes = select(checkpoints.c.thread, func.count()).where(of_these).group_by(checkpoints.c.thread)
            sized = {int(number): int(size) for number, size in connection.execute(sizes)}
            return ThreadPage(
                tuple(
                    ListedThread(row.number, decode_text(row.name), sized.get(row.number, 0), _time(row.last))
                    for row in rows
                ),
                connection.execute(counted, values).scalar_one(),
            )

        return self._parts.database.run(read)

    def name(self, number: int) -> str | None:
        """The id of a thread; None where there is none of this number."""
        name = select(self._tables.threads.c.name).where(self._tables.threads.c.number == number)
        found = self._parts.database.run(lambda connection: connection.execute(name).scalar_one_or_none())
        return None if found is None else decode_text(bytes(found))

    def number(self, name: str) -> int | None:
        """The number of a thread; None where there is none of this id."""
        threads = self._tables.threads
        number = select(threads.c.number).where(threads.c.key == thread_key(name))
        return self._parts.database.run(lambda connection: connection.execute(number).scalar_one_or_none())

    def namespaces(self, number: int) -> list[tuple[str, int]]:
        """The namespaces of a thread with their numbers of checkpoints, that of the main graph ("") first."""
        checkpoints = self._tables.checkpoints

        def read(connection: Connection) -> list[tuple[str, int]]:
            of_thread = checkpoints.c.thread == number
            counted = select(checkpoints.c.ns, func.count()).where(of_thread).group_by(checkpoints.c.ns)
            found = []
            for ns, count in connection.execute(counted).all():
                name = bytes(ns)
                if name.startswith(HASHED):
                    long = select(checkpoints.c.ns_name).where(of_thread, checkpoints.c.ns == ns).limit(1)
                    name = bytes(connection.execute(long).scalar_one())
                found.append((decode_text(name), int(count)))
            return sorted(found)

        return self._parts.database.run(read)

    def links(self, number: int, ns: str = "") -> list[Link]:
        """All checkpoints of a namespace, newest first."""
        checkpoints = self._tables.checkpoints
        rows = (
            select(checkpoints.c.id, checkpoints.c.parent, checkpoints.c.created)
            .where(checkpoints.c.thread == number, checkpoints.c.ns == open_key(ns))
            .order_by(checkpoints.c.id.desc())
        )
        found = self._parts.database.run(lambda connection: connection.execute(rows).all())
        return [
            Link(decode_text(bytes(own)), None if parent is None else decode_text(bytes(parent)), created)
            for own, parent, created in found
        ]

    def describe(self, number: int, thread: str, ns: str, links: Sequence[Link]) -> dict[str, Described]:
        """What the rows of these checkpoints tell, by id; those that were pruned meanwhile are left out.

        Raises:
            StorageError: a row is not what was stored.
        """
        checkpoints = self._tables.checkpoints
        ids = {link.id for link in links} | {link.parent for link in links if link.parent is not None}
        rows = select(checkpoints).where(
            checkpoints.c.thread == number,
            checkpoints.c.ns == open_key(ns),
            checkpoints.c.id.in_([encode_text(each) for each in ids]),
        )
        found = self._parts.database.run(lambda connection: connection.execute(rows).mappings().all())
        by_id = {decode_text(bytes(row["id"])): row for row in found}
        described = {}
        for link in links:
            if (row := by_id.get(link.id)) is None:
                continue
            stored = decode_row(self._parts.protection, self._serde, thread, row)
            above = by_id.get(link.parent or "")
            before = {} if above is None else unpack_content(above["content"])
            changed = [name for name, digest in stored.digests.items() if before.get(name) != digest]
            own = tuple(sorted(name for name in changed if not name.startswith(_OWN)))
            step = stored.metadata.get("step")
            described[link.id] = Described(
                step if isinstance(step, int) else None, str(stored.metadata.get("source") or ""), own
            )
        return described


def _time(milliseconds: int) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None
