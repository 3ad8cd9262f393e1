"""Pending writes of any checkpointer: where they lie, and how to store them so that they keep their order.

LangGraph orders the writes of a checkpoint by the path of their task, the task, and an index; its interface tells
neither path nor index. Where the paths are not known, paths are made up that give the same order: as few as that
takes, beginning with the empty one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from langgraph.checkpoint.base import WRITES_IDX_MAP, PendingWrite, writes_sort_key


class Slot(NamedTuple):
    """Where a write lies: its task, and the index of a special channel or the rank among the task's others."""

    task: str
    idx: int


class Write(NamedTuple):
    """A pending write without its value."""

    slot: Slot
    channel: str
    path: str | None  # None: not known
    digest: bytes = b""  # of its content, in a database of ours


class Call(NamedTuple):
    """A call of ``put_writes``; ``slots`` are those that it is for, the rest of ``writes`` are there already."""

    task: str
    path: str
    writes: list[tuple[str, Any]]
    slots: set[Slot]


def slots(pending: Iterable[tuple[Any, ...]]) -> list[Slot]:
    """Where writes (task, channel, ...) lie, given in order."""
    ranks: defaultdict[str, int] = defaultdict(int)
    found = []
    for task, channel, *_ in pending:
        if channel in WRITES_IDX_MAP:
            found.append(Slot(task, WRITES_IDX_MAP[channel]))
        else:
            found.append(Slot(task, ranks[task]))
            ranks[task] += 1
    return found


def in_order(rows: Iterable[Sequence[Any]]) -> list[Write]:
    """Rows (task, index, path, channel, and perhaps digest) in the order in which LangGraph reads them."""
    ordered = sorted(rows, key=lambda row: writes_sort_key(row[2], row[0], row[1]))
    places = slots((task, channel) for task, _, _, channel, *_ in ordered)
    return [Write(slot, row[3], row[2], *row[4:]) for slot, row in zip(places, ordered, strict=True)]


def paths(pending: Sequence[PendingWrite], known: Sequence[Write]) -> list[str]:
    """The path of each write: the real one if they are known, else one that keeps the order."""
    found = [write.path for write in known if write.path is not None]
    same = [(write.slot.task, write.channel) for write in known] == [(task, channel) for task, channel, _ in pending]
    if same and len(found) == len(pending):
        return found
    number = 0
    made = [""] * bool(pending)
    for before, after in pairwise(slots(pending)):
        number += after < before
        made.append(f"{number:08}" if number else "")
    return made


def calls(pending: Sequence[PendingWrite], of: Sequence[str]) -> Iterator[Call]:
    """The calls of ``put_writes`` that store the writes with the paths ``of`` them.

    A checkpointer makes a write's index from its position in the call and leaves those alone that are there. So a
    task's later writes come with all that are before them.
    """
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for number, (task, channel, _) in enumerate(pending):
        groups.setdefault((task, of[number], channel in WRITES_IDX_MAP), []).append(number)
    places = slots(pending)
    others: defaultdict[str, list[int]] = defaultdict(list)
    for (task, path, special), members in groups.items():
        if not special:
            others[task] += members
        numbers = members if special else others[task]
        yield Call(task, path, [pending[n][1:] for n in numbers], {places[n] for n in members})
