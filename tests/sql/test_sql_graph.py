"""Real LangGraph graphs on the saver: every durability, a restart, time travel, forks."""

from __future__ import annotations

from typing import Any

import pytest

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, memory
from tests.helpers.sql_graphs import chat_graph, say


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
async def test_a_graph_keeps_its_thread(url: str, durability: Any) -> None:
    """By both its modes in turn, and in a saver that knows nothing yet."""
    for number in (1, 2, 3, 4):
        async with SQLAlchemySaver.from_url(url) as saver:
            graph = chat_graph(saver)
            turn = say(f"turn {number}"), config()
            if number % 2:
                state = graph.invoke(*turn, durability=durability)
            else:
                state = await graph.ainvoke(*turn, durability=durability)
            assert state["messages"][-1].content == f"answer {number}"
            assert (await graph.aget_state(config())).values == graph.get_state(config()).values == state
            assert state["memory"] == memory(number)
            assert len(list(saver.list(config()))) == (number if durability == "exit" else 3 * number)


def test_time_travel_and_fork(saver: SQLAlchemySaver) -> None:
    graph = chat_graph(saver)
    for number in (1, 2, 3):
        graph.invoke(say(f"turn {number}"), config())
    ends = [one for one in graph.get_state_history(config()) if not one.next][::-1]
    assert [one.values["memory"] for one in ends] == [memory(1), memory(2), memory(3)]

    left = graph.invoke(say("left"), ends[0].config)
    edited = graph.update_state(ends[0].config, {"memory": memory(99)})
    right = graph.invoke(say("right"), edited)

    assert [m.content for m in left["messages"]] == ["turn 1", "answer 1", "left", "answer 2"]
    assert [m.content for m in right["messages"]] == ["turn 1", "answer 1", "right", "answer 2"]
    assert graph.get_state(edited).values["memory"] == memory(99)
    assert graph.get_state(ends[2].config).values["memory"] == memory(3)
    parent = graph.get_state(edited).parent_config
    assert parent["configurable"]["checkpoint_id"] == ends[0].config["configurable"]["checkpoint_id"]
