"""A graph that leaves behind everything a checkpointer can hold: for the tests of copying threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage
from langgraph.channels import DeltaChannel
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Send, interrupt


@dataclass
class Ticket:
    """A class of the application's own."""

    number: int
    title: str


def collect(state: list[str], writes: list[list[str]]) -> list[str]:
    return [*state, *(item for write in writes for item in write)]


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    log: Annotated[list[str], DeltaChannel(collect, list[str], snapshot_frequency=3)]
    ticket: Ticket
    count: int


class Inner(TypedDict):
    log: Annotated[list[str], DeltaChannel(collect, list[str], snapshot_frequency=3)]
    asked: str


def _turn(state: State) -> int:
    return sum(message.type == "human" for message in state["messages"])


def _asks(state: State, word: str) -> bool:
    return word in str(state["messages"][-1].content)


def left(state: State) -> dict[str, Any]:
    return {"log": [f"left {_turn(state)}"], "count": _turn(state), "ticket": Ticket(_turn(state), "left")}


def middle(state: State) -> dict[str, Any]:
    """Asks back, twice if told so, while the nodes beside it are done already."""
    answers = [interrupt({"question": n, "ticket": Ticket(n, "?")}) for n in range(2 if _asks(state, "twice") else 1)]
    return {"log": [f"middle {_turn(state)} {answers}"]}


def right(state: State) -> dict[str, Any]:
    return {"log": [f"right {_turn(state)}"]}


def reply(state: State) -> dict[str, Any]:
    return {"messages": [AIMessage(f"reply {_turn(state)}", id=f"ai {_turn(state)}")]}


def send(state: State) -> list[Send]:
    return [Send("part", {"part": number}) for number in range(3)]


def part(state: dict[str, int]) -> dict[str, Any]:
    return {"log": [f"part {state['part']}"]}


def ask(state: Inner) -> dict[str, Any]:
    return {"asked": interrupt("inside"), "log": ["inside"]}


def rich_graph(saver: Any) -> Any:
    """Three nodes side by side (the middle one may ask), a reply, tasks sent out, and perhaps a subgraph that asks."""
    inner = StateGraph(Inner).add_node(ask).add_edge(START, "ask").compile()

    def fan_out(state: State) -> list[str]:
        return ["left", "middle", "right"] if _asks(state, "ask") else ["left", "right"]

    def after(state: State) -> list[Send] | str:
        return "inner" if any("inside" in str(m.content) for m in state["messages"][-2:]) else send(state)

    builder = StateGraph(State)
    for node in (left, middle, right, part):
        builder.add_node(node)
    builder.add_node("reply", reply, defer=True)
    builder.add_node("inner", inner)
    builder.add_conditional_edges(START, fan_out, ["left", "middle", "right"])
    for name in ("left", "middle", "right"):
        builder.add_edge(name, "reply")
    builder.add_conditional_edges("reply", after, ["part", "inner"])
    return builder.compile(checkpointer=saver)


def say(text: str, number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text, "id": f"human {number}"}]}
