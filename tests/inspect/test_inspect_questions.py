"""Questions to a memory on the page of `agentmem inspect`: the four ways differ as they should."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from typing import Any

import pytest

import agentmem
from agentmem import Engine, Window
from agentmem_governance import Governor
from agentmem_inspect import make_app
from agentmem_langgraph import ChatDeltaMem, MemoryMessagesState, MemoryNode
from agentmem_langgraph.messages import to_engine
from agentmem_sql import SQLAlchemySaver
from tests.helpers.inspected import HOST, TOKEN, Browser, turns

QUESTION = "What is my favorite color?"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with agentmem.load("nano") as loaded:
        yield loaded


@pytest.fixture
def asker(governor: Governor, engine: Engine) -> Iterator[Browser]:
    """The page with a model, over two threads that were told different things, and one of another model."""
    from langgraph.graph import START, StateGraph

    node = MemoryNode(ChatDeltaMem(engine=engine, max_tokens=24, window=Window(messages=1)))
    graph: Any = StateGraph(MemoryMessagesState).add_node("agent", node).add_edge(START, "agent")
    agent = graph.compile(checkpointer=governor.saver)
    for thread, color in (("ada", "teal"), ("ben", "red")):
        said = {"messages": [("user", f"My favorite color is {color}.")]}
        agent.invoke(said, {"configurable": {"thread_id": thread}})
    turns(governor.saver, "strange", "hello")
    with Browser(make_app(governor, token=TOKEN, hosts=[HOST], engine=engine)) as opened:
        yield opened


def ask(browser: Browser, thread: int, arm: str, **fields: str) -> str:
    given = {"arm": arm, "question": QUESTION, "channel": "memory", "most": "24", **fields}
    return unescape(browser.submit(f"/threads/{thread}/ask", **given))


def test_each_way_of_asking_uses_its_own_memory(asker: Browser, saver: SQLAlchemySaver) -> None:
    page = asker.read("/threads/1/ask")
    assert re.findall(r'data-arm="(\w+)"', page) == ["memory", "other", "zero", "whole"]
    assert '<option value="2">ben</option>' in page
    before = len(list(saver.list(None)))
    memory, other, zero, whole = (
        ask(asker, 1, "memory"),
        ask(asker, 1, "other", other="2"),
        ask(asker, 1, "zero"),
        ask(asker, 1, "whole"),
    )
    assert "teal" in memory
    assert "red" in other
    assert "teal" not in zero + other
    assert "teal" in whole
    tokens = [int(re.search(r"(\d+) prompt tokens", answer)[1]) for answer in (memory, other, zero, whole)]  # type: ignore[index]
    assert tokens[0] == tokens[1] == tokens[2] < tokens[3]
    assert all(re.search(r"\d+\.\d\d s", answer) for answer in (memory, other, zero, whole))
    assert len(list(saver.list(None))) == before, "nothing that was asked is kept"


def test_a_memory_of_another_model_is_refused_in_words(asker: Browser) -> None:
    assert "belongs to another model or adapter" in asker.read("/threads/3/ask")
    assert "belongs to another model or adapter" in ask(asker, 3, "memory")
    assert "belongs to another model or adapter" in ask(asker, 1, "other", other="3")


def test_what_hinders_an_answer_is_told(asker: Browser) -> None:
    cases: list[tuple[str, dict[str, str], str]] = [
        ("memory", {"question": " "}, "expected a question"),
        ("memory", {"most": "100000"}, "expected 1 to"),
        ("memory", {"channel": "nothing"}, "expected a memory in the channel"),
        ("other", {}, "expected another checkpoint"),
        ("other", {"other": "99"}, "expected another checkpoint"),
        ("loudly", {}, "expected an arm"),
    ]
    for arm, fields, told in cases:
        assert told in ask(asker, 1, arm, **fields)


def test_without_a_model_the_page_says_how_to_get_one(browser: Browser, saver: SQLAlchemySaver) -> None:
    turns(saver, "ada/1", "hello")
    assert "agentmem inspect --model" in browser.read("/threads/1/ask")
    assert "start again with --model" in ask(browser, 1, "memory")


def test_what_each_message_writes_by_itself(asker: Browser, governor: Governor, engine: Engine) -> None:
    """A step of two messages; with the model each has bars of its own, those of its write into the memory before it."""
    page = asker.read("/threads/1/checkpoint")
    assert page.count('class="bars"') == 1
    assert "Message by message" in page
    page = asker.read("/threads/1/checkpoint?alone=1")
    asked, reply, step = bars(page)
    stored = governor.saver.get_tuple({"configurable": {"thread_id": "ada"}})
    assert stored is not None
    values = stored.checkpoint["channel_values"]
    after = engine.remember(to_engine(values["messages"][:1])).state
    expected = [float(value) for value in (after.matrices.astype(float) ** 2).sum((1, 2, 3)) ** 0.5]
    assert asked == pytest.approx(expected, rel=0.01)
    assert reply != asked
    assert step == pytest.approx(bars(asker.read("/threads/1/checkpoint"))[0])
    # Who cannot write it, for want of its model, is not offered to.
    assert "Message by message" not in asker.read("/threads/3/checkpoint")
    assert 'class="alone"' not in asker.read("/threads/3/checkpoint?alone=1")


def bars(page: str) -> list[list[float]]:
    """The numbers of each group of bars, by layer, in the order of the page."""
    return [[float(each) for each in found.split(", ")] for found in re.findall(r"change by layer: ([^\"]+)\"", page)]
