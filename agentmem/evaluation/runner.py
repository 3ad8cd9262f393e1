"""Runs the recall cells in several processes, each with its own engine, and collects the results."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from agentmem.evaluation.recall import ARMS, CELLS, MEMORY_ARMS, Arm, Cell, measure
from agentmem.training.intervals import Share, share

Done = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """Part of a cell: the conversations that one process runs."""

    cell: Cell
    conversations: int
    arms: dict[Arm, int]
    seed: int


@dataclass(frozen=True)
class Setup:
    """What a process loads."""

    model: str
    adapter: str | Literal[False] | None
    threads: int


def plan(questions: int, elsewhere: int, seed: int, cells: Sequence[Cell] = CELLS, part: int = 25) -> list[Job]:
    """Jobs for `questions` questions per memory arm in cells with a bar, and `elsewhere` questions in all other cells.

    The arms without memory get `elsewhere` questions in every cell. Long jobs come first.
    """
    jobs = []
    for cell in cells:
        needed = cell.conversations(questions if cell.bar is not None else elsewhere)
        few = cell.conversations(elsewhere)
        for start in range(0, needed, part):
            size = min(part, needed - start)
            arms: dict[Arm, int] = {arm: size if arm in MEMORY_ARMS else max(0, min(size, few - start)) for arm in ARMS}
            jobs.append(Job(cell, size, arms, seed * 100_000 + start))
    return sorted(jobs, key=lambda job: -job.conversations * (job.cell.bindings + job.cell.fillers))


def run(jobs: Sequence[Job], setup: Setup, processes: int, done: Done) -> dict[str, Any]:
    """Run all jobs and return the results as plain data; `done(finished, total)` is called after each job."""
    started = time.monotonic()
    counts: dict[tuple[Cell, Arm], list[tuple[int, int]]] = defaultdict(list)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_start, initargs=(setup,)) as pool:
        running = {pool.submit(_work, job): job for job in jobs}
        for number, future in enumerate(as_completed(running), 1):
            for by_arm in future.result():
                for arm, pair in by_arm.items():
                    counts[running[future].cell, arm].append(pair)
            done(number, len(jobs))
    return {
        "model": setup.model,
        "seconds": round(time.monotonic() - started),
        "machine": f"{platform.machine()}, {processes} processes of {setup.threads} thread on {os.cpu_count()} cores",
        "cells": [
            {"bindings": cell.bindings, "fillers": cell.fillers, "bar": cell.bar}
            | {arm: asdict(share(counts[cell, arm])) for arm in ARMS if counts[cell, arm]}
            for cell in dict.fromkeys(job.cell for job in _ordered(jobs))
        ],
    }


def shares(results: dict[str, Any], arm: Arm) -> Iterator[tuple[Cell, Share]]:
    """The measured shares of one arm in a results file."""
    for row in results["cells"]:
        if arm in row:
            yield Cell(row["bindings"], row["fillers"]), Share(**row[arm])


def save(results: dict[str, Any], path: Path) -> None:
    """Write a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    scratch.replace(path)


def _ordered(jobs: Sequence[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: (job.cell.fillers, job.cell.bindings))


_engine: Any = None
_memoryless: dict[tuple[Arm, str], str] = {}


def _start(setup: Setup) -> None:
    """Load this process's engine."""
    global _engine
    import torch

    from agentmem.loading import load

    torch.set_num_threads(setup.threads)
    _engine = load(setup.model, adapter=setup.adapter)


def _work(job: Job) -> list[dict[Arm, tuple[int, int]]]:
    return list(measure(_engine, job.cell, job.conversations, job.seed, job.arms, _memoryless))
