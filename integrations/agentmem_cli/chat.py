"""`agentmem chat`: the demo's agent on a prompt, with its threads in a SQLite file.

A turn either completes or has no effect: if a reply ends early (Ctrl-C, an error), the thread stays as it was. An error
is shown as one red line, and the prompt returns.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessageChunk, AnyMessage, HumanMessage
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import StateSnapshot
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentmem import Engine, MemoryState, Window
from agentmem.errors import ConfigError
from agentmem.text import printable
from agentmem_chroma import FactRetriever, cited
from agentmem_cli import graph
from agentmem_cli.options import Loading, parse_window, window_of
from agentmem_cli.terminal import error_line
from agentmem_langgraph import ChatDeltaMem, MemoryMessagesState

_PROMPT = "> "
_HELP = (
    ("/memory off", "answer with the base model, beside the thread, for comparison; nothing of it is kept"),
    ("/memory on", "back to the thread as it was"),
    ("/window", "what a prompt shows; /window 2m: the last two messages, /window 4096: the last tokens"),
    ("/stats", "what the memory holds, in numbers"),
    ("/reset", "delete the thread: messages, memory and history"),
    ("/help", "this list"),
    ("/quit", "leave, as does Ctrl-D; Ctrl-C ends a reply that is under way"),
)
_TRY = ("My favorite color is teal.", "What is my favorite color?")
_HISTORY_LINES = 1000


@dataclass(frozen=True)
class Settings:
    """How replies are made: the window as it was typed (None: the model's default), and options of `ChatDeltaMem`."""

    window: str | None = None
    system: str = ""
    max_tokens: int = 512
    temperature: float = 0.0


def chat(
    loading: Loading, name: str, db: str, facts: str | None, settings: Settings, question: str | None = None
) -> None:
    """Answer a single question, or chat until the input ends.

    Raises:
        ConfigError: the window cannot be parsed, or the single question is blank.
        AgentMemError: the single question failed; in a chat, errors are shown and the chat continues.
    """
    if settings.window is not None:
        parse_window(settings.window)  # a mistake is reported before the model is loaded
    if question is not None and not question.strip():
        raise ConfigError("a question has words; found a blank one; leave it out to talk")
    console = Console()
    with ExitStack() as stack:
        with Console(stderr=True).status("loading the model"):
            engine = stack.enter_context(loading.load())
        saver = stack.enter_context(graph.open_threads(db))
        retriever = graph.retriever_of(stack.enter_context(graph.open_facts(facts))) if facts is not None else None
        talk = Chat(engine, saver, name, console, settings, adapter=loading.adapter, retriever=retriever)
        if question is None:
            talk.run(read_lines(console))
        else:
            talk.answer(question)


def read_lines(console: Console) -> Iterator[str]:
    """The typed lines. Ctrl-C drops a line, Ctrl-D ends. On a terminal lines can be edited and are saved as history."""
    typed = sys.stdin.isatty()
    if typed:
        _keep_history()
    while True:
        try:
            yield input(_PROMPT if typed else "")
        except KeyboardInterrupt:
            console.print(Text("\n/quit or Ctrl-D leaves", style="dim"))
        except EOFError:
            return


def _keep_history() -> None:
    """Give `input` line editing and the history of earlier chats, and save this chat's lines at its end."""
    import atexit
    import readline

    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state) / "agentmem" / "chat_history"
    with suppress(OSError):  # no writable home directory: chat without a history
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)  # only the user may read what was typed
        readline.read_history_file(file)
    readline.set_history_length(_HISTORY_LINES)

    def save() -> None:
        with suppress(OSError):
            readline.write_history_file(file)
            file.chmod(0o600)

    atexit.register(save)


