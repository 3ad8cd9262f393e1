"""What a part finds, written line by line as it is found, and what goes wrong in it, case by case."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["", "held", "missed", "failed"]
FAULTS = ("memory", "capture", "time")
"""Failures that can be simulated: too little memory, a CUDA graph that is refused, a case that never ends."""


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Attributes:
        what: of what.
        said: what was found, as it is shown; why, where it failed.
        value: the number that is judged.
        bar: the least that it must be, or the most; None: there is none.
        most: whether `bar` is the most.
        verdict: how it was judged; "failed": there is no number.
        exact: whether it says that something is right, which also counts in a rehearsal.
        places: where the time (or the memory) goes, for what was missed.
        figures: what else was measured.
    """

    what: str
    said: str
    value: float | None = None
    bar: float | None = None
    most: bool = False
    verdict: Verdict = ""
    exact: bool = False
    places: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """A failure to simulate in the case of this number, counted from 1."""

    kind: str
    case: int

    def strike(self) -> None:
        """Fail.

        Raises:
            OutOfMemoryError, CannotCapture: as torch and the engine raise them.
        """
        import torch

        from agentmem.generation.cuda_graph import CannotCapture

        if self.kind == "memory":
            raise torch.OutOfMemoryError("simulated: no memory is left")
        if self.kind == "capture":
            raise CannotCapture("simulated: operation not permitted when stream is capturing")
        time.sleep(1e6)


class Recorder:
    """Writes the results of one part.

    Args:
        path: a JSONL file, a line for each result.
        until: when the part has to end, on the clock of `time.monotonic`, which all processes of a machine share.
        fault: a failure to simulate.
    """

    def __init__(self, path: Path, until: float, fault: Fault | None = None) -> None:
        self.path = path
        self._until = until
        self._fault = fault
        self._case = 0

    @property
    def seconds_left(self) -> float:
        """How long the part may still take."""
        return self._until - time.monotonic()

    def write(self, kind: str, body: dict[str, Any]) -> None:
        """Append a line to the file, at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: body}) + "\n")

    def add(self, result: Result) -> None:
        """Write a result, and show it."""
        self.write("result", asdict(result))
        print(line(result), flush=True)

    def tell(self, what: str, said: str, **figures: Any) -> None:
        """A result that is not judged."""
        self.add(Result(what, said, figures=figures))

    def judge(
        self,
        what: str,
        value: float,
        bar: float,
        said: str,
        *,
        most: bool = False,
        exact: bool = False,
        places: Callable[[], Sequence[str]] | None = None,
        **figures: Any,
    ) -> None:
        """A result and its bar; `places` is asked where it was missed. NaN is a miss."""
        held = value <= bar if most else value >= bar
        found: Sequence[str] = ()
        if not held and places is not None:
            try:
                found = places()
            except Exception as error:  # noqa: BLE001 - the figure stands without them
                found = [f"not known: {brief(error)}"]
        verdict: Verdict = "held" if held else "missed"
        self.add(Result(what, said, value, bar, most, verdict, exact, tuple(found), figures))

    def attempt(
        self, what: str, run: Callable[[], None], *, bar: float | None = None, most: bool = False, exact: bool = False
    ) -> None:
        """Run a case. If it fails, that is its result, beside the bar that it was to be judged by; the part goes on."""
        self._case += 1
        try:
            if self._fault is not None and self._fault.case == self._case:
                self._fault.strike()
            run()
        except Exception as error:  # noqa: BLE001 - the next case has its chance
            traceback.print_exc(file=sys.stderr)
            self.add(Result(what, brief(error), None, bar, most, "failed", exact))
        _release()


def brief(error: BaseException) -> str:
    """What went wrong, in a line."""
    import torch

    from agentmem.generation.cuda_graph import CannotCapture

    name = type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        name = "out of memory"
    elif isinstance(error, CannotCapture):
        name = "capture refused"
    text = " ".join(str(error).split())
    return f"{name}: {text[:200]}" if text else name


def line(result: Result) -> str:
    """A result as one line of text."""
    bar = "" if result.bar is None else f"; at {'most' if result.most else 'least'} {result.bar:g}"
    return f"  {result.what}: {result.said}{bar}{': ' * bool(result.verdict)}{result.verdict}"


def read(path: Path) -> tuple[dict[str, str], list[Result]]:
    """The conditions and results that a part has written, if it came to that; a line cut short is left out."""
    conditions: dict[str, str] = {}
    results = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            body = json.loads(text)
        except ValueError:
            continue
        conditions = body.get("conditions", conditions)
        if "result" in body:
            results.append(Result(**{**body["result"], "places": tuple(body["result"]["places"])}))
    return conditions, results


def _release() -> None:
    """Give back what a case held. After an error of the device itself that fails too, as will all that follows."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"the device does not answer any more: {error}", file=sys.stderr)
