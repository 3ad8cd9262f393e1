"""Runs tasks by arms, and reports them: shares with intervals, what they cost, and the differences that count.

What is written below the directory of the results:

    results.json            everything in numbers, with the files that were read and the fingerprints
    report.md               the same for readers
    predictions/TASK.jsonl  a line for each reply: arm, prompt, quoted context, reply, judgement, seed, fingerprints

A run that was interrupted is continued: what is in `predictions/` is not asked again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agentmem.engine import Engine
from agentmem.errors import ConfigError, MissingAdapterError
from agentmem.evaluation.facts import SEED
from agentmem.evaluation.requirements import Requirement, parse_requirement
from agentmem.evaluation.task import Task
from agentmem.evaluation.tasks import open_task
from agentmem.training.arms import CONTEXT_TOKENS, LEAST_CONTEXT, Writing, measure
from agentmem.training.contexts import ARMS, SETUPS, Arm, import_bm25s
from agentmem.training.intervals import Gain, Share
from agentmem.training.predictions import ArmResults

DEFAULT_ARMS: tuple[Arm, ...] = ("memory", "zero", "foreign", "bare")
"""What is measured where nothing else is asked for; they need no further package."""

_DIFFERENCES: tuple[tuple[Arm, tuple[Arm, ...]], ...] = (
    ("memory", ("zero", "foreign")),
    ("memory", ("zero", "foreign", "constant")),
    ("memory", ("bare",)),
    ("zero", ("bare",)),
    ("memory", ("window",)),
    ("memory", ("retrieval",)),
    ("window_memory", ("window",)),
    ("hybrid", ("retrieval",)),
    ("hybrid", ("memory",)),
    ("hybrid", ("memory", "retrieval")),
)
"""Arms, and those whose best they are compared with, in the order of the report."""


@dataclass(frozen=True)
class Comparison:
    """A run that is ready: everything that can be wrong without the model has been checked.

    Attributes:
        tasks: each task with the arms that it is measured by.
        requirements: what the results must be.
        context_tokens, max_tokens, concurrency, writing: see `agentmem.training.arms.measure`; `max_tokens` None: as
            each task says.
        limit, seed: see `open_task`.
    """

    tasks: tuple[tuple[Task, tuple[Arm, ...]], ...]
    requirements: tuple[Requirement, ...]
    context_tokens: int
    max_tokens: int | None
    concurrency: int
    writing: Writing
    limit: int | None
    seed: int


def prepare_comparison(
    tasks: Sequence[str],
    data_dirs: Sequence[Path],
    *,
    arms: Sequence[str] = DEFAULT_ARMS,
    limit: int | None = None,
    requirements: Sequence[str] = (),
    context_tokens: int = CONTEXT_TOKENS,
    max_tokens: int | None = None,
    concurrency: int = 32,
    writing: Writing = "remember",
    seed: int = SEED,
    has_memory: bool = True,
    own_file: Path | None = None,
) -> Comparison:
    """Read the data and check everything that needs no model.

    Args:
        tasks: keys of `agentmem.evaluation.tasks.TASKS`.
        data_dirs, limit, seed, own_file: see `open_task`.
        arms: who is asked; a task leaves out arms that it cannot ask (ifeval has no retrieval).
        requirements: see `agentmem.evaluation.requirements`.
        context_tokens, max_tokens, concurrency, writing: see `Comparison`.
        has_memory: False: the model is to be loaded without one.

    Raises:
        ConfigError: a task, an arm, a number or a requirement is not understood, or a task can ask none of the arms.
        DataError: see `open_task`.
        MissingExtraError: an arm or a task needs a package that is not installed.
        MissingAdapterError: arms need memory, and there is to be none.
    """
    by_name: dict[str, Arm] = {str(arm): arm for arm in ARMS}
    if unknown := [arm for arm in arms if arm not in by_name]:
        raise ConfigError(f"arms are {', '.join(ARMS)}; found {unknown[0]!r}")
    chosen = tuple(arm for arm in ARMS if arm in arms)
    if not tasks or not chosen:
        raise ConfigError("give a task and an arm at least; found none")
    for name, number, least in (
        ("context_tokens", context_tokens, LEAST_CONTEXT),
        ("max_tokens", max_tokens, 1),
        ("concurrency", concurrency, 1),
    ):
        if number is not None and number < least:
            raise ConfigError(f"{name} is {least} or more; found {number}")
    if any(SETUPS[arm].shows == "best" for arm in chosen):
        import_bm25s()
    needing = [arm for arm in chosen if SETUPS[arm].memory is not None]
    if needing and not has_memory:
        raise MissingAdapterError(
            f"the arms {', '.join(needing)} need memory, and the bare model has none; leave them out (--arms bare), or "
            "give an adapter"
        )
    opened = []
    for name in dict.fromkeys(tasks):
        task = open_task(name, data_dirs, limit, seed, own_file=own_file)
        fitting = tuple(arm for arm in chosen if arm in task.arms)
        if not fitting:
            raise ConfigError(f"the task {name} is measured by {', '.join(task.arms)}; found {', '.join(chosen)}")
        if "foreign" in fitting and len({probe.conversation for probe in task.probes}) < 2:
            raise ConfigError(
                f"the foreign arm needs the memory of another conversation, and these {len(task.probes)} questions of "
                f"{name} are about one; raise the limit, or leave the arm out"
            )
        opened.append((task, fitting))
    measured = {task.name: fitting for task, fitting in opened}
    required = tuple(parse_requirement(text, measured) for text in requirements)
    return Comparison(tuple(opened), required, context_tokens, max_tokens, concurrency, writing, limit, seed)


def run_comparison(
    comparison: Comparison,
    load: Callable[[], Engine],
    out: Path,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the tasks one after another; the results are written after each.

    Args:
        comparison: what is measured.
        load: loads the engine, which is closed at the end.
        out: the directory of the results.
        on_progress: is given the task's name, and the numbers of replies made and wanted.

    Returns:
        The content of `results.json`.

    Raises:
        MissingAdapterError: the engine has no memory, and an arm needs one.
    """
    started = time.monotonic()
    with load() as engine:
        results: dict[str, Any] = {
            "model": engine.name,
            "model_fingerprint": engine.model_fingerprint,
            "adapter_fingerprint": engine.adapter_fingerprint,
            "context_tokens": comparison.context_tokens,
            "concurrency": comparison.concurrency,
            "writing": comparison.writing,
            "limit": comparison.limit,
            "seed": comparison.seed,
            "seconds": 0,
            "tasks": [],
        }
        for task, arms in comparison.tasks:
            max_tokens = comparison.max_tokens or task.max_tokens
            measured = measure(
                engine,
                task.probes,
                arms,
                writing=comparison.writing,
                context_tokens=comparison.context_tokens,
                max_tokens=max_tokens,
                max_words=task.max_words,
                concurrency=comparison.concurrency,
                predictions=out / "predictions" / f"{task.name}.jsonl",
                labels={"task": task.name, "seed": comparison.seed},
                on_progress=on_progress and partial(on_progress, task.name),
            )
            required = [each for each in comparison.requirements if each.applies_to(task.name)]
            results["tasks"].append(_task_results(task, measured, max_tokens, required))
            results["seconds"] = round(time.monotonic() - started)
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            (out / "report.md").write_text(report(results) + "\n", "utf-8")
    return results


