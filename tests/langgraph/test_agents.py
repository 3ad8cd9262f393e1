"""Agents of `create_agent` with MemoryMiddleware, and what people put beside it: retries, approvals, summaries."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    ClearToolUsesEdit,
    ContextEditingMiddleware,
    HumanInTheLoopMiddleware,
    ModelFallbackMiddleware,
    ModelResponse,
    ModelRetryMiddleware,
    PIIMiddleware,
    SummarizationMiddleware,
)
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command
from pydantic import BaseModel, Field

from agentmem import Delta, Engine, MemoryState, Message, Sampling, Window
from agentmem.errors import TurnError
from agentmem_langgraph import ChatDeltaMem, MemoryMiddleware, MemoryWarning
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.numeric import assert_states_close
from tests.helpers.talks import ASK, CALL, KNOWN, TELL, THREAD, State, get_port, memory_of, say


class Color(BaseModel):
    """The color that was asked for."""

    name: str


def agent(engine: Any, *middleware: Any, tools: Any = (), last: int = 1, **options: Any) -> Any:
    llm = ChatDeltaMem(engine=engine, window=Window(messages=last), max_tokens=60)
    stack = middleware or (MemoryMiddleware(),)
    return create_agent(llm, list(tools), middleware=stack, checkpointer=InMemorySaver(), **options)


def test_an_agent_remembers_and_keeps_its_memory_to_itself(fake: FakeEngine) -> None:
    made = agent(fake, system_prompt="Be brief.")
    say(made, TELL)
    made.update_state(THREAD, {"messages": []})
    out = say(made, ASK)
    assert out["messages"][-1].text == KNOWN
    assert set(out) == {"messages"}
    assert memory_of(made).count == 4
    assert fake.calls[-1]["messages"][0].content == "Be brief."
    assert "memory" not in made.get_output_jsonschema()["properties"]


def test_a_model_with_options_bound_to_it_has_the_memory_too(fake: FakeEngine) -> None:
    llm = ChatDeltaMem(engine=fake, window=Window(messages=1)).bind(max_tokens=50).with_config(tags=["x"])
    made = create_agent(llm, [], middleware=[MemoryMiddleware()], checkpointer=InMemorySaver())
    say(made, TELL)
    assert say(made, ASK)["messages"][-1].text == KNOWN
    assert memory_of(made).count == 4
    assert fake.calls[-1]["sampling"].max_tokens == 50


def test_a_tool_loop_is_consumed_once(fake: FakeEngine) -> None:
    made = agent(fake, tools=[get_port])
    say(made, TELL)
    out = say(made, CALL)
    assert out["messages"][-1].text == "The result is 4711."
    out = say(made, ASK)
    assert out["messages"][-1].text == KNOWN
    assert "edits" not in out["messages"][-1].response_metadata
    assert memory_of(made).count == len(out["messages"]) == 8


@pytest.mark.parametrize("retry_first", [True, False])
def test_a_retried_model_call_is_applied_once(fake: FakeEngine, retry_first: bool) -> None:
    retry = ModelRetryMiddleware(max_retries=2, initial_delay=0, jitter=False, on_failure="error")
    stack = [retry, MemoryMiddleware()] if retry_first else [MemoryMiddleware(), retry]
    made, plain = agent(fake, *stack), agent(fake)
    fake.failures = 2
    say(made, TELL)
    say(plain, TELL)
    assert memory_of(made) == memory_of(plain)


def test_two_answers_to_one_turn_are_refused(fake: FakeEngine) -> None:
    class AsksTwice(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            handler(request)
            return handler(request)

    with pytest.raises(TurnError, match="one call"):
        say(agent(fake, MemoryMiddleware(), AsksTwice()), TELL)


class Answers(AgentMiddleware[Any, Any, Any]):
    """Answers the first question itself, as a cache, a guard or a retry's `on_failure` does."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.left = answer, 1

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        if self.left:
            self.left -= 1
            return self.answer(request)
        return handler(request)


@pytest.mark.parametrize(
    "answer",
    [
        lambda request: AIMessage("Ask later."),
        lambda request: ModelResponse(result=[AIMessage("Ask later.")]),
        lambda request: ModelResponse(result=[FakeListChatModel(responses=["Ask later."]).invoke(request.messages)]),
    ],
    ids=["message", "response", "another model"],
)
def test_an_answer_that_is_not_the_models_passes_and_the_next_turn_catches_up(fake: FakeEngine, answer: Any) -> None:
    made = agent(fake, MemoryMiddleware(), Answers(answer))
    assert say(made, TELL)["messages"][-1].text == "Ask later."
    assert "memory" not in made.get_state(THREAD).values
    assert say(made, ASK)["messages"][-1].text == KNOWN
    assert memory_of(made).count == 4


def test_an_error_that_becomes_an_answer_keeps_its_words(fake: FakeEngine) -> None:
    retry = ModelRetryMiddleware(max_retries=0, on_failure=lambda error: f"Sorry: {error}")
    made = agent(fake, MemoryMiddleware(), retry)
    fake.failures = 1
    assert say(made, TELL)["messages"][-1].text == "Sorry: the model failed"
    assert say(made, ASK)["messages"][-1].text == KNOWN


