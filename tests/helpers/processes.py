"""Processes on a work of another file, forked in no time from one that has imported everything.

What a process has to say it appends to a file, past all buffers, so that it is there whenever it is killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# There is one such server for all tests of a process, so what any of them needs is imported there; none has torch.
WORKS = [f"tests.helpers.{name}_processes" for name in ("sql", "fact", "governance")]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([*WORKS, "psycopg", "pymysql"])

Say = Callable[..., None]


def _work(work: Callable[..., None], report: Path, arguments: tuple[Any, ...]) -> None:
    out = os.open(report, os.O_APPEND | os.O_WRONLY)
    work(lambda *said: os.write(out, json.dumps(said).encode() + b"\n"), *arguments)


class Process:
    """A process on a work, which reports to a file. Wait for every one."""

    def __init__(self, report: Path, work: Callable[..., None], *arguments: Any) -> None:
        self._report = report
        report.touch()
        self._process = FORKSERVER.Process(target=_work, args=(work, report, arguments), daemon=True)
        self._process.start()

    def said(self) -> list[list[Any]]:
        """What it has said so far; of a line that it was killed in, nothing."""
        lines = self._report.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def pid(self) -> int | None:
        """Its number."""
        return self._process.pid

    def until_it_says(self, lines: int) -> None:
        """Wait until it has said that much."""
        ends = time.monotonic() + 240  # the first process of all waits for what is imported
        while len(self.said()) < lines:
            assert time.monotonic() < ends, f"waited for {lines} lines, found {self.said()}"
            time.sleep(0.002)

    def kill(self) -> None:
        """End it with SIGKILL, wherever it is."""
        self._process.kill()

    def wait(self) -> int | None:
        """Wait for its end; gives its exit status, that of one that was killed being negative."""
        self._process.join()
        return self._process.exitcode