def missed_requirements(results: Mapping[str, Any]) -> list[str]:
    """A line for each requirement that is not met."""
    return [
        f"{task['task']}: {each['requirement']}, found {each['value']:.3f}"
        for task in results["tasks"]
        for each in task["requirements"]
        if not each["met"]
    ]


def _task_results(
    task: Task, measured: ArmResults, max_tokens: int, requirements: Sequence[Requirement]
) -> dict[str, Any]:
    differences = [(arm, others) for arm, others in _DIFFERENCES if {arm, *others} <= set(measured.arms)]
    checked = [(each.text, *each.check(measured)) for each in requirements]
    return {
        "task": task.name,
        "title": task.title,
        "licence": task.licence,
        "files": [{"name": file.path.name, "sha256": file.sha256} for file in task.files],
        "skipped": dict(task.skipped),
        "questions": len(task.probes),
        "conversations": len(measured.counts(measured.arms[0])),
        "max_tokens": max_tokens,
        "max_words": task.max_words,
        "arms": {
            arm: _share(measured.share(arm))
            | {
                "prompt_tokens": round(measured.prompt_tokens(arm), 1),
                "seconds": measured.seconds(arm),
                "cut": measured.cut(arm),
            }
            for arm in measured.arms
        },
        "differences": [
            {"arm": arm, "over": list(others)} | _gain(measured.gain_over(arm, *others)) for arm, others in differences
        ],
        "kinds": {
            kind: {arm: _share(measured.of_kind(kind).share(arm)) for arm in measured.arms} for kind in measured.kinds
        },
        "requirements": [{"requirement": text, "value": value, "met": met} for text, value, met in checked],
    }


