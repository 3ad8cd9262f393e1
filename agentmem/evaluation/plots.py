"""Draws results of tasks by arms. matplotlib is imported when it is needed, and without a screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentmem.errors import MissingExtraError
from agentmem.training.contexts import SETUPS, Arm

_COLOURS = {"own": "C0", "foreign": "0.6", "empty": "0.6", None: "C1"}
"""By whose memory an arm has: the arms that show what memory does, its controls, and what has no memory."""


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
    pyplot = import_pyplot()
    tasks = results["tasks"]
    names: list[Arm] = [arm for arm in SETUPS if any(arm in task["arms"] for task in tasks)]
    size = (1.6 + 2.4 * len(tasks), 1.2 + 0.32 * len(names))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, task in zip(panels[0], tasks, strict=True):
        for place, arm in enumerate(names):
            if (row := task["arms"].get(arm)) is None:
                continue
            # A bar from end to end, since the share need not lie in the middle of its interval, nor within it.
            colour = _COLOURS[SETUPS[arm].memory] if arm != "constant" else "0.6"
            panel.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2, alpha=0.5)
            panel.plot(row["share"], place, "o", color=colour, markersize=5)
        panel.set(title=f"{task['task']} ({task['questions']:,})", xlim=(-0.02, 1.02), xlabel="right")
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
