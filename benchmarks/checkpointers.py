"""How large and how fast the SQL checkpointer is beside LangGraph's own savers for SQLite and PostgreSQL.

    python benchmarks/checkpointers.py                     threads of 100 turns: the tables and the bars (two minutes)
    python benchmarks/checkpointers.py --long              threads of 1,000 turns, time at turn 500 (half an hour)
    python benchmarks/checkpointers.py --long --page docs/results/checkpointers.md
                                                           the same as a page, with a plot and the figures beside it

The load is a chat graph of one node with ``durability="sync"``: a turn adds 200 characters of question, 400 of answer
and 9,216 random bytes of state, and stores 3 checkpoints. Every saver has a process and a database of its own, and all
take turn 1, then all turn 2, and so on in changing order, so that a machine that slows down slows all of them alike.
(In one process they would measure each other: what five savers keep of a thousand messages each does not fit into a
processor's caches.) Times are medians over the turns around a mark and over the repetitions, a turn's ``put`` being the
mean over its three checkpoints; a ratio is the median over the turns of one saver's time by the other's in the same
turn.

A database that cannot be reached is left out. The exit code is 1 where a bar is missed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from checkpointer_figures import SHOWN, Bar, Sheet, bars, draw, quartiles, race_sheet, size_sheet, time_sheet
from checkpointer_runs import Found, Plan, compete, converse
from checkpointer_savers import ALONE, MARIADB, POSTGRES, TOGETHER, Contender, Servers, answering, at_commit, versions
from rich.console import Console

MARKS = (10, 20, 50, 100, 200, 350, 500, 750, 1000)
LIBRARIES = (
    "agentmem-delta",
    "langgraph",
    "langgraph-checkpoint",
    "langgraph-checkpoint-sqlite",
    "langgraph-checkpoint-postgres",
    "sqlalchemy",
    "psycopg",
    "pymysql",
)
POSTGRES_URL = "postgresql://postgres@127.0.0.1:5432/postgres"
MARIADB_URL = "mysql+pymysql://root@127.0.0.1:3306/mysql"


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on."""
    mounts = Path("/proc/self/mounts")
    lines = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    above = [(mount, kind) for _, mount, kind, *_ in lines if folder.resolve().is_relative_to(mount)]
    return max(above, key=lambda each: len(each[0]))[1] if above else "unknown file system"


def processor() -> str:
    """The CPU's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def flush_seconds(folder: Path) -> float:
    """What it takes to bring 4 KB to the disk: a floor under every commit, and very different between machines."""
    taken = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(50):
            file.write(bytes(4096))
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def conditions(contenders: Sequence[Contender], servers: Servers, plan: Plan, repeats: int, rounds: int) -> list[str]:
    """Everything that somebody needs to know who measures again."""
    libraries = (f"{name} {version(name)}" for name in LIBRARIES if has_version(name))
    flush = f"4 KB are flushed to it in {1000 * flush_seconds(servers.folder):.2f} ms"
    around = f"{2 * plan.window + 1} turns around a mark, {repeats} repetitions"
    return [
        f"`python {' '.join(sys.argv)}`, {datetime.now(UTC):%Y-%m-%d}",
        f"{processor()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start",
        f"SQLite files on {file_system(servers.folder)}; {flush}",
        f"Python {platform.python_version()}, {', '.join(libraries)}",
        *versions(servers),
        *(f"{contender}: {at_commit(contender, servers)}" for contender in contenders),
        f"medians over {around}; over {plan.children} new processes; over {rounds} rounds of threads",
    ]


def has_version(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def as_data(found: Found, judged: Sequence[Bar], lines: Sequence[str]) -> dict[str, Any]:
    """The figures for a file: seconds, bytes, checkpoints a second."""
    times = []
    for (contender, mark, call), seconds in found.seconds.items():
        low, median, high = (round(value, 7) for value in quartiles(list(seconds.values())))
        row = {"turn": mark, "call": call, "median": median, "middle_half": [low, high], "samples": len(seconds)}
        times.append(asdict(contender) | row)
    return {
        "conditions": list(lines),
        "bars": [asdict(bar) | {"held": bar.held} for bar in judged],
        "sizes": [asdict(contender) | {"bytes": sizes} for contender, sizes in found.sizes.items()],
        "times": times,
        "rates": [asdict(contender) | {"load": load, "rounds": r} for (contender, load), r in found.rates.items()],
    }


def page_text(sheets: Sequence[Sheet], lines: Sequence[str], picture: str) -> str:
    """The result page; how it was measured is told in the words of this file's head."""
    method = (__doc__ or "").split("\n\n")[2]
    parts = [
        "# Checkpointers, measured",
        method,
        "\n".join(f"- {line}" for line in lines),
        f"![Size and time against turns]({picture})",
        *(sheet.markdown() for sheet in sheets),
    ]
    return "\n\n".join(parts) + "\n"


