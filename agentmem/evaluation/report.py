"""Presents a results file: the table of the README, a plot of the curves, and the cells that miss their bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentmem.evaluation.plots import import_pyplot
from agentmem.evaluation.recall import ARMS, BINDINGS, FILLERS, Arm
from agentmem.evaluation.runner import shares
from agentmem.training.intervals import Share


def marks(name: str = "results") -> tuple[str, str]:
    """The lines of a page between which results stand."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


BEGIN, END = marks()

_NAMES: dict[Arm, str] = {
    "whole": "whole conversation in the prompt, no memory",
    "window": "question alone, no memory",
    "zeroed": "memory set to zero",
    "foreign": "memory of another conversation",
    "memory": "memory",
}


def missed_bars(results: dict[str, Any]) -> list[str]:
    """A line for each cell whose memory arm is below its bar."""
    return [
        f"{cell.bindings} bindings, {cell.fillers} fillers: {s.value:.3f}, bar {cell.bar:.2f}"
        for cell, s in shares(results, "memory")
        if cell.bar is not None and s.value < cell.bar
    ]


def markdown(results: dict[str, Any]) -> str:
    """The results as markdown: the memory arm cell by cell, then all arms side by side."""
    memory = {(c.bindings, c.fillers): s for c, s in shares(results, "memory")}
    fillers = [f for f in FILLERS if any(key[1] == f for key in memory)]
    lines = [
        "Exact answers by the memory alone (nothing of the conversation in the prompt), with 95 % intervals:",
        "",
        "| facts told | " + " | ".join(f"{f} messages between" for f in fillers) + " |",
        "|---" * (len(fillers) + 1) + "|",
    ]
    for n in BINDINGS:
        row = [memory.get((n, f)) for f in fillers]
        if any(row):
            cells = [f"{s.value:.3f} ({s.low:.3f}-{s.high:.3f})" if s else "" for s in row]
            lines.append(f"| {n} | " + " | ".join(cells) + " |")
    lines += ["", "The same questions by arm, all numbers of facts together:", ""]
    lines.append("| arm | " + " | ".join(f"{f} messages between" for f in fillers) + " | questions |")
    lines.append("|---" * (len(fillers) + 2) + "|")
    for arm in ARMS:
        cells_of_arm = list(shares(results, arm))
        if cells_of_arm:
            pooled = [_pooled([s for c, s in cells_of_arm if c.fillers == f]) for f in fillers]
            lines.append(
                f"| {_NAMES[arm]} | " + " | ".join(pooled) + f" | {sum(s.questions for _, s in cells_of_arm):,} |"
            )
    lines += ["", f"Measured in {results['seconds'] / 60:.0f} minutes ({results['machine']})."]
    return "\n".join(lines)


def details(results: dict[str, Any]) -> str:
    """Every cell and arm with its interval, as a markdown page."""
    lines = [
        f"# Recall of {results['model']}, cell by cell",
        "",
        "Share of exact answers (95 % interval; questions). Made by `agentmem evaluate`.",
        "",
        "| facts told | messages between | " + " | ".join(_NAMES[arm] for arm in ARMS) + " |",
        "|---" * (len(ARMS) + 2) + "|",
    ]
    by_cell = {arm: {(c.bindings, c.fillers): s for c, s in shares(results, arm)} for arm in ARMS}
    for row in results["cells"]:
        key = (row["bindings"], row["fillers"])
        row_shares = [by_cell[arm].get(key) for arm in ARMS]
        cells = [f"{s.value:.3f} ({s.low:.3f}-{s.high:.3f}; {s.questions:,})" if s else "" for s in row_shares]
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _pooled(parts: list[Share]) -> str:
    questions = sum(s.questions for s in parts)
    return f"{sum(s.right for s in parts) / questions:.3f}" if questions else ""


def put_into(page: Path, table: str, name: str = "results") -> None:
    """Replace what is between the result marks of a page.

    Raises:
        ValueError: the page has no such marks.
    """
    first, last = marks(name)
    text = page.read_text("utf-8")
    head, begin, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{page} has no place for results: it needs the lines {first} and {last}")
    page.write_text(f"{head}{first}\n{table}\n{last}{tail}", "utf-8")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw accuracy against the number of stated facts: a line for each number of messages between, controls in grey.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for arm, style in (("memory", "-o"), ("zeroed", ":"), ("foreign", "--")):
        for f in FILLERS:
            points = [(c.bindings, s) for c, s in shares(results, arm) if c.fillers == f]  # type: ignore[arg-type]
            if points:
                x, y = zip(*((n, s.value) for n, s in points), strict=True)
                label = f"{f} messages between" if arm == "memory" else None
                axes.plot(x, y, style, label=label, color=None if arm == "memory" else "0.6")
    axes.set(xlabel="facts told", ylabel="exact answers", ylim=(0, 1.02), xticks=BINDINGS)
    axes.legend(title="memory (controls in grey)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
