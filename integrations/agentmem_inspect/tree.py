"""Checkpoints as a tree with its branches side by side, like the log of a version control system.

The newest checkpoint is at the top. Each branch has a column; where two branches came from one checkpoint, their lines
join on the way down to it. A column is free again below the join, so many short branches need few columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentmem_inspect.catalog import Link

ROW_HEIGHT, COLUMN_WIDTH = 44, 16  # in CSS pixels


@dataclass(frozen=True)
class DrawnRow:
    """A checkpoint's row of the picture.

    Attributes:
        link: the checkpoint.
        column: where its dot is.
        lines: from a column at the upper edge of the row to one at its lower edge. None stands for the dot: a line
            that begins or ends at it.
        tip: whether no checkpoint has this one as its parent.
    """

    link: Link
    column: int
    lines: tuple[tuple[int | None, int | None], ...]
    tip: bool

    @property
    def columns(self) -> int:
        """How many columns the row needs."""
        return 1 + max([self.column, *(end for line in self.lines for end in line if end is not None)])

    def paths(self) -> list[tuple[int, str]]:
        """The lines as paths of SVG, each with the column that it belongs to."""
        drawn = []
        for upper, lower in self.lines:
            x0, y0 = _x(self.column if upper is None else upper), ROW_HEIGHT // 2 if upper is None else 0
            x1, y1 = _x(self.column if lower is None else lower), ROW_HEIGHT // 2 if lower is None else ROW_HEIGHT
            middle = (y0 + y1) / 2
            bend = f"V{y1}" if x0 == x1 else f"C{x0} {middle:g} {x1} {middle:g} {x1} {y1}"
            drawn.append((max(self.column if end is None else end for end in (upper, lower)), f"M{x0} {y0}{bend}"))
        return drawn

    @property
    def x(self) -> int:
        """Where the dot is."""
        return _x(self.column)


def draw(links: Sequence[Link], start: int = 0, stop: int | None = None) -> list[DrawnRow]:
    """Rows of the picture, from `start` up to `stop`; `links` are newest first, children before their parents."""
    there = {link.id for link in links}
    lanes: list[str | None] = []  # by column, the checkpoint that its line leads down to
    rows = []
    for at, link in enumerate(links[:stop]):
        tip = link.id not in lanes
        if tip:
            column = _free(lanes)
        else:
            column = lanes.index(link.id)
            lanes[column] = None
        parent = link.parent if link.parent in there else None
        above, joins = list(lanes) if at >= start else [], None
        if parent is not None and parent in lanes:
            joins = lanes.index(parent)
            lanes[joins] = None
            lanes[min(joins, column)] = parent  # the left of the two goes on
        elif parent is not None:
            lanes[column] = parent
        if at >= start:
            lines: list[tuple[int | None, int | None]] = [] if tip else [(column, None)]
            if parent is not None:
                lines.append((None, lanes.index(parent)))
            for lane, waits in enumerate(above):
                if waits is not None:
                    lines.append((lane, lanes.index(waits) if lane == joins else lane))
            rows.append(DrawnRow(link, column, tuple(lines), tip))
        while lanes and lanes[-1] is None:
            lanes.pop()
    return rows


def _free(lanes: list[str | None]) -> int:
    """The first free column, made if there is none."""
    if None in lanes:
        return lanes.index(None)
    lanes.append(None)
    return len(lanes) - 1


def _x(column: int) -> int:
    return column * COLUMN_WIDTH + COLUMN_WIDTH // 2
