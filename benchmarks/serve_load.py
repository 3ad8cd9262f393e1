"""Load on `agentmem serve`: many sessions at once, how long their turns take, what fails, and whether memory grows.

    python benchmarks/serve_load.py                                   200 sessions for five minutes, nano, SQLite
    python benchmarks/serve_load.py --db postgresql://localhost/test --replicas 2
    python benchmarks/serve_load.py --db postgresql://localhost/test --cut 20
    python benchmarks/serve_load.py --db postgresql://localhost/test --replicas 2 --moves 40
    python benchmarks/serve_load.py --at http://127.0.0.1:8000        servers that run already, Ray Serve's for instance
    python benchmarks/serve_load.py --sessions 8 --seconds 10         a short look
    python benchmarks/serve_load.py --check                           the same; exit code 1 where a bar is missed

Starts the replicas itself, as processes that share the machine's processors. Each session is a thread that sends its
next message when it has the answer: to the replicas in turn, or with --sticky always to the same one. An answer of 429
or 409 is tried again after `Retry-After`, and is counted apart; everything else that is no answer is an error. A
session counts what it was told is stored; at the end every thread must hold these messages, and none twice. Resident
memory is the sum over the replicas, a tenth into the run and at its end. A database of yours keeps the threads.

--cut: in the middle of the run the database cannot be reached for so many seconds: its connections go through this
process, which ends them and takes no new ones. Answers of 503 are then no errors.

--moves: after the load, so many turns of a thread whose turns are all at one replica, and of one whose turns are at
two in turn: what a turn pays where the thread is in no cache of the process. KV is exact by default, so a window is
read anew wherever the turn is made, and no tokens are cached either way.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from conditions import command, processor, versions
from rich.console import Console
from rich.table import Table
from serve_outage import Cable

MOST_GROWTH = 1.2  # of the replicas' resident memory, from a tenth into the run to its end
_TEXTS = ("My editor is helix.", "What is my editor?", "My favorite color is teal.", "What is my favorite color?")


class Load:
    """What the sessions have seen."""

    def __init__(self) -> None:
        self.model = ""
        self.seconds: list[float] = []
        self.answered_at: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()


def start(
    stack: ExitStack, db: str, options: list[str], log: Path, threads: int
) -> tuple[subprocess.Popen[bytes], str]:
    """Start a replica; gives the process and its address."""
    program = [sys.executable, "-c", "from agentmem_cli import main; main()", "serve", "--db", db, *options]
    out = stack.enter_context(log.open("wb"))
    running = stack.enter_context(
        subprocess.Popen(
            [*program, "--port", "0", "--max-turns", "1000", "--max-tokens", "40"],
            stderr=out,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    )
    stack.callback(running.terminate)
    while (found := re.search(r"running on (http://[\d.:]+)", log.read_text())) is None:
        if running.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.2)
    return running, found[1]


async def ask(load: Load, client: httpx.AsyncClient, address: str, thread: str, number: int) -> httpx.Response:
    """Send a turn; the same number again is the same turn."""
    body = {"model": load.model, "messages": [{"role": "user", "content": _TEXTS[number % len(_TEXTS)]}]}
    headers = {"X-Thread-Id": thread, "Idempotency-Key": f"{thread}-{number}"}
    return await client.post(f"{address}/v1/chat/completions", json=body, headers=headers)


async def session(load: Load, client: httpx.AsyncClient, addresses: list[str], name: str, ends: float) -> None:
    """One thread, turn after turn."""
    for number in itertools.count():
        while True:
            begun = time.monotonic()
            if begun > ends:
                return
            try:
                answer = await ask(load, client, addresses[number % len(addresses)], name, number)
            except httpx.HTTPError as error:
                load.outcomes[type(error).__name__] += 1
                await asyncio.sleep(1)
                continue
            load.outcomes[str(answer.status_code)] += 1
            if answer.status_code == 200:
                load.answered_at.append(time.monotonic())
                load.seconds.append(load.answered_at[-1] - begun)
                load.stored[name] += 2
                break
            await asyncio.sleep(int(answer.headers.get("Retry-After", 1)))


async def moving(load: Load, client: httpx.AsyncClient, addresses: list[str], turns: int, name: str) -> dict[str, Any]:
    """Turns of a thread that stays, and of one that moves with each; in turn, so that both find the machine alike."""
    seconds: dict[str, list[float]] = {"stays": [], "moves": []}
    cached: dict[str, list[int]] = {"stays": [], "moves": []}
    for number in range(turns + 1):
        for kind, address in (("stays", addresses[0]), ("moves", addresses[number % 2])):
            begun = time.monotonic()
            answer = await ask(load, client, address, f"{name}-{kind}", number)
            took = time.monotonic() - begun
            usage = answer.raise_for_status().json()["usage"]
            if number:  # the first finds nothing anywhere
                seconds[kind].append(took)
                cached[kind].append(usage["prompt_tokens_details"]["cached_tokens"])
    kinds = {kind: statistics.median(took) for kind, took in seconds.items()}
    tokens = {f"{kind}_cached_tokens": statistics.mean(found) for kind, found in cached.items()}
    return {**kinds, **tokens}


def resident(processes: list[subprocess.Popen[bytes]]) -> int:
    """Bytes of resident memory."""
    pages = [int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) for process in processes]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


async def run(
    load: Load,
    client: httpx.AsyncClient,
    addresses: list[str],
    sessions: int,
    seconds: float,
    name: str,
    sticky: bool,
) -> None:
    """All sessions at once."""
    ends = time.monotonic() + seconds
    places = [[addresses[number % len(addresses)]] if sticky else addresses for number in range(sessions)]
    await asyncio.gather(
        *(session(load, client, place, f"{name}-{number}", ends) for number, place in enumerate(places))
    )


async def compared(load: Load, client: httpx.AsyncClient, address: str) -> tuple[int, int]:
    """How many messages that were acknowledged are not in their threads, and how many are there too often."""
    missing = doubled = 0
    for name, told in load.stored.items():
        answer = await client.get(f"{address}/v1/sessions/{name}?limit=1")
        held = len(answer.raise_for_status().json()["messages"])
        missing += max(0, told - held)
        doubled += max(0, held - told - 2)  # a turn may be stored and its answer lost, at the end
    return missing, doubled


async def measure(
    stack: ExitStack,
    at: list[str],
    db: str | None,
    options: list[str],
    *,
    sessions: int,
    seconds: float,
    replicas: int,
    sticky: bool,
    cut: float,
    turns: int,
) -> dict[str, Any]:
    """Start what is to be started, load it, and give the figures."""
    load, name = Load(), f"load-{os.getpid()}"
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    place = db or f"sqlite:///{folder / 'threads.db'}"
    cable = Cable(place) if cut else None
    if cable is not None:
        place = await cable.open()
    threads = max(1, (os.cpu_count() or 1) // replicas)
    started = [
        await asyncio.to_thread(start, stack, place, options, folder / f"{number}.log", threads)
        for number in range(0 if at else replicas)
    ]
    processes, addresses = [process for process, _ in started], at or [address for _, address in started]
    figures: dict[str, Any] = {"sessions": sessions, "replicas": len(addresses), "seconds": seconds, "sticky": sticky}
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=sessions)) as client:
        load.model = (await client.get(f"{addresses[0]}/v1/models")).raise_for_status().json()["data"][0]["id"]
        running = asyncio.create_task(run(load, client, addresses, sessions, seconds, name, sticky))
        await asyncio.sleep(seconds / 10)
        early, mended = resident(processes), 0.0
        if cable is not None:
            await asyncio.sleep(seconds * 0.4)
            cable.cut()
            await asyncio.sleep(cut)
            await cable.open()
            mended = time.monotonic()
        await running
        late = resident(processes)
        if cable is not None:
            back = [moment for moment in load.answered_at if moment > mended]
            figures |= {"cut": cut, "answers_again_after": min(back) - mended if back else None}
        missing, doubled = await compared(load, client, addresses[0])
        if turns:
            figures["turn"] = await moving(load, client, addresses, turns, name)
    if cable is not None:
        await cable.close()
    ordered = sorted(load.seconds)
    return {
        **figures,
        "turns": len(ordered),
        "turns_per_second": len(ordered) / seconds,
        "p50": statistics.median(ordered) if ordered else None,
        "p99": ordered[int(len(ordered) * 0.99)] if ordered else None,
        "outcomes": dict(load.outcomes),
        "lost": missing,
        "doubled": doubled,
        "resident_early": early,
        "resident_late": late,
    }


def missed(figures: dict[str, Any]) -> list[str]:
    """The bars that were missed."""
    allowed = {"200", "409", "429", *(["503"] if "cut" in figures else [])}
    bars = {
        "no error": not set(figures["outcomes"]) - allowed,
        "every acknowledged message is in its thread, once": not figures["lost"] and not figures["doubled"],
        "memory does not grow": figures["resident_late"] <= MOST_GROWTH * figures["resident_early"],
        "turns go on when the database is back": figures.get("answers_again_after", 0) is not None,
    }
    return [bar for bar, holds in bars.items() if not holds]


def main(
    sessions: Annotated[int, typer.Option(min=1, help="Threads at once.")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 300,
    replicas: Annotated[int, typer.Option(min=1, help="Processes of `agentmem serve`.")] = 1,
    db: Annotated[str | None, typer.Option(help="Their database; left out, a SQLite file that is removed.")] = None,
    model: Annotated[str, typer.Option(help="The model.")] = "nano",
    window: Annotated[str | None, typer.Option(help="What prompts show, as for `agentmem serve`.")] = None,
    sticky: Annotated[bool, typer.Option("--sticky", help="A session stays at its replica.")] = False,
    cut: Annotated[float, typer.Option(min=0, help="Seconds without the database, which is on a server.")] = 0,
    moves: Annotated[int, typer.Option(min=0, help="Turns at one replica and at two, after the load.")] = 0,
    at: Annotated[list[str] | None, typer.Option(help="Addresses of servers to load in place of replicas.")] = None,
    out: Annotated[Path | None, typer.Option(help="The figures as JSON.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 where a bar is missed.")] = False,
) -> None:
    """Measure."""
    if cut and (at or db is None or db.startswith("sqlite")):
        raise typer.BadParameter("what is cut is the way from replicas to a database server; name one with --db")
    if cut and cut > seconds / 3:
        raise typer.BadParameter(f"a cut of {cut:g} s asks for a run of at least {3 * cut:g} s")
    if moves and len(at or range(replicas)) < 2:
        raise typer.BadParameter("a thread moves between two replicas; pass --replicas 2")
    options = ["--model", model, *(["--window", window] if window else [])]
    with ExitStack() as stack:
        loaded = measure(
            stack,
            at or [],
            db,
            options,
            sessions=sessions,
            seconds=seconds,
            replicas=replicas,
            sticky=sticky,
            cut=cut,
            turns=moves,
        )
        figures = asyncio.run(loaded)
    figures |= {"processor": f"{processor()}, {os.cpu_count()} cores", "versions": versions(), "command": command()}
    table = Table("figure", "value")
    for title, value in figures.items():
        table.add_row(title, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")
    bars = missed(figures)
    for bar in bars:
        typer.echo(f"missed: {bar}")
    if check and bars:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
