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
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agentmem.engine import Engine
from agentmem.errors import ConfigError, MissingAdapterError
from agentmem.evaluation.facts import SEED
from agentmem.evaluation.judge import Judge
from agentmem.evaluation.requirements import Requirement, parse_requirement
from agentmem.evaluation.task import Score, Task
from agentmem.evaluation.tasks import open_task
from agentmem.training.arms import CONTEXT_TOKENS, LEAST_CONTEXT, Writing, measure
from agentmem.training.contexts import (
    ARMS,
    COMPRESSED,
    NEAREST,
    RETRIEVING,
    SETUPS,
    STATIC,
    Arm,
    Compressor,
    Ranker,
    import_bm25s,
)
from agentmem.training.intervals import Gain, Mean, Share, holm, mean
from agentmem.training.predictions import ArmResults, best_constants
from agentmem.training.static import StaticAdapter

DEFAULT_ARMS: tuple[Arm, ...] = ("memory", "zero", "foreign", "bare")
"""What is measured where nothing else is asked for; they need no further package."""

_DIFFERENCES: tuple[tuple[Arm, tuple[Arm, ...]], ...] = (
    ("memory", ("zero", "foreign")),
    ("memory", ("zero", "foreign", "constant")),
    ("memory", ("bare",)),
    ("zero", ("bare",)),
    ("memory", ("static",)),
    ("memory", ("window",)),
    ("memory", ("retrieval",)),
    ("memory", ("dense",)),
    ("memory", ("memory_bank",)),
    ("memory", ("llmlingua",)),
    ("window_memory", ("window",)),
    ("whole_memory", ("whole",)),
    ("whole_memory", ("whole", "whole_foreign")),
    ("whole_memory", ("static_whole",)),
    ("hybrid", ("retrieval",)),
    ("hybrid", ("memory",)),
    ("hybrid", ("memory", "retrieval")),
    ("dense", ("retrieval",)),
    ("dense_hybrid", ("memory", "dense")),
)
"""Arms, and those whose best they are compared with, in the order of the report."""


@dataclass(frozen=True)
class Comparison:
    """A run that is ready: everything that can be wrong without the model has been checked.

    Attributes:
        tasks: each task with the arms that it is measured by.
        requirements: what the results must be.
        context_tokens, max_tokens, concurrency, writing, nearest, compress: see `agentmem.training.arms.measure`;
            `max_tokens` None: as each task says.
        static: what the arms with a static LoRA have.
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
    nearest: Ranker | None = None
    compress: Compressor | None = None
    static: StaticAdapter | None = None


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
    nearest: Ranker | None = None,
    judge: Judge | None = None,
    compress: Compressor | None = None,
    static: StaticAdapter | None = None,
) -> Comparison:
    """Read the data and check everything that needs no model.

    Args:
        tasks: keys of `agentmem.evaluation.tasks.TASKS`.
        data_dirs, limit, seed, own_file, judge: see `open_task`.
        arms: who is asked; a task leaves out arms that it cannot ask (ifeval has no retrieval).
        requirements: see `agentmem.evaluation.requirements`.
        context_tokens, max_tokens, concurrency, writing, nearest, compress, static: see `Comparison`.
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
    if set(chosen) & set(RETRIEVING):
        import_bm25s()
    if nearest is None and set(chosen) & set(NEAREST):
        raise ConfigError(f"the arms {', '.join(NEAREST)} need a ranker of passages (nearest); found none")
    if compress is None and set(chosen) & set(COMPRESSED):
        raise ConfigError(
            "the arm llmlingua compresses with the weights of LLMLingua-2, which are not at hand; name them "
            "(--llmlingua), or leave the arm out"
        )
    if static is None and set(chosen) & set(STATIC):
        raise ConfigError(
            f"the arms {', '.join(STATIC)} need a static LoRA: train one (agentmem train --static), and name its "
            "directory (--static)"
        )
    needing = [arm for arm in chosen if SETUPS[arm].memory is not None]
    if needing and not has_memory:
        raise MissingAdapterError(
            f"the arms {', '.join(needing)} need memory, and the bare model has none; leave them out (--arms bare), or "
            "give an adapter"
        )
    opened = []
    for name in dict.fromkeys(tasks):
        task = open_task(name, data_dirs, limit, seed, own_file=own_file, judge=judge)
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
    return Comparison(
        tuple(opened),
        required,
        context_tokens,
        max_tokens,
        concurrency,
        writing,
        limit,
        seed,
        nearest,
        compress,
        static,
    )


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
    started, static = time.monotonic(), comparison.static
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
            "static_fingerprint": "" if static is None else static.fingerprint,
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
                nearest=comparison.nearest,
                compress=comparison.compress,
                static=None if static is None else (static.fingerprint, partial(_with_static, static, load)),
                on_progress=on_progress and partial(on_progress, task.name),
            )
            required = [each for each in comparison.requirements if each.applies_to(task.name)]
            results["tasks"].append(_task_results(task, measured, max_tokens, required))
            results["seconds"] = round(time.monotonic() - started)
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            (out / "report.md").write_text(report(results) + "\n", "utf-8")
    return results


