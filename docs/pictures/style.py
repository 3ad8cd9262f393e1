"""What the pictures share: colours, a plain look, and SVG files that say what they were drawn from.

A file is the same to the byte when it is drawn again from the same figures by the same matplotlib.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"

MEMORY, PROMPT, CONTROL, INK = "#1b6ca8", "#c0582b", "#9a9a9a", "#2b2b2b"

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "agentmem",
        "svg.fonttype": "path",  # the same picture wherever it is looked at
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "legend.frameon": False,
    }
)


def digest(source: Path) -> str:
    """SHA-256 of a results file."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def save(figure: Figure, name: str, source: Path | None = None) -> None:
    """Write a picture beside the scripts; ``source`` is the file its figures came from."""
    origin = None if source is None else f"{source.name} {digest(source)}"
    figure.savefig(HERE / name, metadata={"Date": None, "Source": origin}, facecolor="white")
    pyplot.close(figure)
    print(f"docs/pictures/{name}")
