"""What a person sees of a run: progress with the time left, and one example as the model gets it (`--dry-run`).

On a terminal a bar and colours; elsewhere plain lines that can be kept in a file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from agentmem.training.sources import ENDLESS, FileSource, MixedSource, Source

if TYPE_CHECKING:
    from agentmem.training.examples import Example, Pass
    from agentmem.training.loop import TrainProgress

_EVERY = 15.0  # seconds between plain lines
_BAD_LINES = 5  # of a file that are shown
_READ, _WRITTEN, _LEARNED = "dim", "green", "bold reverse"


@contextmanager
def shown_progress(console: Console | None = None) -> Iterator[Callable[[TrainProgress], None]]:
    """A function that shows progress, on standard error unless told otherwise, until the context ends."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _PlainLines(console).show
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("training", total=None, loss="-", left="")
        last: Mapping[str, float] = {}

        def show(now: TrainProgress) -> None:
            nonlocal last
            bars.update(
                task,
                description=now.stage,
                completed=now.step,
                total=now.max_steps,
                loss=f"{now.loss:.3f}",
                left=f"{duration(now.seconds_left)} left",
            )
            if now.arms is not last and now.arms:
                last = now.arms
                bars.console.print(measured(now), highlight=False)

        yield show


class _PlainLines:
    def __init__(self, console: Console) -> None:
        self._console, self._last = console, 0.0
        self._arms: Mapping[str, float] = {}

    def show(self, now: TrainProgress) -> None:
        fresh = bool(now.arms) and now.arms is not self._arms
        self._arms = now.arms
        if fresh:
            self._console.print(measured(now), highlight=False, soft_wrap=True)
        if fresh or now.step == now.max_steps or time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            stage = "" if now.stage == "training" else f"{now.stage}: "
            line = f"{stage}step {now.step} of {now.max_steps}, loss {now.loss:.3f}, {duration(now.seconds)}, "
            self._console.print(f"{line}{duration(now.seconds_left)} left", highlight=False, soft_wrap=True)


def measured(now: TrainProgress) -> str:
    """A measurement in one line."""
    arms = ", ".join(f"{name} {value:.3f}" for name, value in now.arms.items())
    return f"step {now.step}: {arms}; score {now.score:.3f}"


def duration(seconds: float) -> str:
    """ "48 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def show_example(example: Example, tokenizer: Any, console: Console | None = None) -> None:
    """Print an example pass by pass, with what each token is for: written, only read, or counted in the loss."""
    console = console or Console()
    if console.is_terminal:
        marks = Text.assemble(
            ("only read", _READ), "  ", ("written", _WRITTEN), "  ", ("counts in the loss", _LEARNED), "\n"
        )
        console.print(marks)
    for number, each in enumerate(example.passes, 1):
        _show_pass(f"pass {number}", each, tokenizer, console)
    for number, each in enumerate(example.asks, 1):
        _show_pass(f"question {number}, from the state after the last pass", each, tokenizer, console)


def show_data(source: Source, held_out: Sized, measured: str, console: Console) -> None:
    """Print how many conversations there are, what was left out and why, and what is measured.

    Args:
        source: the data of a run.
        held_out: what is held out of it.
        measured: what that is used for, in words.
        console: where to print.
    """
    count = len(source)
    skipped = ", ".join(f"{number} with {reason}" for reason, number in source.skipped.items())
    console.print(
        f"{source.name}: {'without end' if count >= ENDLESS else f'{count} conversations'}"
        f"{'; left out: ' + skipped if skipped else ''}; {len(held_out)} held out, {measured}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for each in source.sources if isinstance(source, MixedSource) else (source,):
        bad = each.bad if isinstance(each, FileSource) else ()
        lines = [f"  {each.name}:{line.number}: {line.reason}" for line in bad[:_BAD_LINES]]
        if len(bad) > _BAD_LINES:
            lines.append(f"  and {len(bad) - _BAD_LINES} more")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _show_pass(name: str, each: Pass, tokenizer: Any, console: Console) -> None:
    written = sum(segment >= 0 for segment in each.segments)
    learned = sum(weight > 0 for weight in each.weights)
    end = "" if each.split == len(each.ids) else f"; the first {each.split} are written before the others read"
    console.print(
        f"{name}: {len(each.ids)} tokens, {written} written, {learned} in the loss{end}", style="bold", highlight=False
    )
    text = Text()
    # Runs of tokens of one kind are decoded together: a token alone may be a part of a character.
    tokens = zip(each.ids, each.segments, each.weights, strict=True)
    for (writes, weight), run in groupby(tokens, key=lambda token: (token[1] >= 0, token[2])):
        piece = tokenizer.decode([token[0] for token in run])
        if console.is_terminal:
            text.append(
                piece, style=" ".join(filter(None, [_WRITTEN if writes else _READ, _LEARNED if weight else ""]))
            )
        else:
            mark = ("written" if writes else "read") + (f", loss {weight:g}" if weight else "")
            console.print(f"  {mark:<18} {piece!r}", markup=False, highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(text, soft_wrap=True)
    console.print()
