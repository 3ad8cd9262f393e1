"""Load on `agentmem serve`: many sessions at once, how long their turns take, what fails, and whether memory grows.

    python benchmarks/serve_load.py                                   200 sessions for five minutes, nano, SQLite
    python benchmarks/serve_load.py --db postgresql://localhost/test --replicas 2
    python benchmarks/serve_load.py --sessions 8 --seconds 10         a short look
    python benchmarks/serve_load.py --check                           the same; exit code 1 where a bar is missed

Starts the replicas itself, as processes. Each session is a thread that sends its next message when it has the answer,
to the replicas in turn. An answer of 429 or 409 is tried again after `Retry-After`, and is counted apart; everything
else that is no answer is an error. A session counts what it was told is stored; at the end every thread must hold as
many messages. Resident memory is the sum over the replicas, a tenth into the run and at its end.
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
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.table import Table

MOST_GROWTH = 1.2  # of the replicas' resident memory, from a tenth into the run to its end
_TEXTS = ("My editor is helix.", "What is my editor?", "My favorite color is teal.", "What is my favorite color?")


class Load:
    """What the sessions have seen."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()


def start(stack: ExitStack, db: str, model: str, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a replica; gives the process and its address."""
    command = [sys.executable, "-c", "from agentmem_cli import main; main()", "serve", "--model", model, "--db", db]
    out = stack.enter_context(log.open("wb"))
    running = stack.enter_context(
        subprocess.Popen([*command, "--port", "0", "--max-turns", "1000", "--max-tokens", "40"], stderr=out)
    )
    stack.callback(running.terminate)
    while (found := re.search(r"running on (http://[\d.:]+)", log.read_text())) is None:
        if running.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.2)
    return running, found[1]


async def session(load: Load, client: httpx.AsyncClient, addresses: list[str], name: str, ends: float) -> None:
    """One thread, turn after turn."""
    for number in itertools.count():
        message = {"role": "user", "content": _TEXTS[number % len(_TEXTS)]}
        body = {"model": "nano", "messages": [message]}
        address, key = addresses[number % len(addresses)], f"{name}-{number}"
        while True:
            begun = time.monotonic()
            if begun > ends:
                return
            try:
                headers = {"X-Thread-Id": name, "Idempotency-Key": key}
                answer = await client.post(f"{address}/v1/chat/completions", json=body, headers=headers)
            except httpx.HTTPError as error:
                load.outcomes[type(error).__name__] += 1
                await asyncio.sleep(1)
                continue
            load.outcomes[str(answer.status_code)] += 1
            if answer.status_code == 200:
                load.seconds.append(time.monotonic() - begun)
                load.stored[name] += 2
                break
            await asyncio.sleep(int(answer.headers.get("Retry-After", 1)))


def resident(processes: list[subprocess.Popen[bytes]]) -> int:
    """Bytes of resident memory."""
    pages = [int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) for process in processes]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


async def run(load: Load, addresses: list[str], sessions: int, seconds: float, name: str) -> None:
    """All sessions at once."""
    limits = httpx.Limits(max_connections=sessions)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        ends = time.monotonic() + seconds
        await asyncio.gather(
            *(session(load, client, addresses, f"{name}-{number}", ends) for number in range(sessions))
        )


def lost(load: Load, address: str) -> int:
    """How many messages that were acknowledged are not in their threads."""
    missing = 0
    for name, told in load.stored.items():
        held = httpx.get(f"{address}/v1/sessions/{name}?limit=1", timeout=60).json()
        missing += max(0, told - len(held["messages"]))
    return missing


def main(
    sessions: Annotated[int, typer.Option(min=1, help="Threads at once.")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 300,
    replicas: Annotated[int, typer.Option(min=1, help="Processes of `agentmem serve`.")] = 1,
    db: Annotated[str | None, typer.Option(help="Their database; left out, a SQLite file that is removed.")] = None,
    model: Annotated[str, typer.Option(help="The model.")] = "nano",
    out: Annotated[Path | None, typer.Option(help="The figures as JSON.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 where a bar is missed.")] = False,
) -> None:
    """Measure."""
    load, name = Load(), f"load-{os.getpid()}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        at = db or f"sqlite:///{folder / 'threads.db'}"
        started = [start(stack, at, model, folder / f"{number}.log") for number in range(replicas)]
        processes, addresses = [process for process, _ in started], [address for _, address in started]

        async def measured() -> tuple[int, int]:
            running = asyncio.create_task(run(load, addresses, sessions, seconds, name))
            await asyncio.sleep(seconds / 10)
            early = resident(processes)
            await running
            return early, resident(processes)

        early, late = asyncio.run(measured())
        missing = lost(load, addresses[0])
    ordered = sorted(load.seconds)
    figures = {
        "sessions": sessions,
        "replicas": replicas,
        "seconds": seconds,
        "turns": len(ordered),
        "turns_per_second": len(ordered) / seconds,
        "p50": statistics.median(ordered) if ordered else None,
        "p99": ordered[int(len(ordered) * 0.99)] if ordered else None,
        "outcomes": dict(load.outcomes),
        "lost": missing,
        "resident_early": early,
        "resident_late": late,
    }
    table = Table("figure", "value")
    for title, value in figures.items():
        table.add_row(title, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")
    errors = {kind: count for kind, count in load.outcomes.items() if kind not in ("200", "409", "429")}
    if check and (errors or missing or late > MOST_GROWTH * early):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
