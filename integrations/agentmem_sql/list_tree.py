"""Lists as content-addressed trees: each distinct value is stored once under its digest, and lists refer to items.

The kinds of content:

    VALUE     a serialised value: the serializer's type tag, a zero byte, its bytes
    LIST      a list: what it holds (see below), and the entries that are in no node, level by level
    NODE      16 entries of a level
    SPLIT     the digests of the parts of a body that is too large for one row
    PART      such a part
    HISTORY   what pruned ancestors wrote to delta channels (see `reader`)
    OWN       the value of one pending write that may be replaced (see `own_body`)
    WITNESS   nothing: that it is there says that a checkpoint is, whose row may have lost its keys (see `rows`)

An entry of the lowest level is the digest of an item, or a short item itself. Every 16 entries of a level form a NODE,
whose digest is an entry of the level above; the rest of each level, fewer than 16 entries, is in the LIST. So nodes
never change, lists with the same beginning share nodes, and a list that grows by an item stores that item and a LIST of
some 600 bytes, however long it is. Lists of numbers are cut into runs of 256, each a VALUE, and long lists of other
small items into runs of 64, the last ones of 8. A snapshot of a delta channel that holds a list is stored as that list.

Pure functions: no database, no serializer settings.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agentmem.errors import StorageError
from agentmem_sql.schema import DIGEST_BYTES

VALUE, LIST, NODE, SPLIT, PART, HISTORY, OWN, WITNESS = range(8)
LEAVES = frozenset({VALUE, PART, OWN, WITNESS})  # kinds that refer to nothing

# What a LIST holds.
ITEMS, RUNS, SNAPSHOT, SNAPSHOT_RUNS = range(4)  # RUNS after each: the same as runs of items

FANOUT = 16
# Items of a run: numbers; others; those that are too few for one. And most bytes of an item in a run, on average.
NUMBERS, RUN, LAST_RUN, RUN_ITEM = 256, 64, 8, 256
INLINE = 48  # most bytes of an item that is not stored in a row of its own
# The smallest packet limit in use (MySQL's default of 16 MB) holds a body of this size however it is quoted.
PART_BYTES = 4 * 2**20

# Before the entries of a LIST: what it holds, number of levels; then each level's number of entries, highest first
LIST_HEAD = struct.Struct(">BB")
OWN_MARK = b"\xff"  # begins the body of an OWN; no serializer's type tag begins so
LINK = b"\0"  # before a digest; before an item stands its length, 1 to INLINE
_LINK_BYTES = len(LINK) + DIGEST_BYTES


class Inline(bytes):
    """An item that is its own entry."""

    __slots__ = ()


class Node(NamedTuple):
    """Parsed content that refers to other content: by digests, or in the lowest level by `Inline` items.

    Attributes:
        kind: LIST, NODE, SPLIT or HISTORY.
        entries: of a LIST those of all levels, highest first.
        counts: of a LIST the number of entries of each level.
        of: what a LIST holds.
    """

    kind: int
    entries: tuple[bytes, ...]
    counts: bytes = b""
    of: int = ITEMS

    @property
    def links(self) -> Iterator[bytes]:
        """The digests among the entries."""
        return (entry for entry in self.entries if type(entry) is bytes)


def own_body(place: bytes, value: bytes) -> bytes:
    """The body of an OWN: a digest of the write's key (32 bytes), and the serialised value.

    No other write has equal content, so when the write is replaced, its old content can be deleted without a search.
    """
    return OWN_MARK + place + value


def value_of(body: bytes) -> bytes:
    """The serialised value in the body of a VALUE or an OWN."""
    return body[len(OWN_MARK) + DIGEST_BYTES :] if body.startswith(OWN_MARK) else body


def parse(kind: int, body: bytes) -> Node:
    """The entries of a LIST, NODE, SPLIT or HISTORY body."""
    if kind == LIST:
        of, levels = LIST_HEAD.unpack_from(body)
        start = LIST_HEAD.size + levels
        return Node(kind, _entries(body, start), body[LIST_HEAD.size : start], of)
    if kind == NODE:
        return Node(kind, _entries(body, 0))
    if kind == SPLIT:
        return Node(kind, tuple(body[at : at + DIGEST_BYTES] for at in range(0, len(body), DIGEST_BYTES)))
    if kind == HISTORY:
        return Node(kind, tuple(digest for history in read_history(body).values() for digest in history.digests))
    raise StorageError(f"expected content of a kind up to {WITNESS}, found {kind}: a newer version wrote it; upgrade")


def _entries(body: bytes, start: int) -> tuple[bytes, ...]:
    if (len(body) - start) % _LINK_BYTES == 0 and not any(body[start::_LINK_BYTES]):  # nothing but links
        return tuple([body[at : at + DIGEST_BYTES] for at in range(start + 1, len(body), _LINK_BYTES)])
    entries: list[bytes] = []
    while start < len(body):
        length = body[start]
        end = start + 1 + (length or DIGEST_BYTES)
        piece = body[start + 1 : end]
        entries.append(Inline(piece) if length else piece)
        start = end
    return tuple(entries)


@dataclass(frozen=True, slots=True)
class History:
    """What a delta channel was before a checkpoint whose ancestors are gone: a value, and the writes to it.

    `seed` is the value's content; None if the parent has to be searched. `writes` are (task, content), oldest first.
    """

    seed: bytes | None
    writes: Sequence[tuple[str, bytes]]

    @property
    def digests(self) -> Iterator[bytes]:
        """All content that it needs."""
        if self.seed is not None:
            yield self.seed
        for _, digest in self.writes:
            yield digest


def history_body(channels: Mapping[str, History]) -> bytes:
    """The body of a HISTORY."""
    plain = {
        name: [history.seed and history.seed.hex(), [[task, digest.hex()] for task, digest in history.writes]]
        for name, history in channels.items()
    }
    return json.dumps(plain).encode()


def read_history(body: bytes) -> dict[str, History]:
    """The inverse of `history_body`."""
    return {
        name: History(seed and bytes.fromhex(seed), [(task, bytes.fromhex(digest)) for task, digest in writes])
        for name, (seed, writes) in json.loads(body).items()
    }
