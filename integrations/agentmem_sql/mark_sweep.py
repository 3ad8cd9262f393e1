"""Garbage collection: deletes content without references, by mark and sweep over one thread.

Content refers to content (a list to its nodes, those to items), so live content is marked starting from the thread's
checkpoints and pending writes. This takes an exclusive lock on the thread's row (see `writer`) and increases the
thread's epoch, so that no process relies on what it remembers.

To report what would be deleted, no lock is needed if content is read before the rows that refer to it: both are
committed together, so while the epoch stays the same, nothing that was read can have lost its reference.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, case, delete, func, null, select, update

from agentmem.errors import StorageError
from agentmem_sql.list_tree import LEAVES, OWN, parse
from agentmem_sql.protection import Protection
from agentmem_sql.reader import chunks
from agentmem_sql.rows import unpack_content
from agentmem_sql.schema import Tables, by


class Content(NamedTuple):
    """The content of a thread: its digests, and the references of those that have any."""

    digests: Set[bytes]
    links: Mapping[bytes, Collection[bytes]]


class Sweeper:
    """Marks and sweeps the content of single threads."""

    def __init__(self, tables: Tables, protection: Protection) -> None:
        self._protection = protection
        threads, checkpoints, writes, blobs = tables.threads, tables.checkpoints, tables.writes, tables.blobs
        chosen = by(blobs, "thread") & blobs.c.digest.in_(bindparam("digests", expanding=True))
        counted_up = update(threads).where(threads.c.number == bindparam("thread"))
        self._count_up = counted_up.values(epoch=threads.c.epoch + 1)
        self._referring = select(checkpoints.c.content, checkpoints.c.history).where(by(checkpoints, "thread"))
        self._written = select(writes.c.digest).where(by(writes, "thread")).distinct()
        body = case((blobs.c.kind.not_in(LEAVES), blobs.c.body), else_=null())
        self._all = select(blobs.c.digest, blobs.c.kind, body).where(by(blobs, "thread"))
        self._own = select(blobs.c.digest).where(chosen, blobs.c.kind == OWN)
        self._free = delete(blobs).where(chosen)
        self._weigh = select(func.sum(func.length(blobs.c.body))).where(chosen)

    def free_replaced(self, connection: Connection, thread: int, replaced: Collection[bytes]) -> bool:
        """Delete the content of replaced pending writes; gives whether the whole thread had to be swept.

        Content of one write only (see `list_tree.own_body`) is simply deleted: no process relies on it, so the epoch
        stays the same. Older versions stored other content too, and so do values that are too large for one row.
        """
        own = set(connection.execute(self._own, {"thread": thread, "digests": sorted(replaced)}).scalars())
        if own != set(replaced):
            self.sweep(connection, thread)
            return True
        connection.execute(self._free, {"thread": thread, "digests": sorted(own)})
        return False

    def sweep(self, connection: Connection, thread: int) -> None:
        """Delete the content of a thread that nothing refers to; raises as `content`."""
        content = self.content(connection, thread)
        of = {"thread": thread}
        roots: set[bytes] = set(connection.execute(self._written, of).scalars())
        for packed, history in connection.execute(self._referring, of):
            roots.update(referred(packed, history))
        self.free(connection, thread, unreachable(content, roots))

    def free(self, connection: Connection, thread: int, dead: Collection[bytes]) -> None:
        """Delete content that nothing refers to, and increase the thread's epoch."""
        for part in chunks(sorted(dead)):
            connection.execute(self._free, {"thread": thread, "digests": part})
        connection.execute(self._count_up, {"thread": thread})

    def content(self, connection: Connection, thread: int) -> Content:
        """Everything stored in a thread, whether anything refers to it or not.

        Raises:
            StorageError: some content cannot be read, so that its references are unknown.
        """
        rows = connection.execute(self._all, {"thread": thread}).all()
        return Content({row[0] for row in rows}, {row[0]: self._links(*row) for row in rows if row[2] is not None})

    def _links(self, digest: bytes, kind: int, stored: bytes) -> frozenset[bytes]:
        body = self._protection.decrypt(stored)
        if self._protection.digest(kind, body) != digest:  # otherwise what it refers to would count as unreachable
            raise StorageError(
                "a stored list of the thread is not what was stored (its digest differs), so what it refers to is "
                "unknown and nothing was taken out; restore the database from a backup, or delete the thread"
            )
        return frozenset(parse(kind, body).links)

    def weigh(self, connection: Connection, thread: int, digests: Collection[bytes]) -> int:
        """The stored size of content in bytes, without the database's own overhead."""
        parts = (
            connection.execute(self._weigh, {"thread": thread, "digests": part}) for part in chunks(sorted(digests))
        )
        return sum(int(size.scalar_one() or 0) for size in parts)


def referred(packed: bytes, history: bytes | None) -> Iterable[bytes]:
    """The content that a checkpoint's row refers to in its columns `content` and `history`."""
    yield from unpack_content(packed).values()
    if history is not None:
        yield history


def links_of(contents: Mapping[bytes, tuple[int, bytes]]) -> dict[bytes, frozenset[bytes]]:
    """The references in new content, given as digest -> (kind, body)."""
    inner = {digest: content for digest, content in contents.items() if content[0] not in LEAVES}
    return {digest: frozenset(parse(*content).links) for digest, content in inner.items()}


def unreachable(content: Content, roots: Iterable[bytes]) -> set[bytes]:
    """The part of a thread's content that cannot be reached from the roots."""
    alive: set[bytes] = set()
    pending = set(roots)
    while pending:
        alive |= pending
        pending = {link for digest in pending for link in content.links.get(digest, ())} - alive
    return set(content.digests) - alive
