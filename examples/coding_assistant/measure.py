"""How often the remembered value is the tool's argument: fresh values, told anew, with the memory on and off.

Each draw is a developer of its own who tells what `phrases.session_one` says. After it the three requests are made,
each from the memory at the end of session one, with the prompt showing the request alone.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.tools import BaseTool

from agentmem import MemoryState
from agentmem.training.intervals import share
from agentmem_langgraph import ChatDeltaMem, MemoryTurn
from coding_assistant import phrases
from coding_assistant.agent import Shelf, chat_model, system_prompt
from coding_assistant.tools import Tools
from coding_assistant.workspace import Workspace


def measure(model: str, adapter: str | None, draws: int, seed: int = 0) -> str:
    """The table: for each request the share of right calls, with 95 % intervals over the draws."""
    right: dict[tuple[str, bool], list[tuple[int, int]]] = {}
    llm = chat_model(model, adapter)
    with TemporaryDirectory() as folder:
        tools = Tools(Workspace(Path(folder))).all()
        for i in range(draws):
            settings = phrases.Settings.draw(Random(f"{seed} {i}"))
            memory = _memory_of(llm, settings)
            for request in phrases.remembering(settings):
                for on in (True, False):
                    called = _called(llm, model, tools, request.text, memory if on else None)
                    correct = called == (request.tool, request.arguments)
                    right.setdefault((request.text, on), []).append((int(correct), 1))
    llm.close()
    lines = [f"{'':<24}{'memory':<26}no memory"]
    for text in dict.fromkeys(text for text, _ in right):
        lines.append(f"{text:<24}{_spelled(right[text, True]):<26}{_spelled(right[text, False])}")
    return "\n".join([*lines, f"{draws} draws of the values, 95 % intervals"])


def _memory_of(llm: ChatDeltaMem, settings: phrases.Settings) -> MemoryState | None:
    """The memory after session one."""
    messages: list[Any] = []
    memory: MemoryState | None = None
    for text in phrases.session_one(settings):
        messages.append(HumanMessage(text))
        turn = MemoryTurn(memory)
        messages.append(llm.invoke(messages, memory=turn))
        memory = turn.state
    return memory


def _called(
    llm: ChatDeltaMem, model: str, tools: list[BaseTool], text: str, memory: MemoryState | None
) -> tuple[str, dict[str, Any]] | None:
    said = HumanMessage(text)
    chosen = Shelf(only_named=model == "nano").chosen([said], tools)
    asked = llm.bind_tools(list(chosen), strict=True)
    reply = asked.invoke([SystemMessage(system_prompt(model)), said], memory=MemoryTurn(memory))
    assert isinstance(reply, AIMessage)
    return (reply.tool_calls[0]["name"], reply.tool_calls[0]["args"]) if reply.tool_calls else None


def _spelled(counts: list[tuple[int, int]]) -> str:
    found = share(counts)
    return f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})"
