"""Forgetting a message in checkpoints that stay: each is as if it had never held it, and the thread goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, RemoveMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import REMOVE_ALL_MESSAGES, _messages_delta_reducer, add_messages
from langgraph.types import Command, interrupt

from agentmem.errors import ConfigError, StorageError
from agentmem.state import MemoryState
from agentmem_governance import Governor
from agentmem_langgraph import MemoryChannel
from agentmem_langgraph.messages import to_engine
from agentmem_sql import SQLAlchemySaver
from tests.governance.test_forget_message import at, left, messages
from tests.helpers.governance_processes import Memory
from tests.helpers.sql_cases import config, get, put

TOLD = "kestrel"
SAID = ("My editor is helix.", f"The codename is {TOLD}.", "My name is Tom.")


class Plain(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    memory: Annotated[MemoryState, MemoryChannel]


class Delta(TypedDict):
    messages: Annotated[list[AnyMessage], DeltaChannel(_messages_delta_reducer, snapshot_frequency=4)]
    memory: Annotated[MemoryState, MemoryChannel]


@pytest.fixture
def saver(url: str) -> Iterator[SQLAlchemySaver]:
    with SQLAlchemySaver.from_url(url) as opened:
        yield opened


def agent(saver: SQLAlchemySaver, schema: Any) -> Any:
    """Replies "OK." and writes question and reply; a question that ends in "?" is answered by whoever resumes."""

    def node(state: Any) -> dict[str, Any]:
        said = state["messages"]
        asked = str(said[-1].content)
        reply = AIMessage(interrupt("?") if asked.endswith("?") else "OK.")
        written = Memory().remember(to_engine([*said, reply]), state.get("memory")).state
        return {"messages": [reply], "memory": written.to_dict()}

    builder = StateGraph(schema).add_node("node", node).add_edge(START, "node").add_edge("node", END)
    return builder.compile(checkpointer=saver)


def say(graph: Any, *texts: str) -> None:
    for text in texts:
        graph.invoke({"messages": [("user", text)]}, at("t"))


def governor(saver: SQLAlchemySaver) -> Governor:
    engine: Any = Memory()
    return Governor(saver, engines=[engine])


def memory_of(said: list[Any]) -> MemoryState:
    return Memory().remember(to_engine(said)).state


@pytest.mark.parametrize("schema", [Plain, Delta], ids=["list", "delta"])
def test_every_checkpoint_is_as_if_it_had_never_been_said(database_url: str, schema: Any) -> None:
    with SQLAlchemySaver.from_url(database_url, audit=True) as saver:
        _check_every_checkpoint(saver, agent(saver, schema))


def _check_every_checkpoint(saver: SQLAlchemySaver, graph: Any) -> None:
    say(graph, *SAID)
    before = list(graph.get_state_history(at("t")))
    going = next(each for each in messages(graph, "t") if TOLD in each.content)
    receipt = governor(saver).forget(thread="t", message=going.id, keep_checkpoints=True)
    after = list(graph.get_state_history(at("t")))
    assert [each.config for each in after] == [each.config for each in before]
    # But for the input that brought the message: nothing is to be read there any more.
    inputs = [place for place, each in enumerate(before) if each.next == ("__start__",)]
    assert [each.next for each in after] == [
        () if place == inputs[1] else each.next for place, each in enumerate(before)
    ]
    gone = set(receipt.messages)
    assert len(gone) == 2
    for old, new in zip(before, after, strict=True):
        kept = [each for each in old.values["messages"] if each.id not in gone]
        assert new.values["messages"] == kept
        consumed = kept[: len(kept) - (len(kept) % 2)]  # the last one may wait for its reply
        assert new.values.get("memory") == (memory_of(consumed) if consumed else None)
    assert (receipt.checkpoints, receipt.rewritten) == (0, 6)
    assert governor(saver).verify(receipt).holds
    assert governor(saver).audit("t").holds
    say(graph, "My shell is fish.")
    assert [each.content for each in messages(graph, "t") if each.type == "human"] == [*SAID[::2], "My shell is fish."]
    assert graph.get_state(at("t")).values["memory"] == memory_of(messages(graph, "t"))


@pytest.mark.parametrize("keep", [False, True], ids=["removed", "rewritten"])
def test_a_message_in_a_delta_channel_leaves_no_byte(folder: Path, url: str, keep: bool) -> None:
    """Also where what it was put together from was pruned, and is kept beside a later checkpoint."""
    with SQLAlchemySaver.from_url(url) as saver:
        graph = agent(saver, Delta)
        say(graph, *SAID)
        going = next(each for each in messages(graph, "t") if TOLD in each.content)
        saver.prune(["t"])
        assert left(folder, TOLD)
        assert going in messages(graph, "t")
        receipt = governor(saver).forget(thread="t", message=going.id, keep_checkpoints=keep)
        assert left(folder, TOLD) == []
        assert [each.content for each in messages(graph, "t") if each.type == "human"] == [*SAID[::2]]
        assert governor(saver).verify(receipt).holds
        say(graph, "My shell is fish.")
        assert len(messages(graph, "t")) == 6
        assert graph.get_state(at("t")).values["memory"] == memory_of(messages(graph, "t"))


def test_branches_and_a_run_that_waits_go_on(saver: SQLAlchemySaver) -> None:
    graph = agent(saver, Plain)
    say(graph, *SAID[:2])
    fork = graph.get_state(at("t")).config
    say(graph, SAID[2])
    graph.invoke({"messages": [("user", "What now?")]}, fork)
    going = messages(graph, "t")[2]
    governor(saver).forget(thread="t", message=going.id, keep_checkpoints=True)
    waiting = graph.get_state(at("t"))
    assert waiting.next == ("node",)
    assert [each.content for each in waiting.values["messages"]] == [SAID[0], "OK.", "What now?"]
    graph.invoke(Command(resume="Lunch."), at("t"))
    assert [each.content for each in messages(graph, "t")] == [SAID[0], "OK.", "What now?", "Lunch."]
    assert graph.get_state(at("t")).values["memory"] == memory_of(messages(graph, "t"))
    assert graph.get_state(fork).values["memory"] == memory_of(messages(graph, "t")[:2])


def test_what_was_trimmed_before_the_message_stays_in_the_memory(saver: SQLAlchemySaver) -> None:
    graph = agent(saver, Plain)
    say(graph, SAID[0])
    trimmed, _ = messages(graph, "t")
    graph.update_state(at("t"), {"messages": [RemoveMessage(id=trimmed.id)]}, as_node="node")
    say(graph, *SAID[1:])
    governor(saver).forget(thread="t", message=messages(graph, "t")[1].id, keep_checkpoints=True)
    memory = graph.get_state(at("t")).values["memory"]
    assert memory.count == 4
    assert (memory.matrices == memory_of([trimmed, *messages(graph, "t")]).matrices).all()


def test_what_only_says_the_same_stays(saver: SQLAlchemySaver) -> None:
    """A short message, whose text is also a value of another channel, of metadata, and of another message."""
    values = {"messages": [HumanMessage("loop", id="1")], "approved": "loop"}
    first = put(saver, config("t"), values, note="loop")
    saver.put_writes(first, [("approved", "loop"), ("messages", [("user", "loop")])], "task")
    second = put(saver, first, {**values, "messages": [*values["messages"], HumanMessage("loop", id="2")]})
    receipt = Governor(saver).forget(thread="t", message="2", keep_checkpoints=True)
    assert receipt.rewritten == 2, "the raw message that was written at the first is the input of the second"
    for where in (first, second):
        stored = get(saver, where)
        assert stored.checkpoint["channel_values"] == values
        assert stored.metadata["source"] == "loop"
    assert get(saver, first).metadata["note"] == "loop"  # type: ignore[typeddict-item]
    assert get(saver, first).pending_writes == [("task", "approved", "loop"), ("task", "messages", [])]


def test_what_cannot_be_rewritten_is_refused_before_it_begins(saver: SQLAlchemySaver) -> None:
    graph = agent(saver, Plain)
    say(graph, *SAID)
    going = messages(graph, "t")[2]
    with pytest.raises(ConfigError, match="engines="):
        Governor(saver).forget(thread="t", message=going.id, keep_checkpoints=True)
    with pytest.raises(ConfigError, match="forget"):
        Governor(saver).forget("t", keep_checkpoints=True)
    # A delta channel of something else, with the message within, or of messages that LangGraph's reducer cannot follow.
    counters = {"counters_since_delta_snapshot": {"odd": (1, 1)}}
    message = HumanMessage("secret", id="m")
    for thread, odd in (("within", {"within": message}), ("all", [RemoveMessage(REMOVE_ALL_MESSAGES), message])):
        first = put(saver, config(thread), {"messages": [message]})
        saver.put_writes(first, [("odd", odd)], "task")
        made = {**get(saver, first).checkpoint, "id": "2", "channel_versions": {"messages": "1", "odd": "1"}}
        saver.put(first, made, {"source": "loop", "step": 1, **counters}, {"messages": "1"})
        for keep in (False, True):
            with pytest.raises(StorageError, match="delta channel 'odd'"):
                Governor(saver).forget(thread=thread, message="m", keep_checkpoints=keep)
    assert Governor(saver).pending() == []


class Noting(TypedDict):
    """A subgraph's state: the messages of the graph, and a memory of its own."""

    messages: Annotated[list[AnyMessage], add_messages]
    notes: Annotated[MemoryState, MemoryChannel]


