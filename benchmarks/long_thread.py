"""What a turn costs late in a long thread: memory with a window, beside the whole history in the prompt.

    python benchmarks/long_thread.py                                    nano on this machine, 500 turns (minutes)
    python benchmarks/long_thread.py --page P.md --plot P.png           the same, with a page that shows the picture
    python benchmarks/long_thread.py --model DIR --adapter DIR          a model of yours

The thread is talked once through ``MemoryNode``, which is given the whole history at every turn, as LangGraph gives it.
Its turns around the marks are then run again from the states that they had, round after round, each mark in turn and
both ways next to each other, without any KV at hand: so a machine that slows down slows all of them. Replies have a
fixed number of tokens. Times are the process's computing time on a CPU, wall time on a GPU; a time is the median over
the turns around a mark and the rounds, a ratio the median of ratios within a round.

The exit code is 1 where the last turn costs more than 1.1 times turn 20.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from conditions import conditions, picture, text
from langchain_core.messages import BaseMessage, HumanMessage
from rich.console import Console
from rich.table import Table

import agentmem
from agentmem import Engine, Window
from agentmem_langgraph import ChatDeltaMem, MemoryNode

FIRST, BAR = 20, 1.1


@dataclass
class Thread:
    """A thread as a graph keeps it: messages, and the memory before each turn."""

    messages: list[BaseMessage] = field(default_factory=list)
    memories: list[Any] = field(default_factory=list)

    def at(self, turn: int) -> dict[str, Any]:
        """The graph state that turn number ``turn`` (from 1) starts from."""
        return {"messages": self.messages[: 2 * turn - 1], "memory": self.memories[turn - 1]}


@dataclass
class Mark:
    """What was measured around one turn."""

    windowed: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    window_tokens: int = 0
    whole_tokens: int | None = None


def clock(engine: Engine) -> Callable[[], float]:
    """Computing time on a CPU, wall time on a GPU (a turn ends with its state on the CPU)."""
    return time.perf_counter if engine.model.device.type == "cuda" else time.process_time


def talk(node: MemoryNode, turns: int, show: Callable[[int], None]) -> Thread:
    """The thread, and by the way the memory before each of its turns."""
    thread = Thread()
    memory = None
    for turn in range(1, turns + 1):
        thread.messages.append(HumanMessage(f"Remark {turn} is noted."))
        thread.memories.append(memory)
        update = node.invoke(thread.at(turn))
        thread.messages += update["messages"]
        memory = update["memory"]
        show(turn)
    return thread


def timed(engine: Engine, node: MemoryNode, state: dict[str, Any]) -> tuple[float, int]:
    """Seconds of a turn without KV at hand, and the tokens of its prompt."""
    engine.forget_prefills()
    now = clock(engine)
    # Other objects, as a checkpointer brings them.
    given = state | {"messages": [copy.copy(message) for message in state["messages"]]}
    begin = now()
    update = node.invoke(given)
    return now() - begin, update["messages"][0].usage_metadata["input_tokens"]


def measure(
    engine: Engine, ways: tuple[MemoryNode, MemoryNode], thread: Thread, marks: Sequence[int], rounds: int
) -> dict[int, Mark]:
    """Run the turns around the marks again and again."""
    windowed, whole = ways
    found = {mark: Mark() for mark in marks}
    for number in range(rounds):
        for mark in marks if number % 2 == 0 else list(reversed(marks)):
            state = thread.at(mark - number % 5)
            seconds, tokens = timed(engine, windowed, state)
            found[mark].windowed.append(seconds)
            found[mark].window_tokens = tokens
            if number < 3 and _fits(engine, whole, state):  # it is dear, and its differences are large
                seconds, tokens = timed(engine, whole, state)
                found[mark].whole.append(seconds)
                found[mark].whole_tokens = tokens
    return found


def _fits(engine: Engine, whole: MemoryNode, state: dict[str, Any]) -> bool:
    """Whether the model reads all messages at once, with some room for a reply."""
    tokens = cast(ChatDeltaMem, whole.llm).get_num_tokens_from_messages(state["messages"])
    return tokens + 64 < engine.max_tokens_limit


def kv_bytes(engine: Engine) -> int:
    """Bytes of keys and values that one token of a prompt takes."""
    config = engine.model.config.get_text_config()
    size: int = config.num_key_value_heads * config.head_dim * engine.model.dtype.itemsize
    return 2 * config.num_hidden_layers * size


def main(
    model: Annotated[str, typer.Option(help="As `agentmem.load` takes it.")] = "nano",
    adapter: Annotated[str | None, typer.Option(help="Its adapter; left out, the model's own.")] = None,
    turns: Annotated[int, typer.Option(min=40, help="Of the thread.")] = 500,
    window: Annotated[int, typer.Option(help="Tokens of the window.")] = 256,
    tokens: Annotated[int, typer.Option(help="Of each reply.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each mark is measured.")] = 15,
    page: Annotated[Path | None, typer.Option(help="Write the results as a page.")] = None,
    plot: Annotated[Path, typer.Option(help="Where to put the picture.")] = Path("long_thread.png"),
) -> None:
    """Measure turns of a long thread, early and late."""
    torch.set_num_threads(1)
    engine = agentmem.load(model, adapter=adapter)
    # At this temperature all tokens are about as likely, so no reply ends early.
    options: dict[str, Any] = {"engine": engine, "temperature": 50.0, "seed": 1, "max_tokens": tokens}
    windowed = MemoryNode(ChatDeltaMem(**options, window=window))
    whole = MemoryNode(ChatDeltaMem(**options, window=Window(tokens=None), use_memory=False))
    console = Console(width=140)
    with console.status("talking") as status:
        thread = talk(windowed, turns, lambda turn: status.update(f"turn {turn} of {turns}"))
    marks = sorted({FIRST, *(turns * n // 5 for n in range(1, 6))} - set(range(FIRST)))
    found = measure(engine, (windowed, whole), thread, marks, rounds)
    last, first = found[marks[-1]], found[FIRST]
    ratio = statistics.median(b / a for a, b in zip(first.windowed, last.windowed, strict=True))
    stored = len(thread.memories[-1]["data"]) + len(thread.memories[-1]["tail"])
    config = engine.model.config
    said = conditions(engine.model.device, engine.model.dtype) | {
        "model": f"{model}, {config.num_hidden_layers} layers x {config.hidden_size}",
        "thread": f"{turns} turns, a window of {window} tokens, replies of {tokens}, {rounds} rounds",
    }
    rows = [_row(mark, found[mark], kv_bytes(engine), stored) for mark in marks]
    table = Table(*HEAD, title="a turn of a long thread")
    for row in rows:
        table.add_row(*row)
    verdict = f"turn {marks[-1]} : turn {FIRST} = {ratio:.3f}, bar {BAR}, {'held' if ratio <= BAR else 'missed'}"
    console.print(text(said), highlight=False, soft_wrap=True)
    console.print(table, verdict, _drawn(found, plot), sep="\n", highlight=False)
    if page is not None:
        _write(page, rows, said, verdict, plot)
    engine.close()
    raise typer.Exit(0 if ratio <= BAR else 1)


HEAD = (
    "turn", "window: ms", "prompt tokens", "KV, kB", "memory, kB",
    "whole history: ms", "prompt tokens ", "KV, kB ",
)  # fmt: skip


def _row(mark: int, one: Mark, token: int, stored: int) -> tuple[str, ...]:
    too_long = ("does not fit", "", "")
    whole = (
        too_long
        if one.whole_tokens is None
        else (
            f"{1e3 * statistics.median(one.whole):.0f}",
            f"{one.whole_tokens:,}",
            f"{one.whole_tokens * token / 1e3:,.0f}",
        )
    )
    return (
        f"{mark}",
        f"{1e3 * statistics.median(one.windowed):.1f}",
        f"{one.window_tokens}",
        f"{one.window_tokens * token / 1e3:,.0f}",
        f"{stored / 1e3:.1f}",
        *whole,
    )


def _write(page: Path, rows: Sequence[tuple[str, ...]], said: dict[str, str], verdict: str, plot: Path) -> None:
    lines = [
        "# A turn of a long thread",
        "",
        "What is measured, and how, stands at the head of `benchmarks/long_thread.py`.",
        "",
        *(f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in said.items()),
        "",
        f"**{verdict}**",
        "",
        f"| {' | '.join(name.strip() for name in HEAD)} |",
        "|" + "---:|" * len(HEAD),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Window: the model with memory, `MemoryNode` given the whole history and the memory. Whole history: the same",
        "model without memory and all messages in the prompt, which is read anew at each turn. KV: what keys and",
        "values of the prompt take while the turn runs. Memory: what the thread keeps of it in a checkpoint. Does not",
        "fit: more tokens than the model reads.",
        *(["", f"![Time of a turn by its number]({plot.name})"] if plot.exists() else []),
    ]
    page.write_text("\n".join(lines) + "\n", "utf-8")


def _drawn(found: dict[int, Mark], path: Path) -> str:
    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for name, times in (
            ("memory with a window", {m: one.windowed for m, one in found.items()}),
            ("whole history in the prompt", {m: one.whole for m, one in found.items() if one.whole}),
        ):
            axes.plot(list(times), [1e3 * statistics.median(many) for many in times.values()], marker="o", label=name)
        axes.set(xlabel="turn", ylabel="milliseconds", ylim=(0, None))
        axes.legend()

    return picture(path, (7, 4), paint)


if __name__ == "__main__":
    typer.run(main)