def main(
    long: Annotated[bool, typer.Option("--long", help="The second of two figures below.")] = False,
    turns: Annotated[int | None, typer.Option(min=10, help="Length of the threads: 100, or 1,000.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of the conversations.")] = 3,
    window: Annotated[int, typer.Option(help="Turns on either side of a mark that count for it.")] = 4,
    children: Annotated[int | None, typer.Option(help="New processes for each saver and mark: 2, or 9.")] = None,
    workers: Annotated[int, typer.Option(help="Threads at once; 0 leaves this part out.")] = 16,
    worker_turns: Annotated[int | None, typer.Option(help="Turns of each of those threads: 20, or 100.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of those threads: 2, or 3.")] = None,
    postgres: Annotated[str, typer.Option(help="A server where databases can be made; '' for none.")] = POSTGRES_URL,
    mariadb: Annotated[str, typer.Option(help="The same for MariaDB.")] = MARIADB_URL,
    folder: Annotated[Path | None, typer.Option(help="Where the SQLite files lie while it runs.")] = None,
    out: Annotated[Path, typer.Option(help="The figures as JSON.")] = Path("runs/checkpointers.json"),
    plot: Annotated[Path | None, typer.Option(help="A picture; beside the JSON if not named.")] = None,
    page: Annotated[Path | None, typer.Option(help="A page; JSON and picture then lie beside it.")] = None,
) -> None:
    """Measure the SQL checkpointer beside LangGraph's savers for SQLite and PostgreSQL."""
    if page is not None:
        out = page.with_suffix(".json")
    plot = plot or out.with_suffix(".png")
    turns = turns or (1000 if long else 100)
    marks = tuple(mark for mark in MARKS if mark <= turns)
    children = (9 if long else 2) if children is None else children
    plan = Plan(marks, tuple(mark for mark in marks if mark in SHOWN), window, children)
    worker_turns = worker_turns or (100 if long else 20)
    rounds = (rounds or (3 if long else 2)) if workers else 0
    console = Console(width=None if sys.stdout.isatty() else 160)
    urls, left_out = answering({POSTGRES: postgres, MARIADB: mariadb})
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as files:
        servers = Servers(Path(files), urls)
        missing = sorted({c.saver for c in ALONE if not c.installed})
        left_out += [f"{saver} is left out: it is not installed" for saver in missing]
        alone, many = ([c for c in each if c.installed and servers.has(c)] for each in (ALONE, TOGETHER))
        lines = [*conditions(alone, servers, plan, repeats, rounds), *left_out]
        for line in lines:
            console.print(line, highlight=False, markup=False)
        found = Found()
        with console.status("conversations") as status:
            tell = status.update if console.is_terminal else console.print
            for repeat in range(repeats):
                for step in converse(alone, servers, plan, repeat, found):
                    tell(f"conversations, repetition {repeat + 1} of {repeats}, {step}")
            for number in range(rounds):
                for contender, load, rate in compete(many, servers, workers, worker_turns, number):
                    found.rates[contender, load].append(rate)
                    tell(f"{workers} threads at once, round {number + 1} of {rounds}, {contender}, {load}")
    judged = bars(found, workers, worker_turns)
    sheets = [
        Sheet("Bars", ("", "asked", "measured", ""), [bar.row() for bar in judged]),
        size_sheet(found),
        time_sheet(found),
        race_sheet(found, workers, worker_turns),
    ]
    for sheet in sheets:
        console.print(sheet.rich())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(as_data(found, judged, lines), indent=1) + "\n", "utf-8")
    draw(found, plot)
    if page is not None:
        page.write_text(page_text(sheets, lines, os.path.relpath(plot, page.parent)), "utf-8")
    console.print(f"figures: {out}, picture: {plot}" + (f", page: {page}" if page else ""), highlight=False)
    raise typer.Exit(1 if any(bar.held is False for bar in judged) else 0)


if __name__ == "__main__":
    typer.run(main)
