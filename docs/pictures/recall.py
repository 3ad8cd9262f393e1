"""Draws what nano's memory holds (capacity) and for how long (retention), from docs/results/nano.json.

The figures are those of `agentmem evaluate --model nano`; every arm of the evaluation is in the pictures.
"""

from __future__ import annotations

import json
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from style import CONTROL, MEMORY, PROMPT, RESULTS, save

SOURCE = RESULTS / "nano.json"

_ARMS = {
    "memory": ("memory alone", MEMORY, "o-"),
    "whole": ("whole conversation in the prompt", PROMPT, "s-"),
    "foreign": ("memory of another conversation", CONTROL, "^--"),
    "zeroed": ("memory set to zero", CONTROL, "x:"),
    "window": ("question alone", CONTROL, "+-."),
}


def curve(axes: Axes, cells: list[dict[str, Any]], along: str, title: str) -> None:
    """Share of right answers with 95 % intervals, one line for each arm."""
    cells = sorted(cells, key=lambda cell: cell[along])
    places = list(range(len(cells)))
    for arm, (label, colour, line) in _ARMS.items():
        shares = [cell[arm]["right"] / cell[arm]["questions"] for cell in cells]
        errors = [
            [max(0.0, share - cell[arm]["low"]) for share, cell in zip(shares, cells, strict=True)],
            [max(0.0, cell[arm]["high"] - share) for share, cell in zip(shares, cells, strict=True)],
        ]
        axes.errorbar(places, shares, errors, fmt=line, color=colour, label=label, markersize=4, linewidth=1.3)
    axes.set(title=title, ylim=(-0.03, 1.05), xticks=places, xticklabels=[str(cell[along]) for cell in cells])


def draw() -> None:
    """Two panels: facts told one after another, and messages in between where the most were told."""
    cells = json.loads(SOURCE.read_text("utf-8"))["cells"]
    nearest, most = min(cell["fillers"] for cell in cells), max(cell["bindings"] for cell in cells)
    figure, (capacity, retention) = pyplot.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
    at_once = [cell for cell in cells if cell["fillers"] == nearest]
    curve(capacity, at_once, "bindings", f"Capacity: {nearest} messages between")
    capacity.set(xlabel="facts told", ylabel="exact answers")
    curve(retention, [cell for cell in cells if cell["bindings"] == most], "fillers", f"Retention: {most} facts told")
    retention.set(xlabel="messages between telling and asking")
    figure.legend(*capacity.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, "recall.svg", SOURCE)


if __name__ == "__main__":
    draw()
