"""The agent: `create_agent` with three pieces of middleware, on a model whose memory is part of the thread.

- `Shelf` shows the model the tools that a request is about, so that a prompt is short and a small model not confused.
- `MemoryMiddleware` keeps the memory in the agent's state, and so in its checkpoints.
- `HumanInTheLoopMiddleware` interrupts before a tool changes a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, HumanInTheLoopMiddleware
from langchain.agents.middleware.types import ModelRequest, ModelResponse
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.tools import BaseTool
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph.state import CompiledStateGraph

from agentmem import Window
from agentmem_langgraph import ChatDeltaMem, MemoryMiddleware
from coding_assistant.phrases import NANO_SYSTEM, SYSTEM
from coding_assistant.tools import CHANGING

Agent = CompiledStateGraph[Any, Any, Any, Any]


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


def system_prompt(model: str) -> str:
    """What the model is told about itself."""
    return NANO_SYSTEM if model == "nano" else SYSTEM


def build_agent(
    llm: ChatDeltaMem, tools: Sequence[BaseTool], saver: BaseCheckpointSaver[str] | None, *, model: str
) -> Agent:
    """The agent; `saver` keeps its threads."""
    approval = HumanInTheLoopMiddleware(
        {name: {"allowed_decisions": ["approve", "reject"]} for name in CHANGING},
        description_prefix="The assistant wants to change files",
    )
    shelf = Shelf(only_named=model == "nano")
    return create_agent(
        llm,
        tools,
        system_prompt=system_prompt(model),
        middleware=[shelf, MemoryMiddleware(), approval],
        checkpointer=saver,
    )


class Shelf(AgentMiddleware[Any, Any, Any]):
    """Chooses the tools that the model is shown, and binds calls to fit their schemas.

    Args:
        only_named: show those tools alone whose names' words the request has ("Run the tests.": run_tests). Otherwise
            all are shown: a model of some billions of parameters chooses by itself.
    """

    def __init__(self, *, only_named: bool) -> None:
        super().__init__()
        self.only_named = only_named

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model with the chosen tools."""
        tools = [tool for tool in request.tools if isinstance(tool, BaseTool)]
        chosen = self.chosen(request.messages, tools)
        settings = {**request.model_settings, **({"strict": True} if chosen else {})}
        return handler(request.override(tools=list(chosen), model_settings=settings))

    def chosen(self, messages: Sequence[AnyMessage], tools: Sequence[BaseTool]) -> Sequence[BaseTool]:
        """The tools for the last thing that the human said."""
        if not self.only_named:
            return tools
        said = next((message.text for message in reversed(messages) if isinstance(message, HumanMessage)), "")
        words = set(re.findall(r"[a-z]+", said.lower()))
        return [tool for tool in tools if words.issuperset(tool.name.split("_"))]
