"""One session of the developer, in a process of its own: told things, or asked to work.

    python -m coding_assistant.session tell|work SETUP          SETUP: a `Setup` as JSON

Nothing goes from one to the other but the database in `Setup.data`. `work` leaves its outcome in `outcome.json`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AnyMessage,
    BaseMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, ToolException
from langgraph.graph import END
from langgraph.graph.message import REMOVE_ALL_MESSAGES
from langgraph.types import Command

from agentmem_langgraph import ChatDeltaMem
from agentmem_sql import SQLAlchemySaver
from coding_assistant import phrases
from coding_assistant.agent import Agent, Shelf, build_agent, chat_model, system_prompt
from coding_assistant.tools import Tools
from coding_assistant.workspace import REPOSITORY, Workspace

THREAD = "developer"


@dataclass(frozen=True)
class Setup:
    """What both sessions are given.

    Attributes:
        data: a folder, for the database and a copy of the repository.
        memory: False: the same, with the model's memory off.
        yes: changes are approved without asking.
    """

    data: str
    model: str = "nano"
    adapter: str | None = None
    memory: bool = True
    yes: bool = False


@dataclass
class Outcome:
    """How a session went: each request with whether its call was right, and tokens of all its prompts."""

    right: dict[str, bool] = field(default_factory=dict)
    proposed: str = ""
    tests: str = ""
    renamed: bool = False
    prompt_tokens: int = 0
    replayed_tokens: int = 0


@dataclass(frozen=True)
class Bench:
    """The open agent and what it stands on."""

    agent: Agent
    llm: ChatDeltaMem
    tools: Tools
    listed: list[BaseTool]
    setup: Setup

    @property
    def thread(self) -> RunnableConfig:
        """The thread of this run."""
        return RunnableConfig(configurable={"thread_id": THREAD})


@contextmanager
def opened(setup: Setup) -> Iterator[Bench]:
    """Model, database and a fresh copy of the repository."""
    data = Path(setup.data)
    workspace = Workspace.copy_of(REPOSITORY, data / "repository")
    tools = Tools(workspace, detail=0 if setup.model == "nano" else 1_500)
    llm = chat_model(setup.model, setup.adapter, use_memory=setup.memory)
    with SQLAlchemySaver.from_url(f"sqlite:///{data / 'threads.db'}") as saver:
        listed = tools.all()
        agent = build_agent(llm, listed, saver, model=setup.model)
        try:
            yield Bench(agent, llm, tools, listed, setup)
        finally:
            llm.close()


def tell(setup: Setup) -> None:
    """Session one."""
    with opened(setup) as bench:
        for text in phrases.session_one(phrases.Settings()):
            _say(bench, [HumanMessage(text)], bench.thread)


def work(setup: Setup) -> Outcome:
    """Session two: the conversation so far is cleared, the memory stays, and the developer asks for work.

    Each request is a branch of the thread from where session one ended: what it calls and what comes back leaves no
    trace in the memory of the next one, and does not crowd out what was told.
    """
    settings, outcome = phrases.Settings(), Outcome()
    run, fix, rename = phrases.remembering(settings)
    with opened(setup) as bench:
        head = bench.agent.get_state(bench.thread)
        before: list[AnyMessage] = head.values["messages"]
        print(f"  process {os.getpid()}: {len(before)} messages of session one cleared from the conversation")

        def ask(name: str, request: phrases.Request) -> str:
            said = _say(bench, [RemoveMessage(id=REMOVE_ALL_MESSAGES), HumanMessage(request.text)], head.config)
            _count(bench, before, said, outcome)
            call = _call(said)
            outcome.right[name] = call is not None and call == (request.tool, request.arguments)
            return next((m.text for m in reversed(said) if isinstance(m, ToolMessage)), "")

        ask("run the tests", run)
        outcome.proposed = ask("prepare a fix", fix).rstrip(".").rpartition(" is ")[2]
        if outcome.proposed:
            ask("apply it", phrases.apply(outcome.proposed))
        ask("run the tests again", run)
        ask("format the names", rename)
        outcome.tests = ask("run the tests at the end", run)
        # The thread goes on from where it was, should the developer tell more.
        bench.agent.update_state(head.config, None, as_node=END)
        outcome.renamed = "def line_total(" in bench.tools.workspace.read("prices.py")
    return outcome


def _say(bench: Bench, said: Sequence[BaseMessage], base: RunnableConfig) -> list[AnyMessage]:
    """One request from a checkpoint on, with the human's decisions about changes; the conversation after it."""
    print(f"  developer: {said[-1].text}")
    given: Any = {"messages": said}
    while True:
        bench.agent.invoke(given, base)
        # What interrupted goes on from the newest checkpoint.
        base = bench.thread
        state = bench.agent.get_state(bench.thread)
        if not state.interrupts:
            break
        actions = state.interrupts[0].value["action_requests"]
        given = Command(resume={"decisions": [_decide(bench, action) for action in actions]})
    messages: list[AnyMessage] = state.values["messages"]
    start = max(i for i, message in enumerate(messages) if isinstance(message, HumanMessage))
    for message in messages[start + 1 :]:
        _show(message)
    return messages


