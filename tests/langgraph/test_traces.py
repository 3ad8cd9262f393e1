"""Runs, events and streams of the chat model hold no matrices, whatever calls it: not as bytes, arrays or values."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from langchain.agents import create_agent
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import BaseModel
from typing_extensions import TypedDict

from agentmem import MemoryState
from agentmem_langgraph import MemoryChannel, MemoryMiddleware, MemoryNode, MemoryTurn
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.worlds import World, world

THREAD: RunnableConfig = {"configurable": {"thread_id": "1"}}
WAYS = ("model", "node", "agent")


@pytest.fixture
def w(fake: FakeEngine) -> World:
    return world(fake)


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    memory: Annotated[MemoryState, MemoryChannel]


@tool
def get_port(city: str) -> str:
    """The port of a city."""
    return "4711"


def matrices(value: Any, depth: int = 0) -> Iterator[Any]:
    """What of a value is a memory, or made of numbers as one is, wherever in it. Private attributes are looked into."""
    if isinstance(value, MemoryState | bytes | bytearray | np.ndarray | torch.Tensor):
        yield value
    elif isinstance(value, str | int | float | bool | None | type) or depth > 12:
        return
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from matrices(one, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for one in value:
            yield from matrices(one, depth + 1)
    elif isinstance(value, BaseModel):
        yield from matrices(dict(value), depth + 1)
    elif is_dataclass(value):
        yield from matrices([getattr(value, field.name) for field in fields(value)], depth + 1)


class Recorder(BaseTracer):
    """Keeps of every run what it recorded, as it is when the run ends."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[str, Any]] = []

    def _persist_run(self, run: Run) -> None:
        pass

    def _end_trace(self, run: Run) -> None:
        held = [run.inputs, run.outputs, run.extra, run.serialized, run.events, run.tags]
        self.runs.append((run.run_type, held))
        super()._end_trace(run)

    @property
    def of_models(self) -> list[Any]:
        return [held for kind, held in self.runs if kind in ("llm", "chat_model")]


def graph_of(w: World, way: str) -> Any:
    """A graph that keeps a memory, its traces unguarded: what is not the model's may hold matrices."""
    if way == "agent":
        return create_agent(w.llm(), [get_port], middleware=[MemoryMiddleware()], checkpointer=InMemorySaver())
    builder = StateGraph(State).add_node("agent", MemoryNode(w.llm().bind_tools([get_port])))
    builder.add_node("tools", ToolNode([get_port])).add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition).add_edge("tools", "agent")
    return builder.compile(checkpointer=InMemorySaver())


def texts(w: World) -> tuple[str, ...]:
    return (w.tell(0), w.ask(0), "Call get_port with city berlin.")


def test_what_is_looked_for_would_be_found(w: World) -> None:
    recorder = Recorder()
    for text in texts(w):
        graph_of(w, "node").invoke({"messages": [HumanMessage(text)]}, {**THREAD, "callbacks": [recorder]})
    assert list(matrices([held for kind, held in recorder.runs if kind == "chain"]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_runs_of_the_model_hold_none(w: World, way: str, streaming: bool) -> None:
    recorder, turn = Recorder(), MemoryTurn()
    config: RunnableConfig = {**THREAD, "callbacks": [recorder]}
    graph = None if way == "model" else graph_of(w, way)
    for text in texts(w):
        given: Any = {"messages": [HumanMessage(text)]}
        runs: Any = graph
        if graph is None:
            turn = MemoryTurn(turn.state)
            given, runs = text, w.llm().bind(memory=turn)
        if streaming:
            list(runs.stream(given, config))
        else:
            runs.invoke(given, config)
    assert len(recorder.of_models) >= 3
    assert list(matrices(recorder.of_models)) == []
    memory = turn.state if graph is None else graph.get_state(THREAD).values["memory"]
    assert memory.count >= 6, "there was a memory to be seen"


@pytest.mark.parametrize("way", WAYS)
async def test_runs_of_the_model_hold_none_in_a_loop(w: World, way: str) -> None:
    recorder, turn = Recorder(), MemoryTurn()
    config: RunnableConfig = {**THREAD, "callbacks": [recorder]}
    graph = None if way == "model" else graph_of(w, way)
    for text in texts(w):
        if graph is None:
            turn = MemoryTurn(turn.state)
            await w.llm().ainvoke(text, config, memory=turn)
        else:
            await graph.ainvoke({"messages": [HumanMessage(text)]}, config)
    assert len(recorder.of_models) >= 3
    assert list(matrices(recorder.of_models)) == []


async def events_of(w: World, way: str, version: Any) -> list[Any]:
    """All events of a second turn."""
    config: RunnableConfig = {"configurable": {"thread_id": "1"}}
    if way == "model":
        first = MemoryTurn()
        w.llm().invoke(w.tell(0), memory=first)
        found: Any = w.llm().astream_events(w.ask(0), version=version, memory=MemoryTurn(first.state))
    else:
        graph = graph_of(w, way)
        graph.invoke({"messages": [HumanMessage(w.tell(0))]}, config)
        found = graph.astream_events({"messages": [HumanMessage(w.ask(0))]}, config, version=version)
    stream = await found if inspect.isawaitable(found) else found
    return [event async for event in stream]


@pytest.mark.parametrize("way", WAYS)
async def test_events_of_the_model_hold_none(w: World, way: str) -> None:
    events = [event for event in await events_of(w, way, "v2") if event["event"].startswith("on_chat_model")]
    assert {event["event"] for event in events} == {
        "on_chat_model_start",
        "on_chat_model_stream",
        "on_chat_model_end",
    }
    assert list(matrices(events)) == []


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
@pytest.mark.parametrize("way", WAYS)
async def test_events_of_messages_hold_none_in_the_third_version(w: World, way: str) -> None:
    events = await events_of(w, way, "v3")
    if way != "model":
        events = [event["params"] for event in events if event["method"] == "messages"]
    assert len(events) > 4
    assert list(matrices(events)) == []


@pytest.mark.parametrize("way", ["node", "agent"])
def test_streamed_and_stored_messages_hold_none(w: World, way: str) -> None:
    graph = graph_of(w, way)
    for text in texts(w):
        chunks = list(graph.stream({"messages": [HumanMessage(text)]}, THREAD, stream_mode="messages"))
        assert chunks
        assert list(matrices(chunks)) == []
    for snapshot in graph.get_state_history(THREAD):
        assert list(matrices(snapshot.values.get("messages", []))) == []


def test_values_of_an_agent_can_be_streamed_without_the_memory(w: World) -> None:
    """LangGraph streams private keys too; what is asked for by name comes alone."""
    graph = graph_of(w, "agent")
    for text in texts(w):
        given, modes = {"messages": [HumanMessage(text)]}, ["values", "updates"]
        assert list(matrices(list(graph.stream(given, THREAD, stream_mode=modes))))
        named = list(graph.stream(given, THREAD, stream_mode=modes, output_keys=["messages"]))
        assert {mode for mode, _ in named} == {"values", "updates"}
        assert list(matrices(named)) == []


@pytest.mark.parametrize("way", WAYS)
def test_the_real_engine_shows_none_either(nano_engine: Any, way: str) -> None:
    test_runs_of_the_model_hold_none(world(nano_engine), way, True)
