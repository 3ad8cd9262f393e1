"""Threads, tasks, loops and processes on one database."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from sqlalchemy import Engine, event

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.database import THREADS
from agentmem_sql.schema import MIGRATIONS
from tests.helpers.processes import Process
from tests.helpers.sql_cases import Sql, aput, config, put
from tests.helpers.sql_chains import unaccounted
from tests.helpers.sql_processes import fork, write

Start = Callable[..., Process]


def test_eight_threads_on_one_thread_id_and_a_deleter(saver: SQLAlchemySaver, sql: Sql) -> None:
    """Writers, readers and a deletion of the same thread: what is read is whole, what is left is whole."""

    def work(number: int) -> None:
        for step in range(8):
            at = put(saver, config(), {"shared": b"same" * 2000, "own": [number, step]}, writer=number)
            saver.put_writes(at, [("shared", b"same" * 2000), ("own", step)], f"task {number}")
            if number == 0 and step == 4:
                saver.delete_thread("t")
            found = saver.get_tuple(config())
            assert found is None or found.checkpoint["channel_values"]["shared"] == b"same" * 2000

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert unaccounted(sql) == (set(), set())
    assert sql("SELECT count(*) FROM agentmem_threads") == [(1,)]
    assert sql("SELECT count(*) FROM agentmem_blobs WHERE length(body) > 8000") == [(1,)]


def test_processes_that_write_one_file_wait_for_each_other(
    url: str, path: Path, tmp_path: Path, sql: Sql, processes: Start
) -> None:
    """They make the tables together, and write a thread of their own and one that all of them write.

    Also while another one keeps the lock; nobody starves, and a reader meets no error and does not wait.
    """
    stop = tmp_path / "stop"
    started = [processes(write, url, own, str(stop)) for own in "ab"]
    with SQLAlchemySaver.from_url(url) as saver:
        put(saver, config("c"), {"shared": b"same" * 500}, writer="c")
        for one in started:
            one.until_it_says(5)
        with closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as other:
            other.execute("BEGIN IMMEDIATE")
            before = [len(one.said()) for one in started]
            reads = 0
            ends = time.monotonic() + 0.5
            while time.monotonic() < ends:
                assert all(saver.get_tuple(config(thread)) is not None for thread in "ab")
                reads += 1
            held = [len(one.said()) for one in started]
            other.execute("COMMIT")
        for one, number in zip(started, held, strict=True):
            one.until_it_says(number + 10)
        stop.touch()
        assert [one.wait() for one in started] == [0, 0]
        assert sum(held) <= sum(before) + 2  # what was stored already, and said a moment later
        assert reads > 10
        expected = Counter({("c", "c"): 1})
        for own, one in zip("ab", started, strict=True):
            assert 0.3 < max(took for (took,) in one.said()) < 10
            expected |= dict.fromkeys([(own, own), ("everybody's", own)], len(one.said()))
        stored = [(one.config["configurable"]["thread_id"], one.metadata["writer"]) for one in saver.list(None)]  # type: ignore[typeddict-item]
        assert Counter(stored) == expected
    assert sql("SELECT count(*) FROM agentmem_schema_versions") == [(len(MIGRATIONS),)]
    assert sql("SELECT count(*) FROM agentmem_blobs WHERE length(body) > 1000") == [(4,)]
    assert unaccounted(sql) == (set(), set())


def test_a_task_waits_for_a_page_of_a_listing_and_not_for_each_checkpoint(
    saver: SQLAlchemySaver, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    ats = [put(saver, config(), {"n": number}) for number in range(70)]
    calls: list[object] = []

    class Counting(ThreadPoolExecutor):
        def submit(self, *args: Any) -> Any:  # type: ignore[override]
            calls.append(args)
            return super().submit(*args)

    monkeypatch.setattr(saver._database, "reading_threads", Counting(2))

    async def listed() -> tuple[list[Any], Exception | None]:
        found: list[Any] = []
        try:
            async for one in saver.alist(config()):
                found.append(one.config)
        except StorageError as error:
            return found, error
        return found, None

    assert asyncio.run(listed()) == (ats[::-1], None)
    assert len(calls) <= 4
    damaged = ats[20]["configurable"]["checkpoint_id"].encode()
    sql("UPDATE agentmem_checkpoints SET created = 1 WHERE id = ?", damaged)
    found, error = asyncio.run(listed())
    assert error is not None
    assert found == ats[:20:-1][: len(found)]
    assert len(found) >= 32


def test_calls_that_wait_when_a_saver_closes_say_so(saver: SQLAlchemySaver) -> None:
    put(saver, config())
    database, free = saver._database, threading.Event()

    async def close_under_them() -> list[Any]:
        for _ in range(THREADS):
            database.reading_threads.submit(free.wait)
        waiting = [asyncio.create_task(saver.aget_tuple(config())) for _ in range(3)]
        await asyncio.sleep(0.05)
        saver.close()
        free.set()
        return [*await asyncio.gather(*waiting, return_exceptions=True)]

    for error in asyncio.run(close_under_them()):
        assert isinstance(error, StorageError)
        assert "closed, so that the call did nothing" in str(error)


@pytest.mark.parametrize("url_of", ["sqlite:///{path}", "sqlite:///:memory:"])
def test_tasks_of_several_loops_and_threads(url_of: str, path: Any) -> None:
    """Loops one after the other and at the same time, and blocking calls in a loop whose tasks write."""
    with SQLAlchemySaver.from_url(url_of.format(path=path)) as saver:

        async def talk(number: int) -> None:
            async def store(task: int) -> None:
                for step in range(3):
                    at = await aput(saver, f"{number}.{task}", x=[number, step])
                    await saver.aput_writes(at, [("x", step)], "task")
                    found = await saver.aget_tuple(config(f"{number}.{task}"))
                    assert found is not None
                    assert found.checkpoint["channel_values"]["x"] == [number, step]
                    assert found.pending_writes == [("task", "x", step)]

            busy = [asyncio.create_task(store(task)) for task in range(3)]
            for step in range(3):
                await asyncio.sleep(0)
                put(saver, config(f"{number}.blocking"), {"x": step})
            await asyncio.gather(*busy)
            assert len([one async for one in saver.alist(config(f"{number}.0"))]) == 3

        for number in range(2):
            asyncio.run(talk(number))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: asyncio.run(talk(number)), range(2, 6)))
        assert len(list(saver.list(None))) == 6 * 4 * 3


async def test_writers_that_wait_block_neither_their_loop_nor_readers(url: str, path: Path) -> None:
    """While another process holds the file's lock, writers may take all of their threads: readers have their own."""
    async with SQLAlchemySaver.from_url(url) as saver:
        stored = await aput(saver, "t", x=0)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            writers = [asyncio.create_task(aput(saver, f"t{number}", x=1)) for number in range(THREADS + 1)]
            for _ in range(10):  # a loop that a writer blocks would go on when that has failed
                await asyncio.sleep(0.005)
            assert await asyncio.wait_for(saver.aget_tuple(stored), timeout=20) is not None
            assert [item async for item in saver.alist(config("t"))]
            assert not any(writer.done() for writer in writers)
            other.execute("ROLLBACK")
        await asyncio.gather(*writers)