class Hosted(FakeListChatModel):
    """Refuses what it does not know, as hosted models do."""

    responses: list[str] = Field(default_factory=lambda: ["hosted"])

    def _call(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> str:
        assert not kwargs, kwargs
        return super()._call(messages, stop, run_manager)


@pytest.mark.parametrize("inside", [True, False])
def test_a_fallback_to_a_hosted_model_answers_and_the_memory_catches_up(fake: FakeEngine, inside: bool) -> None:
    fallback = ModelFallbackMiddleware(Hosted())
    made = agent(fake, *([MemoryMiddleware(), fallback] if inside else [fallback, MemoryMiddleware()]))
    fake.failures = 1
    with nullcontext() if inside else pytest.warns(MemoryWarning, match="Hosted, which has no memory"):
        assert say(made, TELL)["messages"][-1].text == "hosted"
    assert say(made, ASK)["messages"][-1].text == KNOWN
    assert memory_of(made).count == 4


def test_another_memory_model_inside_is_refused(fake: FakeEngine) -> None:
    class Chooses(AgentMiddleware[Any, Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(request.override(model=ChatDeltaMem(engine=fake, temperature=1.0)))

    with pytest.raises(TurnError, match="before MemoryMiddleware"):
        say(agent(fake, MemoryMiddleware(), Chooses()), TELL)
    made = agent(fake, Chooses(), MemoryMiddleware())
    say(made, TELL)
    assert say(made, ASK)["messages"][-1].text == KNOWN


def test_a_name_that_an_agent_signs_its_replies_with_changes_nothing(fake: FakeEngine) -> None:
    signed, plain = agent(fake, name="expert"), agent(fake)
    for text in (TELL, ASK, "Go on."):
        out = say(signed, text)
        say(plain, text)
    assert out["messages"][-1].name == "expert"
    assert memory_of(signed).count == 6
    assert memory_of(signed) == memory_of(plain)


def test_a_summary_is_written_once_and_facts_outlive_it(fake: FakeEngine) -> None:
    """SummarizationMiddleware beside MemoryMiddleware: as many tokens a turn afterwards as before."""
    summaries = SummarizationMiddleware(
        FakeListChatModel(responses=["what was said"]), trigger=("messages", 6), keep=("messages", 2)
    )
    made = agent(fake, MemoryMiddleware(), summaries)
    say(made, TELL)
    written = []
    for number in range(9):
        metadata = say(made, f"Remark {number}.")["messages"][-1].response_metadata
        written.append(metadata["memory"]["written"])
    assert sorted(set(written)) == [1, 2]  # the question, and now and then the summary before it
    assert memory_of(made).count == 2 * 10 + written.count(2)
    out = say(made, ASK)
    assert out["messages"][-1].text == KNOWN
    assert len(out["messages"]) < 8
    assert not any(TELL in message.text for message in out["messages"])


@pytest.mark.parametrize("inside", [True, False])
def test_cleared_tool_results_are_written_once(fake: FakeEngine, inside: bool) -> None:
    editing = ContextEditingMiddleware(edits=[ClearToolUsesEdit(trigger=30, keep=1)])
    stack = [MemoryMiddleware(), editing] if inside else [editing, MemoryMiddleware()]
    made = agent(fake, *stack, tools=[get_port])
    for turn in range(1, 7):
        out = say(made, f"Call get_port with city berlin{turn}.")
        cleared = turn - 1  # all results but the last
        assert memory_of(made).count == len(out["messages"]) + cleared


def test_a_shared_memory_goes_through_an_agent_that_is_a_node(fake: FakeEngine) -> None:
    llm = ChatDeltaMem(engine=fake, window=Window(messages=1))
    builder = StateGraph(State)
    builder.add_node("agent", create_agent(llm, [], middleware=[MemoryMiddleware(shared=True)]))
    builder.add_edge(START, "agent")
    graph = builder.compile(checkpointer=InMemorySaver())
    say(graph, TELL)
    out = say(graph, ASK)
    assert out["messages"][-1].text == KNOWN
    assert out["memory"].count == 4


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
    made = agent(fake, MemoryMiddleware(), HumanInTheLoopMiddleware(interrupt_on={"get_port": True}), tools=[get_port])
    say(made, TELL)
    asked = say(made, CALL)
    (interrupt,) = asked["__interrupt__"]
    assert interrupt.value["action_requests"][0]["args"] == {"city": "berlin"}
    before = memory_of(made)
    answer: dict[str, Any] = {"type": decision}
    if decision == "edit":
        answer["edited_action"] = {"name": "get_port", "args": {"city": "oslo"}}
    out = made.invoke(Command(resume={"decisions": [answer]}), THREAD)
    assert out["messages"][-1].text.startswith("The result is")
    after = memory_of(made)
    assert after.count > before.count
    assert say(made, ASK)["messages"][-1].text == KNOWN, "what was told is still known"


@pytest.mark.parametrize(
    "strategy", [Color, ToolStrategy(Color), ProviderStrategy(Color)], ids=["auto", "tool", "provider"]
)
def test_every_strategy_of_structured_answers(nano_engine: Engine, strategy: Any) -> None:
    made = agent(nano_engine, last=3, response_format=strategy)
    out = say(made, ASK)
    assert isinstance(out["structured_response"], Color)
    assert memory_of(made).count >= 2


def test_a_provider_is_shown_the_schema(fake: FakeEngine) -> None:
    fake.scripted.append([Delta('{"name": "teal"}')])
    out = say(agent(fake, response_format=Color, system_prompt="Be brief."), ASK)
    assert out["structured_response"] == Color(name="teal")
    system = fake.calls[-1]["messages"][0].content
    assert system.startswith("Be brief.")
    assert json.dumps(Color.model_json_schema()["properties"]["name"])[1:-1] in system
    assert fake.calls[-1]["form"].schema["required"] == ["name"]


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
