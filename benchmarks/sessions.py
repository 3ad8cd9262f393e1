"""Tokens a second of many sessions that decode at once, beside the same sessions one after another.

    python benchmarks/sessions.py                              nano on this machine, 1 to 64 sessions (a minute)
    python benchmarks/sessions.py --count 1 --count 16         some numbers of sessions
    python benchmarks/sessions.py --model DIR --adapter DIR    a model of yours
    python benchmarks/sessions.py --shape qwen3-4b             random weights in a shape of ``shapes.py``, for a GPU

Every session has a memory, a short prompt and a reply of as many tokens as asked: drawn at a temperature at which all
tokens are about as likely, so that no reply ends early. Both ways run the same turns with the same seeds, each first in
turn; the prompts are read anew each time. One after another is what a single session gets.

The exit code is 1 where a bar is missed: nano on a CPU, 16 sessions at least 4 times; Qwen3-4B's shape on a GPU under
AGENTMEM_TRITON=1 and AGENTMEM_CUDA_GRAPHS=1, 32 sessions at least 16 times.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from conditions import conditions, picture, text
from rich.console import Console
from rich.table import Table
from shapes import REAL, SMALL, TINY, attached

import agentmem
from agentmem import Engine, Message, Sampling, Turn
from agentmem.generation.cuda_graph import uses_graphs

COUNTS = (1, 2, 4, 8, 16, 32, 64)
SHAPES = {one.name: one for one in (*SMALL, *REAL, TINY)}
# Model and device type: so many sessions at once give at least so many times the tokens a second of one after another.
BARS = {("nano", "cpu"): (16, 4.0), ("qwen3-4b", "cuda"): (32, 16.0)}
RANK = 8


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


def of_shape(name: str) -> Engine:
    """Random weights with random memory, and nano's tokenizer: which tokens are drawn makes no difference.

    A small vocabulary is widened to the tokenizer's.

    Raises:
        BadParameter: no such shape.
    """
    if name not in SHAPES:
        raise typer.BadParameter(f"no {name}; there are {', '.join(SHAPES)}")
    with agentmem.load("nano", adapter=False, device="cpu") as nano:
        tokenizer = nano.tokenizer
    cuda = torch.cuda.is_available()
    shape = replace(SHAPES[name], vocabulary=max(SHAPES[name].vocabulary, len(tokenizer)))
    model = shape.model(torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32)
    return Engine(model, tokenizer, attached(model, RANK, "TSW"), name=name)


def bar_for(model: str, device: torch.device, graphs: bool) -> tuple[int, float] | None:
    """How many sessions are to reach how many times one's tokens a second, where that is asked for."""
    return None if device.type == "cuda" and not graphs else BARS.get((model, device.type))


def in_graphs(engine: Engine) -> bool:
    """Whether sessions decode in CUDA graphs: asked for, and not given up."""
    return engine.model.device.type == "cuda" and engine._context.batch.uses_graphs


def main(
    model: Annotated[str, typer.Option(help="nano, a directory, or a hub id.")] = "nano",
    adapter: Annotated[str | None, typer.Option(help="Its adapter, if not its own.")] = None,
    shape: Annotated[str | None, typer.Option(help="Instead of a model: random weights in this shape.")] = None,
    count: Annotated[list[int], typer.Option(help="How many sessions; may be repeated.")] = list(COUNTS),  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens of each reply.")] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of each number of sessions.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="The figures as JSON.")] = Path("runs/sessions.json"),
    plot: Annotated[Path, typer.Option(help="Where to put the picture.")] = Path("sessions.png"),
) -> None:
    """Measure how much is gained by decoding sessions together."""
    torch.set_num_threads(threads)
    console = Console(width=140)
    with of_shape(shape) if shape else agentmem.load(model, adapter) as engine:
        config, device = engine.model.config, engine.model.device
        said = conditions(device, engine.model.dtype) | {
            "model": f"{shape or model}, {config.num_hidden_layers} layers x {config.hidden_size}, "
            f"vocabulary {config.vocab_size:,}" + ", random weights" * bool(shape),
            "sessions": f"replies of {tokens} tokens, median of {repeats}",
        }
        console.print(text(said), highlight=False, soft_wrap=True)
        say(engine, 0, tokens)
        table = Table("sessions", "one after another, tokens/s", "at once, tokens/s", "at once : one after another")
        found = {}
        for sessions in sorted(set(count)):
            if in_graphs(engine):  # so many rows are captured once
                rates(engine, sessions, tokens, company_first=True)
            pairs = [rates(engine, sessions, tokens, company_first=bool(turn % 2)) for turn in range(repeats)]
            alone, together = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            found[sessions] = {"alone": alone, "together": together, "ratio": ratio}
            table.add_row(str(sessions), f"{alone:,.0f}", f"{together:,.0f}", f"{ratio:.2f}")
        bar = bar_for(shape or model, device, uses_graphs(device))
        gave_up = uses_graphs(device) and not in_graphs(engine)
    console.print(table)
    console.print(_drawn(found, plot), highlight=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(said | {"rates": found}, indent=1) + "\n", "utf-8")
    if gave_up:
        console.print("CUDA graphs were asked for and given up: these are figures without them")
        raise typer.Exit(1)
    if bar is not None and bar[0] in found:
        held = found[bar[0]]["ratio"] >= bar[1]
        console.print(f"bar: {bar[0]} sessions at least {bar[1]:g} times, {'held' if held else 'missed'}")
        raise typer.Exit(0 if held else 1)


def _drawn(found: Mapping[int, Mapping[str, float]], path: Path) -> str:
    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for name, way in (("at once", "together"), ("one after another", "alone")):
            axes.plot(list(found), [one[way] for one in found.values()], marker="o", label=name)
        axes.set(xlabel="sessions", ylabel="tokens a second", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(found), [str(one) for one in found])
        axes.legend()

    return picture(path, (7, 4), paint)


if __name__ == "__main__":
    typer.run(main)
