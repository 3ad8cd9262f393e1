"""What other processes do with a database (`tests.helpers.processes`), most of them until they are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from itertools import count
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.types import INTERRUPT
from sqlalchemy import Engine, event

from agentmem_sql import SQLAlchemySaver
from tests.helpers.processes import Say
from tests.helpers.sql_cases import aput, config, memory, put

INTERRUPTS = 3


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


def set_up(say: Say, url: str, go: str) -> None:
    """Make the tables as soon as there is a file `go`."""
    say("ready")
    while not os.path.exists(go):
        time.sleep(0.001)
    with SQLAlchemySaver.from_url(url) as saver:
        saver.setup()


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

    child = os.fork()
    use("parent" if child else "child")
    if not child:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
