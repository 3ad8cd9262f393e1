"""The table with its bars, and the same as JSON; both renewed after each part."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpu.parts import PARTS, Part
from gpu.results import Result, read

_WIDTH = 150


@dataclass(frozen=True)
class Ended:
    """How a part ended.

    Attributes:
        why: why it did not come to its end; empty where it did.
        code: its exit code; None where it was not started.
        seconds: how long it took.
    """

    why: str
    code: int | None = None
    seconds: float = 0.0


class Report:
    """Gathers what the parts have found.

    Args:
        out: the directory that the parts write to.
        rehearsal: whether times count for nothing.
        command: as it was given.
    """

    def __init__(self, out: Path, rehearsal: bool, command: str) -> None:
        self._out, self._rehearsal, self._command = out, rehearsal, command
        self._notes: list[str] = []
        self._parts: list[tuple[Part, Ended, list[Result]]] = []
        self._conditions: dict[str, str] = {}

    @property
    def held(self) -> bool:
        """Whether every part came to its end and all bars were held; in a rehearsal those of what must be right."""
        judged = [result for _, _, results in self._parts for result in results]
        missed = any(r.verdict == "failed" or (r.verdict == "missed" and self._counts(r)) for r in judged)
        return not missed and not any(ended.why for _, ended, _ in self._parts)

    def note(self, text: str) -> None:
        """Something to be said above the table."""
        print(text, flush=True)
        self._notes.append(text)
        self._write()

    def add(self, part: Part, ended: Ended) -> None:
        """Take up what a part has written, however it ended."""
        conditions, results = read(self._out / f"{part.name}.jsonl")
        self._conditions = self._conditions or conditions
        self._parts.append((part, ended, results))
        self._parts.sort(key=lambda entry: PARTS.index(entry[0]))
        if ended.why:
            print(f"{part.name}: {ended.why}", flush=True)
        self._write()

    def text(self) -> str:
        """Conditions, the table, and where the time goes."""
        table = Table("part", "what", "found", "bar", "verdict")
        for part, ended, results in self._parts:
            for result in results:
                sign = "at most" if result.most else "at least"
                bar = "" if result.bar is None else f"{sign} {result.bar:g}"
                table.add_row(part.name, escape(result.what), escape(result.said), bar, self._verdict(result))
            whole = escape(ended.why) or f"{ended.seconds:.0f} s"
            table.add_row(part.name, "in all", whole, "", "failed" * bool(ended.why), end_section=True)
        page = StringIO()
        console = Console(width=_WIDTH, file=page)
        said = {**self._conditions, "command": self._command}
        for text in (*(f"{name}: {value}" for name, value in said.items()), *self._notes):
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        console.print(table)
        for _, _, results in self._parts:
            for result in results:
                if result.places:
                    text = f"{result.what}, where it goes: {'; '.join(result.places)}"
                    console.print(text, highlight=False, markup=False, soft_wrap=True)
        return page.getvalue()

    def _counts(self, result: Result) -> bool:
        return result.exact or not self._rehearsal

    def _write(self) -> None:
        body = {
            "command": self._command,
            "conditions": self._conditions,
            "rehearsal": self._rehearsal,
            "held": self.held,
            "notes": self._notes,
            "parts": [self._part(*entry) for entry in self._parts],
        }
        for name, text in (("results.json", json.dumps(body, indent=1) + "\n"), ("table.txt", self.text())):
            aside = self._out / f".{name}.partial"
            aside.write_text(text, "utf-8")
            aside.replace(self._out / name)

    def _part(self, part: Part, ended: Ended, results: list[Result]) -> dict[str, Any]:
        return {"name": part.name, "title": part.title, **asdict(ended), "results": [asdict(x) for x in results]}

    def _verdict(self, result: Result) -> str:
        return "missed (does not count)" if result.verdict == "missed" and not self._counts(result) else result.verdict