async def test_calls_of_tasks_see_their_context_variables(url: str) -> None:
    class Telling(JsonPlusSerializer):
        def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
            seen.append(tenant.get())
            return super().dumps_typed(obj)

    seen: list[str] = []
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
    async with SQLAlchemySaver.from_url(url, serde=Telling()) as saver:
        tenant.set("me")
        await aput(saver, "t", x=1)
    assert set(seen) == {"me"}


async def test_cancelled_tasks_store_all_or_nothing_and_block_nobody(url: str, sql: Sql) -> None:
    """A put is cancelled at each of its statements in turn: it ends when its call has, which is done whole."""
    statements = 0
    loop = asyncio.get_running_loop()

    def cancel(*_: object) -> None:
        nonlocal statements
        statements += 1
        if statements == at_statement:
            cancelled = threading.Event()
            loop.call_soon_threadsafe(lambda: (busy.cancel(), cancelled.set()))
            cancelled.wait()

    async with SQLAlchemySaver.from_url(url) as saver:
        await saver.asetup()
        event.listen(Engine, "before_cursor_execute", cancel)
        try:
            for at_statement in range(1, 6):  # a first put takes five
                statements = 0
                names = f"busy {at_statement}", f"behind {at_statement}"
                busy, behind = [asyncio.create_task(aput(saver, name, x=b"x" * 20_000)) for name in names]
                results = await asyncio.gather(busy, behind, return_exceptions=True)
                assert [type(result) for result in results] == [asyncio.CancelledError, dict]
                assert await saver.aget_tuple(config(f"busy {at_statement}")) is not None
        finally:
            event.remove(Engine, "before_cursor_execute", cancel)
    assert unaccounted(sql) == (set(), set())


async def test_a_task_that_is_cancelled_before_a_thread_is_free_does_nothing(url: str, sql: Sql) -> None:
    go_on = threading.Event()

    def hold(*_: object) -> None:
        go_on.wait(10)

    async with SQLAlchemySaver.from_url(url) as saver:
        await saver.asetup()
        event.listen(Engine, "before_cursor_execute", hold)
        try:
            busy = [asyncio.create_task(aput(saver, f"busy {number}", x=1)) for number in range(THREADS)]
            waiting = asyncio.create_task(aput(saver, "waiting", x=1))
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            go_on.set()
            await asyncio.gather(*busy)
        finally:
            event.remove(Engine, "before_cursor_execute", hold)
    assert sql("SELECT count(*) FROM agentmem_threads") == [(THREADS,)]
    assert sql("SELECT count(*) FROM agentmem_threads WHERE instr(name, 'waiting')") == [(0,)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_and_its_parent_go_on_with_one_saver(database_url: str, processes: Start) -> None:
    """As servers with worker processes do it: at the same time, and one closes first; nothing is lost."""
    assert processes(fork, database_url).wait() == 0
    with SQLAlchemySaver.from_url(database_url) as saver:
        stored = Counter(one.config["configurable"]["thread_id"] for one in saver.list(None))
    assert stored == {"parent": 13, "child": 11}
