"""Tools reach the prompt, calls come back, a choice binds the reply; structured output by every method is an object
that fits.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field, model_validator
from typing_extensions import TypedDict

from agentmem import Engine
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


METHODS = ("function_calling", "json_schema", "json_mode")


class Trip(BaseModel):
    """A trip."""

    city: str = Field(description="where to")
    days: int
    kind: Literal["work", "fun"]
    stops: list[str] | None = None


class Typed(TypedDict):
    """A trip."""

    city: Annotated[str, ..., "where to"]
    days: Annotated[int, ..., "how long"]


SCHEMAS = {"pydantic": Trip, "typed": Typed, "json": Trip.model_json_schema()}


@pytest.fixture
def nano(nano_engine: Engine) -> ChatDeltaMem:
    return ChatDeltaMem(engine=nano_engine, max_tokens=90)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_schema_by_every_method(nano: ChatDeltaMem, kind: str, method: Any) -> None:
    schema: Any = SCHEMAS[kind]
    found = nano.with_structured_output(schema, method=method).invoke("Plan a trip to Oslo for 3 days.")
    if kind == "pydantic":
        assert isinstance(found, Trip)
    elif kind == "typed":
        assert found.keys() == {"city", "days"}
        assert isinstance(found["days"], int)
    else:
        Trip.model_validate(found)


async def test_it_streams_and_awaits(nano: ChatDeltaMem) -> None:
    bound = nano.with_structured_output(Trip)
    chunks = [chunk async for chunk in bound.astream("Plan a trip.")]
    assert chunks[-1] == await bound.ainvoke("Plan a trip.") == bound.invoke("Plan a trip.")


class Node(BaseModel):
    """A number, and perhaps another node."""

    value: int
    child: Node | None = None


class Tree(BaseModel):
    """A tree, whose title is no title of pydantic's."""

    title: str
    root: Node


class Endless(TypedDict):
    """A number, and perhaps another."""

    value: int
    child: Endless | None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Node, Tree])
def test_classes_that_hold_themselves(nano: ChatDeltaMem, kind: type[BaseModel], method: Any) -> None:
    bound = nano.with_structured_output(kind, method=method, temperature=1.0, seed=0, max_tokens=60)
    assert isinstance(bound.invoke("Give me a number."), kind)
    schema = nano.with_structured_output(
        kind.model_json_schema(), method=method, temperature=1.0, seed=3, max_tokens=60
    )
    kind.model_validate(schema.invoke("Give me a number."))


def test_tools_that_take_what_holds_itself(nano: ChatDeltaMem) -> None:
    def plant(tree: Tree, count: int) -> str:
        """Plant trees."""
        return "planted"

    for given in (plant, tool(plant), Tree):
        bound = nano.bind_tools([given], tool_choice="any", temperature=1.0, seed=1, max_tokens=60)
        (call,) = bound.invoke("Plant an oak.").tool_calls
        Tree.model_validate(call["args"]["tree"] if "tree" in call["args"] else call["args"])


@pytest.mark.parametrize("method", METHODS)
def test_what_holds_itself_and_cannot_say_so_is_refused(nano: ChatDeltaMem, method: Any) -> None:
    with pytest.raises(ConfigError, match="'Endless' holds itself"):
        nano.with_structured_output(Endless, method=method)


def test_what_is_nested_too_deep_is_refused(llm: ChatDeltaMem, fake: FakeEngine) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(3000):
        schema = {"type": "object", "properties": {"a": schema}}
    described = {"type": "function", "function": {"name": "f", "parameters": schema}}
    shown = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
    for call in (
        lambda: llm.bind_tools([described]),
        lambda: llm.bind_tools([{"name": "f", "description": "", "input_schema": schema}]),
        lambda: llm.bind_tools([{"title": "f", **schema}]),
        lambda: llm.with_structured_output({"title": "f", **schema}),
        lambda: llm.invoke("Hello!", response_format=shown),
    ):
        with pytest.raises(ConfigError, match="nested at most 100 deep"):
            call()
    assert not fake.calls