class Counting(TypedDict):
    """A subgraph's state: the memory of the graph, without the messages."""

    memory: Annotated[MemoryState, MemoryChannel]
    consumed: int


def agent_with_subgraph(saver: SQLAlchemySaver, schema: Any, keeps: bool | None) -> Any:
    """`agent`, that calls a subgraph first, which has a thread of its own if it `keeps` what it had."""

    def note(state: Any) -> dict[str, Any]:
        if "messages" not in state:
            return {"consumed": state["memory"].count if "memory" in state else 0}
        return {"notes": Memory().remember(to_engine(state["messages"]), state.get("notes")).state.to_dict()}

    def node(state: Any) -> dict[str, Any]:
        said = [*state["messages"], reply := AIMessage("OK.")]
        return {"messages": [reply], "memory": Memory().remember(to_engine(said), state.get("memory")).state.to_dict()}

    inner = StateGraph(schema).add_node("note", note).add_edge(START, "note").add_edge("note", END)
    builder = StateGraph(Plain).add_node("inner", inner.compile(checkpointer=keeps)).add_node("node", node)
    builder.add_edge(START, "inner").add_edge("inner", "node").add_edge("node", END)
    return builder.compile(checkpointer=saver)


def memories_of(value: Any) -> Iterator[MemoryState]:
    """Every memory in plain data."""
    if isinstance(value, dict) and {"shape", "data", "digest"} <= value.keys():
        yield MemoryState.from_dict(value)
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from memories_of(each)