class Chat:
    """One thread on a prompt.

    Args:
        engine: a model, with memory or bare. The chat closes neither it nor the saver.
        saver: stores the thread.
        name: name of the thread.
        console: where everything is shown.
        settings: how replies are made.
        adapter: the adapter as the user named it; None: the model's own.
        retriever: finds facts to answer from, if any.
    """

    def __init__(
        self,
        engine: Engine,
        saver: BaseCheckpointSaver[str],
        name: str,
        console: Console,
        settings: Settings,
        *,
        adapter: str | None = None,
        retriever: FactRetriever | None = None,
    ) -> None:
        self._engine = engine
        self._saver = saver
        self._name = name
        self._console = console
        self._settings = settings
        self._adapter = adapter
        self._retriever = retriever
        self._compares = False  # whether the base model answers, outside of the thread
        self._use_window(window_of(settings.window, engine.name))
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/stats": self._stats,
            "/reset": self._reset,
            "/memory": self._memory,
            "/window": self._show_window,
        }

    def run(self, lines: Iterator[str]) -> None:
        """Read lines until they end or one is /quit."""
        self._greet()
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            if line:
                self._take(line)

    def answer(self, question: str) -> None:
        """Send one message in the thread and show only the reply.

        Raises:
            Exception: whatever ended the turn; the thread is unchanged.
        """
        self._say(question, details=False)

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

    def _say(self, text: str, *, details: bool = True) -> None:
        start = self._active.get_state(graph.thread(self._name))
        try:
            asyncio.run(self._reply(text, details))
        except BaseException as error:
            self._put_back(start)
            if not details or not isinstance(error, KeyboardInterrupt):
                raise
            self._show("\ncancelled; the thread is as it was", "yellow")

    async def _reply(self, text: str, details: bool) -> None:
        shown, reply = graph.ShownFacts(), AIMessageChunk(content="")
        given: MemoryMessagesState = {"messages": [HumanMessage(text)]}
        config = graph.thread(self._name, shown)
        async for chunk, _ in self._active.astream(given, config, stream_mode="messages"):
            if isinstance(chunk, AIMessageChunk):
                thought = printable(str(chunk.additional_kwargs.get("reasoning_content", ""))) if details else ""
                piece = Text.assemble((thought, "dim"), (printable(chunk.text), "cyan"))
                self._console.print(piece, end="", soft_wrap=True)
                reply += chunk
        self._console.print()
        if details:
            self._console.print(_footer(reply), soft_wrap=True)
        for document in cited(reply, shown.documents):
            number = shown.documents.index(document) + 1
            self._show(f"[{number}] {document.page_content} ({document.metadata['source']})", "dim")

    def _put_back(self, start: StateSnapshot) -> None:
        if start.config["configurable"].get("checkpoint_id"):
            graph.set_head(self._active, start)
        else:
            self._active_saver.delete_thread(self._name)

    # ------------------------------------------------------------------ commands

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for command, meaning in _HELP:
            table.add_row(Text(command, style="bold"), meaning)
        self._console.print(table)

    def _stats(self, _: str) -> None:
        memory = self._thread()[1]
        if memory is None:
            self._show("the memory is empty" if self._engine.has_memory else "this model has no memory", "dim")
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

    def _memory(self, argument: str) -> None:
        if not self._engine.has_memory:
            raise ConfigError("this model has no memory to switch; start again with --adapter")
        if argument == "off":
            messages, _ = self._thread()
            self._compare()
            self._active.update_state(graph.thread(self._name), {"messages": messages}, as_node=graph.NODE)
            self._show("memory off: the base model answers, and nothing of it is kept", "yellow")
        elif argument == "on":
            self._use_memory()
            self._show("memory on: back to the thread as it was", "dim")
        elif argument == "":
            self._show(f"memory is {'off' if self._compares else 'on'}", "dim")
        else:
            raise ConfigError(f"/memory takes on or off; found {argument!r}")

    def _show_window(self, argument: str) -> None:
        if argument:
            messages = self._active.get_state(graph.thread(self._name)).values.get("messages", [])
            self._use_window(parse_window(argument))
            if self._compares:
                self._compare()
                self._active.update_state(graph.thread(self._name), {"messages": messages}, as_node=graph.NODE)
        self._show(f"a prompt shows the last {self._window_words()}", "dim")

    # ------------------------------------------------------------------ the thread

    def _use_window(self, window: Window) -> None:
        self._window = window
        self._agent = self._build(self._saver, use_memory=self._engine.has_memory)
        if not self._compares:
            self._use_memory()

    def _use_memory(self) -> None:
        self._compares = False
        self._active, self._active_saver = self._agent, self._saver

    def _compare(self) -> None:
        """Let the base model answer. Its replies are not part of the thread, and are gone when memory is on again."""
        self._compares = True
        self._active_saver = InMemorySaver()
        self._active = self._build(self._active_saver, use_memory=False)

    def _build(self, saver: BaseCheckpointSaver[str], *, use_memory: bool) -> graph.Agent:
        llm = ChatDeltaMem(
            engine=self._engine,
            window=self._window,
            max_tokens=self._settings.max_tokens,
            temperature=self._settings.temperature,
            use_memory=use_memory,
        )
        return graph.build_agent(llm, saver, self._retriever, self._settings.system)

    def _thread(self) -> tuple[list[AnyMessage], MemoryState | None]:
        values: dict[str, Any] = self._agent.get_state(graph.thread(self._name)).values
        return values.get("messages", []), values.get("memory")

    def _greet(self) -> None:
        messages, _ = self._thread()
        model = self._engine.model
        adapter = (self._adapter or "the model's own") if self._engine.has_memory else "none, so no memory"
        keeps = "; the memory keeps the rest" if self._engine.has_memory else ""
        self._show(
            f"model {self._engine.name} ({str(model.dtype).removeprefix('torch.')} on {model.device}), "
            f"adapter {adapter}; thread {self._name!r} ({len(messages)} messages so far)\n"
            f"A prompt shows the last {self._window_words()}{keeps}. /help lists the commands.",
            "dim",
        )
        if not messages and self._engine.has_memory:
            self._show(f"Try: {_TRY[0]}\nthen: {_TRY[1]}", "dim")

    def _window_words(self) -> str:
        number, unit = (self._window.messages, "message") if self._window.messages else (self._window.tokens, "token")
        return unit if number == 1 else f"{number} {unit}s"

    def _show(self, text: str, style: str) -> None:
        self._console.print(Text(printable(text), style=style), soft_wrap=True)


def _footer(reply: AIMessageChunk) -> Text:
    memory: dict[str, Any] = reply.response_metadata.get("memory", {})
    usage = reply.usage_metadata
    parts = [f"prompt {usage['input_tokens']} tokens" if usage else "", f"{memory.get('written', 0)} written"]
    if reply.response_metadata.get("finish_reason") == "length":
        parts.append("cut at the longest reply")
    return Text(" · ".join(part for part in parts if part), style="dim")
