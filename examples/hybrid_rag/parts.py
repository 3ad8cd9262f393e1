"""What the recipes share: a model, a graph of one memory node, and a turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NotRequired

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.retrievers import BaseRetriever
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from typing_extensions import TypedDict

from agentmem import MemoryState, Window
from agentmem_chroma import FactRetriever, FactStore
from agentmem_langgraph import ChatDeltaMem, MemoryChannel, MemoryNode

TOLD = REMOTE, LIGHT, MAIN = "remote store", "light store", "main server"
"""Databases that nano was never trained on."""
CITE = (
    "Answer in one sentence. Cite the number of the fact that you use, like [1]; where it contradicts the user, say so."
)


class State(TypedDict):
    """What a checkpoint holds."""

    messages: Annotated[list[AnyMessage], add_messages]
    memory: NotRequired[Annotated[MemoryState, MemoryChannel]]


@dataclass(frozen=True)
class Chat:
    """A graph, and how it was made."""

    graph: CompiledStateGraph[State, None, State, State]

    def say(self, text: str, thread: str = "1") -> AIMessage:
        """One turn of a thread."""
        print(f"  {thread}> {text}")
        messages = self.graph.invoke({"messages": [HumanMessage(text)]}, {"configurable": {"thread_id": thread}})[
            "messages"
        ]
        reply = messages[-1]
        assert isinstance(reply, AIMessage)
        print(f"     {reply.text}")
        return reply


def chat_model(model: str, adapter: str | None) -> ChatDeltaMem:
    """A model whose prompt shows the last message alone: what else it knows is memory or a shown fact."""
    small = model in ("nano", "smollm2")  # which may never come to an end
    return ChatDeltaMem(model=model, adapter=adapter, window=Window(messages=1), max_tokens=48 if small else 1024)


def chat(llm: ChatDeltaMem, retriever: BaseRetriever | None = None) -> Chat:
    """A graph of one memory node; `retriever` finds the facts that its prompts show."""
    # nano has learned to cite; other models are told to.
    system = "" if llm.model == "nano" else CITE
    node = MemoryNode(llm, retriever=retriever, system=system)
    builder = StateGraph(State)
    builder.add_node("agent", node, trace_policy=node.trace_policy)
    builder.add_edge(START, "agent")
    return Chat(builder.compile(checkpointer=InMemorySaver()))


def finds(store: FactStore, *, thread: str | None = None, source: str | None = None) -> FactRetriever:
    """Finds the two facts that a question is about; nothing for other things."""
    return FactRetriever(store=store, k=2, min_score=0.6, thread=thread, source=source)


def prompt_tokens(reply: AIMessage) -> int:
    """The tokens of the prompt that a reply answers."""
    assert reply.usage_metadata is not None
    return reply.usage_metadata["input_tokens"]
