"""Processes that write to a database until they are killed, forked in no time from one that has imported everything.

Run as a script, this is that one, the template. It reads commands, a JSON list a line, and answers each with a line:
`["start", work, report, ...]` forks a process that does the work and gives its number, `["wait", number]` waits for its
end and gives its exit status, negative for the signal that killed it. What the process has to say it appends to the
file `report`, line by line, past all buffers, so that it is there whenever it is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.types import INTERRUPT
from sqlalchemy import Engine, event

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import aput, config, memory, put

INTERRUPTS = 3

Say = Callable[..., None]


def values(step: int) -> dict[str, Any]:
    """The channels of a checkpoint: a list that grows by a message a step and now and then begins anew, a state."""
    first = step - step % 40
    return {"messages": [f"message {at} of the thread, " * 9 for at in range(first, step + 1)], "memory": memory(step)}


def pending(step: int) -> list[tuple[str, Any]]:
    """What a task wrote under the checkpoint of a step: content of its own, and content of the checkpoint."""
    return [("messages", [f"answer {step}, " * 20]), ("memory", memory(step)), ("step", step)]


def question(step: int, number: int) -> dict[str, Any]:
    """What an interrupt asks; each of a step overwrites the one before it."""
    return {"number": number, "text": f"question {number} of step {step}, " * 9}


# What a process does.


def grow(say: Say, url: str, die_at: int = 0) -> None:
    """Go on with the thread `t` for ever; says what is stored when it is, and before it prunes.

    With `die_at` it kills itself before the statement, or commit, of that number.
    """
    numbers = count(1)

    def die(*_: object) -> None:
        if next(numbers) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", die)
    event.listen(Engine, "commit", die)
    saver = SQLAlchemySaver.from_url(url)
    newest = saver.get_tuple(config())
    at: RunnableConfig = config() if newest is None else newest.config
    for step in count(0 if newest is None else newest.metadata["step"] + 1):
        at = put(saver, at, values(step), step=step)
        own_id = at["configurable"]["checkpoint_id"]
        say("put", own_id, step)
        saver.put_writes(at, pending(step), "task")
        say("writes", own_id)
        if step % 3 == 0:
            for number in range(INTERRUPTS):
                saver.put_writes(at, [(INTERRUPT, question(step, number))], "asking")
                say("interrupt", own_id, number)
        if step % 8 == 7:
            say("pruning", own_id)
            saver.prune(["t"])
            say("pruned", own_id)


def write(say: Say, url: str, own: str, stop: str) -> None:
    """Store checkpoints in a thread of its own and in one that others write too, until there is a file `stop`.

    Says of each pair how many seconds it took.
    """
    with SQLAlchemySaver.from_url(url) as saver:
        for step in count():
            begin = time.monotonic()
            for thread in (own, "everybody's"):
                at = put(saver, config(thread), {"n": step, "shared": b"same" * 500}, writer=own)
                saver.put_writes(at, [("n", step), ("shared", b"same" * 500)], "task", "path")
            say(time.monotonic() - begin)
            if os.path.exists(stop):
                return


def fork(_: Say, url: str) -> None:
    """Fork with a saver open that was used in both modes; both processes use it at the same time, and close it."""
    saver = SQLAlchemySaver.from_url(url)
    put(saver, config("parent"), {"x": 1})
    asyncio.run(aput(saver, "parent", x=1))

    def use(thread: str) -> None:
        for x in range(10):
            put(saver, config(thread), {"x": x})
        asyncio.run(aput(saver, thread, x=10))
        saver.close()

    child = _forked(lambda: use("child"))
    use("parent")
    assert wait(child) == 0


# The template.


def _forked(work: Callable[[], None]) -> int:
    """The number of a process that does some work and ends."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001  (of the fork, nothing may go on)
        traceback.print_exc()
    finally:
        os._exit(status)


def start(work: str, report: str, *arguments: Any) -> int:
    """Fork a process that does `work`; gives its number."""
    do = {"grow": grow, "write": write, "fork": fork}[work]
    out = os.open(report, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    number = _forked(lambda: do(lambda *said: os.write(out, json.dumps(said).encode() + b"\n"), *arguments))
    os.close(out)
    return number


def wait(number: int) -> int:
    """Wait for the end of a process; gives its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


# The side of the tests.


@dataclass(frozen=True)
class Process:
    """One of them. Wait for every one."""

    ask: Callable[..., int]
    number: int
    report: Path

    def said(self) -> list[list[Any]]:
        """What it has said so far; of a line that it was killed in, nothing."""
        lines = self.report.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def until_it_says(self, lines: int) -> None:
        """Wait until it has said that much."""
        ends = time.monotonic() + 60
        while len(self.said()) < lines:
            assert time.monotonic() < ends, f"waited for {lines} lines, found {self.said()}"
            time.sleep(0.002)

    def kill(self) -> None:
        """End it with SIGKILL, wherever it is."""
        os.kill(self.number, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end; gives its exit status, that of one that was killed being negative."""
        return self.ask("wait", self.number)


@contextmanager
def template(folder: Path) -> Iterator[Callable[..., Process]]:
    """Import everything once; gives what starts a process on a work of this file. Reports go into `folder`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    reports = count()
    with subprocess.Popen([sys.executable, __file__], env=environment, **pipes) as process:

        def ask(*command: Any) -> int:
            print(json.dumps(command), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        def start_one(work: str, *arguments: Any) -> Process:
            report = folder / f"report {next(reports)}"
            return Process(ask, ask("start", work, str(report), *arguments), report)

        yield start_one


if __name__ == "__main__":
    for driver in ("psycopg", "pymysql"):
        with suppress(ModuleNotFoundError):
            import_module(driver)
    for line in sys.stdin:
        command, *given = json.loads(line)
        print({"start": start, "wait": wait}[command](*given), flush=True)
