"""Delta channels: values that checkpoints do not contain, but that follow from earlier writes.

LangGraph stores such a channel's value now and then (the seed) and asks for the writes since then, along the parents of
a checkpoint. One recursive statement reads the rows of up to a hundred parents, another reads their writes with the
thread's epoch: if that has changed since the first row was read, something was removed, and all is read again.

When ancestors are pruned, what they wrote since the last seed is kept with their nearest survivor as its HISTORY: the
seed and the writes in order, by reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Integer, bindparam, cast, literal, select

from agentmem_sql.list_tree import HISTORY, History, read_history
from agentmem_sql.message_cache import Body, CachedThread
from agentmem_sql.reader import Holders, Missing, Reader, chunks
from agentmem_sql.rows import Address, Row, StoredWrite, check_seal, damaged, unpack_content
from agentmem_sql.schema import by, decode_text, open_key

_ANCESTORS = 100  # in one statement


@dataclass
class Ancestor:
    """A checkpoint on the way to the root: what it contains, and what its own pruned ancestors left."""

    ns: bytes
    id: bytes
    digests: Mapping[str, bytes]
    left: Mapping[str, History]
    writes: list[StoredWrite] = field(default_factory=list)


class AncestorReader:
    """Reads the ancestors of checkpoints."""

    def __init__(self, reader: Reader) -> None:
        self.protection = reader.protection
        self.reader = reader
        blobs, checkpoints = reader.tables.blobs, reader.tables.checkpoints
        columns = [column for column in checkpoints.c if column.name not in ("thread", "ns")]
        here = by(checkpoints, "thread", "ns")
        start = select(*columns, cast(literal(0), Integer).label("depth"))
        chain = start.where(here, checkpoints.c.id == bindparam("id")).cte("ancestors", recursive=True)
        step = select(*columns, chain.c.depth + 1)
        step = step.where(here, checkpoints.c.id == chain.c.parent, chain.c.depth < _ANCESTORS - 1)
        self._chain = select(chain.union_all(step)).order_by("depth")
        self._history = select(blobs.c.kind, blobs.c.body).where(by(blobs, "thread", "digest"))

    def read(
        self, connection: Connection, address: Address, channels: Sequence[str]
    ) -> tuple[dict[str, History], dict[bytes, Body], CachedThread] | None:
        """For each channel the nearest seed among a checkpoint's ancestors and the writes since; and the content.

        None if there is no such checkpoint.
        """
        before = None
        while (located := self.reader.locate(connection, address)) is not None:
            known, start = located
            try:
                ancestors = self._read_rows(connection, address, known, start, channels)
                histories = self.histories(connection, address.thread, known, ancestors, channels)
                wanted = {digest for history in histories.values() for digest in history.digests}
                return histories, self.reader.collect(connection, known, wanted), known
            except Missing:
                if before == (known.epoch, start):
                    raise damaged(address.thread, decode_text(start), "a value of an ancestor") from None
                before = known.epoch, start
        return None

    def rows(self, connection: Connection, keys: Mapping[str, Any]) -> list[Row]:
        """A checkpoint, given by `thread`, `ns` and `id`, and its ancestors: at most a hundred rows."""
        return [{**row, "ns": keys["ns"]} for row in connection.execute(self._chain, keys).mappings()]

    def ancestor(self, connection: Connection, thread: int | None, row: Row) -> Ancestor:
        """A checkpoint with what pruned ancestors left with it, still without its writes; raises `Missing`."""
        left: dict[str, History] = {}
        if row["history"] is not None:
            stored = connection.execute(self._history, {"thread": thread, "digest": row["history"]}).one_or_none()
            if stored is None or stored.kind != HISTORY:
                raise Missing
            body = self.protection.decrypt(stored.body)
            if self.protection.digest(HISTORY, body) != row["history"]:
                raise Missing
            left = read_history(body)
        return Ancestor(row["ns"], row["id"], unpack_content(row["content"]), left)

    def _read_rows(
        self, connection: Connection, address: Address, known: CachedThread, start: bytes, channels: Sequence[str]
    ) -> list[Ancestor]:
        """The checkpoint itself and its ancestors, until every channel is found; raises `Missing`."""
        ancestors: dict[bytes, Ancestor] = {}
        missing = set(channels)
        following: bytes | None = start
        while following is not None and missing:
            keys = {"thread": known.number, "ns": open_key(address.ns), "id": following}
            rows = self.rows(connection, keys)
            following = rows[-1]["parent"] if len(rows) == _ANCESTORS else None
            for row in rows:
                if row["id"] in ancestors:  # it was stored as its own ancestor
                    return list(ancestors.values())
                check_seal(self.protection, address.thread, row)
                ancestor = self.ancestor(connection, known.number, row)
                if ancestors:  # the checkpoint's own values do not count
                    missing -= ancestor.digests.keys()
                missing -= {name for name, history in ancestor.left.items() if history.seed is not None}
                ancestors[ancestor.id] = ancestor
                if not missing:
                    break
        if not ancestors:
            raise Missing
        return list(ancestors.values())

    def histories(
        self,
        connection: Connection,
        thread_id: str,
        known: CachedThread,
        ancestors: Sequence[Ancestor],
        channels: Sequence[str],
    ) -> dict[str, History]:
        """The seed and writes of each channel, along a checkpoint and its ancestors (the checkpoint stands first).

        Raises:
            Missing: something was removed from the thread meanwhile.
        """
        for part in chunks(ancestors[1:]):
            holders: Holders = {(known.number, ancestor.id): (thread_id, ancestor.writes) for ancestor in part}
            if self.reader.add_writes(connection, ancestors[0].ns, holders) != {(known.number, known.epoch)}:
                raise Missing
        return {name: _fold(ancestors, name) for name in channels}


def _fold(ancestors: Sequence[Ancestor], channel: str) -> History:
    newest_first: list[tuple[str, bytes]] = []
    for distance, ancestor in enumerate(ancestors):
        if distance:  # the checkpoint's own value and pending writes do not count
            own = [write for write in ancestor.writes if write.channel == channel]
            own.sort(key=lambda write: write.order, reverse=True)
            newest_first += [(write.task, write.digest) for write in own]
            if channel in ancestor.digests:
                return History(ancestor.digests[channel], newest_first[::-1])
        left = ancestor.left.get(channel)
        if left is not None:
            newest_first += reversed(left.writes)
            if left.seed is not None:
                return History(left.seed, newest_first[::-1])
    return History(None, newest_first[::-1])
