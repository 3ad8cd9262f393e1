"""What carried KV does to answers: the same conversations with exact and with carried keys and values.

    python benchmarks/kv_carry.py                          nano on this machine, 100 conversations (minutes)
    python benchmarks/kv_carry.py --conversations 20       a first look, with the picture of all arms (``--plot``)

Conversations of nano's language, none of which it was trained on: things are told, some are changed, small talk, and
then all are asked for, one question a turn. Every conversation is talked twice in closed loop, each way with its own
replies, and each with the whole thread in view and with the last messages alone. What is compared: whole answers with
95 % intervals over conversations, replies that are the same word for word, tokens that were read for the prompts, and
the process's computing time. The peer is the default, ``kv="exact"``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import torch
import typer
from conditions import conditions, picture, text
from rich.console import Console
from rich.progress import track
from rich.table import Table

from agentmem import Engine, Message, Sampling, Window, load
from agentmem.nano.recipe.language import Binding, answer, ask
from agentmem.nano.recipe.turns import Talk
from agentmem.training.intervals import share

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
    plot: Annotated[Path, typer.Option(help="Where to put the picture.")] = Path("kv_carry.png"),
) -> None:
    """Print the table and draw it."""
    console = Console(width=140)
    torch.set_num_threads(1)
    plots = [draw(Random(f"carry {seed} {i}"), bindings, fillers) for i in range(conversations)]
    arms: dict[str, dict[KV, Arm]] = {name: {"exact": Arm(), "carry": Arm()} for name in WINDOWS}
    with load("nano", kv_cache_tokens=65_536) as engine:
        console.print(text(conditions(engine.model.device, engine.model.dtype)), highlight=False, soft_wrap=True)
        for i, talk in enumerate(track(plots, console=Console(stderr=True))):
            for name, messages in WINDOWS.items():
                ways: tuple[KV, KV] = ("exact", "carry") if i % 2 else ("carry", "exact")
                for kv in ways:
                    run(engine, talk, kv, messages, arms[name][kv])
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
        f"{bindings} questions, seed {seed}; in brackets: as a share of exact."
    )
    console.print(draw_arms(arms, plot), highlight=False)


def draw_arms(arms: dict[str, dict[KV, Arm]], path: Path) -> str:
    """Right answers, tokens read and computing time of all arms."""

    def paint(figure: Any) -> None:
        names = [f"{name}, {kv}" for name, both in arms.items() for kv in both]
        each = [arm for both in arms.values() for arm in both.values()]
        for axes, (what, values) in zip(
            figure.subplots(1, 3, sharey=True),
            (
                ("right answers", [share(arm.right).value for arm in each]),
                ("prompt tokens read", [arm.read for arm in each]),
                ("computing time, s", [arm.seconds for arm in each]),
            ),
            strict=True,
        ):
            axes.barh(names, values)
            axes.set(title=what, xlim=(0, None))
        axes.invert_yaxis()

    return picture(path, (11, 2.6), paint)


if __name__ == "__main__":
    typer.run(main)