@pytest.mark.parametrize("keeps", [None, True], ids=["of a call", "of its own"])
@pytest.mark.parametrize("schema", [Noting, Counting])
def test_checkpoints_of_subgraphs_never_held_it_either(folder: Path, url: str, schema: Any, keeps: bool | None) -> None:
    with SQLAlchemySaver.from_url(url, audit=True) as saver:
        graph = agent_with_subgraph(saver, schema, keeps)
        say(graph, *SAID)
        before = list(saver.list(at("t")))
        asked, replied = messages(graph, "t")[2:4]
        receipt = governor(saver).forget(thread="t", message=asked.id, keep_checkpoints=True)
        after = list(saver.list(at("t")))
        assert [each.config for each in after] == [each.config for each in before]
        assert left(folder, TOLD) == []
        told = to_engine([asked])[0].digest()[:8]
        for stored in after:
            values = stored.checkpoint["channel_values"]
            kept = values.get("messages", [])
            assert {asked.id, replied.id}.isdisjoint(each.id for each in kept)
            for memory in memories_of((values, stored.pending_writes)):
                assert told not in memory.record.recent
            if "notes" in values:
                assert MemoryState.from_dict(values["notes"]).record.recent in [
                    memory_of(kept[:end]).record.recent for end in range(1, len(kept) + 1)
                ]
        assert governor(saver).verify(receipt).holds
        say(graph, "My shell is fish.")
        assert len(messages(graph, "t")) == 6
        assert graph.get_state(at("t")).values["memory"] == memory_of(messages(graph, "t"))
