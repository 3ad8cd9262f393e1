"""Processes that fork while they have a saver open, for the fault tests; see sql_fault_child."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, create_engine, event

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import checkpoint, config, put

Say = Callable[..., None]

_PATIENCE = 20  # seconds after which a process that does not end hangs


async def aput(saver: SQLAlchemySaver, thread: str) -> None:
    made = checkpoint({"x": 1}, saver.get_next_version(None, None))
    await saver.aput(config(thread), made, {}, made["channel_versions"])


def fork(do: Callable[[], None]) -> int:
    """Do something in a process that is forked from this one; gives its number."""
    number = os.fork()
    if number:
        return number
    try:
        do()
        os._exit(0)
    except BaseException:  # noqa: BLE001  (of the fork, nothing may go on)
        traceback.print_exc()
        os._exit(1)


def end(number: int) -> None:
    """Wait for the end of a process, and see to it that it did what it should."""
    ends = time.monotonic() + _PATIENCE
    while (found := os.waitpid(number, os.WNOHANG)) == (0, 0):
        if time.monotonic() > ends:
            os.kill(number, 9)
        time.sleep(0.002)
    assert found[1] == 0, f"the forked process ended with {os.waitstatus_to_exitcode(found[1])}"


class Turns:
    """Two processes that wait for each other."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def give(self) -> None:
        os.write(self._write, b".")

    def take(self) -> None:
        os.read(self._read, 1)


def taking_turns(_: Say, url: str, own: bool) -> None:
    """Both write, in turns; the first one closes before the other does. With ``own`` the other has its own saver."""
    first = SQLAlchemySaver.from_url(url)
    put(first, config("first"), {"x": 1})
    to_first, to_other = Turns(), Turns()

    def other() -> None:
        saver = SQLAlchemySaver.from_url(url) if own else first
        put(saver, config("other"), {"x": 1})
        to_first.give()
        to_other.take()
        put(saver, config("other"), {"x": 1})
        assert saver.get_tuple(config("first")) is not None
        saver.close()

    number = fork(other)
    to_first.take()
    put(first, config("first"), {"x": 1})
    first.close()
    with SQLAlchemySaver.from_url(url) as third:
        put(third, config("first"), {"x": 1})
        to_other.give()
        end(number)
        put(third, config("first"), {"x": 1})


def in_a_loop(_: Say, url: str) -> None:
    """Fork between two awaits; the forked process writes in both modes, and closes in both."""
    saver = SQLAlchemySaver.from_url(url)

    def write_and_close() -> None:
        put(saver, config("other"), {"x": 1})
        asyncio.run(aput(saver, "other"))
        saver.close()

    async def main() -> None:
        for do in (write_and_close, saver.close, lambda: asyncio.run(saver.aclose())):
            await asyncio.gather(*(aput(saver, "first") for _ in range(3)))
            end(fork(do))
        await aput(saver, "first")
        await saver.aclose()

    asyncio.run(main())


def busy(say: Say, url: str) -> None:
    """Fork while a thread is in the middle of a transaction; says what becomes of a write of the forked process."""
    saver = SQLAlchemySaver.from_url(url)
    saver.setup()
    inside, go_on = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        if threading.current_thread() is thread:
            inside.set()
            go_on.wait()

    def write() -> None:
        try:
            put(saver, config("other"), {"x": 1})
        except StorageError as error:
            say(str(error))

    event.listen(Engine, "before_cursor_execute", stop)
    thread = threading.Thread(target=put, args=(saver, config("first"), {"x": 1}))
    thread.start()
    inside.wait()
    end(fork(write))
    go_on.set()
    thread.join()
    saver.close()


def given(say: Say, url: str) -> None:
    """Fork with an engine of one's own; says what becomes of a write before and after it is disposed of there."""
    engine = create_engine(url)
    saver = SQLAlchemySaver(engine)
    put(saver, config("first"), {"x": 1})

    def other() -> None:
        for _ in range(2):
            try:
                put(saver, config("other"), {"x": 1})
                say("stored")
            except StorageError as error:
                say(str(error))
            engine.dispose(close=False)

    end(fork(other))
    put(saver, config("first"), {"x": 1})
    engine.dispose()


WORKS: dict[str, Callable[..., None]] = {
    "taking_turns": taking_turns,
    "in_a_loop": in_a_loop,
    "busy": busy,
    "given": given,
}
