"""Threads, tasks, loops and processes on one database."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from sqlalchemy import Engine, event

from agentmem_sql import SQLAlchemySaver
from agentmem_sql.database import THREADS
from tests.helpers.sql_cases import checkpoint, config, put
from tests.helpers.sql_chains import unaccounted
from tests.helpers.sql_graphs import chat_graph, say
from tests.helpers.sql_processes import Template, template

Sql = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    with template(tmp_path_factory.mktemp("reports")) as started:
        yield started


def test_eight_threads_with_a_thread_id_each(saver: SQLAlchemySaver, sql: Sql) -> None:
    graph = chat_graph(saver)

    def talk(number: int) -> str:
        for _ in range(3):
            state = graph.invoke(say(f"I am {number}"), config(f"thread {number}"))
        assert {m.content for m in state["messages"] if m.type == "human"} == {f"I am {number}"}
        return str(state["messages"][-1].content)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(talk, range(8))) == ["answer 3"] * 8
    assert unaccounted(sql) == (set(), set())


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


def test_processes_that_start_together_on_a_new_file(
    url: str, saver: SQLAlchemySaver, sql: Sql, processes: Template
) -> None:
    """They make the tables, and write a thread of their own and one that all of them write."""
    started = [processes.start("write_both", url, own, 20) for own in "ab"]
    put(saver, config("c"), {"shared": b"same" * 500}, writer="c")
    assert [one.wait() for one in started] == [0, 0]
    found = Counter((one.config["configurable"]["thread_id"], one.metadata["writer"]) for one in saver.list(None))  # type: ignore[typeddict-item]
    assert found == {("a", "a"): 20, ("b", "b"): 20, ("everybody's", "a"): 20, ("everybody's", "b"): 20, ("c", "c"): 1}
    assert sql("SELECT count(*) FROM agentmem_schema_versions") == [(1,)]
    assert sql("SELECT count(*) FROM agentmem_blobs WHERE length(body) > 1000") == [(4,)]
    assert unaccounted(sql) == (set(), set())


def test_processes_that_write_one_file_wait_for_each_other(
    url: str, path: Path, tmp_path: Path, saver: SQLAlchemySaver, sql: Sql, processes: Template
) -> None:
    """Also while another one keeps the lock; nobody starves, and a reader meets no error and does not wait."""
    stop = tmp_path / "stop"
    started = [processes.start("write", url, thread, str(stop)) for thread in "ab"]
    for one in started:
        one.until_it_says(5)
    with closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN IMMEDIATE")
        before = [len(one.said()) for one in started]
        reads = 0
        ends = time.monotonic() + 1
        while time.monotonic() < ends:
            assert all(saver.get_tuple(config(thread)) is not None for thread in "ab")
            assert next(saver.list(None)) is not None
            reads += 1
        held = [len(one.said()) for one in started]
        other.execute("COMMIT")
    for one, number in zip(started, held, strict=True):
        one.until_it_says(number + 30)
    stop.touch()
    assert [one.wait() for one in started] == [0, 0]
    assert sum(held) <= sum(before) + 2  # what was stored already, and said a moment later
    assert reads > 20
    for thread, one in zip("ab", started, strict=True):
        assert 0.5 < max(took for _, took in one.said()) < 10
        assert len(list(saver.list(config(thread)))) == len(one.said())
    assert unaccounted(sql) == (set(), set())


async def test_many_tasks_at_once(url: str, sql: Sql) -> None:
    async with SQLAlchemySaver.from_url(url) as saver:

        async def talk(number: int) -> None:
            for step in range(4):
                made = checkpoint({"x": [number, step]}, saver.get_next_version(None, None))
                at = await saver.aput(config(f"{number}"), made, {}, made["channel_versions"])
                await saver.aput_writes(at, [("x", step)], "task")
                found = await saver.aget_tuple(config(f"{number}"))
                assert found is not None
                assert found.checkpoint["channel_values"]["x"] == [number, step]

        await asyncio.gather(*(talk(number) for number in range(20)))
        assert len([one async for one in saver.alist(None)]) == 80
    assert unaccounted(sql) == (set(), set())


@pytest.mark.parametrize("url_of", ["sqlite:///{path}", "sqlite:///:memory:"])
def test_one_saver_in_several_loops_and_threads(url_of: str, path: Any) -> None:
    with SQLAlchemySaver.from_url(url_of.format(path=path)) as saver:

        async def talk(number: int) -> None:
            for step in range(5):
                made = checkpoint({"x": step})
                await asyncio.gather(*(saver.aput(config(f"{number}.{n}"), made, {}, {"x": 1}) for n in range(3)))

        for number in range(3):
            asyncio.run(talk(number))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: asyncio.run(talk(number)), range(3, 7)))
        assert len(list(saver.list(None))) == 7 * 3 * 5


async def test_synchronous_calls_work_in_a_running_loop(saver: SQLAlchemySaver) -> None:
    graph = chat_graph(saver)
    assert graph.invoke(say("hello"), config())["messages"][-1].content == "answer 1"
    assert (await graph.ainvoke(say("hello"), config()))["messages"][-1].content == "answer 2"


@pytest.mark.parametrize("url_of", ["sqlite:///{path}", "sqlite:///:memory:"])
async def test_a_blocking_call_in_a_loop_whose_tasks_write(url_of: str, path: Any) -> None:
    """The tasks' calls go on in their threads while the loop waits for its own."""
    async with SQLAlchemySaver.from_url(url_of.format(path=path)) as saver:
        made = checkpoint({"x": 1})
        busy = [asyncio.create_task(saver.aput(config(f"a{n}"), made, {}, made["channel_versions"])) for n in range(20)]
        while not all(task.done() for task in busy):
            saver.put(config("b"), made, {}, made["channel_versions"])
            await asyncio.sleep(0)
        assert {one.config["configurable"]["thread_id"] async for one in saver.alist(None)} == {
            "b",
            *(f"a{n}" for n in range(20)),
        }


