"""Memory in real graphs, on the stand-in, and on nano where an engine may make a difference: the truth is the graph
state alone.

The prompt shows the last message only, so what a reply knows of earlier turns comes from the memory.
"""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, Overwrite, RetryPolicy, Send, interrupt

from agentmem import MemoryState, Window
from agentmem_langgraph import MemoryNode
from tests.helpers.talks import State, World, memory_of

# The limit ends the test of a model that calls tools for ever.
THREAD: RunnableConfig = {"configurable": {"thread_id": "1"}, "recursion_limit": 10}
LAST = {"window": Window(messages=1), "max_tokens": 40}


on_nano_too = pytest.mark.parametrize("w", ["fake", "nano"], indirect=True)


class FanState(State):
    topics: list[str]


def compiled(node: Any, saver: Any = None, **options: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("agent", node, **options)
    builder.add_edge(START, "agent")
    builder.add_edge("agent", END)
    return builder.compile(checkpointer=saver or InMemorySaver())


def say(graph: Any, text: str, config: RunnableConfig = THREAD, **options: Any) -> BaseMessage:
    out = graph.invoke({"messages": [HumanMessage(text)]}, config, **options)
    reply: BaseMessage = out["messages"][-1]
    return reply


@on_nano_too
def test_a_thread_remembers_what_its_prompt_no_longer_shows(w: World) -> None:
    graph = compiled(MemoryNode(w.llm(**LAST)))
    for n in range(3):
        say(graph, w.tell(n))
    say(graph, w.small_talk(1))
    assert [w.knows(say(graph, w.ask(n)), n) for n in range(3)] == [True] * 3


def test_threads_do_not_share_a_memory(w: World) -> None:
    graph = compiled(MemoryNode(w.llm(**LAST)))
    say(graph, w.tell(0))
    other: RunnableConfig = {"configurable": {"thread_id": "2"}}
    assert not w.knows(say(graph, w.ask(0), other), 0)
    assert w.knows(say(graph, w.ask(0)), 0)


def test_a_new_process_opens_the_thread_from_the_checkpoint(w: World) -> None:
    saver = InMemorySaver()
    say(compiled(MemoryNode(w.llm(**LAST)), saver), w.tell(0))
    assert w.knows(say(compiled(MemoryNode(w.llm(**LAST)), saver), w.ask(0)), 0)


def test_trimming_the_messages_changes_nothing_of_the_memory(w: World) -> None:
    graph = compiled(MemoryNode(w.llm(**LAST)))
    say(graph, w.tell(0))
    before = memory_of(graph)
    graph.update_state(THREAD, {"messages": Overwrite([])})
    assert memory_of(graph) == before
    assert w.knows(say(graph, w.ask(0)), 0)
    assert memory_of(graph).count == before.count + 2


@on_nano_too
def test_a_tool_loop_is_consumed_once_and_in_order(w: World) -> None:
    @tool
    def get_room(number: int) -> str:
        """The key of a room."""
        return "4711" if number == 42 else "wrong room"

    builder = StateGraph(State)
    llm = w.llm(window=Window(messages=3), max_tokens=60)
    builder.add_node("agent", MemoryNode(llm.bind_tools([get_room])))
    builder.add_node("tools", ToolNode([get_room]))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition)
    builder.add_edge("tools", "agent")
    saver = InMemorySaver()
    graph, plain = builder.compile(checkpointer=saver), compiled(MemoryNode(w.llm(**LAST)), saver)
    reply = say(graph, "Call get_room with number 42.")
    messages = graph.get_state(THREAD).values["messages"]
    assert [m.type for m in messages] == ["human", "ai", "tool", "ai"]
    assert messages[1].tool_calls[0]["args"] == {"number": 42}
    assert "4711" in reply.text
    assert memory_of(graph).count == 4
    # Nothing of the loop is taken for new or edited afterwards.
    say(plain, w.tell(0))
    reply = say(plain, w.ask(0))
    assert "edits" not in reply.response_metadata
    assert memory_of(graph).count == 8
    assert w.knows(reply, 0)


