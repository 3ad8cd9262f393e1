"""The agent: a `StateGraph` of a node that calls tools, a node that answers from facts, and the tools.

Both nodes are `MemoryNode`s on one memory, which is part of the graph's state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, NotRequired

from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode
from typing_extensions import TypedDict

from agentmem import MemoryState, Window
from agentmem_langgraph import ChatDeltaMem, MemoryChannel, MemoryNode
from analysis_agent.phrases import NANO_SYSTEM, SYSTEM


class State(TypedDict):
    """What a checkpoint holds."""

    messages: Annotated[list[AnyMessage], add_messages]
    memory: NotRequired[Annotated[MemoryState, MemoryChannel]]


Agent = CompiledStateGraph[State, None, State, State]


def chat_model(model: str, adapter: str | None, *, use_memory: bool = True) -> ChatDeltaMem:
    """The model. nano was trained with one message in view; others see this session, 4,096 tokens of it."""
    nano = model == "nano"
    return ChatDeltaMem(
        model=model,
        adapter=adapter,
        window=Window(messages=1) if nano else Window(),
        max_tokens=64 if nano else 1024,
        use_memory=use_memory,
    )


def build_agent(
    llm: ChatDeltaMem,
    tools: Sequence[BaseTool],
    facts: BaseRetriever,
    saver: BaseCheckpointSaver[str],
    *,
    nano: bool,
) -> Agent:
    """The graph; `saver` keeps its threads."""
    system = NANO_SYSTEM if nano else SYSTEM
    answer = MemoryNode(llm, system=system, retriever=facts)

    def route(state: State) -> str:
        # The tool that a request names by its words; for another model a request with none of them is a question too.
        return "act" if named(state, tools) else "answer"

    def act(state: State, config: RunnableConfig) -> dict[str, Any]:
        shown = named(state, tools) if nano else tools
        calling = llm.bind_tools(list(shown), strict=True)
        return MemoryNode(calling, system=system).invoke(state, config)

    builder = StateGraph(State)
    builder.add_node("act", act, trace_policy=MemoryNode.trace_policy)
    builder.add_node("answer", answer, trace_policy=answer.trace_policy)
    builder.add_node("tools", ToolNode(tools))
    builder.add_conditional_edges(START, route, ["act", "answer"])
    builder.add_conditional_edges("act", _called, {True: "tools", False: END})
    builder.add_edge("tools", "act")
    builder.add_edge("answer", END)
    return builder.compile(checkpointer=saver)


def named(state: State, tools: Sequence[BaseTool]) -> list[BaseTool]:
    """The tools whose names' words are all in what the human said last."""
    said = next((message.text for message in reversed(state["messages"]) if isinstance(message, HumanMessage)), "")
    words = set(re.findall(r"[a-z]+", said.lower()))
    return [tool for tool in tools if words.issuperset(tool.name.split("_"))]


def _called(state: State) -> bool:
    return bool(getattr(state["messages"][-1], "tool_calls", None))
