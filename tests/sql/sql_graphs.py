"""A LangGraph graph for the SQL tests, apart from sql_cases because importing it takes a second or two."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from sql_cases import memory


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    memory: dict[str, Any]


def chat_graph(saver: Any, fixed: bool = False) -> Any:
    """Counts the human messages, answers with the count, and keeps it in a memory-like dict."""

    def node(state: State) -> dict[str, Any]:
        count = sum(message.type == "human" for message in state["messages"])
        return {"messages": [AIMessage(f"answer {count}")], "memory": memory(7 if fixed else count)}

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_edge("node", END)
    return builder.compile(checkpointer=saver)


def say(text: str) -> dict[str, Any]:
    return {"messages": [("user", text)]}
