"""Threads and checkpoints on the page of `agentmem inspect`."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from langchain_core.messages import AIMessage, SystemMessage
from langgraph.graph import START, MessagesState, StateGraph
from sqlalchemy import Engine

from agentmem_governance import Governor
from agentmem_inspect.catalog import Catalog, Link
from agentmem_inspect.contents import changes, find, groups
from agentmem_inspect.tree import draw
from agentmem_sql import SQLAlchemySaver
from tests.helpers.inspected import Browser, turns
from tests.helpers.sql_cases import config, put
from tests.helpers.sql_chains import statements


def rows_of(page: str) -> list[str]:
    """The rows of a tree as texts."""
    found = re.findall(r"<li>(.*?)</li>", page, re.DOTALL)
    return [" ".join(re.sub(r"<svg.*?</svg>|<[^>]+>", " ", row, flags=re.DOTALL).split()) for row in found]


def test_threads_are_listed_newest_first_and_found_by_a_part_of_their_id(
    browser: Browser, saver: SQLAlchemySaver
) -> None:
    for name in ("ada/1", "ben/1", "<b>ü & half \ud800", *(f"many/{number}" for number in range(60))):
        put(saver, config(name), {"messages": []})
    page = browser.read("/")
    assert page.index("many/59") < page.index("many/58")
    assert "ada/1" not in page
    assert "page 1 of 2" in page
    assert "ada/1" in browser.read("/?page=1")
    found = browser.read("/?q=da/")
    assert "ada/1" in found
    assert "ben/1" not in found
    assert "&lt;b&gt;ü &amp; half" in browser.read("/?q=<b>"), "text stays text"
    assert "0 threads" in browser.read("/?q=nobody")


def test_the_tree_shows_branches_steps_and_what_changed(browser: Browser, saver: SQLAlchemySaver) -> None:
    first, second = turns(saver, "ada/1", "one", "two")
    turns(saver, "ada/1", "three", at=first)
    page = browser.read("/threads/1")
    assert "6 checkpoints, 2 branches" in page
    rows = rows_of(page)
    assert rows[0].startswith("step 4, loop newest memory messages")
    assert rows[1].startswith("step 3, loop messages")
    assert [row.partition(" loop ")[2].partition(" m")[0] for row in rows if "branch" in row] == ["end of a branch"]
    assert second["configurable"]["checkpoint_id"] in page
    assert all(browser.read(f"/threads/{number}", 404) for number in (99, 2**64))


def test_lists_are_the_same_on_every_database(database_url: str) -> None:
    long = "sub|" * 100
    with SQLAlchemySaver.from_url(database_url) as saver:
        first = put(saver, config("Ada/1"), step=3)
        put(saver, first, {"n": 1}, source="update")
        put(saver, config("Ada/1", long), {})
        put(saver, config("ben/ü"), {})
        catalog = Catalog(saver)
        assert [(each.name, each.checkpoints) for each in catalog.threads().threads] == [("ben/ü", 1), ("Ada/1", 3)]
        assert [[each.name for each in catalog.threads(part).threads] for part in ("ü", "a/", "%", "ADA")] == [
            ["ben/ü"],
            ["Ada/1"],
            [],
            [],
        ]
        number = catalog.number("Ada/1")
        assert number is not None
        assert catalog.name(number) == "Ada/1"
        assert catalog.namespaces(number) == [("", 2), (long, 1)]
        newest, oldest = links = catalog.links(number)
        assert (newest.parent, oldest.id) == (oldest.id, first["configurable"]["checkpoint_id"])
        described = catalog.describe(number, "Ada/1", "", links)
        assert (described[oldest.id].step, described[newest.id].source) == (3, "update")
        assert [described[each.id].changed for each in links] == [("n",), ()]


def chain(text: str) -> list[Link]:
    """Checkpoints, newest first, from "child<parent ..."."""
    pairs = (each.partition("<") for each in text.split())
    return [Link(own, parent or None, 0) for own, _, parent in pairs]


@pytest.mark.parametrize(
    ("tree", "columns"),
    [
        ("c<b b<a a", [0, 0, 0]),
        # A branch beside the main one, whose column is free again below the join.
        ("d<b c<b b<a a", [0, 1, 0, 0]),
        ("e<a d<c c<b b<a a", [0, 1, 1, 1, 0]),
        # Many short branches share a column.
        ("f<a e<a d<a c<a b<a a", [0, 1, 1, 1, 1, 0]),
        # A parent that was pruned.
        ("c<gone b<a a", [0, 0, 0]),
    ],
)
def test_branches_have_columns(tree: str, columns: list[int]) -> None:
    rows = draw(chain(tree))
    assert [row.column for row in rows] == columns
    assert draw(chain(tree), 1, 3) == rows[1:3], "a page is a part of the picture"
    for upper, lower in pairwise(rows):
        ends = {row_end for _, row_end in upper.lines if row_end is not None}
        starts = {row_start for row_start, _ in lower.lines if row_start is not None}
        assert ends == starts, "lines go on in the next row"


def test_a_checkpoint_shows_messages_beside_what_each_wrote(browser: Browser, saver: SQLAlchemySaver) -> None:
    _, second = turns(saver, "ada/1", "one", "<script>alert(1)</script>")
    page = browser.read(f"/threads/1/checkpoint?at={second['configurable']['checkpoint_id']}")
    assert "4 messages consumed, norm 2.000" in page
    assert page.count("moved by 1.414") == 2, "each turn added two ones"
    assert "layer 0: 1.414" in page
    assert "layer 1: 0<" in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_message_that_comes_twice_belongs_to_two_steps(saver: SQLAlchemySaver) -> None:
    turns(saver, "ada/1", "yes", "yes")
    place = find(saver, 1, "ada/1", "", None)
    history = changes(saver, place, "memory")
    _, made = groups(place.messages["messages"], history, None)
    assert [len(group.said) for group in made] == [2, 2]
    assert [group.change for group in made] == history


def test_a_long_history_is_shown_by_windows(browser: Browser, saver: SQLAlchemySaver) -> None:
    turns(saver, "ada/1", *(f"word {number}" for number in range(60)))
    page = browser.read("/threads/1/checkpoint")
    assert "word 59" in page
    assert "word 11<" not in page
    earlier = re.search(r'href="(/threads/1/checkpoint\?[^"]+)">Earlier', page)
    assert earlier is not None
    before = browser.read(earlier[1].replace("&amp;", "&"))
    assert "ok word 11<" in before
    assert "word 0<" in before


def test_checkpoints_without_a_memory_and_other_channels_are_shown(browser: Browser, saver: SQLAlchemySaver) -> None:
    put(saver, config(), {"messages": [SystemMessage("Be brief.")], "draft": {"pages": 3}})
    page = browser.read("/threads/1/checkpoint")
    assert "no memory" in page
    assert "Be brief." in page
    assert "{&#39;pages&#39;: 3}" in page
    assert browser.read("/threads/1/checkpoint?at=nothing", 404)


def test_opening_a_thread_is_noted_once_for_a_while(
    browser: Browser, saver: SQLAlchemySaver, governor: Governor
) -> None:
    turns(saver, "ada/1", "hello")
    for address in ("/", "/threads/1", "/threads/1/checkpoint"):
        browser.read(address)
    entries = [entry for entry in governor.audit("ada/1").entries if entry.event == "inspected"]
    assert [entry.details["actor"] for entry in entries] == ["inspector"]


def test_rewinding_makes_a_copy_the_newest_and_removes_nothing(browser: Browser, saver: SQLAlchemySaver) -> None:
    first, second = turns(saver, "ada/1", "one", "two")
    page = browser.submit("/threads/1/rewind", at=first["configurable"]["checkpoint_id"])
    assert "goes on from a copy" in page
    assert rows_of(page)[0].startswith("step 3, fork newest")
    newest, old = saver.get_tuple(config("ada/1")), saver.get_tuple(first)
    assert newest is not None
    assert old is not None
    assert newest.checkpoint["channel_values"] == old.checkpoint["channel_values"]
    assert newest.parent_config == old.parent_config
    assert saver.get_tuple(second) is not None
    assert len(list(saver.list(config("ada/1")))) == 5


def test_a_graph_goes_on_from_the_copy(browser: Browser, saver: SQLAlchemySaver) -> None:
    def reply(state: MessagesState) -> dict[str, list[AIMessage]]:
        return {"messages": [AIMessage(f"{len(state['messages'])}")]}

    agent: Any = StateGraph(MessagesState).add_node("reply", reply).add_edge(START, "reply").compile(checkpointer=saver)
    for text in ("one", "two"):
        agent.invoke({"messages": [("user", text)]}, config())
    after_one = next(each for each in agent.get_state_history(config()) if each.metadata["step"] == 1)
    browser.submit("/threads/1/rewind", at=after_one.config["configurable"]["checkpoint_id"])
    now = agent.get_state(config())
    assert (now.values, now.next, now.metadata["source"]) == (after_one.values, (), "fork")
    said = agent.invoke({"messages": [("user", "three")]}, config())["messages"]
    assert [message.text for message in said] == ["one", "1", "three", "3"]


def test_a_page_of_a_long_thread_takes_as_many_statements_as_one_of_a_short(
    browser: Browser, saver: SQLAlchemySaver
) -> None:
    counts = []
    for number, length in ((1, 3), (2, 250)):
        at = config(f"thread {number}")
        for step in range(length):
            at = put(saver, at, {"n": step}, step=step)
        browser.read(f"/threads/{number}")  # notes that it was opened
        with statements(Engine) as sent:
            page = browser.read(f"/threads/{number}")
        assert page.count("<li>") == min(length, 100)
        counts.append(len(sent))
    assert counts[0] == counts[1]
