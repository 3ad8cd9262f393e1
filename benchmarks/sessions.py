"""Tokens a second of many sessions that decode at once, beside the same sessions one after another.

    python benchmarks/sessions.py                              nano on this machine, 1 to 64 sessions (a minute)
    python benchmarks/sessions.py --count 1 --count 16         some numbers of sessions
    python benchmarks/sessions.py --model DIR --adapter DIR    a model of yours

Every session has a memory, a short prompt and a reply of as many tokens as asked: drawn at a temperature at which all
tokens are about as likely, so that no reply ends early. Both ways run the same turns with the same seeds, each first in
turn; the prompts are read anew each time. The exit code is 1 where a bar is missed (nano on a CPU: 16 sessions at least
4 times).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import agentmem
from agentmem import Engine, Message, Sampling, Turn

COUNTS = (1, 2, 4, 8, 16, 32, 64)
BAR_AT, BAR = 16, 4.0


def say(engine: Engine, number: int, tokens: int) -> Turn:
    """One session's turn; it follows from the number alone."""
    told = [Message("user", f"My favorite number is {number}."), Message("assistant", "Noted.")]
    sampling = Sampling(temperature=50.0, seed=number, max_tokens=tokens)
    return engine.turn([*told, Message("user", "Hello, how are you?")], sampling=sampling)


def rates(engine: Engine, count: int, tokens: int, *, company_first: bool) -> tuple[float, float]:
    """Tokens a second one after another and at once.

    Raises:
        RuntimeError: a session says something else in company.
    """

    def one_by_one() -> list[Turn]:
        return [say(engine, number, tokens) for number in range(count)]

    def at_once() -> list[Turn]:
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(lambda number: say(engine, number, tokens), range(count)))

    turns, seconds = {}, {}
    for way in (at_once, one_by_one) if company_first else (one_by_one, at_once):
        engine.forget_prefills()
        begin = time.perf_counter()
        turns[way] = way()
        seconds[way] = time.perf_counter() - begin
    alone, together = turns[one_by_one], turns[at_once]
    if engine.model.dtype == torch.float32 and [t.token_ids for t in together] != [t.token_ids for t in alone]:
        raise RuntimeError(f"{count} sessions at once say something else than alone")
    made = [sum(len(turn.token_ids) for turn in some) for some in (alone, together)]
    return made[0] / seconds[one_by_one], made[1] / seconds[at_once]


def main(
    model: Annotated[str, typer.Option(help="nano, a directory, or a hub id.")] = "nano",
    adapter: Annotated[str | None, typer.Option(help="Its adapter, if not its own.")] = None,
    count: Annotated[list[int], typer.Option(help="How many sessions; may be repeated.")] = list(COUNTS),  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens of each reply.")] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of each number of sessions.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="The figures as JSON.")] = Path("runs/sessions.json"),
) -> None:
    """Measure how much is gained by decoding sessions together."""
    torch.set_num_threads(threads)
    console = Console()
    with agentmem.load(model, adapter) as engine:
        device = engine.model.device
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        lines = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "hardware": f"{hardware}, {os.cpu_count()} cores, {threads} torch thread(s), load {os.getloadavg()[0]:.1f}",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, agentmem {agentmem.__version__}",
            "model": f"{model}, {engine.model.dtype}, replies of {tokens} tokens, median of {repeats}",
        }
        for name, line in lines.items():
            console.print(f"{name}: {line}", highlight=False)
        say(engine, 0, tokens)
        table = Table("sessions", "one after another, tokens/s", "at once, tokens/s", "at once : one after another")
        found = {}
        for sessions in sorted(set(count)):
            pairs = [rates(engine, sessions, tokens, company_first=bool(turn % 2)) for turn in range(repeats)]
            alone, together = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            found[sessions] = {"alone": alone, "together": together, "ratio": ratio}
            table.add_row(str(sessions), f"{alone:,.0f}", f"{together:,.0f}", f"{ratio:.2f}")
    console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(lines | {"rates": found}, indent=1) + "\n", "utf-8")
    if BAR_AT in found:
        held = found[BAR_AT]["ratio"] >= BAR
        console.print(f"bar: {BAR_AT} sessions at least {BAR:g} times, {'held' if held else 'missed'}")
        raise typer.Exit(0 if held else 1)


if __name__ == "__main__":
    typer.run(main)
