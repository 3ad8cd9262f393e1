"""MemoryMiddleware: memory in agents of `langchain.agents.create_agent`."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRetryMiddleware
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from pydantic import BaseModel
from typing_extensions import TypedDict

from agentmem import MemoryState, Window
from agentmem.errors import TurnError
from agentmem_langgraph import ChatDeltaMem, MemoryChannel, MemoryMiddleware
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
