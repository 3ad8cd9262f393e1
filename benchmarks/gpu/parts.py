"""The parts of the benchmark, in the order of their value, and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 8.0
"""What the seconds of the parts are for."""


@dataclass(frozen=True)
class Setting:
    """What every part is told.

    Attributes:
        device: "cuda" or "cpu".
        tiny: whether shapes and counts are only to show that everything runs.
        out: the directory of the results.
    """

    device: str
    tiny: bool
    out: Path


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
        name: as it is given to `--part`, and of its files.
        title: what it tells.
        seconds: the most that it may take, its start included, of `MINUTES`; None: all that is left.
        function: what runs it, "module:function" in this package.
        triton: whether a rehearsal on a CPU runs Triton's kernels, in the interpreter.
    """

    name: str
    title: str
    seconds: float | None
    function: str
    triton: bool = False

    def limit(self, minutes: float, left: float) -> float:
        """Seconds that it may take when the whole has `minutes`, of which `left` seconds are left."""
        return left if self.seconds is None else min(left, self.seconds * minutes / MINUTES)


PARTS = (
    Part("kernels", "Triton kernels against the definition in float64", 90, "kernels:check", triton=True),
    Part("equivalence", "the device against golden vectors and the CPU", 75, "equivalence:check", triton=True),
    Part("steering", "decode, prefill and memory: bare against steered", 100, "steering:measure"),
    Part("sessions", "many sessions at once", 80, "many_sessions:measure"),
    Part("training", "steps of SmolLM2's recipe", 40, "training:measure"),
    Part("scan", "chunks of the scan", 50, "scan_chunks:measure", triton=True),
    Part("recipe", "SmolLM2's recipe to its end, with larger batches", None, "training:run_recipe"),
)
