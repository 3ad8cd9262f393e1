"""An analyst in three sessions, each a process of its own; then the third again with the memory off.

    python -m analysis_agent [--model nano] [--adapter DIR] [--data DIR]

Exits with 1 where a query does not follow the definitions, or an answer does not cite the query that gave it.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from agentmem.loading import load_tokenizer
from agentmem.prompt.transcript import Transcript
from analysis_agent.data import write_sales
from analysis_agent.phrases import SESSIONS, Terms
from analysis_agent.session import Outcome, Setup

_MARKER = ".analysis-agent"


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="analysis_agent", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="nano", help='"nano", a directory or a hub id')
    parser.add_argument("--adapter", help="a directory or a hub id; nano brings its own")
    parser.add_argument("--data", type=Path, default=Path("analysis-agent-data"), help="emptied first")
    given = parser.parse_args()
    if not Transcript(load_tokenizer(given.model)).takes_tools():
        parser.error(
            f"the chat template of {given.model} has no place for tools, and all that is shown here is tool calls"
        )
    started = time.monotonic()
    prepare(given.data)
    setup = Setup(str(given.data / "with-memory"), given.model, given.adapter)
    control = Setup(str(given.data / "without-memory"), given.model, given.adapter, memory=False)
    Path(setup.data).mkdir()
    write_sales(Path(setup.data) / "sales.csv")
    print("Session one: definitions")
    _run(0, setup)
    # The control starts from the same thread.
    shutil.copytree(setup.data, control.data)
    print("\nSession two, another process")
    outcomes = [_run(1, setup)]
    print("\nSession three, another process")
    outcomes.append(_run(2, setup))
    print("\nSession three with the memory off")
    without = _run(2, control)
    truths = true_totals(Path(setup.data) / "sales.csv", Terms())
    good = [kept(outcome, truth) for outcome, truth in zip(outcomes, truths, strict=True)]
    print()
    for number, (outcome, truth) in enumerate(zip(outcomes, truths, strict=True), start=2):
        right = sum(outcome.right.values())
        print(
            f"session {number}: {right} of {len(outcome.right)} calls right, answer {outcome.answer!r}, truth {truth}"
        )
    right = sum(without.right.values())
    print(f"memory off: {right} of {len(without.right)} calls right, answer {without.answer!r}")
    print(f"{time.monotonic() - started:.0f} s; the plot and the facts are in {Path(setup.data).resolve()}")
    print("The definitions held." if all(good) else "Falls short: not all definitions held.")
    return 0 if all(good) and (Path(setup.data) / "sums.png").exists() else 1


def prepare(data: Path) -> None:
    """An empty folder, in place of that of an earlier run; other folders with content are refused."""
    if data.exists():
        if any(data.iterdir()) and not (data / _MARKER).exists():
            sys.exit(f"{data} holds other things; give another folder with --data")
        shutil.rmtree(data)
    data.mkdir(parents=True)
    (data / _MARKER).touch()


def true_totals(table: Path, terms: Terms) -> tuple[int, int]:
    """What the sessions' questions should be answered with: counted here, without the agent's tools."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = [
            row for row in csv.DictReader(file) if row["branch"] != terms.branch and row["currency"] == terms.currency
        ]
    year = [row for row in rows if "2024-10-01" <= row["day"] < "2025-10-01"]
    return sum(int(row["amount"]) for row in rows), sum(int(row["amount"]) for row in year)


def kept(outcome: Outcome, truth: int) -> bool:
    """Whether every call followed the definitions, and the answer cites one fact, which is true.

    The fact counts, not the sentence about it: a very small model may miscopy digits.
    """
    value = re.search(r" is (\d+)\.", outcome.facts[0]) if outcome.facts else None
    return (
        bool(outcome.right)
        and all(outcome.right.values())
        and value is not None
        and int(value[1]) == truth
        and len(outcome.sources) == 1
    )


def _run(number: int, setup: Setup) -> Outcome:
    """A session in a process of its own."""
    subprocess.run([sys.executable, "-m", "analysis_agent.session", str(number), json.dumps(asdict(setup))], check=True)
    found = Path(setup.data) / f"outcome-{number}.json"
    return Outcome(**json.loads(found.read_text())) if number in range(1, len(SESSIONS) + 1) else Outcome()


if __name__ == "__main__":
    sys.exit(main())