def _with_static(static: StaticAdapter, load: Callable[[], Engine]) -> Engine:
    return static.into(load())


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
    scores = {name: _scores(task, measured, score) for name, score in task.scores.items()}
    ceiling = measured.share_of("memory", "whole") if {"memory", "whole"} <= set(measured.arms) else None
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
                "kept_bytes": round(measured.kept_bytes(arm)),
                "scores": {name: asdict(of_arm[arm]) for name, of_arm in scores.items()},
            }
            for arm in measured.arms
        },
        "differences": [
            {"arm": arm, "over": list(others)} | _gain(measured.gain_over(arm, *others)) for arm, others in differences
        ],
        "ceiling": None if ceiling is None else asdict(ceiling),
        "kinds": {
            kind: {arm: _share(measured.of_kind(kind).share(arm)) for arm in measured.arms} for kind in task.kinds
        },
        "by_kind": _by_kind(task, measured, *differences[0]) if differences and len(task.kinds) > 1 else None,
        "requirements": [{"requirement": text, "value": value, "met": met} for text, value, met in checked],
    }


def _scores(task: Task, measured: ArmResults, score: Score) -> dict[Arm, Mean]:
    """The mean of a published score for each arm; the constant arm gives the answers that are best by this score."""
    best = best_constants(task.probes, task.max_words, score) if "constant" in measured.arms else {}
    means = {}
    for arm in measured.arms:
        totals: dict[int, list[float]] = defaultdict(list)
        for probe, prediction in zip(task.probes, measured.of_arm(arm), strict=True):
            text = best[probe.ask.kind] if arm == "constant" else prediction.reply.content
            totals[prediction.conversation].append(score(probe.ask, text))
        means[arm] = mean([(sum(of_one), len(of_one)) for of_one in totals.values()])
    return means


def _by_kind(task: Task, measured: ArmResults, arm: Arm, others: tuple[Arm, ...]) -> dict[str, Any]:
    """The first difference, kind by kind, with p-values by Holm's method.

    Which kinds and which difference is fixed by the task and the arms, so nothing is chosen after the replies are seen.
    """
    gains = {kind: measured.of_kind(kind).gain_over(arm, *others) for kind in task.kinds}
    adjusted = holm([gain.p for gain in gains.values()])
    return {
        "arm": arm,
        "over": list(others),
        "kinds": {kind: _gain(gain) | {"holm": p} for (kind, gain), p in zip(gains.items(), adjusted, strict=True)},
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
    scores = [name for row in task["arms"].values() for name in row["scores"]]
    heads = ["right (interval)", *dict.fromkeys(scores), "prompt tokens", "bytes kept"]
    heads.append(f"seconds, {concurrency} at once")
    lines = [
        f"## {task['task']}",
        "",
        f"A right reply shows: {task['title']}. {task['questions']:,} questions about {task['conversations']:,} "
        f"conversations; replies of at most {task['max_tokens']:,} tokens.",
        "",
        f"| | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for arm, row in task["arms"].items():
        cells = [f"{row['share']:.3f} ({_range(row)})"]
        cells += [f"{score['value']:.3f} ({_range(score)})" for score in row["scores"].values()]
        if arm == "constant":
            cells += ["", "", ""]
        else:
            cells += [f"{row['prompt_tokens']:,.0f}", f"{row['kept_bytes']:,}", f"{row['seconds']:.2f}"]
        lines.append(f"| {SETUPS[arm].title} (`{arm}`) | {' | '.join(cells)} |")
    cut = [f"`{arm}` {row['cut']:,}" for arm, row in task["arms"].items() if row["cut"]]
    if cut:
        lines += [
            "",
            f"Prompts cut to what the model reads, the newest messages kept: {', '.join(cut)}.",
        ]
    if task["differences"]:
        lines += ["", "| difference | (interval) |", "|---|---|"]
        for row in task["differences"]:
            lines.append(f"| {_difference(row)} | {row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}) |")
    if ceiling := task["ceiling"]:
        lines += ["", f"Share of the ceiling (memory / whole): {ceiling['value']:.2f} ({_range(ceiling)})."]
    if len(task["kinds"]) > 1:
        lines += ["", *_kind_lines(task["kinds"], task["by_kind"])]
    if task["skipped"]:
        lines += ["", *(f"- left out: {count:,} x {reason}" for reason, count in task["skipped"].items())]
    if task["requirements"]:
        lines.append("")
    for each in task["requirements"]:
        met = "met" if each["met"] else "falls short"
        lines.append(f"- {met}: `{each['requirement']}`, found {each['value']:.3f}")
    return lines


def _kind_lines(kinds: Mapping[str, Any], by_kind: Mapping[str, Any] | None) -> list[str]:
    arms = list(next(iter(kinds.values())))
    heads = ["questions", "number", *arms]
    if by_kind:
        heads += [f"{_difference(by_kind)} (interval)", "p, by Holm"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind, row in kinds.items():
        cells = [kind or "(no kind)", f"{row[arms[0]]['questions']:,}", *(f"{row[arm]['share']:.3f}" for arm in arms)]
        if by_kind:
            gain = by_kind["kinds"][kind]
            cells += [f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})", f"{gain['holm']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference(row: Mapping[str, Any]) -> str:
    others = row["over"][0] if len(row["over"]) == 1 else f"max({', '.join(row['over'])})"
    return f"{row['arm']} - {others}"


def _range(row: Mapping[str, Any]) -> str:
    return f"{row['low']:.2f}-{row['high']:.2f}"
