"""How much is stored: content once, lists by their items; and how much of it a process keeps in memory."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.graph import START, StateGraph

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import Sql, config, get, put, read
from tests.helpers.sql_chains import stored_bytes
from tests.helpers.sql_graphs import State, say
from tests.helpers.sql_values import Counting, serialised, spelled

VALUE, LIST, NODE, WITNESS = 0, 1, 2, 7  # kinds of content


def kinds(sql: Sql) -> dict[int, int]:
    """How many rows of content there are, by their kind."""
    return dict(sql("SELECT kind, count(*) FROM agentmem_blobs WHERE kind <> ? GROUP BY kind", WITNESS))


def vacuumed(path: Path, sql: Sql) -> int:
    """The size of the file without free pages."""
    compact = path.with_suffix(".compact")
    compact.unlink(missing_ok=True)
    sql("VACUUM INTO ?", str(compact))
    return compact.stat().st_size


def text(random: Random, length: int) -> str:
    return "".join(random.choices("abcdefgh ijklm nopqrst uvwxyz", k=length))


def said(count: int) -> list[AnyMessage]:
    random = Random(count)
    kinds_of_message = (HumanMessage, AIMessage)
    return [kinds_of_message[number % 2](text(random, 200), id=f"{number}") for number in range(count)]


def chat(saver: SQLAlchemySaver) -> Callable[[], None]:
    """A graph whose every call is a turn of 200 + 400 characters and 9,216 new bytes of state."""
    random = Random(1)

    def node(state: State) -> dict[str, Any]:
        state_of_memory = {"v": 1, "shape": [36, 1, 8, 8], "data": random.randbytes(9216)}
        return {"messages": [AIMessage(text(random, 400))], "memory": state_of_memory}

    graph = StateGraph(State).add_node(node).add_edge(START, "node").compile(checkpointer=saver)
    return lambda: graph.invoke(say(text(random, 200)), config())


def test_a_hundred_turns_of_a_chat_take_less_than_two_megabytes(url: str, path: Path, sql: Sql) -> None:
    sizes = {}
    with SQLAlchemySaver.from_url(url) as saver:
        turn = chat(saver)
        for number in range(1, 121):
            turn()
            if number == 100:
                assert vacuumed(path, sql) <= 2_000_000
            sizes[number] = stored_bytes(sql) if number in (20, 40, 100, 120) else 0
    early, late = sizes[40] - sizes[20], sizes[120] - sizes[100]
    assert early < late < 1.1 * early


@pytest.mark.slow
def test_turn_1000_takes_what_turn_100_took(url: str, path: Path, sql: Sql) -> None:
    sizes = {}
    with SQLAlchemySaver.from_url(url) as saver:
        turn = chat(saver)
        for number in range(1, 1001):
            turn()
            if number in (50, 150, 900, 1000):
                sizes[number] = vacuumed(path, sql)
    assert sizes[1000] - sizes[900] == pytest.approx(sizes[150] - sizes[50], rel=0.1)


@pytest.mark.parametrize("wrap", [list, _DeltaSnapshot])
def test_a_list_that_grows_takes_what_is_added(saver: SQLAlchemySaver, sql: Sql, wrap: Callable[[Any], Any]) -> None:
    """Storing whole lists would take 800 times one item for the last forty steps."""
    items = [f"item {number} " + "x" * 1000 for number in range(120)]
    at, before = config(), {}
    for number in range(1, 121):
        at = put(saver, at, {"x": wrap(items[:number])})
        before[number] = stored_bytes(sql) if number in (1, 80, 120) else 0
    assert before[120] - before[80] < 40 * 2400
    assert kinds(sql)[VALUE] == 120


def test_a_list_of_small_items_that_grows_takes_little_more(saver: SQLAlchemySaver, sql: Sql) -> None:
    """In runs, of which the last few are written again; whole, the lists would take 13,000 bytes a step."""
    items = [f"item {number} " + "x" * 40 for number in range(300)]
    at, before = config(), {}
    for number in range(1, 301):
        at = put(saver, at, {"x": items[:number]})
        before[number] = stored_bytes(sql) if number in (200, 300) else 0
    assert before[300] - before[200] < 100 * 2000
    assert read(saver, at)["x"] == items
    large = [f"item {number} " + "x" * 5000 for number in range(20)]
    for number in range(1, 21):
        at = put(saver, at, {"x": [*items, *large[:number]]})
    assert stored_bytes(sql) - before[300] < 20 * 7000
    saver.delete_thread("t")
    put(saver, config(), {"x": items})
    assert kinds(sql)[VALUE] < 20


def test_content_is_shared_by_channels_writes_checkpoints_namespaces_and_forks(
    saver: SQLAlchemySaver, url: str, sql: Sql
) -> None:
    messages, large = said(100), "large " * 1000
    root = put(saver, config(), {"messages": messages, "x": large, "same": messages, "y": large})
    before = kinds(sql)
    assert before == {VALUE: 101, LIST: 1, NODE: 0} | before

    saver.put_writes(root, [("x", large), ("messages", messages), ("z", messages[0])], "task")
    put(saver, config(ns="sub:1"), {"messages": messages, "x": large})
    left = put(saver, root, {"messages": messages, "x": large})
    assert kinds(sql) == before
    with SQLAlchemySaver.from_url(url) as another:  # that knows nothing yet
        put(another, config(ns="sub:2"), {"messages": messages, "x": large})
        another.put_writes(left, [("x", large), ("messages", messages)], "task")
    assert kinds(sql) == before

    for side in ("left", "right"):
        put(saver, root, {"messages": [*messages, HumanMessage(side, id=side)], "x": large})
    after = kinds(sql)
    assert after[VALUE] == before[VALUE] + 2
    assert after[LIST] == before[LIST] + 2
    assert sum(after.values()) <= sum(before.values()) + 6

    saver.copy_thread("t", "copy")
    each = sql("SELECT count(*) FROM agentmem_blobs WHERE kind <> ? GROUP BY thread", WITNESS)
    assert each == [(sum(after.values()),)] * 2


def new_rows(saver: SQLAlchemySaver, sql: Sql, before: Any, after: Any) -> dict[int, int]:
    """What a list adds to a thread that has another."""
    at = put(saver, config(), {"x": before})
    had = kinds(sql)
    at = put(saver, at, {"x": after})
    assert spelled(read(saver, at)["x"]) == spelled(serialised(after))
    found = {kind: count - had.get(kind, 0) for kind, count in kinds(sql).items()}
    return {kind: count for kind, count in found.items() if count}


LONG = [f"item {number}, longer than what is stored in runs" + "." * 250 for number in range(1200)]
NEW = "a new item, that is longer than the others are" + "." * 250


@pytest.mark.parametrize(
    ("after", "values", "nodes"),
    [
        (LONG, 0, 0),
        ([*LONG, LONG[0]], 0, 1),
        ([*LONG, NEW], 1, 1),
        ([*LONG[:600], NEW, *LONG[601:]], 1, 3),
        (LONG[:-1], 0, 1),
        (LONG[:1024], 0, 0),
        (LONG[1:], 0, 80),
        (_DeltaSnapshot(LONG), 0, 0),
    ],
    ids=["same", "repeated", "appended", "changed", "shortened", "cut", "first removed", "snapshot"],
)
def test_a_changed_list_shares_what_is_unchanged(
    saver: SQLAlchemySaver, sql: Sql, after: Any, values: int, nodes: int
) -> None:
    added = new_rows(saver, sql, LONG, after)
    assert added.get(VALUE, 0) == values
    assert added.get(LIST, 0) == (after != LONG)
    assert added.get(NODE, 0) <= nodes


def test_short_items_have_no_row_of_their_own(saver: SQLAlchemySaver, sql: Sql) -> None:
    put(saver, config(), {"x": [f"{number}" for number in range(40)] + [{"a": 1}] * 20})
    assert VALUE not in kinds(sql)
    assert sql("SELECT count(*) < 6 FROM agentmem_blobs") == [(1,)]
    numbers = [number / 7 for number in range(10_000)]  # 40 rows of 256
    assert new_rows(saver, sql, numbers, [*numbers, 1]) == {VALUE: 1, LIST: 1}
    assert kinds(sql)[VALUE] == 41


# Memory.


@pytest.mark.parametrize("size", [0, 1, 50_000])
def test_any_size_of_cache_works(url: str, size: int) -> None:
    """Also one that is too small for anything."""
    last: dict[str, RunnableConfig] = {}
    with SQLAlchemySaver.from_url(url, cache_bytes=size) as saver:
        for turn, number in product(range(1, 5), range(12)):
            name, messages = f"thread {number}", said(turn * 4 + number)
            last[name] = put(saver, last.get(name, config(name)), {"messages": messages, "n": turn})
            saver.put_writes(last[name], [("messages", messages[:2])], "task")
            assert read(saver, last[name]) == {"messages": messages, "n": turn}
        saver.prune(["thread 3"])
        for number in range(12):
            found, messages = get(saver, config(f"thread {number}")), said(16 + number)
            assert found.checkpoint["channel_values"] == {"messages": messages, "n": 4}
            assert found.pending_writes == [("task", "messages", messages[:2])]
        assert len(list(saver.list(None))) == 12 * 4 - 3


def test_a_cache_of_no_size_remembers_nothing(url: str) -> None:
    serde = Counting()
    with SQLAlchemySaver.from_url(url, serde=serde, cache_bytes=0) as saver:
        at = put(saver, config(), {"messages": said(20)})
        for _ in range(2):
            assert read(saver, at)["messages"] == said(20)
            serde.dumped = 0
            at = put(saver, at, {"messages": said(20)})
            assert serde.dumped == 22


def held(saver: SQLAlchemySaver, work: Callable[[], None]) -> int:
    """The bytes of memory that stay taken after some work."""
    put(saver, config("first"), {"messages": said(4)})
    read(saver, config("first"))
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("of", ["messages", "values", "channels"])
def test_a_long_lived_saver_takes_the_memory_it_was_given(of: str) -> None:
    """Roughly: what is remembered is counted, not measured. Without a limit it were several times as much."""
    budget = 400_000

    def values(turn: int) -> dict[str, Any]:
        if of == "messages":
            return {"messages": said(10 + turn)}
        if of == "values":
            return {"x": os.urandom(9000)}
        return {f"channel {number}": turn for number in range(40)}

    def work() -> None:
        for number in range(40):
            at = config(f"thread {number}")
            for turn in range(5):
                at = put(saver, at, values(turn))
                read(saver, at)

    with SQLAlchemySaver.from_url("sqlite:///:memory:", cache_bytes=budget) as saver:
        assert budget / 4 < held(saver, work) < 2 * budget
