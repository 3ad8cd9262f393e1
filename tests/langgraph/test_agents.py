"""Agents of `create_agent` with memory, and what people put beside it: approvals, summaries, structured answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware, PIIMiddleware, SummarizationMiddleware
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from pydantic import BaseModel

from agentmem import Delta, Engine, MemoryState, Message, Sampling, Window
from agentmem_langgraph import ChatDeltaMem, MemoryMiddleware, MemoryWarning
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.numeric import assert_states_close

THREAD: RunnableConfig = {"configurable": {"thread_id": "1"}}
TELL = "My favorite color is teal."
ASK = "What is my favorite color?"
KNOWN = "Your favorite color is teal."
CALL = "Call get_port with city berlin."


@tool
def get_port(city: str) -> str:
    """The port of a city."""
    return "4711"


class Color(BaseModel):
    """The color that was asked for."""

    name: str


def agent(engine: Any, *middleware: Any, tools: Any = (), last: int = 1, **options: Any) -> Any:
    llm = ChatDeltaMem(engine=engine, window=Window(messages=last), max_tokens=60)
    stack = [MemoryMiddleware(), *middleware]
    return create_agent(llm, list(tools), middleware=stack, checkpointer=InMemorySaver(), **options)


def say(made: Any, text: str) -> Any:
    return made.invoke({"messages": [HumanMessage(text)]}, THREAD)


def test_a_redacted_reply_is_written_as_it_was_redacted_and_only_so(nano_engine: Engine) -> None:
    """The recipe of docs/langgraph.md. What is compared are memories: what was written is all that they hold."""
    told, asked = HumanMessage(TELL), HumanMessage(ASK)

    def memories(write: Any, redacts: bool) -> list[MemoryState]:
        llm = ChatDeltaMem(engine=nano_engine, max_tokens=20, write=write, window=Window(messages=1))
        redact = PIIMiddleware("all", detector=r"[^\n]+", apply_to_input=False, apply_to_output=True)
        stack = [MemoryMiddleware(), *([redact] if redacts else [])]
        made = create_agent(llm, [], middleware=stack, checkpointer=InMemorySaver())
        states = []
        for message in (told, asked):
            replies.append(say(made, message.text)["messages"][-1])
            states.append(made.get_state(THREAD).values["memory"])
        return states

    replies: list[Any] = []
    first, second = memories("input", redacts=True)
    assert [reply.text for reply in replies] == ["[REDACTED_ALL]", "[REDACTED_ALL]"]
    expected = nano_engine.remember([Message("user", TELL)]).state
    assert_states_close(first, expected)
    shown = [Message("user", TELL), Message("assistant", "[REDACTED_ALL]"), Message("user", ASK)]
    direct = nano_engine.turn(shown, first, write="input", window=Window(messages=1), sampling=Sampling(max_tokens=20))
    assert_states_close(second, direct.state)
    assert abs(second.matrices - first.matrices).max() > 0.01
    # Not redacted: recorded and never written.
    plain = memories("input", redacts=False)
    assert_states_close(plain[0], expected)
    # Without the recipe the memory has read what was redacted, and says so.
    nano_engine.message_cache.clear()
    with pytest.warns(MemoryWarning, match=r"write='input'"):
        spoken = memories("all", redacts=True)
    assert abs(spoken[0].matrices - expected.matrices).max() > 0.01


@pytest.mark.parametrize("decision", ["approve", "edit", "reject"])
def test_a_human_decides_about_a_call(fake: FakeEngine, decision: str) -> None:
    made = agent(fake, HumanInTheLoopMiddleware(interrupt_on={"get_port": True}), tools=[get_port])
    say(made, TELL)
    asked = say(made, CALL)
    (interrupt,) = asked["__interrupt__"]
    assert interrupt.value["action_requests"][0]["args"] == {"city": "berlin"}
    before = made.get_state(THREAD).values["memory"]
    answer: dict[str, Any] = {"type": decision}
    if decision == "edit":
        answer["edited_action"] = {"name": "get_port", "args": {"city": "oslo"}}
    out = made.invoke(Command(resume={"decisions": [answer]}), THREAD)
    assert out["messages"][-1].text.startswith("The result is")
    after = made.get_state(THREAD).values["memory"]
    assert after.count > before.count
    assert say(made, ASK)["messages"][-1].text == KNOWN, "what was told is still known"


def test_a_summary_takes_the_place_of_old_messages(fake: FakeEngine) -> None:
    """The memory has consumed what the summary leaves out."""
    summary = SummarizationMiddleware(ChatDeltaMem(engine=fake), trigger=("messages", 6), keep=("messages", 2))
    made = agent(fake, summary)
    say(made, TELL)
    for _ in range(4):
        out = say(made, "How are you?")
    assert len(out["messages"]) < 8
    assert not any(TELL in message.text for message in out["messages"])
    assert say(made, ASK)["messages"][-1].text == KNOWN


@pytest.mark.parametrize(
    "strategy", [Color, ToolStrategy(Color), ProviderStrategy(Color)], ids=["auto", "tool", "provider"]
)
def test_every_strategy_of_structured_answers(nano_engine: Engine, strategy: Any) -> None:
    made = agent(nano_engine, last=3, response_format=strategy)
    out = say(made, ASK)
    assert isinstance(out["structured_response"], Color)
    assert made.get_state(THREAD).values["memory"].count >= 2


def test_a_provider_is_shown_the_schema(fake: FakeEngine) -> None:
    fake.scripted.append([Delta('{"name": "teal"}')])
    out = say(agent(fake, response_format=Color, system_prompt="Be brief."), ASK)
    assert out["structured_response"] == Color(name="teal")
    system = fake.calls[-1]["messages"][0].content
    assert system.startswith("Be brief.")
    assert json.dumps(Color.model_json_schema()["properties"]["name"])[1:-1] in system
    assert fake.calls[-1]["form"].schema["required"] == ["name"]


def test_every_stream_shows_the_same_reply_and_no_matrix(nano_engine: Engine) -> None:
    made = agent(nano_engine)
    tokens = [
        piece.text
        for piece, _ in made.stream({"messages": [HumanMessage("Hello!")]}, THREAD, stream_mode="messages")
        if isinstance(piece, AIMessageChunk)
    ]
    said = made.get_state(THREAD).values["messages"][-1]
    assert "".join(tokens) == said.text
    assert len(tokens) > 2
    for part in (said.model_dump_json(), *tokens):
        assert "matrices" not in part
    updates = list(made.stream({"messages": [HumanMessage("Hello again!")]}, THREAD, stream_mode="updates"))
    assert any("messages" in update for part in updates for update in part.values() if update)
    values = list(made.stream({"messages": [HumanMessage("And again!")]}, THREAD, stream_mode="values"))
    assert values[-1]["messages"][-1].type == "ai"


def test_a_batch_meets_in_the_engine(nano_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = type(nano_engine.model).forward

    def forward(own: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        rows.append(input_ids.shape[0])
        return real(own, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(nano_engine.model), "forward", forward)
    llm = ChatDeltaMem(engine=nano_engine, temperature=30.0, seed=1, max_tokens=40)
    replies = llm.batch([f"Hello, number {n}!" for n in range(6)], {"max_concurrency": 6})
    assert len(replies) == 6
    assert max(rows) > 2
