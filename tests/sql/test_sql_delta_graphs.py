"""Real graphs with delta channels: pruned, thinned out, forked and copied, they go on as if nothing had happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.types import Command
from sqlalchemy import make_url

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config
from tests.helpers.sql_chains import grow, history, id_of, ids, unaccounted
from tests.helpers.sql_graphs import chat_graph, delta_graph, say

Sql = Callable[..., list[Any]]
State = tuple[list[tuple[str, str]], list[str], int, bytes]


def of_run(run: str, thread: str = "t") -> RunnableConfig:
    return {**config(thread), "metadata": {"run_id": run}}


def state(graph: Any, at: RunnableConfig | None = None) -> State:
    """What a user sees, but for the ids of messages, which are made by chance."""
    values = graph.get_state(at or config()).values
    messages = [(message.type, str(message.content)) for message in values["messages"]]
    return messages, values["log"], values["total"], values["memory"]["matrices"][:1]


def talk(graph: Any, turn: int, **options: Any) -> None:
    """One turn; every fifth asks back, and is answered."""
    graph.invoke(say(f"turn {turn}{'?' if turn % 5 == 3 else ''}"), config(), **options)
    if turn % 5 == 3:
        graph.invoke(Command(resume=f"yes {turn}"), config(), **options)


def ends(graph: Any) -> dict[str, State]:
    """The states at the ends of all runs, newest first."""
    return {id_of(one.config): state(graph, one.config) for one in graph.get_state_history(config()) if not one.next}


@pytest.fixture(scope="module")
def expected() -> list[State]:
    """The states after each turn on LangGraph's own saver, which nobody prunes."""
    graph = delta_graph(InMemorySaver())
    states = []
    for turn in range(14):
        talk(graph, turn)
        states.append(state(graph))
    return states


def test_a_thread_that_is_pruned_goes_on(
    swept_saver: SQLAlchemySaver, shared_url: str, shared_ask: Sql, expected: list[State]
) -> None:
    """Between snapshots (every seven updates) and across them; by the process that ran it and by others.

    On each database with another durability, since they have nothing to do with each other.
    """
    durability = {"sqlite": "exit", "postgresql": "async", "mysql": "sync"}[make_url(shared_url).get_backend_name()]
    graph = delta_graph(swept_saver)
    sizes, snapshots = [], 0
    for turn in range(14):
        talk(graph, turn, durability=durability)
        assert state(graph) == expected[turn]
        if turn % 3 == 2:
            rows = shared_ask("SELECT count(*), sum(length(body)) FROM agentmem_blobs")[0]
            snapshots += sum("messages" in one.checkpoint["channel_values"] for one in swept_saver.list(config()))
            swept_saver.prune(["t"])
            sizes.append((rows, shared_ask("SELECT count(*), sum(length(body)) FROM agentmem_blobs")[0]))
            assert len(ids(swept_saver)) == 1
            assert unaccounted(shared_ask) == (set(), set())
            assert state(graph) == expected[turn]
            with SQLAlchemySaver.from_url(shared_url) as other:
                assert state(delta_graph(other)) == expected[turn]
    assert snapshots >= 2
    for before, after in sizes:
        assert before[0] > after[0]
        assert before[1] > after[1] + 9216  # at least one turn's memory


def test_a_question_that_waits_for_its_answer_outlives_pruning(
    swept_saver: SQLAlchemySaver, shared_url: str, expected: list[State]
) -> None:
    graph = delta_graph(swept_saver)
    for turn in range(3):
        talk(graph, turn)
    asked = graph.invoke(say("turn 3?"), config())["__interrupt__"]
    swept_saver.prune(["t"])
    waiting = graph.get_state(config())
    assert [one.value for one in waiting.interrupts] == [one.value for one in asked] == ["turn 3?"]
    assert waiting.next == ("answer",)  # the other node's work is done, and kept
    with SQLAlchemySaver.from_url(shared_url) as other:
        resumed = delta_graph(other)
        resumed.invoke(Command(resume="yes 3"), config())
        assert state(resumed) == expected[3]
    assert state(graph) == expected[3]


async def test_pruning_in_asyncio(swept_saver: SQLAlchemySaver, expected: list[State]) -> None:
    graph = delta_graph(swept_saver)
    for turn in range(3):
        await graph.ainvoke(say(f"turn {turn}"), config())
        await swept_saver.aprune(["t"])
        assert await asyncio.to_thread(state, graph) == expected[turn]