def _decide(bench: Bench, action: dict[str, Any]) -> dict[str, str]:
    """Ask the human about a change."""
    plan = bench.tools.planned(action["name"], action["args"])
    if isinstance(plan, ToolException):
        # Nothing to decide: the tool would refuse, and says why.
        return {"type": "reject", "message": str(plan)}
    print(f"  -- wants {action['name']}({_spelled(action['args'])}):")
    print(indent(plan, "     "), end="")
    if bench.setup.yes:
        print("  -- approved (--yes)")
        return {"type": "approve"}
    print("  -- apply it? [y/N] ", end="", flush=True)
    agreed = sys.stdin.readline().strip().lower() in ("y", "yes")
    return {"type": "approve"} if agreed else {"type": "reject", "message": "The developer does not want this change."}


def _show(message: AnyMessage) -> None:
    if isinstance(message, AIMessage) and message.tool_calls:
        calls = ", ".join(f"{call['name']}({_spelled(call['args'])})" for call in message.tool_calls)
        print(f"  assistant calls {calls}")
    else:
        who = "  result" if isinstance(message, ToolMessage) else "assistant"
        print(f"  {who}: {message.text}")


def _spelled(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _call(messages: list[AnyMessage]) -> tuple[str, dict[str, Any]] | None:
    """The first call since the human spoke last."""
    start = max(i for i, message in enumerate(messages) if isinstance(message, HumanMessage))
    calls = [call for m in messages[start:] if isinstance(m, AIMessage) for call in m.tool_calls]
    return (calls[0]["name"], calls[0]["args"]) if calls else None


def _count(bench: Bench, before: list[AnyMessage], messages: list[AnyMessage], outcome: Outcome) -> None:
    """Add the tokens of the prompts since the human spoke last, and those of prompts with the whole conversation."""
    start = max(i for i, message in enumerate(messages) if isinstance(message, HumanMessage))
    system = SystemMessage(system_prompt(bench.setup.model))
    tools = Shelf(only_named=bench.setup.model == "nano").chosen(messages, bench.listed)
    for i, message in enumerate(messages[start:], start):
        if isinstance(message, AIMessage):
            usage = message.usage_metadata
            assert usage is not None
            outcome.prompt_tokens += usage["input_tokens"]
            whole = [system, *before, *messages[:i]]
            outcome.replayed_tokens += bench.llm.get_num_tokens_from_messages(whole, list(tools))


def main() -> None:
    """See the module."""
    phase, setup = sys.argv[1], Setup(**json.loads(sys.argv[2]))
    if phase == "tell":
        tell(setup)
    else:
        (Path(setup.data) / "outcome.json").write_text(json.dumps(asdict(work(setup))))


if __name__ == "__main__":
    main()
