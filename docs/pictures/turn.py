"""Draws the walk of a turn: what goes in, which passes read and write the memory, what comes out."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from style import CONTROL, INK, MEMORY, PROMPT, save

_STEPS = (
    ("align", "which messages has the\nrecord not seen yet?"),
    ("catch up", "new messages that the\nwindow does not show"),
    ("prompt", "the window, from\nposition 0"),
    ("reply", "token by token, cut\nwhere it ends, closed"),
    ("commit", "reply and state\ntogether, or neither"),
)
_WIDTH, _GAP = 1.75, 0.3


def box(axes: Axes, x: float, y: float, text: str, *, colour: str, height: float = 0.9, bold: str = "") -> None:
    """A rounded box with a heading and a text."""
    axes.add_patch(
        FancyBboxPatch((x, y), _WIDTH, height, boxstyle="round,pad=0.03,rounding_size=0.1", fc="white", ec=colour)
    )
    middle = x + _WIDTH / 2
    if bold:
        axes.text(middle, y + height - 0.2, bold, ha="center", va="center", color=colour, weight="bold")
    axes.text(middle, y + (height - 0.3 if bold else height) / 2, text, ha="center", va="center", fontsize=8, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, style: str = "-|>") -> None:
    """An arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=10, color=colour, linewidth=1.2))


def draw() -> None:
    """Messages above, the passes in the middle, the memory below."""
    figure, axes = pyplot.subplots(figsize=(9.6, 4.1), layout="constrained")
    axes.set(xlim=(-0.15, 10.25), ylim=(-0.15, 4.05))
    axes.axis("off")
    places = [index * (_WIDTH + _GAP) for index in range(len(_STEPS))]
    for x, (name, text) in zip(places, _STEPS, strict=True):
        box(axes, x, 1.6, text, colour=INK, bold=name)
    for x in places[:-1]:
        arrow(axes, (x + _WIDTH + 0.04, 2.05), (x + _WIDTH + _GAP - 0.04, 2.05), INK)

    box(axes, places[0], 3.1, "messages: the history as\nthe graph state has it", colour=PROMPT, height=0.7)
    arrow(axes, (places[0] + _WIDTH / 2, 3.05), (places[0] + _WIDTH / 2, 2.56), PROMPT)
    box(axes, places[2], 3.1, "shown: system, facts,\nthe last messages", colour=PROMPT, height=0.7)
    arrow(axes, (places[2] + _WIDTH / 2, 3.05), (places[2] + _WIDTH / 2, 2.56), PROMPT)
    box(axes, places[4], 3.1, "the reply, for\nthe messages", colour=PROMPT, height=0.7)
    arrow(axes, (places[4] + _WIDTH / 2, 2.54), (places[4] + _WIDTH / 2, 3.05), PROMPT)

    labels = (
        "the state S,\nas it was",
        "read and written",
        "read; written by\nwhat is new",
        "read and written",
        "the new state S'",
    )
    for x, label in zip(places, labels, strict=True):
        ends = x in (places[0], places[-1])
        box(axes, x, 0.1, label, colour=MEMORY if ends else CONTROL, height=0.65)
    arrow(axes, (places[0] + _WIDTH / 2, 0.8), (places[0] + _WIDTH / 2, 1.55), MEMORY)
    for x in places[1:4]:
        arrow(axes, (x + _WIDTH / 2, 0.8), (x + _WIDTH / 2, 1.55), MEMORY, "<|-|>")
    arrow(axes, (places[4] + _WIDTH / 2, 1.55), (places[4] + _WIDTH / 2, 0.8), MEMORY)
    for x in places[:-1]:
        arrow(axes, (x + _WIDTH + 0.04, 0.42), (x + _WIDTH + _GAP - 0.04, 0.42), MEMORY)
    save(figure, "turn.svg")


if __name__ == "__main__":
    draw()
