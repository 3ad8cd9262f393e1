"""What leaves the graph: strict msgpack, and no matrices in messages, streams or traces."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langsmith._internal._serde import dumps_json
from typing_extensions import TypedDict

from agentmem import MemoryState
from agentmem.errors import CorruptStateError
from agentmem_langgraph import ChatDeltaMem, MemoryChannel, MemoryNode, MemoryTurn, without_matrices
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.worlds import World, world

THREAD: RunnableConfig = {"configurable": {"thread_id": "1"}}


class Talk(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


class State(Talk):
    memory: Annotated[MemoryState, MemoryChannel]


@pytest.fixture
def w(fake: FakeEngine) -> World:
    return world(fake)


class Recorder(BaseTracer):
    """Keeps every run as a tracing service would be sent it."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[str, bytes]] = []

    def _persist_run(self, run: Run) -> None:
        pass

    def _end_trace(self, run: Run) -> None:
        payload = {"inputs": run.inputs, "outputs": run.outputs, "extra": run.extra, "serialized": run.serialized}
        self.runs.append((f"{run.run_type}:{run.name}", dumps_json(payload)))
        super()._end_trace(run)


def matrices_in(payload: bytes, memory: MemoryState) -> bool:
    """Whether a payload holds the matrices in any form that a serialiser would give them."""
    text = payload.decode()
    return base64.b64encode(memory.data).decode()[:400] in text or len(text) > 6000


def test_every_kind_of_value_survives_strict_msgpack() -> None:
    script = Path(__file__).parents[1] / "helpers" / "strict_graphs.py"
    env = os.environ | {"LANGGRAPH_STRICT_MSGPACK": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) == 64, "something was blocked or unregistered:\n" + done.stdout


def test_traces_of_the_node_and_the_model_hold_digests(w: World) -> None:
    builder = StateGraph(State, input_schema=Talk, output_schema=Talk)
    node = MemoryNode(w.llm())
    builder.add_node("agent", node, trace_policy=node.trace_policy)
    builder.add_edge(START, "agent")
    graph = builder.compile(checkpointer=InMemorySaver())
    recorder = Recorder()
    for text in (w.tell(0), w.ask(0)):
        graph.invoke({"messages": [HumanMessage(text)]}, {**THREAD, "callbacks": [recorder]})
    memory = graph.get_state(THREAD).values["memory"]
    names = [name for name, _ in recorder.runs]
    assert {"chain:LangGraph", "chain:agent", "llm:ChatDeltaMem"} <= set(names)
    assert [name for name, payload in recorder.runs if matrices_in(payload, memory)] == []
    (last,) = [payload for name, payload in recorder.runs if name == "chain:agent"][1:]
    assert memory.digest in last.decode()
    calls = [payload.decode() for name, payload in recorder.runs if name == "llm:ChatDeltaMem"]
    assert "MemoryTurn(empty)" not in calls[1]
    assert "MemoryTurn(" in calls[1]


def test_the_recorder_would_notice_matrices(w: World) -> None:
    graph = StateGraph(State).add_node("agent", MemoryNode(w.llm())).add_edge(START, "agent").compile()
    recorder = Recorder()
    memory = graph.invoke({"messages": [HumanMessage(w.tell(0))]}, {"callbacks": [recorder]})["memory"]
    noticed = {name for name, payload in recorder.runs if matrices_in(payload, memory)}
    assert noticed == {"chain:LangGraph", "chain:agent"}


def test_stored_messages_hold_no_matrices(w: World) -> None:
    graph = StateGraph(State).add_node("agent", MemoryNode(w.llm())).add_edge(START, "agent")
    compiled = graph.compile(checkpointer=InMemorySaver())
    for text in (w.tell(0), w.ask(0)):
        compiled.invoke({"messages": [HumanMessage(text)]}, THREAD)
    values = compiled.get_state(THREAD).values
    _, stored = JsonPlusSerializer().dumps_typed(values["messages"])
    assert values["memory"].data[:100] not in stored
    assert len(stored) < 3000


async def test_events_of_the_model_hold_no_matrices(w: World) -> None:
    turn = MemoryTurn()
    events = [event async for event in w.llm().astream_events(w.tell(0), version="v2", memory=turn)]
    assert turn.state is not None
    assert not any(matrices_in(dumps_json(event), turn.state) for event in events)
    assert events[-1]["event"] == "on_chat_model_end"


def test_an_entrypoint_that_saves_the_value_under_strict_msgpack_is_told_what_to_save(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saver = InMemorySaver(serde=JsonPlusSerializer(allowed_msgpack_modules=[]))
    llm, thread = ChatDeltaMem(engine=FakeEngine()), {"configurable": {"thread_id": "1"}}

    def chat(save: Callable[[MemoryState], Any]) -> Any:
        @entrypoint(checkpointer=saver)
        def turn(text: str, *, previous: Any = None) -> Any:
            memory = MemoryTurn(previous)
            reply = llm.invoke([HumanMessage(text)], memory=memory)
            assert memory.state is not None
            return entrypoint.final(value=reply.text, save=save(memory.state))

        return turn

    for save in (MemoryState.to_dict, MemoryState.to_json):
        thread["configurable"]["thread_id"] = save.__name__
        chat(save).invoke("My name is Anna.", thread)
        assert chat(save).invoke("What is my name?", thread) == "Your name is Anna."
    thread["configurable"]["thread_id"] = "value"
    value = chat(lambda state: state)
    value.invoke("My name is Anna.", thread)
    with pytest.raises(CorruptStateError, match=r"strict msgpack.*state\.to_dict\(\)"):
        value.invoke("What is my name?", thread)


def test_the_json_form_is_found_in_traces_too(w: World) -> None:
    state = w.engine.zero_state()
    assert without_matrices({"memory": state.to_json()}) == {"memory": {"digest": state.digest, "count": 0}}


def test_memories_are_found_wherever_they_are(w: World) -> None:
    turn = MemoryTurn()
    message = w.llm().invoke(w.tell(0), memory=turn)
    memory = turn.state
    assert memory is not None
    shown = {"digest": memory.digest, "count": 2}
    value = {"memory": memory, "nested": [(memory.to_dict(),)], "messages": [message], "other": {"data": b"x"}}
    assert without_matrices(value) == {
        "memory": shown,
        "nested": [[shown]],
        "messages": [message],
        "other": {"data": b"x"},
    }
