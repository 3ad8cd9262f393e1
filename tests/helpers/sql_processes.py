"""Processes for the fault tests, started in no time: forked from one that has imported everything (sql_fault_child)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Process:
    """One of them. Wait for every one."""

    template: Template
    number: int
    report: Path

    def said(self) -> list[list[Any]]:
        """What it has said so far; of a line that it was killed in, nothing."""
        text = self.report.read_text() if self.report.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def until_it_says(self, lines: int) -> None:
        """Wait until it has said that much."""
        ends = time.monotonic() + 30
        while len(self.said()) < lines:
            assert time.monotonic() < ends, f"waited for {lines} lines, found {self.said()}"
            time.sleep(0.002)

    def kill(self) -> None:
        """End it with SIGKILL, wherever it is."""
        os.kill(self.number, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end; gives its exit status, that of one that was killed being negative."""
        return self.template.ask("wait", self.number)


class Template:
    """What they are forked from."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._started = 0

    def start(self, work: str, *arguments: Any) -> Process:
        """Start a process on one of the works in sql_fault_child."""
        self._started += 1
        report = self._folder / f"report {self._started}"
        return Process(self, self.ask("start", work, str(report), *arguments), report)

    def ask(self, *command: Any) -> int:
        """Have it do a command; gives the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


@contextmanager
def template(folder: Path) -> Iterator[Template]:
    """Import everything once; reports go into ``folder``."""
    command = [sys.executable, str(Path(__file__).with_name("sql_fault_child.py"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Template(process, folder)
