"""LangGraph graphs for the SQL tests, apart from sql_cases because importing them takes a second or two."""

from __future__ import annotations

import operator
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import _messages_delta_reducer, add_messages
from langgraph.types import interrupt

from tests.helpers.sql_cases import memory


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    memory: dict[str, Any]


def chat_graph(saver: Any) -> Any:
    """Counts the human messages, answers with the count, and keeps it in a memory-like dict."""

    def node(state: State) -> dict[str, Any]:
        count = sum(message.type == "human" for message in state["messages"])
        return {"messages": [AIMessage(f"answer {count}")], "memory": memory(count)}

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_edge("node", END)
    return builder.compile(checkpointer=saver)


def say(text: str) -> dict[str, Any]:
    return {"messages": [("user", text)]}


class DeltaState(TypedDict):
    messages: Annotated[list[AnyMessage], DeltaChannel(_messages_delta_reducer, snapshot_frequency=7)]
    log: Annotated[list[str], operator.add]  # keeps its whole value in every checkpoint
    total: Annotated[int, operator.add]
    memory: dict[str, Any]


def delta_graph(saver: Any) -> Any:
    """As ``chat_graph``, with the messages in a delta channel; two nodes write it in one superstep.

    A message that ends in a question mark is answered by ``Command(resume=...)``.
    """

    def answer(state: DeltaState) -> dict[str, Any]:
        asked = str(state["messages"][-1].content)
        count = sum(message.type == "human" for message in state["messages"])
        text = interrupt(asked) if asked.endswith("?") else f"answer {count}"
        return {"messages": [AIMessage(text)], "log": [text], "total": 1, "memory": memory(count)}

    def remark(state: DeltaState) -> dict[str, Any]:
        return {"messages": [AIMessage(f"remark on {len(state['messages'])}")], "log": ["remark"], "total": 10}

    builder = StateGraph(DeltaState)
    for node in (answer, remark):
        builder.add_node(node.__name__, node)
        builder.add_edge(START, node.__name__)
        builder.add_edge(node.__name__, END)
    return builder.compile(checkpointer=saver)
