"""agentmem_langgraph: LangGraph agents on a local model that carries their working memory.

The graph state is the only place where a memory is kept. A chat model takes the memory from a `MemoryTurn` and puts the
new one there; `MemoryChannel` stores it in the graph as plain data and merges parallel branches; `MemoryNode` and
`MemoryMiddleware` do both for you. The names below load on first use; torch is imported when a model loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.lazy import lazy_names

_HOMES = {
    "ChatDeltaMem": "agentmem_langgraph.chat_model",
    "MemoryChannel": "agentmem_langgraph.channel",
    "MemoryMessagesState": "agentmem_langgraph.channel",
    "MemoryMiddleware": "agentmem_langgraph.middleware",
    "MemoryNode": "agentmem_langgraph.node",
    "MemoryTurn": "agentmem_langgraph.memory_turn",
    "MemoryWarning": "agentmem.errors",
    "merge_states": "agentmem_langgraph.merge",
    "numbered_facts": "agentmem_langgraph.prompting",
    "redact_traces": "agentmem_langgraph.tracing",
    "with_context": "agentmem_langgraph.prompting",
    "without_matrices": "agentmem_langgraph.tracing",
}
_NEEDS = {
    "langchain": ("langchain", "langgraph"),
    "langchain_core": ("langchain-core", "langgraph"),
    "langgraph": ("langgraph", "langgraph"),
}

__all__ = [
    "ChatDeltaMem",
    "MemoryChannel",
    "MemoryMessagesState",
    "MemoryMiddleware",
    "MemoryNode",
    "MemoryTurn",
    "MemoryWarning",
    "merge_states",
    "numbered_facts",
    "redact_traces",
    "with_context",
    "without_matrices",
]

if TYPE_CHECKING:
    from agentmem.errors import MemoryWarning
    from agentmem_langgraph.channel import MemoryChannel, MemoryMessagesState
    from agentmem_langgraph.chat_model import ChatDeltaMem
    from agentmem_langgraph.memory_turn import MemoryTurn
    from agentmem_langgraph.merge import merge_states
    from agentmem_langgraph.middleware import MemoryMiddleware
    from agentmem_langgraph.node import MemoryNode
    from agentmem_langgraph.prompting import numbered_facts, with_context
    from agentmem_langgraph.tracing import redact_traces, without_matrices

__getattr__, __dir__ = lazy_names(__name__, _HOMES, _NEEDS)
