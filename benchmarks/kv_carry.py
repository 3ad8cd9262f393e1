"""What carried KV does to answers: the same conversations with exact and with carried keys and values.

    python benchmarks/kv_carry.py                          nano on this machine, 100 conversations (minutes)
    python benchmarks/kv_carry.py --conversations 20       a first look

Conversations of nano's language, none of which it was trained on: things are told, some are changed, small talk, and
then all are asked for, one question a turn. Every conversation is talked twice in closed loop, each way with its own
replies, and each with the whole thread in view and with the last messages alone. What is compared: whole answers with
95 % intervals over conversations, replies that are the same word for word, tokens that were read for the prompts, and
the process's computing time. The peer is the default, ``kv="exact"``.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Literal

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import agentmem
from agentmem import Engine, Message, Sampling, Window, load
from agentmem.evaluation.intervals import share
from agentmem.nano.language import Binding, answer, ask
from agentmem.nano.turns import Talk

WINDOWS = {"the whole thread in view": None, "the last 4 messages in view": 4}
KV = Literal["exact", "carry"]


@dataclass(frozen=True)
class Plot:
    """What the user says, and for each question the binding that answers it."""

    said: tuple[str, ...]
    asked: dict[int, Binding]


@dataclass
class Arm:
    """What one way of keeping KV led to."""

    right: list[tuple[int, int]] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    read: int = 0
    seconds: float = 0.0


def draw(rng: Random, bindings: int, fillers: int) -> Plot:
    """A conversation: told in any order among small talk, one thing changed, everything asked at the end."""
    talk = Talk(rng)
    steps = ["tell"] * bindings + ["filler"] * fillers
    rng.shuffle(steps)
    steps.insert(rng.randint(steps.index("tell") + 1, len(steps)), "change")
    said = [talk.take(step)[0].content for step in steps]
    asked = {}
    for binding in rng.sample(sorted(talk.told.values(), key=lambda one: one.attribute), bindings):
        asked[len(said)] = binding
        said.append(ask(rng, binding.attribute))
    return Plot(tuple(said), asked)


def run(engine: Engine, plot: Plot, kv: KV, messages: int | None, arm: Arm) -> None:
    """Talk a conversation, each turn with the replies that came before."""
    engine.forget_prefills()
    window = Window() if messages is None else Window(messages=messages)
    history: list[Message] = []
    state, right = None, 0
    for number, said in enumerate(plot.said):
        history.append(Message("user", said))
        began = time.process_time()
        turn = engine.turn(history, state, kv=kv, window=window, sampling=Sampling(max_tokens=48))
        arm.seconds += time.process_time() - began
        history.append(turn.message)
        state = turn.state
        arm.replies.append(turn.message.content)
        arm.read += turn.usage.input_tokens - turn.usage.cache_read_tokens
        if number in plot.asked:
            right += turn.message.content == answer(plot.asked[number])
    arm.right.append((right, len(plot.asked)))


def main(
    conversations: Annotated[int, typer.Option(min=1)] = 100,
    bindings: Annotated[int, typer.Option(min=1, max=20)] = 4,
    fillers: Annotated[int, typer.Option(min=0)] = 4,
    seed: int = 0,
) -> None:
    """Print the table."""
    console = Console(width=140)
    torch.set_num_threads(1)
    plots = [draw(Random(f"carry {seed} {i}"), bindings, fillers) for i in range(conversations)]
    arms: dict[str, dict[KV, Arm]] = {name: {"exact": Arm(), "carry": Arm()} for name in WINDOWS}
    with load("nano", kv_cache_tokens=65_536) as engine:
        for i, plot in enumerate(track(plots, console=Console(stderr=True))):
            for name, messages in WINDOWS.items():
                ways: tuple[KV, KV] = ("exact", "carry") if i % 2 else ("carry", "exact")
                for kv in ways:
                    run(engine, plot, kv, messages, arms[name][kv])
    table = Table("window", "kv", "right answers (95 %)", "same replies", "prompt tokens read", "computing time")
    for name, both in arms.items():
        for kv, arm in both.items():
            found = share(arm.right)
            same = sum(a == b for a, b in zip(arm.replies, both["exact"].replies, strict=True)) / len(arm.replies)
            table.add_row(
                name,
                kv,
                f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f})",
                "-" if kv == "exact" else f"{same:.3f}",
                f"{arm.read:,} ({arm.read / both['exact'].read:.2f})",
                f"{arm.seconds:.1f} s ({arm.seconds / both['exact'].seconds:.2f})",
            )
    console.print(table)
    console.print(
        f"{conversations} conversations of {bindings} things told, one changed, {fillers} turns of small talk and "
        f"{bindings} questions; in brackets: as a share of exact. nano in float32, one thread, {platform.machine()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; agentmem {agentmem.__version__}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}\n"
        f"python {' '.join(sys.argv)}"
    )


if __name__ == "__main__":
    typer.run(main)
