"""Processes that write until they are killed, for the fault tests.

Run as a script, this is a template: everything is imported, nothing is open. It reads commands, a JSON list a
line, and answers each with a line. `["start", work, report, ...]` forks a process that does the work and writes
what it has to say into the file `report`, line by line, past all buffers, so that it is there whenever the process
is killed; the answer is its number. `["wait", number]` waits for its end, and answers with its exit status (the
negative number of the signal that killed it).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from itertools import count
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import WRITES_IDX_MAP
from sqlalchemy import Engine, event

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import aput, checkpoint, config, memory, put

for driver in ("psycopg", "pymysql"):
    with suppress(ModuleNotFoundError):
        import_module(driver)

INTERRUPT = next(name for name in WRITES_IDX_MAP if "interrupt" in name)
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


class Sync:
    """The saver's synchronous methods."""

    def __init__(self, saver: SQLAlchemySaver) -> None:
        self.saver = saver

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.saver, name)(*arguments)

    def put(self, to: RunnableConfig, step: int) -> RunnableConfig:
        """Store the checkpoint of a step."""
        made = checkpoint(values(step), self.saver.get_next_version(None, None))
        found: RunnableConfig = self.call("put", to, made, {"source": "loop", "step": step}, made["channel_versions"])
        return found

    def close(self) -> None:
        self.saver.close()


class Async(Sync):
    """The asynchronous ones, on one loop."""

    def __init__(self, saver: SQLAlchemySaver) -> None:
        super().__init__(saver)
        self._runner = asyncio.Runner()

    def call(self, name: str, *arguments: Any) -> Any:
        return self._runner.run(getattr(self.saver, f"a{name}")(*arguments))

    def close(self) -> None:
        self._runner.close()
        self.saver.close()


def grow(say: Say, url: str, mode: str, die_at: int = 0) -> None:
    """Go on with the thread `t` for ever; says what is stored when it is, and before it prunes.

    With `die_at` it kills itself before the statement, or commit, of that number.
    """
    numbers = count(1)

    def die(*_: object) -> None:
        if next(numbers) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", die)
    event.listen(Engine, "commit", die)
    saver = (Async if mode == "async" else Sync)(SQLAlchemySaver.from_url(url))
    newest = saver.call("get_tuple", config())
    at: RunnableConfig = config() if newest is None else newest.config
    for step in count(0 if newest is None else newest.metadata["step"] + 1):
        at = saver.put(at, step)
        own_id = at["configurable"]["checkpoint_id"]
        say("put", own_id, step)
        saver.call("put_writes", at, pending(step), "task")
        say("writes", own_id)
        if step % 3 == 0:
            for number in range(INTERRUPTS):
                saver.call("put_writes", at, [(INTERRUPT, question(step, number))], "asking")
                say("interrupt", own_id, number)
        if step % 8 == 7:
            say("pruning", own_id)
            saver.call("prune", ["t"])
            say("pruned", own_id)


def write(say: Say, url: str, thread: str, stop: str) -> None:
    """Store checkpoints in a thread until there is a file `stop`; says of each how many seconds it took."""
    with SQLAlchemySaver.from_url(url) as saver:
        while not os.path.exists(stop):
            begin = time.monotonic()
            put(saver, config(thread), {"x": memory(0)})
            say("put", time.monotonic() - begin)


def write_both(_: Say, url: str, own: str, number: int) -> None:
    """Store that many checkpoints with writes on a thread of its own, and on one that others write too."""
    with SQLAlchemySaver.from_url(url) as saver:
        for step in range(number):
            for thread in (own, "everybody's"):
                at = put(saver, config(thread), {"n": step, "shared": b"same" * 500}, writer=own)
                saver.put_writes(at, [("n", step), ("shared", b"same" * 500)], "task", "path")


def forked(_: Say, url: str) -> None:
    """Fork with a saver open that was used in both modes; both processes use and close it, the other one first."""
    saver = SQLAlchemySaver.from_url(url)
    put(saver, config("parent"), {"x": 1})
    asyncio.run(aput(saver, "parent", x=1))
    number = os.fork()
    if number:
        assert wait(number) == 0
        put(saver, config("parent"), {"x": 2})
        asyncio.run(aput(saver, "parent", x=2))
        saver.close()
        return
    status = 1
    try:
        asyncio.run(aput(saver, "child", x=1))
        for x in (2, 3):
            put(saver, config("child"), {"x": x})
        saver.close()
        status = 0
    finally:
        os._exit(status)


WORKS: dict[str, Callable[..., None]] = {"grow": grow, "write": write, "write_both": write_both, "forked": forked}


def start(work: str, report: str, *arguments: Any) -> int:
    """Fork a process that does `work` and ends; gives its number."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        out = os.open(report, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        WORKS[work](lambda *said: os.write(out, json.dumps(said).encode() + b"\n"), *arguments)
        status = 0
    except BaseException:  # noqa: BLE001  (of the fork, nothing may go on)
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(number: int) -> int:
    """Wait for the end of a process; gives its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        command, *given = json.loads(line)
        print({"start": start, "wait": wait}[command](*given), flush=True)
