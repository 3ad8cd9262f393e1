"""`agentmem evaluate`: runs the recall measurement; shows, saves and judges the results."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agentmem.evaluation.report import details, markdown, missed_bars, put_into
from agentmem.evaluation.report import plot as draw
from agentmem.evaluation.runner import Setup, plan, run, save


def evaluate(
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
    """Returns the exit code: 1 if a bar is missed."""
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
