"""Structured output with the embedded model: every kind of schema by every method gives an object that fits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from langchain_core.tools import tool
from pydantic import BaseModel, Field, model_validator
from typing_extensions import TypedDict

from agentmem import Engine, Sampling
from agentmem.errors import ConfigError
from agentmem_langgraph import ChatDeltaMem, MemoryTurn

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
    bound = nano.with_structured_output(kind, method=method, temperature=1.0, seed=0, max_tokens=150)
    assert isinstance(bound.invoke("Give me a number."), kind)
    schema = nano.with_structured_output(
        kind.model_json_schema(), method=method, temperature=1.0, seed=3, max_tokens=150
    )
    kind.model_validate(schema.invoke("Give me a number."))


def test_tools_that_take_what_holds_itself(nano: ChatDeltaMem) -> None:
    def plant(tree: Tree, count: int) -> str:
        """Plant trees."""
        return "planted"

    for given in (plant, tool(plant), Tree):
        bound = nano.bind_tools([given], tool_choice="any", temperature=1.0, seed=1, max_tokens=200)
        (call,) = bound.invoke("Plant an oak.").tool_calls
        Tree.model_validate(call["args"]["tree"] if "tree" in call["args"] else call["args"])


@pytest.mark.parametrize("method", METHODS)
def test_what_holds_itself_and_cannot_say_so_is_refused(nano: ChatDeltaMem, method: Any) -> None:
    with pytest.raises(ConfigError, match="'Endless' holds itself"):
        nano.with_structured_output(Endless, method=method)


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


def test_too_few_tokens_are_refused_before_decoding(nano: ChatDeltaMem) -> None:
    with pytest.raises(ConfigError, match="takes at least"):
        nano.with_structured_output(Trip).invoke("Plan a trip.", max_tokens=5)


@pytest.mark.parametrize(("schema", "method"), [(Trip, "magic"), (None, "function_calling")])
def test_a_method_that_does_not_exist_is_refused(nano: ChatDeltaMem, schema: Any, method: Any) -> None:
    with pytest.raises(ConfigError, match="method"):
        nano.with_structured_output(schema, method=method)


def test_a_reply_is_bound_at_any_temperature(nano_engine: Engine) -> None:
    llm = ChatDeltaMem(engine=nano_engine, temperature=1.5, seed=3, max_tokens=60)
    assert Sampling(temperature=1.5).temperature == llm.temperature
    for seed in range(3):
        assert isinstance(llm.bind(seed=seed).with_structured_output(Trip).invoke("Plan a trip."), Trip)