def test_a_run_in_the_middle_is_taken_out(swept_saver: SQLAlchemySaver, expected: list[State]) -> None:
    """Its checkpoints are gone, and every other state is what it was: later ones hold what the run did."""
    graph = delta_graph(swept_saver)
    for turn in range(7):
        asked = turn == 3
        graph.invoke(say(f"turn {turn}{'?' * asked}"), of_run(f"run {turn}"))
        if asked:
            graph.invoke(Command(resume="yes 3"), of_run("run 3"))
    before = ends(graph)
    assert list(before.values()) == expected[6::-1]
    for gone in (4, 1, 0, 6, 3):
        swept_saver.delete_for_runs([f"run {gone}"])
        left = ends(graph)
        assert left == {key: value for key, value in before.items() if value != expected[gone]}
        before = left
    assert state(graph) == expected[5]
    graph.invoke(say("turn 6"), config())
    assert state(graph) == expected[6]


def test_a_fork_is_pruned(swept_saver: SQLAlchemySaver) -> None:
    """The newest branch stays, with what it has from before the fork and nothing of the other branch."""
    graph = delta_graph(swept_saver)
    for turn in range(3):
        graph.invoke(say(f"turn {turn}"), config())
    second = [one.config for one in graph.get_state_history(config()) if not one.next][1]
    graph.invoke(say("left"), second)
    edited = graph.update_state(second, {"messages": [HumanMessage("edited")], "total": 100}, "remark")
    graph.invoke(say("right"), edited)
    right = state(graph)
    assert [content for _, content in right[0]][-5:] == ["remark on 4", "edited", "right", "answer 4", "remark on 8"]
    swept_saver.prune(["t"])
    assert state(graph) == right
    graph.invoke(say("on"), config())
    assert [content for _, content in state(graph)[0]][:-3] == [content for _, content in right[0]]
    assert state(graph)[2] == right[2] + 11


def test_a_thread_from_before_its_channel_was_a_delta_channel(swept_saver: SQLAlchemySaver) -> None:
    """Plain lists of messages in its checkpoints are where the history begins, pruned or not."""
    chat_graph(swept_saver).invoke(say("hello"), config())
    graph = delta_graph(swept_saver)
    graph.invoke(say("again"), config())
    contents = [content for _, content in state(graph)[0]]
    assert contents == ["hello", "answer 1", "again", "answer 2", "remark on 3"]
    swept_saver.prune(["t"])
    assert [content for _, content in state(graph)[0]] == contents


def test_copies_go_on_apart(swept_saver: SQLAlchemySaver, expected: list[State]) -> None:
    graph = delta_graph(swept_saver)
    for turn in range(3):
        talk(graph, turn)
    graph.invoke(say("turn 3?"), config())
    swept_saver.copy_thread("t", "copy")
    swept_saver.prune(["t"])
    swept_saver.copy_thread("t", "copy of what was pruned")
    swept_saver.delete_thread("t")
    for thread in ("copy", "copy of what was pruned"):
        graph.invoke(Command(resume="yes 3"), config(thread))
        assert state(graph, config(thread)) == expected[3]
    graph.invoke(say("only here"), config("copy"))
    assert state(graph, config("copy of what was pruned")) == expected[3]


def test_snapshots_share_their_items(swept_saver: SQLAlchemySaver, shared_ask: Sql) -> None:
    """A snapshot of a list that has grown by a few items stores those, a few nodes, and nothing twice."""
    messages = [HumanMessage(f"message {number} " * 20, id=f"{number}") for number in range(400)]
    at, sizes = None, []
    for length in range(300, 401, 10):
        at = grow(swept_saver, at, {"d": _DeltaSnapshot(messages[:length])})
        sizes.append(shared_ask("SELECT sum(length(body)) FROM agentmem_blobs")[0][0])
    each = sizes[0] / 300
    assert max(after - before for before, after in pairwise(sizes)) < 10 * each + 4096
    assert history(swept_saver, grow(swept_saver, at)) == (_DeltaSnapshot(messages), [])
    swept_saver.prune(["t"])
    assert shared_ask("SELECT sum(length(body)) FROM agentmem_blobs")[0][0] < sizes[-1]
