"""A chat on an ideal memory: the stand-in for the engine that the graphs are tested on, behind the chat's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from rich.console import Console

from agentmem_cli.chat import Chat, Settings
from agentmem_cli.graph import open_threads
from tests.helpers.fake_engine import FakeEngine


class IdealEngine(FakeEngine):
    """Remembers what it is told in nano's language, with the names that a command asks for."""

    model_fingerprint = "model"
    adapter_fingerprint = "adapter"
    model = SimpleNamespace(dtype="torch.float32", device="cpu")


class Talk:
    """A chat over a file of threads."""

    def __init__(self, db: Path, engine: Any = None, thread: str = "main", retriever: Any = None) -> None:
        self.db, self.engine, self.thread = db, engine or IdealEngine(), thread
        self.retriever = retriever
        self.settings = Settings(window="1m")
        self.writes: list[str] = []

    def __call__(self, *lines: str) -> str:
        """Open the file, say these lines, close it; returns what was shown."""
        return self.through(lines)

    def through(self, lines: Iterable[str]) -> str:
        """As a call, with lines that are made while the chat goes on."""
        return self._record(lambda chat: chat.run(iter(lines)))

    def answer(self, question: str) -> str:
        """One question; returns what was shown."""
        return self._record(lambda chat: chat.answer(question))

    def _record(self, do: Callable[[Chat], None]) -> str:
        shown = _Recorder()
        console = Console(file=shown, width=200)
        with open_threads(self.db) as saver:
            do(Chat(self.engine, saver, self.thread, console, self.settings, retriever=self.retriever))
        self.writes = shown.writes
        return shown.getvalue()


@dataclass
class Payload:
    """A value in somebody else's database that does something when it is made."""

    made: ClassVar[list[str]] = []
    text: str

    def __post_init__(self) -> None:
        self.made.append(self.text)


class _Recorder(StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)
