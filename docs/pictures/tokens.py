"""Draws the tokens of a prompt and the bytes kept, turn by turn of a long thread, from docs/results/long_thread.md.

The table there is made by `benchmarks/long_thread.py`; this reads its columns by their names.
"""

from __future__ import annotations

from matplotlib import pyplot
from style import INK, MEMORY, PROMPT, RESULTS, save

SOURCE = RESULTS / "long_thread.md"


def table() -> list[dict[str, str]]:
    """The rows of the page's table; a column of the whole history is named as such."""
    lines = [line for line in SOURCE.read_text("utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names, way = [], ""
    for name in head:
        before, colon, column = name.rpartition(": ")
        way = before if colon else way
        names.append(f"{way} {column}".strip())
    return [dict(zip(names, row, strict=True)) for row in rows]


def points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    """Turns and figures of a column, where there are any."""
    found = [(int(row["turn"]), row[column].replace(",", "")) for row in rows if row[column]]
    return [turn for turn, _ in found], [float(figure) for _, figure in found]


def draw() -> None:
    """One panel for the prompt, one for what is kept."""
    rows = table()
    figure, (prompt, kept) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for way, label, colour in (("window", "memory and a window", MEMORY), ("whole history", "whole history", PROMPT)):
        prompt.plot(*points(rows, f"{way} prompt tokens"), "o-", color=colour, label=label, markersize=4)
        kept.plot(*points(rows, f"{way} KV, kB"), "o-", color=colour, label=f"KV of the prompt, {label}", markersize=4)
    kept.plot(
        *points(rows, "window memory, kB"), "s--", color=INK, label="what the thread keeps: the memory", markersize=4
    )
    missing = [int(row["turn"]) for row in rows if not row["whole history prompt tokens"]]
    if missing:
        for axes in (prompt, kept):
            axes.axvline(missing[0], color=PROMPT, linewidth=0.8, linestyle=":")
        text = f"at turn {missing[0]}\nit does not fit"
        prompt.annotate(
            text, (missing[0], 0.5), (-4, 0), ("data", "axes fraction"), "offset points", ha="right", color=PROMPT
        )
    prompt.set(title="Tokens of a prompt", xlabel="turn", ylim=(0, None))
    kept.set(title="Kilobytes", xlabel="turn", yscale="log")
    prompt.legend(loc="upper left")
    kept.legend(loc=(0.02, 0.22), fontsize=8)
    save(figure, "tokens.svg", SOURCE)


if __name__ == "__main__":
    draw()
