"""`agentmem evaluate`: runs a measurement of memory with controls; shows, saves and judges the results."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from agentmem.evaluation.facts import CELLS, SEED, facts_table, run_facts
from agentmem.evaluation.report import details, markdown, missed_bars, put_into
from agentmem.evaluation.report import plot as draw
from agentmem.evaluation.runner import Setup, plan, run, save
from agentmem.training.arms import Arm
from agentmem_cli.options import Loading


def evaluate_recall(
    model: str,
    adapter: str | None,
    out: Path,
    questions: int,
    elsewhere: int,
    seed: int,
    processes: int,
    page: Path | None,
    plot: Path | None,
) -> int:
    """Measure recall in nano's language. Returns the exit code: 1 if a bar is missed."""
    console = Console()
    jobs = plan(questions, elsewhere, seed)
    columns = (TextColumn("recall"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("recall", total=len(jobs))
        results = run(
            jobs,
            Setup(model, False if adapter == "none" else adapter, threads=1),
            processes,
            lambda done, _: progress.update(task, completed=done),
        )
    results["seed"] = seed
    save(results, out)
    table = markdown(results)
    console.print(Markdown(table))
    out.with_suffix(".md").write_text(details(results), "utf-8")
    console.print(f"results: {out}, every cell: {out.with_suffix('.md')}")
    if page is not None:
        put_into(page, table)
    if plot is not None:
        draw(results, plot)
    missed = missed_bars(results)
    for line in missed:
        console.print(f"[red]under its bar[/red]: {line}", highlight=False)
    return 1 if missed else 0


def evaluate_facts(
    loading: Loading,
    out: Path,
    limit: int,
    cells: str | None,
    arms: str | None,
    seed: int | None,
    page: Path | None,
) -> int:
    """Measure how much is held of facts in natural English. Returns the exit code: 1 if a bar is missed."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(title: str, made: int, wanted: int) -> None:
            if title not in tasks:
                tasks[title] = progress.add_task(title, total=wanted)
            progress.update(tasks[title], completed=made)

        results = run_facts(
            loading.load,
            out,
            cells=tuple(CELLS) if cells is None else tuple(cells.split(",")),
            limit=limit,
            # Names are checked where they are used.
            arms=None if arms is None else cast(list[Arm], arms.split(",")),
            seed=SEED if seed is None else seed,
            on_progress=show,
        )
    table = facts_table(results)
    console.print(Markdown(table))
    console.print(f"results: {out / 'results.json'}, every reply: {out / 'predictions'}", highlight=False)
    if page is not None:
        put_into(page, table)
    return 1 if any(row["missed"] for row in results["cells"]) else 0
