"""MemoryNode: the graph node that calls a model with the graph's memory and returns both reply and memory.

The node keeps nothing. LangGraph commits the message and the memory together or neither, so a node that is
retried, interrupted, rewound or run in parallel gives what the graph state says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.types import TracePolicy

from agentmem.errors import TranscriptError
from agentmem_langgraph.carrier import MemoryTurn
from agentmem_langgraph.facts import numbered_facts, question, with_leading_text
from agentmem_langgraph.tracing import MATRIX_FREE


class MemoryNode(Runnable[Any, dict[str, Any]]):
    """Calls a chat model with the messages and the memory of the graph state.

        builder.add_node("agent", node := MemoryNode(llm), trace_policy=node.trace_policy)

    Args:
        llm: a ChatDeltaMem, also with tools or options bound.
        messages_key: where the state keeps its messages.
        memory_key: where it keeps its memory (`Annotated[MemoryState, MemoryChannel]`).
        system: a system prompt, shown before the messages and never stored.
        retriever: looks up facts for the last human message. They are shown in the leading system message,
            and neither stored nor written into memory.
        format_facts: how the facts are shown; by default "Facts:" and a line "text [1]" for each.
        name: of the node.
    """

    trace_policy: TracePolicy = MATRIX_FREE
    """For `add_node`: keeps matrices out of the node's trace."""

    def __init__(
        self,
        llm: Runnable[Any, Any],
        messages_key: str = "messages",
        memory_key: str = "memory",
        *,
        system: str = "",
        retriever: BaseRetriever | None = None,
        format_facts: Callable[[Sequence[Document]], str] = numbered_facts,
        name: str | None = None,
    ) -> None:
        self.llm = llm
        self.messages_key = messages_key
        self.memory_key = memory_key
        self.system = system
        self.retriever = retriever
        self.format_facts = format_facts
        self.name = name

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """`{messages_key: [reply], memory_key: plain dict}` for a graph state (mapping, dataclass or model).

        Raises:
            TranscriptError: the state has no messages.
        """
        history, turn = self._messages(input), MemoryTurn(_read(input, self.memory_key))
        documents = self.retriever.invoke(question(history), config) if self.retriever else []
        reply = self.llm.invoke(self._shown(history, documents), config, memory=turn, **kwargs)
        return self._update(reply, turn)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """As `invoke`, without blocking the loop."""
        history, turn = self._messages(input), MemoryTurn(_read(input, self.memory_key))
        documents = await self.retriever.ainvoke(question(history), config) if self.retriever else []
        reply = await self.llm.ainvoke(self._shown(history, documents), config, memory=turn, **kwargs)
        return self._update(reply, turn)

    def _messages(self, state: Any) -> list[BaseMessage]:
        messages = _read(state, self.messages_key)
        if not messages:
            raise TranscriptError(
                f"the graph state holds no messages at {self.messages_key!r}; a model answers at least one"
            )
        return list(messages)

    def _shown(self, history: list[BaseMessage], documents: Sequence[Document]) -> list[BaseMessage]:
        return with_leading_text(history, self.system, self.format_facts(documents) if documents else "")

    def _update(self, reply: BaseMessage, turn: MemoryTurn) -> dict[str, Any]:
        return {self.messages_key: [reply], **memory_update(turn, self.memory_key)}


def memory_update(turn: MemoryTurn, key: str) -> dict[str, Any]:
    """The state update that a carrier brings back; nothing where a model without memory was given none.

    Raises:
        TurnError: the model did not use the carrier.
    """
    turn.require_used()
    return {} if turn.state is None else {key: turn.state.to_dict()}


def _read(state: Any, key: str) -> Any:
    return state.get(key) if isinstance(state, Mapping) else getattr(state, key, None)
