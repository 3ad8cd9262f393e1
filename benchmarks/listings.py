"""What it takes to find a user's checkpoints among everybody's, beside LangGraph's own savers on the same database.

    python benchmarks/listings.py                      6,750 checkpoints: tables and bars (two minutes)
    python benchmarks/listings.py --stages 3           then 13,500 and 20,250, so that growth shows

The load is that of ``checkpointers.py``: threads of three turns, nine checkpoints each. Every user has five threads.
What is timed is ``list(None, filter={"user_id": ...})`` for a user who has none, with a limit of 10, and for all 45
checkpoints of a user, and ``list(None, limit=10)``. Every round opens each saver anew, in changing order, makes one
call for another user that does not count (connections, statements), and takes each time once, so that nothing that was
read before is in a cache. A figure is the least of the rounds in wall and in CPU milliseconds, the latter without a
server's.

A database that cannot be reached is left out. The exit code is 1 where a bar is missed: for a user's checkpoints at
most the time of LangGraph's saver, and, with more than one stage, no growth beyond that of the number of checkpoints.
"""

from __future__ import annotations

import os
import platform
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from checkpointer_figures import Bar, Sheet
from checkpointer_runs import CHECKPOINTS, QUESTION, Calls, Recorder, chat_graph, shuffled, words
from checkpointer_savers import ALONE, MARIADB, OURS, POSTGRES, Contender, Servers, answering, opened, versions
from checkpointers import LIBRARIES, MARIADB_URL, POSTGRES_URL, has_version, processor
from rich.console import Console
from sqlalchemy import URL

THREADS_OF_A_USER, TURNS = 5, 3
SEVERAL = 10
HITS = CHECKPOINTS * TURNS * THREADS_OF_A_USER
NOBODY, SOME, ALL, NEWEST = "nobody's", f"a user's, limit {SEVERAL}", f"a user's, all {HITS}", f"any, limit {SEVERAL}"
EXPECTED = {NOBODY: 0, SOME: SEVERAL, ALL: HITS, NEWEST: SEVERAL}
# How much faster than the number of checkpoints a time may grow; the rest is the noise of a busy machine.
GROWTH = 1.25
# (contender, stage, what is listed) -> (wall, CPU) seconds by round
Times = dict[tuple[Contender, int, str], list[tuple[float, float]]]


def calls_of(threads: range) -> Calls:
    """The put and put_writes calls of these threads; each user's lie scattered among the others'."""
    users = len(threads) // THREADS_OF_A_USER
    # Every stage has users of its own, so that the hits stay the same.
    first = threads.start // THREADS_OF_A_USER
    recorder = Recorder()
    graph = chat_graph(recorder)
    for number in threads:
        user = f"user {first + number % users}"
        at: Any = {"configurable": {"thread_id": f"thread {number}"}, "metadata": {"user_id": user}}
        for turn in range(TURNS):
            question = words(random.Random(f"{number} {turn}"), QUESTION)
            graph.invoke({"messages": [("user", question)]}, at, durability="sync")
        recorder.delete_thread(f"thread {number}")
    return recorder.calls


def time_round(contender: Contender, url: URL, stage: int, times: Times) -> None:
    """Each listing once, on a saver that has just been opened.

    Raises:
        RuntimeError: a listing has not what it should have: that is not fast but wrong.
    """
    user = {"user_id": "user 1"}
    asked: dict[str, dict[str, Any]] = {
        NOBODY: {"filter": {"user_id": "nobody"}},
        SOME: {"filter": user, "limit": SEVERAL},
        ALL: {"filter": user},
        NEWEST: {"limit": SEVERAL},
    }
    with opened(contender, url) as saver:
        list(saver.list(None, filter={"user_id": "user 2"}))
        for what, options in asked.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found = list(saver.list(None, **options))
            taken = time.perf_counter() - wall, time.process_time() - cpu
            times[contender, stage, what].append(taken)
            if len(found) != EXPECTED[what]:
                raise RuntimeError(f"{contender} lists {len(found)} of {EXPECTED[what]}: {what}")


