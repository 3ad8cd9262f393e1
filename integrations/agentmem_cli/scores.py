"""The inputs and reports of the demo's processes, and the bars that the demo must reach. Light to import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from agentmem_cli.options import Loading

Arm = Literal["memory", "zeroed", "foreign"]

NAMES: dict[Arm, str] = {
    "memory": "the thread's memory",
    "zeroed": "memory zeroed",
    "foreign": "another thread's memory",
}

MISSES = 1  # questions that the memory may get wrong
CHANCE = 4  # a control may get one of so many questions right


@dataclass(frozen=True)
class Setup:
    """One run: the seed, how the model is loaded, and the directory that holds everything."""

    seed: int
    loading: Loading
    data: str

    def to_json(self) -> str:
        """The setup as text for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """The setup from the result of `to_json`."""
        values = json.loads(text)
        return cls(values["seed"], Loading(**values["loading"]), values["data"])

    @property
    def threads(self) -> Path:
        """The SQLite file of the threads."""
        return Path(self.data) / "threads.db"

    @property
    def facts(self) -> Path:
        """The directory of the exact facts."""
        return Path(self.data) / "facts"

    @property
    def scores(self) -> Path:
        """The file for the asking process's report."""
        return Path(self.data) / "scores.json"


@dataclass(frozen=True)
class Score:
    """How many of the questions were answered right."""

    right: int
    questions: int

    @property
    def by_chance(self) -> int:
        """How many a control may get right."""
        return self.questions // CHANCE

    def __str__(self) -> str:
        return f"{self.right} of {self.questions}"


@dataclass(frozen=True)
class Report:
    """The asking process's results: the arms' scores, and whether citing and rewinding worked."""

    arms: Mapping[Arm, Score]
    cites: bool
    rewound: bool


def shortfalls(arms: Mapping[Arm, Score]) -> list[str]:
    """The bars that the demo misses; empty if it reaches all."""
    memory = arms["memory"]
    problems = []
    if memory.questions - memory.right > MISSES:
        problems.append(f"{NAMES['memory']}: {memory} right, at most {MISSES} miss allowed")
    for arm in ("zeroed", "foreign"):
        if arms[arm].right > (most := arms[arm].by_chance):
            problems.append(f"{NAMES[arm]}: {arms[arm]} right, at most {most} by chance allowed")
    return problems


def write_scores(setup: Setup, arms: Mapping[Arm, Score], cites: bool, rewound: bool) -> None:
    """Write the report for the parent process."""
    report = {"arms": {arm: asdict(score) for arm, score in arms.items()}, "cites": cites, "rewound": rewound}
    setup.scores.write_text(json.dumps(report, indent=2))


def read_scores(setup: Setup) -> Report:
    """Read the report that `write_scores` wrote."""
    report: dict[str, Any] = json.loads(setup.scores.read_text())
    return Report({arm: Score(**s) for arm, s in report["arms"].items()}, report["cites"], report["rewound"])
