"""What leaves a graph: no matrices in runs, events, streams and messages, and plain data under strict msgpack."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from langchain.agents import create_agent
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, Send, TracePolicy, interrupt
from pydantic import BaseModel
from typing_extensions import TypedDict

from agentmem import MemoryState
from agentmem.errors import CorruptStateError
from agentmem_langgraph import ChatDeltaMem, MemoryMiddleware, MemoryNode, MemoryTurn, redact_traces, without_matrices
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.talks import CALL, THREAD, State, World, get_port, memory_of, say, world

WAYS = ("model", "node", "agent")


@pytest.fixture
def w(fake: FakeEngine) -> World:
    return world(fake)


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
        self.runs: list[tuple[str, str, Any]] = []

    def _persist_run(self, run: Run) -> None:
        pass

    def _end_trace(self, run: Run) -> None:
        held = [run.inputs, run.outputs, run.extra, run.serialized, run.events, run.tags]
        self.runs.append((run.run_type, run.name, held))
        super()._end_trace(run)

    @property
    def of_models(self) -> list[Any]:
        return [held for kind, _, held in self.runs if kind in ("llm", "chat_model")]


def graph_of(w: World, way: str) -> Any:
    """A graph that keeps a memory, its traces unguarded: what is not the model's may hold matrices."""
    if way == "agent":
        return create_agent(w.llm(), [get_port], middleware=[MemoryMiddleware()], checkpointer=InMemorySaver())
    builder = StateGraph(State).add_node("agent", MemoryNode(w.llm().bind_tools([get_port])))
    builder.add_node("tools", ToolNode([get_port])).add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition).add_edge("tools", "agent")
    return builder.compile(checkpointer=InMemorySaver())


def texts(w: World) -> tuple[str, ...]:
    return (w.tell(0), w.ask(0), CALL)


def test_what_is_looked_for_would_be_found(w: World) -> None:
    recorder = Recorder()
    graph = graph_of(w, "node")
    for text in texts(w):
        say(graph, text, {**THREAD, "callbacks": [recorder]})
    assert {name for _, name, held in recorder.runs if list(matrices(held))} >= {"LangGraph", "agent"}


@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke"])
@pytest.mark.parametrize("way", WAYS)
async def test_runs_of_the_model_hold_none(w: World, way: str, how: str) -> None:
    recorder, turn = Recorder(), MemoryTurn()
    config: RunnableConfig = {**THREAD, "callbacks": [recorder]}
    graph = None if way == "model" else graph_of(w, way)
    for text in texts(w):
        given: Any = {"messages": [HumanMessage(text)]}
        runs: Any = graph
        if graph is None:
            turn = MemoryTurn(turn.state)
            given, runs = text, w.llm().bind(memory=turn)
        if how == "stream":
            list(runs.stream(given, config))
        elif how == "invoke":
            runs.invoke(given, config)
        else:
            await runs.ainvoke(given, config)
    assert len(recorder.of_models) >= 3
    assert list(matrices(recorder.of_models)) == []
    memory = turn.state if graph is None else memory_of(graph)
    assert memory.count >= 6, "there was a memory to be seen"


@pytest.mark.parametrize("way", WAYS)
async def test_the_real_engine_shows_none_either(nano_engine: Any, way: str) -> None:
    await test_runs_of_the_model_hold_none(world(nano_engine), way, "stream")