class FailsAfterwards(MemoryNode):
    """Does all its work, then fails: as if the machine had gone down before LangGraph committed."""

    failures = 0

    def invoke(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        update = super().invoke(*args, **kwargs)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("gone")
        return update


def test_a_node_that_fails_twice_is_applied_once(w: World) -> None:
    once, node = compiled(MemoryNode(w.llm(**LAST))), FailsAfterwards(w.llm(**LAST))
    graph = compiled(node, retry_policy=RetryPolicy(initial_interval=0, jitter=False, max_attempts=3))
    node.failures = 2
    say(graph, w.tell(0))
    say(once, w.tell(0))
    assert node.failures == 0
    assert memory_of(graph) == memory_of(once)
    assert w.knows(say(graph, w.ask(0)), 0)


def test_an_exhausted_retry_leaves_the_memory_of_the_turn_before(w: World) -> None:
    node = FailsAfterwards(w.llm(**LAST))
    graph = compiled(node)
    say(graph, w.tell(0))
    before = memory_of(graph)
    node.failures = 1
    with pytest.raises(ConnectionError):
        say(graph, w.tell(1))
    assert memory_of(graph) == before
    graph.invoke(None, THREAD)
    assert w.knows(say(graph, w.ask(1)), 1)


def test_an_interrupted_node_is_applied_once_when_it_resumes(w: World) -> None:
    memory_node = MemoryNode(w.llm(**LAST))
    runs = []

    def asks_a_human(state: State, config: RunnableConfig) -> dict[str, Any]:
        update = memory_node.invoke(state, config)
        runs.append(update["memory"]["digest"])
        return update if interrupt("keep this?") == "yes" else {}

    once, graph = compiled(memory_node), compiled(asks_a_human)
    say(once, w.tell(0))
    graph.invoke({"messages": [HumanMessage(w.tell(0))]}, THREAD)
    assert "memory" not in graph.get_state(THREAD).values
    graph.invoke(Command(resume="yes"), THREAD)
    assert len(runs) == 2
    assert runs[0] == runs[1] == memory_of(graph).digest == memory_of(once).digest


@on_nano_too
def test_rewinding_a_thread_brings_the_old_answer_back(w: World) -> None:
    graph = compiled(MemoryNode(w.llm(**LAST)))
    say(graph, w.tell(0))
    early = graph.get_state(THREAD).config
    say(graph, w.change(0))
    late = graph.get_state(THREAD).config
    assert w.knows(say(graph, w.ask(0)), 0, changed=True)
    assert w.knows(say(graph, w.ask(0), early), 0)
    # The fork left the other branch as it was.
    assert w.knows(say(graph, w.ask(0), late), 0, changed=True)


@on_nano_too
def test_replaying_a_checkpoint_gives_the_same_memory(w: World) -> None:
    graph = compiled(MemoryNode(w.llm(**LAST)))
    say(graph, w.tell(0))
    say(graph, w.tell(1))
    memory = memory_of(graph)
    before_agent = next(s for s in graph.get_state_history(THREAD) if s.next == ("agent",))
    graph.invoke(None, before_agent.config)
    assert memory_of(graph) == memory


def test_a_memory_can_be_set_from_outside(w: World) -> None:
    graph = compiled(MemoryNode(w.llm(**LAST)))
    say(graph, w.tell(0))
    other: RunnableConfig = {"configurable": {"thread_id": "2"}}
    graph.update_state(other, {"memory": memory_of(graph).to_dict()}, as_node="agent")
    assert w.knows(say(graph, w.ask(0), other), 0)
    # An emptied memory takes in what the thread's messages say, and no more.
    graph.update_state(other, {"memory": None, "messages": Overwrite([])})
    assert not w.knows(say(graph, w.ask(0), other), 0)


def fan_graph(w: World) -> Any:
    def route(state: FanState) -> Any:
        topics = state.get("topics") or []
        base = {"memory": state["memory"]} if "memory" in state else {}
        sends = [Send("branch", {"messages": [HumanMessage(topic)], **base}) for topic in topics]
        return sends or "agent"

    builder = StateGraph(FanState)
    builder.add_node("agent", MemoryNode(w.llm(**LAST)))
    builder.add_node("branch", MemoryNode(w.llm(**LAST)))
    builder.add_conditional_edges(START, route, ["agent", "branch"])
    builder.add_edge("agent", END)
    builder.add_edge("branch", END)
    return builder.compile(checkpointer=InMemorySaver())


@on_nano_too
@pytest.mark.parametrize("based", [True, False], ids=["on-a-base", "from-nothing"])
def test_after_a_fan_out_the_base_and_every_branch_are_known(w: World, based: bool) -> None:
    graph = fan_graph(w)
    if based:
        say(graph, w.tell(0))
    graph.invoke({"messages": [], "topics": [w.tell(n) for n in (1, 2, 3)]}, THREAD)
    assert memory_of(graph).count == 2 * (3 + based)
    graph.update_state(THREAD, {"topics": []})
    for n in range(0 if based else 1, 4):
        assert w.knows(say(graph, w.ask(n)), n)


@pytest.mark.parametrize("saver", [None, True], ids=["stateless", "stateful"])
def test_a_subgraph_shares_the_memory_with_its_parent(w: World, saver: Any) -> None:
    inner = StateGraph(State)
    inner.add_node("inner", MemoryNode(w.llm(**LAST)))
    inner.add_edge(START, "inner")
    builder = StateGraph(State)
    builder.add_node("agent", MemoryNode(w.llm(**LAST)))
    builder.add_node("sub", inner.compile(checkpointer=saver))
    builder.add_conditional_edges(START, lambda s: "sub" if len(s["messages"]) % 4 else "agent", ["agent", "sub"])
    graph = builder.compile(checkpointer=InMemorySaver())
    for n in range(4):  # the parent and the subgraph take turns
        say(graph, w.tell(n))
    assert memory_of(graph).count == 8
    assert [w.knows(say(graph, w.ask(n)), n) for n in range(4)] == [True] * 4


def test_a_subgraph_beside_a_node_is_a_branch(w: World) -> None:
    inner = StateGraph(State)
    inner.add_node("inner", MemoryNode(w.llm(**LAST)))
    inner.add_edge(START, "inner")
    sub = inner.compile()

    def aside(state: State, config: RunnableConfig) -> dict[str, Any]:
        told = {"messages": [HumanMessage(w.tell(2))], "memory": state["memory"]}
        return {"memory": sub.invoke(told, config)["memory"]}

    builder = StateGraph(State)
    builder.add_node("agent", MemoryNode(w.llm(**LAST)))
    builder.add_node("aside", aside)
    builder.add_conditional_edges(START, lambda s: ["agent", "aside"] if "memory" in s else "agent", ["agent", "aside"])
    graph = builder.compile(checkpointer=InMemorySaver())
    say(graph, w.tell(0))
    graph.invoke({"messages": [HumanMessage(w.tell(1))]}, THREAD)
    memory = memory_of(graph)
    assert memory.count == 6
    node = MemoryNode(w.llm(**LAST))
    for n in range(3):
        update = node.invoke({"messages": [HumanMessage(w.ask(n))], "memory": memory})
        assert w.knows(update["messages"][0], n)


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_every_durability_keeps_the_same_memory(w: World, durability: str) -> None:
    graph, plain = compiled(MemoryNode(w.llm(**LAST))), compiled(MemoryNode(w.llm(**LAST)))
    for text in (w.tell(0), w.ask(0)):
        reply = say(graph, text, durability=durability)
        say(plain, text)
    assert memory_of(graph) == memory_of(plain)
    assert w.knows(reply, 0)
    # Earlier checkpoints were not rewritten by later turns.
    counts = {s.values["memory"].count for s in graph.get_state_history(THREAD) if "memory" in s.values}
    assert counts == {2, 4}


@on_nano_too
def test_stream_modes_show_digests_in_messages_and_the_memory_in_values(w: World) -> None:
    graph = compiled(MemoryNode(w.llm(**LAST)))
    say(graph, w.tell(0))
    seen: dict[str, list[Any]] = {"values": [], "updates": [], "messages": []}
    for mode, part in graph.stream({"messages": [HumanMessage(w.ask(0))]}, THREAD, stream_mode=list(seen)):
        seen[mode].append(part)
    assert isinstance(seen["values"][-1]["memory"], MemoryState)
    update = seen["updates"][-1]["agent"]["memory"]
    assert MemoryState.from_dict(update) == memory_of(graph)
    chunks = [chunk for chunk, _ in seen["messages"]]
    assert len(chunks) > 2
    assert "".join(chunk.text for chunk in chunks) == seen["values"][-1]["messages"][-1].text
    assert sum(bool(chunk.usage_metadata) for chunk in chunks) == 1
    assert w.knows(seen["values"][-1]["messages"][-1], 0)
    # A streamed turn is the turn: the next one finds nothing edited and the memory goes on.
    assert "edits" not in say(graph, w.ask(0)).response_metadata


@on_nano_too
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_async_graph_ends_in_the_same_memory(w: World, streamed: bool) -> None:
    graph, plain = compiled(MemoryNode(w.llm(**LAST))), compiled(MemoryNode(w.llm(**LAST)))
    for text in (w.tell(0), w.ask(0)):
        given, expected = {"messages": [HumanMessage(text)]}, say(plain, text)
        if streamed:
            async for _ in graph.astream(given, THREAD, stream_mode="messages"):
                pass
        else:
            out = await graph.ainvoke(given, THREAD)
            assert out["messages"][-1].text == expected.text
    assert memory_of(graph) == memory_of(plain)
    assert w.knows(expected, 0)
