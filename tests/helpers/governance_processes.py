"""Threads with a memory that needs no model, and a process that forgets from them until it is killed
(`tests.helpers.processes`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from sqlalchemy import Engine, event

from agentmem.messages import Message, MessageCache
from agentmem.state import MemoryState
from agentmem_chroma import FactStore
from agentmem_governance import Governor, Receipt
from agentmem_langgraph.messages import to_engine
from agentmem_sql import SQLAlchemySaver
from tests.helpers.fact_processes import Hashed
from tests.helpers.processes import Say
from tests.helpers.sql_cases import config, get, put, read

THREAD = "ada/1"
SECRET = "kestrel"


@dataclass
class Written:
    """What `Memory.remember` gives."""

    state: MemoryState


class Memory:
    """An engine whose memory counts the letters that it was told, as far as governance asks for one."""

    has_memory = True

    def __init__(self) -> None:
        self.message_cache = MessageCache()

    def zero_state(self) -> MemoryState:
        return MemoryState.zeros([1, 1, 8, 8], "model", "adapter")

    def remember(self, messages: Sequence[Message], state: MemoryState | None = None) -> Written:
        before = state or self.zero_state()
        plan = before.record.align(list(messages))
        matrices = before.matrices.copy()
        for place in plan.new:
            for letter in messages[place].content:
                matrices.flat[ord(letter) % 64] += 1
        return Written(before.replaced(matrices=matrices, record=plan.record))

    def forget_prefills(self) -> None:
        """Nothing is cached."""


def say(saver: SQLAlchemySaver, text: str, thread: str = THREAD) -> None:
    """One turn, in the checkpoints that LangGraph makes of one: the input, the message, the reply."""
    at, said, state = config(thread), list[BaseMessage](), None
    if (newest := saver.get_tuple(at)) is not None:
        at, values = newest.config, newest.checkpoint["channel_values"]
        said = values["messages"]
        state = MemoryState.from_dict(values["memory"]) if "memory" in values else None
    memory = {} if state is None else {"memory": state.to_dict()}
    at = put(saver, at, {"__start__": {"messages": [("user", text)]}, "messages": said, **memory}, source="input")
    name = str(uuid5(NAMESPACE_URL, f"{thread} {text}"))
    question = HumanMessage(text, id=name)
    saver.put_writes(at, [("messages", [question])], "input")
    said = [*said, question]
    at = put(saver, at, {"messages": said, **memory})
    said = [*said, AIMessage("OK.", id=f"reply-{name}")]
    written = Memory().remember(to_engine(said), state).state.to_dict()
    saver.put_writes(at, [("messages", said[-1:]), ("memory", written)], "node")
    put(saver, at, {"messages": said, "memory": written})


def told(saver: SQLAlchemySaver, thread: str = THREAD) -> list[str]:
    """What was said in a thread, whose memory is that of a thread in which nothing else was."""
    values = read(saver, config(thread))
    state = Memory().remember(to_engine(values["messages"])).state
    assert MemoryState.from_dict(values["memory"]) == state
    return [str(message.content) for message in values["messages"] if message.type == "human"]


def message_of(saver: SQLAlchemySaver) -> str:
    """The id of the message that holds the secret, or ""."""
    at = config(THREAD)
    messages = get(saver, at).checkpoint["channel_values"]["messages"] if saver.get_tuple(at) else []
    return next((str(message.id) for message in messages if SECRET in message.content), "")


def forget(governor: Governor, what: str) -> Receipt:
    """Forget the subject, or the message with the secret; "rewritten": in checkpoints that stay."""
    if what == "subject":
        return governor.forget("ada")
    message = message_of(governor.saver)
    return governor.forget(thread=THREAD, message=message, keep_checkpoints=what == "rewritten")


def forget_and_die(_: Say, url: str, directory: str, what: str, die_at: int, step: str) -> None:
    """Forget; with SIGKILL before the statement, or commit, of that number, or at a step of the fact store."""
    numbers = count(1)

    def die(*_: object) -> None:
        if next(numbers) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with ExitStack() as stack:
        saver = stack.enter_context(SQLAlchemySaver.from_url(url))
        facts = None
        if directory:
            facts = stack.enter_context(FactStore(directory, embeddings=Hashed(), rebuild=True))
            for name in ("delete", "rebuild_index"):
                setattr(facts, name, _dying(getattr(facts, name), name, step))
        engine: Any = Memory()
        governor = Governor(saver, facts=facts, engines=[engine])
        message_of(saver)  # read before the statements are counted
        event.listen(Engine, "before_cursor_execute", die)
        event.listen(Engine, "commit", die)
        forget(governor, what)


def _dying(method: Callable[..., Any], name: str, step: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if step == f"before {name}":
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*arguments)
        if step == f"after {name}":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call
