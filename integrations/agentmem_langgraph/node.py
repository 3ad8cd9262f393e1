"""MemoryNode: the graph node that calls a model with the graph's memory and returns both reply and memory.

The node keeps nothing. LangGraph commits the message and the memory together or not at all, so a node that is retried,
interrupted, rewound or run in parallel depends only on the graph state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import BaseOutputParser
from langchain_core.prompts import BasePromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableParallel, RunnableSequence, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langgraph.types import TracePolicy

from agentmem.errors import ConfigError, TranscriptError, TurnError
from agentmem_langgraph.chat_model import ChatDeltaMem
from agentmem_langgraph.memory_turn import MemoryTurn
from agentmem_langgraph.prompting import facts_metadata, numbered_facts, question, with_leading_text
from agentmem_langgraph.tracing import MATRIX_FREE


class MemoryNode(Runnable[Any, dict[str, Any]]):
    """Calls a chat model with the messages and the memory of the graph state.

        builder.add_node("agent", node := MemoryNode(llm), trace_policy=node.trace_policy)

    Args:
        llm: a ChatDeltaMem, possibly with tools or options bound. Not a chain: a prompt before it would not pass
            the memory on, and the output of a parser is not a message.
        messages_key: the state key of the messages.
        memory_key: the state key of the memory (`Annotated[MemoryState, MemoryChannel]`).
        system: a system prompt, shown before the messages and never stored.
        retriever: looks up facts for the last human message. They are shown in the leading system message,
            and neither stored nor written into memory.
        format_facts: formats the facts; by default "Facts:" and a line "text [1]" for each.
        name: name of the node.

    Raises:
        ConfigError: `llm` is a chain that does not pass the memory on, or does not return a message; or no runnable.
        TurnError: `llm` is another chat model.
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
        _require_memory_model(llm)
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
            ConfigError: the graph's state has no key for the memory.
            TurnError: the model did not use the memory, or returned no message.
        """
        history, turn = self._messages(input), self._turn(input, config)
        documents = self.retriever.invoke(question(history), config) if self.retriever else []
        reply = self.llm.invoke(self._shown(history, documents), config, memory=turn, **kwargs)
        return self._update(reply, turn, documents)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """As `invoke`, without blocking the event loop."""
        history, turn = self._messages(input), self._turn(input, config)
        documents = await self.retriever.ainvoke(question(history), config) if self.retriever else []
        reply = await self.llm.ainvoke(self._shown(history, documents), config, memory=turn, **kwargs)
        return self._update(reply, turn, documents)

    def _messages(self, state: Any) -> list[BaseMessage]:
        messages = _read(state, self.messages_key)
        if not messages:
            raise TranscriptError(
                f"the graph state holds no messages at {self.messages_key!r}; a model answers at least one"
            )
        return list(messages)

    def _turn(self, state: Any, config: RunnableConfig | None) -> MemoryTurn:
        memory = _read(state, self.memory_key)
        channels = _channels(config)
        has_key = self.memory_key in state if isinstance(state, Mapping) else hasattr(state, self.memory_key)
        if not has_key and channels is not None and self.memory_key not in channels:
            raise ConfigError(
                f"the graph's state has no key {self.memory_key!r}, so every turn would start from an empty memory; "
                f"found {', '.join(sorted(channels))}; add `{self.memory_key}: Annotated[MemoryState, MemoryChannel]` "
                "to the state, or take agentmem_langgraph.MemoryMessagesState"
            )
        return MemoryTurn(memory)

    def _shown(self, history: list[BaseMessage], documents: Sequence[Document]) -> list[BaseMessage]:
        return with_leading_text(history, self.system, self.format_facts(documents) if documents else "")

    def _update(self, reply: Any, turn: MemoryTurn, documents: Sequence[Document]) -> dict[str, Any]:
        if not isinstance(reply, BaseMessage):
            raise TurnError(
                f"a node adds a message to its state; its model gave {type(reply).__name__}; give MemoryNode the "
                "ChatDeltaMem itself, and take its reply apart in a node of its own"
            )
        if documents and isinstance(reply, AIMessage):
            reply.response_metadata["facts"] = facts_metadata(documents)
        return {self.messages_key: [reply], **memory_update(turn, self.memory_key)}


def memory_update(turn: MemoryTurn, key: str) -> dict[str, Any]:
    """The state update with a turn's new memory; empty if the model has no memory and none was passed in.

    Raises:
        TurnError: the model did not use the `MemoryTurn`.
    """
    turn.require_used()
    return {} if turn.state is None else {key: turn.state.to_dict()}


def _read(state: Any, key: str) -> Any:
    return state.get(key) if isinstance(state, Mapping) else getattr(state, key, None)


def _require_memory_model(llm: Any) -> None:
    """Refuse models that are known to lose the memory or the message.

    Raises:
        ConfigError, TurnError: says what to write instead.
    """
    if not isinstance(llm, Runnable):
        raise ConfigError(f"MemoryNode takes a ChatDeltaMem; found {llm!r}; write MemoryNode(ChatDeltaMem(model=...))")
    first = last = _unwrapped(llm)
    rest: list[Any] = []
    while isinstance(first, RunnableSequence):
        rest += first.steps[1:]
        first = _unwrapped(first.steps[0])
    while isinstance(last, RunnableSequence):
        last = _unwrapped(last.steps[-1])
    # A chain hands the memory to its first step alone.
    if isinstance(first, BasePromptTemplate) or (not isinstance(first, ChatDeltaMem) and any(map(_is_model, rest))):
        what = "a prompt" if isinstance(first, BasePromptTemplate) else type(first).__name__
        raise ConfigError(
            f"MemoryNode takes a ChatDeltaMem; found a chain that begins with {what}, which does not pass the memory "
            "on; write MemoryNode(llm, system='...'), or change the messages in a node before it"
        )
    if isinstance(first, BaseLanguageModel) and not isinstance(first, ChatDeltaMem):
        raise TurnError(
            f"MemoryNode takes a ChatDeltaMem, with or without tools and options bound; found {type(first).__name__}, "
            "which has no memory"
        )
    # With `include_raw` the model is a part of a RunnableParallel, which makes a dict of its reply.
    made = next((step for step in (last, first) if isinstance(step, BaseOutputParser | RunnableParallel)), None)
    if made is not None:
        raise ConfigError(
            f"MemoryNode adds the reply to the state's messages; found a chain with {type(made).__name__}, which "
            "makes something else of it (with_structured_output does, too); write MemoryNode(llm) and parse the "
            "reply in a node behind it"
        )


def _unwrapped(step: Any) -> Any:
    """A step without what is bound to it, its retries and its fallbacks."""
    while isinstance(step, RunnableBindingBase | RunnableWithFallbacks):
        step = step.bound if isinstance(step, RunnableBindingBase) else step.runnable
    return step


def _is_model(step: Any) -> bool:
    return isinstance(_unwrapped(step), ChatDeltaMem)


def _channels(config: RunnableConfig | None) -> Sequence[str] | None:
    """The keys of the state of the graph that runs a node; None if they cannot be determined.

    LangGraph has no public API for this: the channels are inside the function that it gives nodes for reading the
    state.
    """
    read = (config or {}).get("configurable", {}).get("__pregel_read")
    channels = next((part for part in getattr(read, "args", ()) if isinstance(part, Mapping)), None)
    return None if channels is None else list(channels)