def _share(share: Share) -> dict[str, Any]:
    return {"share": share.value, **asdict(share)}


def _gain(gain: Gain) -> dict[str, Any]:
    return asdict(gain)


# The report.


def report(results: Mapping[str, Any]) -> str:
    """The results as a Markdown page."""
    about = f"{results['context_tokens']} tokens of context for arms that show some of the conversation"
    lines = [
        f"# {results['model']} by task and arm",
        "",
        "Greedy replies to the same questions. Intervals are 95 %, over conversations; differences are paired. Made by "
        f"`agentmem evaluate`: {about}; seed {results['seed']}; {results['seconds'] / 60:.0f} minutes.",
    ]
    for task in results["tasks"]:
        lines += ["", *_task_lines(task, results["concurrency"])]
    return "\n".join(lines)


def _task_lines(task: Mapping[str, Any], concurrency: int) -> list[str]:
    lines = [
        f"## {task['task']}",
        "",
        f"A right reply shows: {task['title']}. {task['questions']:,} questions about {task['conversations']:,} "
        f"conversations; replies of at most {task['max_tokens']:,} tokens.",
        "",
        f"| | right (interval) | prompt tokens | seconds, {concurrency} at once |",
        "|---|---|---|---|",
    ]
    for arm, row in task["arms"].items():
        asked = arm != "constant"
        cost = f"{row['prompt_tokens']:,.0f} | {row['seconds']:.2f}" if asked else " | "
        lines.append(f"| {SETUPS[arm].title} (`{arm}`) | {row['share']:.3f} ({_range(row)}) | {cost} |")
    cut = [f"`{arm}` {row['cut']:,}" for arm, row in task["arms"].items() if row["cut"]]
    if cut:
        lines += [
            "",
            f"Prompts cut to what the model reads, the newest messages kept: {', '.join(cut)}.",
        ]
    if task["differences"]:
        lines += ["", "| difference | (interval) |", "|---|---|"]
        for row in task["differences"]:
            others = row["over"][0] if len(row["over"]) == 1 else f"max({', '.join(row['over'])})"
            lines.append(f"| {row['arm']} - {others} | {row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}) |")
    if ceiling := _ceiling(task["arms"]):
        lines += ["", ceiling]
    if len(task["kinds"]) > 1:
        arms = list(task["arms"])
        lines += ["", f"| questions | {' | '.join(arms)} | number |", "|---" * (len(arms) + 2) + "|"]
        for kind, row in task["kinds"].items():
            shares = " | ".join(f"{row[arm]['share']:.3f}" for arm in arms)
            lines.append(f"| {kind} | {shares} | {row[arms[0]]['questions']:,} |")
    if task["skipped"]:
        lines += ["", *(f"- left out: {count:,} x {reason}" for reason, count in task["skipped"].items())]
    if task["requirements"]:
        lines.append("")
    for each in task["requirements"]:
        met = "met" if each["met"] else "falls short"
        lines.append(f"- {met}: `{each['requirement']}`, found {each['value']:.3f}")
    return lines


def _ceiling(arms: Mapping[str, Mapping[str, Any]]) -> str:
    if not {"memory", "whole"} <= set(arms) or not arms["whole"]["share"]:
        return ""
    return f"Share of the ceiling (memory / whole): {arms['memory']['share'] / arms['whole']['share']:.2f}."


def _range(row: Mapping[str, Any]) -> str:
    return f"{row['low']:.2f}-{row['high']:.2f}"
