"""Tools: every kind reaches the prompt, calls come back, a choice binds the reply."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from pydantic import BaseModel

from agentmem.errors import ConfigError
from agentmem_langgraph import ChatDeltaMem, MemoryTurn
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.talks import CALL, gathered, get_port


def plain(city: str) -> str:
    """The port of a city."""
    return "4711"


class Port(BaseModel):
    """The port of a city."""

    city: str


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (get_port, "get_port"),
        (plain, "plain"),
        (Port, "Port"),
        ({"title": "port", "description": "of a city", "type": "object", "properties": {}}, "port"),
        ({"type": "function", "function": {"name": "port", "parameters": {}}}, "port"),
    ],
    ids=["tool", "function", "pydantic", "schema", "openai"],
)
def test_every_kind_of_tool_reaches_the_prompt(fake: FakeEngine, llm: ChatDeltaMem, kind: Any, name: str) -> None:
    reply = llm.bind_tools([kind], tool_choice="auto").invoke(f"Call {name} with city berlin.")
    assert [t["function"]["name"] for t in fake.calls[-1]["tools"]] == [name]
    (call,) = reply.tool_calls
    assert (call["name"], call["args"]) == (name, {"city": "berlin"})
    assert call["id"].startswith("call_")
    assert reply.text == "Sure."
    assert reply.response_metadata["finish_reason"] == "tool_calls"


def test_a_streamed_call_comes_as_tool_call_chunks(llm: ChatDeltaMem) -> None:
    chunks = list(llm.bind_tools([get_port]).stream(CALL))
    assert [len(chunk.tool_call_chunks) for chunk in chunks] == [0] * (len(chunks) - 1) + [1]
    whole = gathered(chunks)
    assert whole.tool_calls == llm.bind_tools([get_port]).invoke(CALL).tool_calls
    assert whole.text == "Sure."


def test_a_call_and_its_result_go_back_to_the_engine(fake: FakeEngine, llm: ChatDeltaMem) -> None:
    bound, turn = llm.bind_tools([get_port]), MemoryTurn()
    history: list[Any] = [HumanMessage(CALL)]
    history.append(bound.invoke(history, memory=turn))
    history.append(ToolMessage("4711", tool_call_id=history[-1].tool_calls[0]["id"], name="get_port"))
    assert bound.invoke(history, memory=MemoryTurn(turn.state)).text == "The result is 4711."
    _, call, result = fake.calls[-1]["messages"]
    assert call.tool_calls[0].arguments == {"city": "berlin"}
    assert (result.role, result.tool_call_id, result.name) == ("tool", call.tool_calls[0].id, "get_port")


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        *((choice, None) for choice in (None, "auto", "none", False)),
        *((choice, "must") for choice in ("any", "required", True, "get_port")),
        ({"type": "function", "function": {"name": "get_port"}}, "must"),
        # As other providers spell them.
        *(({"type": kind}, None) for kind in ("auto", "none")),
        ({"type": "any"}, "must"),
        ({"type": "tool", "name": "get_port"}, "must"),
    ],
)
def test_a_tool_choice_binds_the_reply(fake: FakeEngine, llm: ChatDeltaMem, choice: Any, calls: str | None) -> None:
    llm.bind_tools([get_port, plain], tool_choice=choice).invoke("Hello!")
    form, shown = fake.calls[-1]["form"], fake.calls[-1]["tools"]
    assert (form.calls if form else None) == calls
    if calls:
        names = [t["function"]["name"] for t in form.tools]
        assert names == (
            ["get_port", "plain"] if choice in ("any", "required", True, {"type": "any"}) else ["get_port"]
        )
        assert not form.parallel, "a forced call is one call"
    assert len(shown) == (0 if choice in ("none", False, {"type": "none"}) else 2)


def test_strict_tools_bind_calls_that_the_model_makes_by_itself(fake: FakeEngine, llm: ChatDeltaMem) -> None:
    llm.bind_tools([get_port], strict=True, parallel_tool_calls=False).invoke("Hello!")
    form = fake.calls[-1]["form"]
    assert (form.calls, form.parallel, form.schema) == ("may", False, None)


@pytest.mark.parametrize("choice", ["get_weather", 7, {"type": "function"}])
def test_a_choice_of_no_tool_is_refused(llm: ChatDeltaMem, choice: Any) -> None:
    with pytest.raises(ConfigError, match=r"get_port.*found"):
        llm.bind_tools([get_port], tool_choice=choice)


@pytest.mark.parametrize("response_format", [{"type": "xml"}, {"type": "json_schema"}, "json"])
def test_a_response_format_that_does_not_exist_is_refused(llm: ChatDeltaMem, response_format: Any) -> None:
    with pytest.raises(ConfigError, match="response_format is"):
        llm.invoke("Hello!", response_format=response_format)


def test_two_tools_of_one_name_are_one_or_refused(fake: FakeEngine, llm: ChatDeltaMem) -> None:
    llm.bind_tools([Port, Port.model_json_schema()]).invoke("Hello!")
    assert len(fake.calls[-1]["tools"]) == 1
    other = {"type": "function", "function": {"name": "Port", "parameters": {"properties": {"land": {}}}}}
    with pytest.raises(ConfigError, match="two that are called 'Port'"):
        llm.bind_tools([Port, other])
    with pytest.raises(ConfigError, match="two that are called 'Port'"):
        llm.invoke("Hello!", tools=[Port, other])


def test_keywords_that_are_null_say_nothing(fake: FakeEngine, llm: ChatDeltaMem) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "integer", "default": None}}, "required": None}
    given = {"type": "function", "function": {"name": "f", "description": None, "parameters": parameters}}
    llm.bind_tools([given]).invoke("Hello!")
    (shown,) = fake.calls[-1]["tools"]
    assert shown["function"] == {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer", "default": None}}},
    }


def test_a_tool_that_is_no_function_is_refused(llm: ChatDeltaMem) -> None:
    with pytest.raises(ConfigError, match="web_search"):
        llm.bind_tools([{"type": "web_search"}])