@pytest.mark.parametrize("parameters", [True, "object", []])
def test_parameters_that_are_no_schema_are_refused(llm: ChatDeltaMem, parameters: Any) -> None:
    with pytest.raises(ConfigError, match="the parameters of 'f' should be"):
        llm.bind_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])


def test_a_reference_that_leads_only_to_itself_is_refused(nano: ChatDeltaMem) -> None:
    endless = {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}
    with pytest.raises(ConfigError, match=r"#/\$defs/A in the parameters of 'f', which leads only to itself"):
        nano.bind_tools([{"type": "function", "function": {"name": "f", "parameters": endless}}])
    with pytest.raises(ConfigError, match="leads only to itself"):
        nano.with_structured_output(endless)


def test_the_form_of_openai(nano: ChatDeltaMem) -> None:
    schema = {"name": "trip", "strict": True, "schema": Trip.model_json_schema()}
    Trip.model_validate(nano.with_structured_output(schema, method="json_schema").invoke("Plan a trip."))


def test_any_object_in_json_mode(nano: ChatDeltaMem) -> None:
    assert isinstance(nano.with_structured_output(method="json_mode").invoke("Give me an object."), dict)


def test_raw_and_parsed_together(nano: ChatDeltaMem) -> None:
    class Never(BaseModel):
        """A trip that no validator lets through."""

        city: str

        @model_validator(mode="after")
        def _refuse(self) -> Never:
            raise ValueError("too far away")

    found = nano.with_structured_output(Never, include_raw=True).invoke("Plan a trip.")
    assert found["raw"].tool_calls[0]["name"] == "Never"
    assert found["parsed"] is None
    assert "too far away" in str(found["parsing_error"])
    found = nano.with_structured_output(Trip, include_raw=True).invoke("Plan a trip.")
    assert isinstance(found["parsed"], Trip)
    assert found["parsing_error"] is None


def test_a_memory_goes_through_it(nano: ChatDeltaMem) -> None:
    turn = MemoryTurn()
    nano.with_structured_output(Trip).invoke("Plan a trip.", memory=turn)
    assert turn.state is not None
    assert turn.state.count == 2


def test_a_forced_call_is_one_whole_call_of_an_offered_tool(nano: ChatDeltaMem) -> None:
    @tool
    def book(city: str, days: int) -> str:
        """Book a trip."""
        return "booked"

    @tool
    def refund(number: int) -> str:
        """Give the money back."""
        return "done"

    for choice, names in (("any", {"book", "refund"}), ("refund", {"refund"})):
        reply = nano.bind_tools([book, refund], tool_choice=choice).invoke("Hello!")
        (call,) = reply.tool_calls
        assert call["name"] in names
        {"book": book, "refund": refund}[call["name"]].invoke(call["args"])


def test_a_call_streams_as_it_is_decoded(nano: ChatDeltaMem) -> None:
    @tool
    def book(city: str, days: int) -> str:
        """Book a trip."""
        return "booked"

    bound = nano.bind_tools([book], tool_choice="any")
    chunks = [chunk for chunk in bound.stream("Book a trip to Oslo.") if chunk.tool_call_chunks]
    assert len(chunks) > 4
    first = chunks[0].tool_call_chunks[0]
    assert (first["name"], first["id"][:5], first["index"]) == ("book", "call_", 0)
    assert all(piece["name"] is None for chunk in chunks[1:] for piece in chunk.tool_call_chunks)
    whole = sum(chunks[1:], chunks[0])
    assert whole.tool_calls == bound.invoke("Book a trip to Oslo.").tool_calls


@pytest.mark.parametrize(("schema", "method"), [(Trip, "magic"), (None, "function_calling")])
def test_a_method_that_does_not_exist_is_refused(nano: ChatDeltaMem, schema: Any, method: Any) -> None:
    with pytest.raises(ConfigError, match="method"):
        nano.with_structured_output(schema, method=method)
