"""MemoryMiddleware: memory in agents of `langchain.agents.create_agent`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    ClearToolUsesEdit,
    ContextEditingMiddleware,
    ModelFallbackMiddleware,
    ModelResponse,
    ModelRetryMiddleware,
    SummarizationMiddleware,
)
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from agentmem import MemoryState, Window
from agentmem.errors import TurnError
from agentmem_langgraph import ChatDeltaMem, MemoryChannel, MemoryMiddleware, MemoryWarning
from tests.helpers.fake_engine import FakeEngine

THREAD: RunnableConfig = {"configurable": {"thread_id": "1"}}
TELL = "My favorite color is teal."
ASK = "What is my favorite color?"
KNOWN = "Your favorite color is teal."


@tool
def get_port(city: str) -> str:
    """The port of a city."""
    return "4711"


def agent(fake: FakeEngine, *middleware: Any, tools: Any = (), **options: Any) -> Any:
    llm = ChatDeltaMem(engine=fake, window=Window(messages=1))
    stack = middleware or (MemoryMiddleware(),)
    return create_agent(llm, list(tools), middleware=stack, checkpointer=InMemorySaver(), **options)


def say(made: Any, text: str) -> Any:
    return made.invoke({"messages": [HumanMessage(text)]}, THREAD)


def test_an_agent_remembers_and_keeps_its_memory_to_itself(fake: FakeEngine) -> None:
    made = agent(fake, system_prompt="Be brief.")
    say(made, TELL)
    made.update_state(THREAD, {"messages": []})
    out = say(made, ASK)
    assert out["messages"][-1].text == KNOWN
    assert set(out) == {"messages"}
    assert made.get_state(THREAD).values["memory"].count == 4
    assert fake.calls[-1]["messages"][0].content == "Be brief."
    assert "memory" not in made.get_output_jsonschema()["properties"]


async def test_an_async_agent_remembers_the_same(fake: FakeEngine) -> None:
    plain, made = agent(fake), agent(fake)
    for text in (TELL, ASK):
        say(plain, text)
        out = await made.ainvoke({"messages": [HumanMessage(text)]}, THREAD)
    assert out["messages"][-1].text == KNOWN
    assert made.get_state(THREAD).values["memory"] == plain.get_state(THREAD).values["memory"]


def test_a_tool_loop_is_consumed_once(fake: FakeEngine) -> None:
    made = agent(fake, tools=[get_port])
    say(made, TELL)
    out = say(made, "Call get_port with city berlin.")
    assert out["messages"][-1].text == "The result is 4711."
    out = say(made, ASK)
    assert out["messages"][-1].text == KNOWN
    assert "edits" not in out["messages"][-1].response_metadata
    assert made.get_state(THREAD).values["memory"].count == len(out["messages"]) == 8


@pytest.mark.parametrize("retry_first", [True, False])
def test_a_retried_model_call_is_applied_once(fake: FakeEngine, retry_first: bool) -> None:
    retry = ModelRetryMiddleware(max_retries=2, initial_delay=0, jitter=False, on_failure="error")
    stack = [retry, MemoryMiddleware()] if retry_first else [MemoryMiddleware(), retry]
    made, plain = agent(fake, *stack), agent(fake)
    fake.failures = 2
    say(made, TELL)
    say(plain, TELL)
    assert made.get_state(THREAD).values["memory"] == plain.get_state(THREAD).values["memory"]


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
    assert made.get_state(THREAD).values["memory"].count == 4


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
    assert made.get_state(THREAD).values["memory"].count == 4


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
    assert signed.get_state(THREAD).values["memory"].count == 6
    assert signed.get_state(THREAD).values["memory"] == plain.get_state(THREAD).values["memory"]


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
    assert made.get_state(THREAD).values["memory"].count == 2 * 10 + written.count(2)
    assert say(made, ASK)["messages"][-1].text == KNOWN


@pytest.mark.parametrize("inside", [True, False])
def test_cleared_tool_results_are_written_once(fake: FakeEngine, inside: bool) -> None:
    editing = ContextEditingMiddleware(edits=[ClearToolUsesEdit(trigger=30, keep=1)])
    stack = [MemoryMiddleware(), editing] if inside else [editing, MemoryMiddleware()]
    made = agent(fake, *stack, tools=[get_port])
    for turn in range(1, 7):
        out = say(made, f"Call get_port with city berlin{turn}.")
        cleared = turn - 1  # all results but the last
        assert made.get_state(THREAD).values["memory"].count == len(out["messages"]) + cleared


def test_a_shared_memory_goes_through_an_agent_that_is_a_node(fake: FakeEngine) -> None:
    class State(TypedDict):
        messages: Annotated[list[AnyMessage], add_messages]
        memory: Annotated[MemoryState, MemoryChannel]

    llm = ChatDeltaMem(engine=fake, window=Window(messages=1))
    builder = StateGraph(State)
    builder.add_node("agent", create_agent(llm, [], middleware=[MemoryMiddleware(shared=True)]))
    builder.add_edge(START, "agent")
    graph = builder.compile(checkpointer=InMemorySaver())
    say(graph, TELL)
    out = say(graph, ASK)
    assert out["messages"][-1].text == KNOWN
    assert out["memory"].count == 4


def test_a_structured_response_beside_memory(nano_engine: Any) -> None:
    class Color(BaseModel):
        """The color that was asked for."""

        name: str

    found = say(agent(nano_engine, response_format=Color), ASK)
    assert isinstance(found["structured_response"], Color)
