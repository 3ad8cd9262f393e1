"""A chat on an ideal memory: the stand-in for the engine that the graphs are tested on, behind the chat's own loop."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from agentmem import Window
from agentmem_cli.chat import Chat
from agentmem_cli.graph import open_threads
from tests.helpers.fake_engine import FakeEngine


class IdealEngine(FakeEngine):
    """Remembers what it is told in nano's language, with the names that a command asks for."""

    model_fingerprint = "model"
    adapter_fingerprint = "adapter"


class Talk:
    """A chat over a file of threads."""

    def __init__(self, db: Path, engine: Any = None, thread: str = "main", retriever: Any = None) -> None:
        self.db, self.engine, self.thread = db, engine or IdealEngine(), thread
        self.retriever = retriever
        self.writes: list[str] = []

    def __call__(self, *lines: str) -> str:
        """Open the file, say these lines, close it; returns what was shown."""
        return self.through(lines)

    def through(self, lines: Iterable[str]) -> str:
        """As a call, with lines that are made while the chat goes on."""
        shown = _Recorder()
        console = Console(file=shown, width=200)
        with open_threads(self.db) as saver:
            options = {"window": Window(messages=1), "retriever": self.retriever}
            Chat(self.engine, saver, self.thread, console, **options).run(iter(lines))
        self.writes = shown.writes
        return shown.getvalue()


class _Recorder(StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)
