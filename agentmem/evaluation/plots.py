"""Draws results of tasks by arms. matplotlib is imported when it is needed, and without a screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentmem.errors import MissingExtraError
from agentmem.evaluation.curves import AXES
from agentmem.training.contexts import SETUPS, Arm

_COLOURS = {"own": "C0", "foreign": "0.6", "empty": "0.6", None: "C1"}
"""By whose memory an arm has: the arms that show what memory does, its controls, and what has no memory."""


_MARKS = "o^svDP"  # of arms that have a colour in common


def import_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtraError("matplotlib", "eval") from None
    return pyplot


def plot_arms(results: Mapping[str, Any], path: Path) -> None:
    """Draw the share of right replies with its interval, a panel for each task and a line for each arm.

    Args:
        results: of `agentmem.evaluation.comparison.run_comparison`.
        path: the picture; its suffix says which format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    tasks = results["tasks"]
    names: list[Arm] = [arm for arm in SETUPS if any(arm in task["arms"] for task in tasks)]
    size = (1.6 + 2.4 * len(tasks), 1.2 + 0.32 * len(names))
    with _panels(len(tasks), size, path) as panels:
        for panel, task in zip(panels, tasks, strict=True):
            for place, arm in enumerate(names):
                if (row := task["arms"].get(arm)) is None:
                    continue
                # A bar from end to end, since the share need not lie in the middle of its interval, nor within it.
                colour = _COLOURS[SETUPS[arm].memory] if arm != "constant" else "0.6"
                panel.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2, alpha=0.5)
                panel.plot(row["share"], place, "o", color=colour, markersize=5)
            panel.set(title=f"{task['task']} ({task['questions']:,})", xlim=(-0.02, 1.02), xlabel="right")
            panel.grid(axis="x", alpha=0.3)
        panels[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))


def plot_curves(results: Mapping[str, Any], path: Path) -> None:
    """Draw fading and filling, a panel for each and a line with intervals for each arm.

    Args:
        results: of `agentmem.evaluation.curves.run_curves`.
        path: the picture; its suffix says which format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    curves = [curve for curve in AXES if any(row["curve"] == curve for row in results["points"])]
    size = (4 * len(curves), 3.4)
    with _panels(len(curves), size, path) as panels:
        for panel, curve in zip(panels, curves, strict=True):
            rows = [row for row in results["points"] if row["curve"] == curve]
            places = [row["place"] for row in rows]
            for arm, (colour, line) in _styles([arm for arm in SETUPS if arm in rows[0]["arms"]]).items():
                shares = [row["arms"][arm] for row in rows]
                panel.plot(places, [share["share"] for share in shares], line, color=colour, label=arm, markersize=4)
                low, high = [share["low"] for share in shares], [share["high"] for share in shares]
                panel.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.set(title=curve, xlabel=AXES[curve], xscale="log", ylim=(-0.03, 1.03), xticks=places)
            panel.set_xticks(places, [str(place) for place in places], minor=False)
            panel.set_xticks([], minor=True)
        panels[0].set(ylabel="right")
        panels[0].legend()


def plot_facts(results: Mapping[str, Any], path: Path) -> None:
    """Draw the cells of facts, a line for each, with a mark and an interval for each arm.

    Args:
        results: of `agentmem.evaluation.facts.run_facts`.
        path: the picture; its suffix says which format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    cells = results["cells"]
    styles = _styles([arm for arm in SETUPS if any(arm in row["arms"] for row in cells)])
    with _panels(1, (8, 1.0 + 0.34 * len(cells)), path) as (panel,):
        for number, (arm, (colour, line)) in enumerate(styles.items()):
            rows = [(place, row["arms"][arm]) for place, row in enumerate(cells) if arm in row["arms"]]
            heights = [place + 0.6 * ((number + 0.5) / len(styles) - 0.5) for place, _ in rows]  # side by side
            for height, (_, share) in zip(heights, rows, strict=True):
                panel.plot([share["low"], share["high"]], [height, height], color=colour, linewidth=1.5, alpha=0.5)
            panel.plot([share["share"] for _, share in rows], heights, line[0], color=colour, label=arm, markersize=4)
        panel.set(yticks=range(len(cells)), ylim=(len(cells) - 0.5, -0.5), xlim=(-0.02, 1.02), xlabel="right")
        panel.set_yticklabels([row["title"] for row in cells])
        panel.grid(axis="x", alpha=0.3)
        panel.legend()


def _styles(arms: Sequence[Arm]) -> dict[Arm, tuple[str, str]]:
    """A colour, and a mark with a line, for each arm; arms that have the same colour have marks of their own."""
    styles, seen = dict[Arm, tuple[str, str]](), Counter[str]()
    for arm in arms:
        colour = _COLOURS[SETUPS[arm].memory]
        line = {"own": "-", "empty": ":"}.get(SETUPS[arm].memory or "", "--")
        styles[arm] = colour, _MARKS[seen[colour] % len(_MARKS)] + line
        seen[colour] += 1
    return styles


@contextmanager
def _panels(count: int, size: tuple[float, float], path: Path) -> Iterator[Any]:
    """Panels side by side, with one scale of y, in a picture of `size` inches; `path` gets it once they are drawn."""
    pyplot = import_pyplot()
    figure, panels = pyplot.subplots(1, count, figsize=size, sharey=True, squeeze=False, layout="constrained")
    try:
        yield panels[0]
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)