def least(times: Times, contender: Contender, stage: int, what: str, at: int = 0) -> float:
    """The least time of the rounds: wall, or CPU."""
    return min(taken[at] for taken in times[contender, stage, what])


def bars(times: Times, contenders: Sequence[Contender], stages: int) -> list[Bar]:
    """Ours beside LangGraph's at the last stage, and its growth over the stages."""
    judged = []
    for ours in (contender for contender in contenders if contender.ours):
        for what in EXPECTED:
            peers = (each for each in contenders if each.database == ours.database and not each.ours)
            for peer in peers if what != NEWEST else ():
                ratio = least(times, ours, stages, what) / least(times, peer, stages, what)
                judged.append(Bar(f"{ours.database}, {what}, ours : {peer.saver}'s", 1.0, True, "x", ratio))
            if stages > 1:
                grown = least(times, ours, stages, what) / least(times, ours, 1, what)
                limit = GROWTH * stages
                judged.append(Bar(f"{ours.database}, {what}, {stages} times as many", limit, True, "x", grown))
    return judged


def sheet(times: Times, contenders: Sequence[Contender], stage: int, checkpoints: int) -> Sheet:
    """Wall and CPU milliseconds at one stage."""
    rows = []
    for contender in contenders:
        cells = (
            f"{1000 * least(times, contender, stage, what):.1f} / {1000 * least(times, contender, stage, what, 1):.1f}"
            for what in EXPECTED
        )
        rows.append((str(contender), *cells))
    return Sheet(f"{checkpoints:,} checkpoints, wall / CPU ms", ("", *EXPECTED), rows)


def conditions(servers: Servers, rounds: int) -> list[str]:
    """What somebody needs to know who measures again."""
    libraries = (f"{name} {version(name)}" for name in LIBRARIES if has_version(name))
    return [
        f"`python {' '.join(sys.argv)}`",
        f"{processor()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start",
        f"Python {platform.python_version()}, {', '.join(libraries)}",
        *versions(servers),
        f"the least of {rounds} rounds",
    ]


def main(
    threads: Annotated[int, typer.Option(min=10, help="Threads of three turns in a stage.")] = 750,
    stages: Annotated[int, typer.Option(min=1, help="How often so many threads are added.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often each time is taken.")] = 7,
    postgres: Annotated[str, typer.Option(help="A server where databases can be made; '' for none.")] = POSTGRES_URL,
    mariadb: Annotated[str, typer.Option(help="The same for MariaDB.")] = MARIADB_URL,
    folder: Annotated[Path | None, typer.Option(help="Where the SQLite files lie while it runs.")] = None,
) -> None:
    """Measure listings by metadata beside LangGraph's savers for SQLite and PostgreSQL."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    urls, left_out = answering({POSTGRES: postgres, MARIADB: mariadb})
    times: Times = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as files, ExitStack() as stack:
        servers = Servers(Path(files), urls)
        contenders = [each for each in ALONE if each.installed and servers.has(each)]
        for line in (*conditions(servers, rounds), *left_out):
            console.print(line, highlight=False, markup=False)
        places = {each: stack.enter_context(servers.database(each.database)) for each in contenders}
        for stage in range(1, stages + 1):
            new = calls_of(range((stage - 1) * threads, stage * threads))
            for contender, url in places.items():
                with opened(contender, url) as saver:
                    for method, arguments in new:
                        getattr(saver, method)(*arguments)
            for number in range(rounds):
                for contender in shuffled(contenders, number):
                    time_round(contender, places[contender], stage, times)
            console.print(sheet(times, contenders, stage, stage * threads * TURNS * CHECKPOINTS).rich())
    judged = bars(times, contenders, stages)
    if not any(contender.saver != OURS for contender in contenders):
        console.print("none of LangGraph's savers is installed")
    console.print(Sheet("Bars", ("", "asked", "measured", ""), [bar.row() for bar in judged]).rich())
    raise typer.Exit(1 if any(bar.held is False for bar in judged) else 0)


if __name__ == "__main__":
    typer.run(main)