async def test_tasks_do_not_block_their_loop(url: str, path: Path) -> None:
    """While another process holds the file's lock, a writing task waits and the loop goes on."""
    async with SQLAlchemySaver.from_url(url) as saver:
        await saver.asetup()
        ticks = 0
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            made = checkpoint({"x": 1})
            writing = asyncio.create_task(saver.aput(config(), made, {}, made["channel_versions"]))
            ends = time.monotonic() + 0.2
            while time.monotonic() < ends:
                await asyncio.sleep(0.005)
                ticks += 1
            assert not writing.done()
            other.execute("COMMIT")
        await writing
        assert ticks > 10


async def test_calls_of_tasks_see_their_context_variables(url: str) -> None:
    class Telling(JsonPlusSerializer):
        def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
            seen.append(tenant.get())
            return super().dumps_typed(obj)

    seen: list[str] = []
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
    async with SQLAlchemySaver.from_url(url, serde=Telling()) as saver:
        tenant.set("me")
        made = checkpoint({"x": 1})
        await saver.aput(config(), made, {}, made["channel_versions"])
    assert set(seen) == {"me"}


async def test_cancelled_tasks_store_all_or_nothing_and_block_nobody(url: str, sql: Sql) -> None:
    """A put is cancelled at each of its statements in turn: it ends when its call has, which is done whole."""
    made = checkpoint({"x": b"x" * 20_000})
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

        def put_task(name: str) -> asyncio.Task[Any]:
            return asyncio.create_task(saver.aput(config(name), made, {}, made["channel_versions"]))

        event.listen(Engine, "before_cursor_execute", cancel)
        try:
            for at_statement in range(1, 6):  # a first put takes five
                statements = 0
                busy, behind = put_task(f"busy {at_statement}"), put_task(f"behind {at_statement}")
                results = await asyncio.gather(busy, behind, return_exceptions=True)
                assert [type(result) for result in results] == [asyncio.CancelledError, dict]
                assert await saver.aget_tuple(config(f"busy {at_statement}")) is not None
        finally:
            event.remove(Engine, "before_cursor_execute", cancel)
    assert unaccounted(sql) == (set(), set())


async def test_a_task_that_is_cancelled_before_a_thread_is_free_does_nothing(url: str, sql: Sql) -> None:
    made = checkpoint({"x": 1})
    go_on = threading.Event()

    def hold(*_: object) -> None:
        go_on.wait(10)

    async with SQLAlchemySaver.from_url(url) as saver:
        await saver.asetup()

        def put_task(name: str) -> asyncio.Task[Any]:
            return asyncio.create_task(saver.aput(config(name), made, {}, made["channel_versions"]))

        event.listen(Engine, "before_cursor_execute", hold)
        try:
            busy = [put_task(f"busy {number}") for number in range(THREADS)]
            waiting = put_task("waiting")
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
def test_a_forked_process_and_its_parent_go_on_with_one_saver(database_url: str, processes: Template) -> None:
    """As servers with worker processes do it; one closes while the other goes on, and nothing is lost."""
    assert processes.start("forked", database_url).wait() == 0
    with SQLAlchemySaver.from_url(database_url) as saver:
        stored = Counter(one.config["configurable"]["thread_id"] for one in saver.list(None))
    assert stored == {"parent": 4, "child": 3}
