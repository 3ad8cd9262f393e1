"""Makes the results of docs/results: every arm on every task, for nano and SmolLM2, by `agentmem evaluate`.

    python -m benchmarks.results --data-dir data                 # both models, all steps, about four hours on two cores
    python -m benchmarks.results nano                            # nano alone, which needs no data
    python -m benchmarks.results smollm2 --only sgd,ttl --limit 4 --out runs/try --no-pages    # a try

Steps run side by side (`--jobs`), each in a process with one thread, the longest first. What was interrupted goes on
where it was: nothing that was asked is asked again. The page of a model, docs/results/MODEL_tasks.md, is written anew
from the reports below `--out`, and says of steps that were not run how to run them; SmolLM2's table of all tasks also
goes into the README. A new step is a line of `STEPS`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from agentmem.evaluation.report import put_into

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "results"
README_MODEL = "smollm2"
ARMS = "memory,zero,foreign,bare,whole,window,retrieval,hybrid"
OVERVIEW = {
    "memory": "memory",
    "zero": "empty memory",
    "foreign": "another's memory",
    "retrieval": "retrieval",
    "hybrid": "memory and retrieval",
    "whole": "whole conversation",
}
"""The arms of the table of all tasks, and what they are called there."""
# Cells of facts that are not in that table: there an empty memory is right, too, or no value is asked for.
_OTHER_CELLS = {"never-told", "rule"}
_MISSED = 1  # the exit code of `agentmem evaluate` where a bar is missed, which is a result too


@dataclass(frozen=True)
class Step:
    """A run of `agentmem evaluate`.

    Attributes:
        task: its task.
        limit: its `--limit`: with it all steps of a model together take less than six hours on two cores.
        minutes: about how long it takes on one core of a processor with AVX-512 BF16; an estimate from shorter runs.
        arms: who is asked; "" = the task's own.
        plot: whether there is a picture.
        data: whether it reads a data directory.
    """

    task: str
    limit: int
    minutes: int
    arms: str = ARMS
    plot: bool = True
    data: bool = True

    def command(self, model: str, out: Path, options: argparse.Namespace) -> list[str]:
        """The arguments of `agentmem`."""
        limit = self.limit if options.limit is None else options.limit
        words = ["evaluate", "--model", model, "--task", self.task, "--limit", str(limit), "--out", str(out)]
        if self.arms:
            words += ["--arms", self.arms]
        if model != "nano":
            words += ["--dtype", options.dtype]
        if self.data:
            words += [word for directory in options.data_dir for word in ("--data-dir", str(directory))]
        return [*words, "--plot", str(out / "plot.png")] if self.plot else words


STEPS: dict[str, tuple[Step, ...]] = {
    "nano": (
        Step("curves", 40, 15, data=False),
        Step("leak", 200, 2, arms="", plot=False, data=False),
    ),
    "smollm2": (
        Step("facts", 60, 75, data=False),
        Step("bfcl-memory", 155, 25),
        Step("longmemeval", 150, 30),
        Step("sgd", 200, 15),
        Step("ttl", 200, 15),
        Step("hotpotqa", 300, 35),
        Step("ifeval", 100, 30, arms="bare,zero,memory,foreign"),
        Step("curves", 40, 30, arms="memory,zero,foreign", data=False),
        Step("leak", 100, 5, arms="", plot=False, data=False),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps, and write the pages. Returns 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(STEPS)}; left out, all")
    parser.add_argument("--data-dir", type=Path, action="append", default=[], help="has the tasks' folders; repeatable")
    parser.add_argument("--only", default="", help="only these tasks, with commas between")
    parser.add_argument("--limit", type=int, help="most questions of each step, in place of its own")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--jobs", type=int, default=2, help="steps at once, each with one thread")
    parser.add_argument("--dtype", default="bfloat16", help="of SmolLM2; float32 is faster without AVX-512 BF16")
    parser.add_argument("--no-pages", action="store_true", help="leave docs/results as it is")
    options = parser.parse_args(arguments)
    models = options.models or list(STEPS)
    if unknown := [model for model in models if model not in STEPS]:
        parser.error(f"models are {', '.join(STEPS)}; found {unknown[0]}")
    only = {name for name in options.only.split(",") if name}
    if unknown := sorted(only - {step.task for model in models for step in STEPS[model]}):
        parser.error(f"no step of {', '.join(models)} is called {unknown[0]}")
    chosen = [(model, step) for model in models for step in STEPS[model] if not only or step.task in only]
    if not options.data_dir and any(step.data for _, step in chosen):
        parser.error("the tasks read a data directory: name it (--data-dir), see docs/howto/evaluate.md")
    chosen.sort(key=lambda each: -each[1].minutes)
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(lambda each: _run(*each, options), chosen))
    if not options.no_pages:
        for model in models:
            write_page(model, options.out)
        if README_MODEL in models:
            put_into(ROOT / "README.md", overview(README_MODEL, options.out), "tasks")
    return int(any(code not in (0, _MISSED) for code in codes))


def _run(model: str, step: Step, options: argparse.Namespace) -> int:
    out = options.out / model / step.task
    out.mkdir(parents=True, exist_ok=True)
    agentmem = Path(sys.executable).with_name("agentmem")
    started = time.monotonic()
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        words = [str(agentmem), *step.command(model, out, options)]
        code = subprocess.run(
            words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
        ).returncode
    minutes = (time.monotonic() - started) / 60
    outcome = "failed, see its log" if code not in (0, _MISSED) else "done"
    print(f"{model} {step.task}: {outcome} after {minutes:.1f} minutes, {out / 'log.txt'}", flush=True)
    return code


def write_page(model: str, out: Path, pages: Path = PAGES) -> None:
    """Put the reports of a model into its page, and the pictures beside it.

    Raises:
        ValueError: the page has no result marks.
    """
    sections = list[str]()
    for step in STEPS[model]:
        place = out / model / step.task
        report = place / "report.md"
        if not report.is_file():
            command = f"python -m benchmarks.results {model} --only {step.task}" + " --data-dir data" * step.data
            sections.append(f"## {step.task}\n\nNot run yet: `{command}`.")
            continue
        _, _, text = report.read_text("utf-8").partition("\n")  # without its title
        text = text.strip()
        lines = [text] if f"## {step.task}\n" in text else [f"## {step.task}", "", text]
        if (picture := place / "plot.png").is_file():
            name = f"{model}_{step.task}.png"
            (pages / name).write_bytes(picture.read_bytes())
            lines += ["", f"![Right replies by arm, with intervals: {step.task}]({name})"]
        sections.append("\n".join(lines))
    if any(_rows(step, out / model / step.task) for step in STEPS[model]):
        sections.insert(0, overview(model, out))
    put_into(pages / f"{model}_tasks.md", "\n\n".join(sections))


def overview(model: str, out: Path) -> str:
    """A table of all tasks that were run: each arm's share of right replies, and its prompt tokens in brackets."""
    lines = [
        f"| task | questions | {' | '.join(OVERVIEW.values())} |",
        f"|---|---:{'|---:' * len(OVERVIEW)}|",
    ]
    for step in STEPS[model]:
        if rows := _rows(step, out / model / step.task):
            questions = max(int(row["questions"]) for row in rows.values())
            cells = [
                f"{rows[arm]['share']:.2f} ({rows[arm]['prompt_tokens']:,.0f})" if arm in rows else ""
                for arm in OVERVIEW
            ]
            lines.append(f"| {step.task} | {questions:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(step: Step, place: Path) -> dict[str, dict[str, float]]:
    """The arms of a task that was run; of facts the means over cells. Empty where a report has no such table."""
    file = place / "results.json"
    results = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if step.task != "facts":
        return next((task["arms"] for task in results.get("tasks", ())), {})
    rows = dict[str, dict[str, float]]()
    for arm in OVERVIEW:
        chosen = [cell["arms"] for cell in results.get("cells", ()) if cell["cell"] not in _OTHER_CELLS]
        cells = [arms[arm] for arms in chosen if arm in arms]
        if cells:
            means = {key: sum(cell[key] for cell in cells) / len(cells) for key in ("share", "prompt_tokens")}
            rows[arm] = means | {"questions": sum(cell["questions"] for cell in cells)}
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
