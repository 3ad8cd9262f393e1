"""Run by test_strict_msgpack in a process of its own, since LangGraph reads the variable when it is imported.

Turns, an interrupt that shows the memory, a fan-out whose payloads hold it, a subgraph that returns it, and
pending writes of it, all through the strict serialiser. Prints the digest at the end; logs anything blocked.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

from langchain_core.messages import AnyMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send, interrupt
from typing_extensions import TypedDict

from agentmem import MemoryState
from agentmem_langgraph import ChatDeltaMem, MemoryChannel, MemoryNode
from tests.helpers.fake_engine import FakeEngine

logging.basicConfig(level=logging.WARNING, stream=sys.stdout)


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    memory: Annotated[MemoryState, MemoryChannel]


node = MemoryNode(ChatDeltaMem(engine=FakeEngine()))
inner = StateGraph(State)
inner.add_node("inner", node)
inner.add_edge(START, "inner")


def review(state: State) -> dict[str, Any]:
    return {"memory": interrupt(state["memory"])}


def fan(state: State) -> list[Send]:
    told = ("My name is Anna.", "My job is baker.")
    return [Send("branch", {"messages": [HumanMessage(t)], "memory": state["memory"]}) for t in told]


def waits(state: State) -> dict[str, Any]:
    interrupt("while the branches' writes are pending")
    return {}


builder = StateGraph(State)
for name, action in (("agent", node), ("sub", inner.compile()), ("review", review), ("branch", node), ("waits", waits)):
    builder.add_node(name, action)
builder.add_edge(START, "agent")
builder.add_edge("agent", "sub")
builder.add_edge("sub", "review")
builder.add_conditional_edges("review", lambda state: [*fan(state), Send("waits", state)], ["branch", "waits"])

assert JsonPlusSerializer()._allowed_msgpack_modules is None, "strict mode is not on"
graph = builder.compile(checkpointer=InMemorySaver())
config = {"configurable": {"thread_id": "1"}}
shown = graph.invoke({"messages": [HumanMessage("My favorite color is teal.")]}, config)["__interrupt__"][0].value
assert isinstance(shown, MemoryState)
assert shown == graph.get_state(config).values["memory"]
graph.invoke(Command(resume=shown), config)
graph.invoke(Command(resume=True), config)
memory = graph.get_state(config).values["memory"]
assert isinstance(memory, MemoryState)
assert memory.count == shown.count + 4
stored = graph.checkpointer.get(config)["channel_values"]["memory"]
assert stored == memory.to_dict(), "a checkpoint holds the plain dict"
print(memory.digest)