class Talk(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


def test_guarded_traces_of_the_node_hold_digests(w: World) -> None:
    node, recorder = MemoryNode(w.llm()), Recorder()
    builder = StateGraph(State, input_schema=Talk, output_schema=Talk)
    builder.add_node("agent", node, trace_policy=node.trace_policy).add_edge(START, "agent")
    graph = builder.compile(checkpointer=InMemorySaver())
    for text in (w.tell(0), w.ask(0)):
        say(graph, text, {**THREAD, "callbacks": [recorder]})
    assert {"LangGraph", "agent", "ChatDeltaMem"} <= {name for _, name, _ in recorder.runs}
    assert list(matrices(recorder.runs)) == []
    assert memory_of(graph).digest in str([held for _, name, held in recorder.runs if name == "agent"][1])
    second = str(recorder.of_models[1])
    assert "MemoryTurn(" in second
    assert "MemoryTurn(empty)" not in second


@pytest.mark.parametrize("is_async", [False, True])
async def test_runs_of_an_agents_nodes_hold_digests(w: World, is_async: bool) -> None:
    async def talk(graph: Any) -> dict[str, list[Any]]:
        recorder = Recorder()
        config: RunnableConfig = {**THREAD, "callbacks": [recorder]}
        for text in texts(w):
            given: Any = {"messages": [HumanMessage(text)]}
            await (graph.ainvoke(given, config) if is_async else asyncio.to_thread(graph.invoke, given, config))
        assert {"LangGraph", "model", "tools"} <= {name for _, name, _ in recorder.runs}
        return {kind: [held[n] for _, _, held in recorder.runs] for n, kind in enumerate(("inputs", "outputs"))}

    bare, redacted = graph_of(w, "agent"), graph_of(w, "agent")
    assert list(matrices((await talk(bare))["outputs"])) == [], "the model node takes no policy"
    held = await talk(redact_traces(redacted))
    assert list(matrices(held)) == []
    assert memory_of(redacted) == memory_of(bare), "what is recorded is another value than what is kept"
    assert memory_of(redacted).digest in str(held["outputs"])
    assert "'count': " in str(held["inputs"])


def test_all_nodes_of_a_graph_and_of_its_subgraphs_are_redacted_after_it_ran(w: World) -> None:
    agent = create_agent(w.llm(), [get_port], middleware=[MemoryMiddleware(shared=True)])
    builder = StateGraph(State, input_schema=Talk, output_schema=Talk).add_node("agent", agent)
    seen: list[Any] = []
    policy = TracePolicy(process_inputs=lambda state: seen.append(state) or {"memory": state["memory"]})
    builder.add_node("look", lambda state: {}, trace_policy=policy)
    builder.add_edge(START, "agent").add_edge("agent", "look")
    graph = builder.compile(checkpointer=InMemorySaver())
    say(graph, w.tell(0))
    recorder = Recorder()
    redact_traces(graph)
    say(graph, w.ask(0), {**THREAD, "callbacks": [recorder]})
    nodes = [held for _, name, held in recorder.runs if name != "LangGraph"]
    assert list(matrices(nodes)) == [], "the runs of whole graphs are no node's"
    assert {"agent", "model", "look"} <= {name for _, name, _ in recorder.runs}
    assert next(held for _, name, held in recorder.runs if name == "look")[0].keys() == {"memory"}
    assert list(matrices(seen)), "a policy of one's own sees the value"


async def events_of(w: World, way: str, version: Any) -> list[Any]:
    """All events of a second turn."""
    if way == "model":
        first = MemoryTurn()
        w.llm().invoke(w.tell(0), memory=first)
        found: Any = w.llm().astream_events(w.ask(0), version=version, memory=MemoryTurn(first.state))
    else:
        graph = graph_of(w, way)
        say(graph, w.tell(0))
        found = graph.astream_events({"messages": [HumanMessage(w.ask(0))]}, THREAD, version=version)
    stream = await found if inspect.isawaitable(found) else found
    return [event async for event in stream]


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("way", WAYS)
async def test_events_of_the_model_hold_none(w: World, way: str, version: str) -> None:
    events = await events_of(w, way, version)
    if version == "v2":
        events = [event for event in events if event["event"].startswith("on_chat_model")]
        kinds = {"on_chat_model_start", "on_chat_model_stream", "on_chat_model_end"}
        assert {event["event"] for event in events} == kinds
    elif way != "model":
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


def test_memories_are_found_wherever_they_are(w: World) -> None:
    turn = MemoryTurn()
    message = w.llm().invoke(w.tell(0), memory=turn)
    memory = turn.state
    assert memory is not None
    shown = {"digest": memory.digest, "count": 2}
    nested = [(memory.to_dict(), memory.to_json())]
    value = {"memory": memory, "nested": nested, "messages": [message], "other": {"data": b"x"}}
    assert without_matrices(value) == {
        "memory": shown,
        "nested": [[shown, shown]],
        "messages": [message],
        "other": {"data": b"x"},
    }


def test_every_kind_of_value_survives_strict_msgpack(
    llm: ChatDeltaMem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Turns, an interrupt that shows the memory, a fan-out whose payloads hold it, a subgraph that returns it, and
    pending writes of it.
    """
    # What LangGraph makes of LANGGRAPH_STRICT_MSGPACK when it is imported.
    monkeypatch.setattr("langgraph.checkpoint.serde._msgpack.STRICT_MSGPACK_ENABLED", True)
    monkeypatch.setattr("langgraph._internal._serde.STRICT_MSGPACK_ENABLED", True)
    assert JsonPlusSerializer()._allowed_msgpack_modules is None, "strict mode is not on"
    node = MemoryNode(llm)
    inner = StateGraph(State).add_node("inner", node).add_edge(START, "inner")

    def review(state: State) -> dict[str, Any]:
        return {"memory": interrupt(state["memory"])}

    def fan(state: State) -> list[Send]:
        told = ("My name is Anna.", "My job is baker.")
        return [Send("branch", {"messages": [HumanMessage(t)], "memory": state["memory"]}) for t in told]

    def waits(state: State) -> dict[str, Any]:
        interrupt("while the branches' writes are pending")
        return {}

    builder = StateGraph(State).add_node("agent", node).add_node("sub", inner.compile()).add_node("review", review)
    builder.add_node("branch", node).add_node("waits", waits)
    builder.add_edge(START, "agent").add_edge("agent", "sub").add_edge("sub", "review")
    builder.add_conditional_edges("review", lambda state: [*fan(state), Send("waits", state)], ["branch", "waits"])
    saver = InMemorySaver(serde=JsonPlusSerializer())
    graph: Any = builder.compile(checkpointer=saver)
    shown = say(graph, "My favorite color is teal.")["__interrupt__"][0].value
    assert isinstance(shown, MemoryState)
    assert shown == memory_of(graph)
    graph.invoke(Command(resume=shown), THREAD)
    graph.invoke(Command(resume=True), THREAD)
    memory = memory_of(graph)
    assert isinstance(memory, MemoryState)
    assert memory.count == shown.count + 4
    stored = saver.get(THREAD)
    assert stored is not None
    assert stored["channel_values"]["memory"] == memory.to_dict(), "a checkpoint holds the plain dict"
    assert caplog.text == "", "something was blocked or unregistered"


def test_an_entrypoint_that_saves_the_value_under_strict_msgpack_is_told_what_to_save(
    llm: ChatDeltaMem, caplog: pytest.LogCaptureFixture
) -> None:
    saver = InMemorySaver(serde=JsonPlusSerializer(allowed_msgpack_modules=[]))

    def talk(save: Callable[[MemoryState], Any], text: str) -> Any:
        @entrypoint(checkpointer=saver)
        def turn(text: str, *, previous: Any = None) -> Any:
            memory = MemoryTurn(previous)
            reply = llm.invoke([HumanMessage(text)], memory=memory)
            assert memory.state is not None
            return entrypoint.final(value=reply.text, save=save(memory.state))

        return turn.invoke(text, {"configurable": {"thread_id": save.__name__}})

    for save in (MemoryState.to_dict, MemoryState.to_json):
        talk(save, "My name is Anna.")
        assert talk(save, "What is my name?") == "Your name is Anna."

    def value(state: MemoryState) -> MemoryState:
        return state

    talk(value, "My name is Anna.")
    with pytest.raises(CorruptStateError, match=r"strict msgpack.*state\.to_dict\(\)"):
        talk(value, "What is my name?")
