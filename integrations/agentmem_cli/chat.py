"""``agentmem chat``: the demo's agent at a prompt, its threads in a SQLite file.

A turn is finished or has not been: whatever ends a reply early (Ctrl-C, an error) leaves the thread as it was. An error
is one red line, and the prompt comes back.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessageChunk, AnyMessage, HumanMessage, RemoveMessage
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph.message import REMOVE_ALL_MESSAGES
from langgraph.types import Overwrite, StateSnapshot
from rich.console import Console
from rich.table import Table
from rich.text import Text

import agentmem
from agentmem import Engine, MemoryState, Window
from agentmem.errors import ConfigError
from agentmem_chroma import FactRetriever, cited
from agentmem_cli import saved
from agentmem_cli.app import error_line
from agentmem_cli.graph import (
    NODE,
    AgentState,
    ShownFacts,
    build_agent,
    open_facts,
    open_threads,
    retriever_of,
    set_head,
    thread,
)
from agentmem_langgraph import ChatDeltaMem

_PROMPT = "> "
_HELP = (
    ("/memory off", "answer with the base model, beside the thread, for comparison; nothing of it is kept"),
    ("/memory on", "back to the thread as it was"),
    ("/stats", "what the memory holds, in numbers"),
    ("/save DIR", "write messages and memory into a directory"),
    ("/load DIR", "replace the thread by what /save wrote there"),
    ("/reset", "delete the thread: messages, memory and history"),
    ("/help", "this list"),
    ("/quit", "leave, as does Ctrl-D; Ctrl-C ends a reply that is under way"),
)


def chat(model: str, adapter: str | None, name: str, db: Path, window: str, facts: Path | None) -> None:
    """Talk until the input ends.

    Raises:
        ConfigError: the window cannot be read.
    """
    shows = parse_window(window)
    console = Console()
    with ExitStack() as stack:
        with console.status("loading the model"):
            engine = stack.enter_context(agentmem.load(model, adapter))
        saver = stack.enter_context(open_threads(db))
        retriever = retriever_of(stack.enter_context(open_facts(facts))) if facts is not None else None
        Chat(engine, saver, name, console, window=shows, retriever=retriever).run(read_lines(console))


def parse_window(text: str) -> Window:
    """ "4096", "4096t" or "4096 tokens": the last tokens; "2m" or "2 messages": the last messages.

    Raises:
        ConfigError: it is neither.
    """
    found = re.fullmatch(r"(\d+)\s*(t|tokens?|m|messages?)?", text.strip())
    if found is None:
        raise ConfigError(f'a window is a number of tokens ("4096") or of messages ("2m"); found {text!r}')
    number = int(found[1])
    return Window(messages=number) if (found[2] or "").startswith("m") else Window(tokens=number)


def read_lines(console: Console) -> Iterator[str]:
    """What is typed, line by line, with a history on a terminal; Ctrl-C drops a line, Ctrl-D ends."""
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401 - importing it gives input() line editing and a history
    while True:
        try:
            yield input(_PROMPT if typed else "")
        except KeyboardInterrupt:
            console.print(Text("\n/quit or Ctrl-D leaves", style="dim"))
        except EOFError:
            return


class Chat:
    """One thread at a prompt.

    Args:
        engine: a model with memory; the chat does not close it, nor the saver.
        saver: keeps the thread.
        name: of the thread.
        console: where everything is shown.
        window: what a prompt shows of the thread.
        retriever: finds facts to answer from, if any.
    """

    def __init__(
        self,
        engine: Engine,
        saver: BaseCheckpointSaver[str],
        name: str,
        console: Console,
        *,
        window: Window,
        retriever: FactRetriever | None = None,
    ) -> None:
        self._engine = engine
        self._saver = saver
        self._name = name
        self._console = console
        self._agent = build_agent(ChatDeltaMem(engine=engine, window=window), saver, retriever)
        # What the base model says stands beside the thread, and goes when memory is switched on again.
        self._bare_llm = ChatDeltaMem(engine=engine, window=window, use_memory=False)
        self._retriever = retriever
        self._active, self._active_saver = self._agent, saver
        self._window = window
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/stats": self._stats,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/memory": self._memory,
        }

    def run(self, lines: Iterator[str]) -> None:
        """Take lines until they end or one says /quit."""
        self._greet()
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            if line:
                self._take(line)

    # ------------------------------------------------------------------ one line

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        try:
            if not line.startswith("/"):
                self._say(line)
            elif command in self._commands:
                self._commands[command](argument.strip())
            else:
                self._show(f"{command} is no command; /help lists them", "red")
        except Exception as error:  # noqa: BLE001 - the outermost prompt: whatever it is, the chat goes on
            self._console.print(error_line(error), soft_wrap=True)

    def _say(self, text: str) -> None:
        before = self._active.get_state(thread(self._name))
        try:
            asyncio.run(self._reply(text))
        except BaseException as error:
            self._put_back(before)
            if not isinstance(error, KeyboardInterrupt):
                raise
            self._show("\ncancelled; the thread is as it was", "yellow")

    async def _reply(self, text: str) -> None:
        shown, whole = ShownFacts(), AIMessageChunk(content="")
        given: AgentState = {"messages": [HumanMessage(text)]}
        config = thread(self._name, shown)
        async for chunk, _ in self._active.astream(given, config, stream_mode="messages"):
            if isinstance(chunk, AIMessageChunk):
                thought = str(chunk.additional_kwargs.get("reasoning_content", ""))
                self._console.print(Text.assemble((thought, "dim"), (chunk.text, "cyan")), end="", soft_wrap=True)
                whole += chunk
        self._console.print()
        self._console.print(_footer(whole), soft_wrap=True)
        for document in cited(whole, shown.documents):
            number = shown.documents.index(document) + 1
            self._show(f"[{number}] {document.page_content} ({document.metadata['source']})", "dim")

    def _put_back(self, before: StateSnapshot) -> None:
        if before.config["configurable"].get("checkpoint_id"):
            set_head(self._active, before)
        else:
            self._active_saver.delete_thread(self._name)

    # ------------------------------------------------------------------ commands

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for command, meaning in _HELP:
            table.add_row(Text(command, style="bold"), meaning)
        self._console.print(table)

    def _stats(self, _: str) -> None:
        memory = self._kept()[1]
        if memory is None:
            self._show("the memory is empty", "dim")
            return
        stats = memory.stats()
        self._show(
            f"{stats['consumed']} messages consumed, {stats['bytes']} bytes, norm {stats['norm']:.3f}, "
            f"digest {stats['digest'][:12]}",
            "bold",
        )
        table = Table("layer", "norm", "stable rank", "effective rank", "top share", box=None)
        for number, layer in enumerate(stats["layers"]):
            names = ("norm", "stable_rank", "effective_rank", "top_share")
            table.add_row(str(number), *(f"{layer[name]:.3f}" for name in names))
        self._console.print(table)

    def _reset(self, _: str) -> None:
        self._saver.delete_thread(self._name)
        self._use_memory()
        self._show(f"thread {self._name!r} is empty", "dim")

    def _save(self, argument: str) -> None:
        directory = _directory(argument, "/save")
        messages, memory = self._kept()
        if memory is None:
            raise ConfigError(f"thread {self._name!r} has no memory to save yet; say something first")
        saved.save(directory, messages, memory)
        self._show(f"saved {len(messages)} messages and the memory to {directory}", "dim")

    def _load(self, argument: str) -> None:
        messages, memory = saved.load(_directory(argument, "/load"))
        memory.require(
            self._engine.model_fingerprint, self._engine.adapter_fingerprint, self._engine.zero_state().shape
        )
        update = {
            "messages": [RemoveMessage(REMOVE_ALL_MESSAGES), *messages],
            "memory": Overwrite(memory.to_dict()),
        }
        self._agent.update_state(thread(self._name), update, as_node=NODE)
        self._use_memory()
        self._show(f"loaded {len(messages)} messages and their memory", "dim")

    def _memory(self, argument: str) -> None:
        if argument == "off":
            messages, _ = self._kept()
            self._active_saver = InMemorySaver()
            self._active = build_agent(self._bare_llm, self._active_saver, self._retriever)
            self._active.update_state(thread(self._name), {"messages": messages}, as_node=NODE)
            self._show("memory off: the base model answers, and nothing of it is kept", "yellow")
        elif argument == "on":
            self._use_memory()
            self._show("memory on: back to the thread as it was", "dim")
        elif argument == "":
            self._show(f"memory is {'on' if self._active is self._agent else 'off'}", "dim")
        else:
            raise ConfigError(f"/memory takes on or off; found {argument!r}")

    # ------------------------------------------------------------------ the thread

    def _use_memory(self) -> None:
        self._active, self._active_saver = self._agent, self._saver

    def _kept(self) -> tuple[list[AnyMessage], MemoryState | None]:
        values: dict[str, Any] = self._agent.get_state(thread(self._name)).values
        return values.get("messages", []), values.get("memory")

    def _greet(self) -> None:
        messages, _ = self._kept()
        number, unit = (self._window.messages or self._window.tokens), "message" if self._window.messages else "token"
        shown = unit if number == 1 else f"{number} {unit}s"
        self._show(
            f"{self._engine.name}, thread {self._name!r} ({len(messages)} messages so far). A prompt shows the last "
            f"{shown}; the memory keeps the rest. /help lists the commands.",
            "dim",
        )

    def _show(self, text: str, style: str) -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)


def _directory(argument: str, command: str) -> Path:
    if not argument:
        raise ConfigError(f"{command} takes a directory; found none; for example: {command} kept")
    return Path(argument).expanduser()


def _footer(reply: AIMessageChunk) -> Text:
    memory: dict[str, Any] = reply.response_metadata.get("memory", {})
    usage = reply.usage_metadata
    parts = [f"prompt {usage['input_tokens']} tokens" if usage else "", f"{memory.get('written', 0)} written"]
    if reply.response_metadata.get("finish_reason") == "length":
        parts.append("cut at the longest reply")
    return Text(" · ".join(part for part in parts if part), style="dim")
