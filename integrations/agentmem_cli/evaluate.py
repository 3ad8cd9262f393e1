"""`agentmem evaluate`: runs a measurement of memory with controls; shows, saves and judges the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from agentmem.errors import MissingExtraError
from agentmem.evaluation.comparison import (
    DEFAULT_ARMS,
    Comparison,
    missed_requirements,
    prepare_comparison,
    report,
    run_comparison,
)
from agentmem.evaluation.curves import LIMIT, POINTS, curves_table, run_curves
from agentmem.evaluation.facts import CELLS, SEED, facts_table, run_facts
from agentmem.evaluation.judge import Judge, open_judge
from agentmem.evaluation.leak import LIMIT as CONVERSATIONS
from agentmem.evaluation.leak import leak_table, leaks, run_leak
from agentmem.evaluation.plots import import_pyplot, plot_arms, plot_curves, plot_facts
from agentmem.evaluation.report import details, markdown, missed_bars, put_into
from agentmem.evaluation.report import plot as draw
from agentmem.evaluation.runner import Setup, plan, run, save
from agentmem.evaluation.suites import SUITE_ARMS, SUITE_CONTEXT_TOKENS, suite_table
from agentmem.training.arms import CONTEXT_TOKENS
from agentmem.training.compression import LLMLingua2
from agentmem.training.contexts import COMPRESSED, CONTROLLED, NEAREST, SETUPS, STATIC, Arm, Ranker
from agentmem.training.static import StaticAdapter
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


@dataclass(frozen=True)
class Evaluation:
    """The options of an evaluation by arms. `cells` matters to facts alone, what follows it to the other tasks.

    `suite`: its table is made of the results too, and goes into `page` alone.
    """

    loading: Loading
    tasks: tuple[str, ...]
    out: Path
    arms: tuple[str, ...] | None = None
    limit: int | None = None
    seed: int | None = None
    page: Path | None = None
    suite: str | None = None
    cells: tuple[str, ...] | None = None
    data_dirs: tuple[Path, ...] = ()
    own_file: Path | None = None
    judge: str | None = None
    judge_url: str | None = None
    static: Path | None = None
    llmlingua: str | None = None
    plot: Path | None = None
    requirements: tuple[str, ...] = ()
    context_tokens: int | None = None
    max_tokens: int | None = None
    concurrency: int = 32


def evaluate_curves(options: Evaluation) -> int:
    """Measure how a memory fades and fills. Returns the exit code, 0."""
    if options.plot is not None:
        import_pyplot()
    console = Console()
    with _progress(console) as show:
        results = run_curves(
            options.loading.load,
            options.out,
            points=tuple(POINTS) if options.cells is None else options.cells,
            limit=LIMIT if options.limit is None else options.limit,
            # Names are checked where they are used.
            arms=CONTROLLED if options.arms is None else cast(tuple[Arm, ...], options.arms),
            seed=SEED if options.seed is None else options.seed,
            on_progress=show,
        )
    table = curves_table(results)
    console.print(Markdown(table))
    console.print(f"results: {options.out / 'results.json'}", highlight=False)
    if options.page is not None:
        put_into(options.page, table)
    if options.plot is not None:
        plot_curves(results, options.plot)
    return 0


def evaluate_leak(options: Evaluation) -> int:
    """Measure what a rewind leaves. Returns the exit code: 1 if a removed value is named too often."""
    console = Console()
    with _progress(console) as show:
        results = run_leak(
            options.loading.load,
            options.out,
            limit=CONVERSATIONS if options.limit is None else options.limit,
            seed=SEED if options.seed is None else options.seed,
            on_progress=show,
        )
    table = leak_table(results)
    console.print(Markdown(table))
    console.print(f"results: {options.out / 'results.json'}", highlight=False)
    if options.page is not None:
        put_into(options.page, table)
    found = leaks(results)
    for line in found:
        console.print(f"[red]leaks[/red]: {escape(line)}", highlight=False)
    return 1 if found else 0


def evaluate_tasks(options: Evaluation) -> int:
    """Measure tasks by arms. Returns the exit code: 1 if a bar is missed or a requirement is not met."""
    others = tuple(task for task in options.tasks if task != "facts")
    if options.plot is not None:
        import_pyplot()
    with ExitStack() as resources:
        return _evaluate(options, others, resources)


def _evaluate(options: Evaluation, others: tuple[str, ...], resources: ExitStack) -> int:
    judge = None
    if options.judge is not None:
        judge = open_judge(options.judge, options.judge_url, options.out / "judgements.jsonl")
        resources.callback(judge.close)
    comparison = _comparison(options, others, _nearest(options, resources), judge) if others else None
    console, missed, tables = Console(), list[str](), list[str]()
    if "facts" in options.tasks:
        out = options.out / "facts" if others else options.out
        with _progress(console) as show:
            facts = run_facts(
                options.loading.load,
                out,
                cells=tuple(CELLS) if options.cells is None else options.cells,
                limit=200 if options.limit is None else options.limit,
                # Names are checked where they are used.
                arms=None if options.arms is None else cast(tuple[Arm, ...], options.arms),
                seed=SEED if options.seed is None else options.seed,
                on_progress=show,
            )
        tables.append(facts_table(facts))
        console.print(f"results: {out / 'results.json'}, every reply: {out / 'predictions'}", highlight=False)
        missed += [text for row in facts["cells"] for text in row["missed"]]
        if options.plot is not None and not others:
            plot_facts(facts, options.plot)
    if comparison is not None:
        with _progress(console) as show:
            results = run_comparison(comparison, options.loading.load, options.out, show)
        tables.append(report(results))
        if options.suite is not None:
            page = suite_table(results)
            (options.out / f"{options.suite}.md").write_text(page + "\n", "utf-8")
            tables.append(page)
        place = options.out
        console.print(f"results: {place / 'results.json'}, every reply: {place / 'predictions'}", highlight=False)
        missed += missed_requirements(results)
        if options.plot is not None:
            plot_arms(results, options.plot)
    for table in tables:
        console.print(Markdown(table))
    if options.page is not None:
        put_into(options.page, tables[-1] if options.suite else "\n\n".join(tables))
    for line in missed:
        console.print(f"[red]falls short[/red]: {escape(line)}", highlight=False)
    return 1 if missed else 0


def _nearest(options: Evaluation, resources: ExitStack) -> Ranker | None:
    """What ranks passages by meaning, where an arm needs it."""
    if not set(options.arms or ()) & set(NEAREST):
        return None
    if find_spec("chromadb") is None:
        raise MissingExtraError("chromadb", "chroma")
    from agentmem_cli.passages import NearestPassages

    nearest = NearestPassages()
    resources.callback(nearest.close)
    return nearest


def _comparison(options: Evaluation, tasks: tuple[str, ...], nearest: Ranker | None, judge: Judge | None) -> Comparison:
    memory = options.loading.adapter != "none"
    usual: tuple[Arm, ...] = DEFAULT_ARMS if options.suite is None else SUITE_ARMS
    if not memory:
        usual = tuple(arm for arm in usual if SETUPS[arm].memory is None) if options.suite else ("bare",)
    if options.suite:
        usual = (*usual, *(STATIC if options.static else ()), *(COMPRESSED if options.llmlingua else ()))
    context_tokens = options.context_tokens
    if context_tokens is None:
        context_tokens = CONTEXT_TOKENS if options.suite is None else SUITE_CONTEXT_TOKENS
    return prepare_comparison(
        tasks,
        options.data_dirs,
        arms=usual if options.arms is None else options.arms,
        limit=options.limit,
        requirements=options.requirements,
        context_tokens=context_tokens,
        max_tokens=options.max_tokens,
        concurrency=options.concurrency,
        seed=SEED if options.seed is None else options.seed,
        has_memory=memory,
        own_file=options.own_file,
        nearest=nearest,
        judge=judge,
        compress=None if options.llmlingua is None else LLMLingua2(options.llmlingua, options.loading.device),
        static=None if options.static is None else StaticAdapter.find(options.static),
    )


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A line for each title, with the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(title: str, made: int, wanted: int) -> None:
            if title not in tasks:
                tasks[title] = progress.add_task(title, total=wanted)
            progress.update(tasks[title], completed=made)

        yield show
