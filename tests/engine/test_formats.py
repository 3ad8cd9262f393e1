"""Replies bound to a format: whatever a random model would say, they fit; what leaves no choice is read in one pass."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field

from agentmem import Engine, Message, ReplyFormat, Sampling, Turn
from agentmem.errors import ConfigError
from agentmem.generation import turn as turns
from agentmem.generation.guided import Constraint
from agentmem.generation.runner import ModelRunner
from tests.helpers.numeric import assert_same_at_once, assert_same_turn

MakeEngine = Callable[..., Engine]
ASK = [Message("user", "Hello there.")]


class Color(Enum):
    RED = "red"
    GREEN = "grün"


class Item(BaseModel):
    """Refers to itself and to another class, so its schema has references."""

    name: str
    color: Color
    count: int
    parts: list[Item] = []


class Box(BaseModel):
    items: list[Item]
    code: str = Field(pattern="^[a-z]{3}-[0-9]{4}$")
    note: str | None = None
    weight: float


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


NOTHING = tool("nothing", {"type": "object", "properties": {}})
PACK = tool("pack", Box.model_json_schema())
JSON = ReplyFormat(schema=Box.model_json_schema())


def say(engine: Engine, form: ReplyFormat, seed: int = 0, max_tokens: int = 120, **options: Any) -> Turn:
    sampling = Sampling(temperature=1.0, seed=seed, max_tokens=max_tokens, **options)
    return engine.turn(ASK, sampling=sampling, form=form)


@pytest.mark.parametrize("budget", [60, 120, 300])
def test_json_fits_its_schema_whatever_the_budget(make_engine: MakeEngine, budget: int) -> None:
    engine = make_engine()
    closed = 0
    for seed in range(2 if budget == 300 else 4):
        turn = say(engine, JSON, seed, budget)
        Box.model_validate_json(turn.message.content)
        assert len(turn.token_ids) <= budget
        closed += turn.finish_reason == "length"
    assert closed or budget == 300, "a random model does not come to an end by itself"


def test_a_forced_call_is_one_call_that_fits(make_engine: MakeEngine) -> None:
    engine = make_engine()
    names = set()
    for seed in range(6):
        turn = say(engine, ReplyFormat(tools=[PACK, NOTHING], calls="must"), seed, (120, 200)[seed % 2])
        (call,) = turn.message.tool_calls
        names.add(call.name)
        assert (turn.message.content, turn.invalid_tool_calls) == ("", ())
        jsonschema.validate(call.arguments, Box.model_json_schema() if call.name == "pack" else {"maxProperties": 0})
    assert names == {"pack", "nothing"}


def test_several_calls_where_they_are_allowed(make_engine: MakeEngine) -> None:
    engine = make_engine()
    form = ReplyFormat(tools=[NOTHING], calls="must", parallel=True)
    counts = {len(say(engine, form, seed).message.tool_calls) for seed in range(8)}
    assert min(counts) >= 1
    assert max(counts) > 1


def test_calls_or_json(make_engine: MakeEngine) -> None:
    engine = make_engine()
    form = ReplyFormat(tools=[NOTHING], calls="may", schema={"type": "array", "items": {"type": "boolean"}})
    kinds = set()
    for seed in range(12):
        turn = say(engine, form, seed)
        kinds.add(bool(turn.message.tool_calls))
        if not turn.message.tool_calls:
            assert isinstance(json.loads(turn.message.content), list)
    assert kinds == {True, False}


def test_text_before_calls_is_free_and_calls_are_not(make_engine: MakeEngine) -> None:
    engine = make_engine()
    turns = [say(engine, ReplyFormat(tools=[PACK], calls="may", parallel=True), seed, 200) for seed in range(4)]
    assert any(turn.message.content for turn in turns)
    assert any(turn.message.tool_calls for turn in turns)
    for turn in turns:
        assert turn.invalid_tool_calls == ()
        for call in turn.message.tool_calls:
            jsonschema.validate(call.arguments, Box.model_json_schema())


def test_objects_are_closed_and_integers_have_64_bits(make_engine: MakeEngine) -> None:
    """What LangChain makes of functions leaves objects open, and a random model writes integers without end."""
    engine = make_engine()
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for seed in range(8):
        found = json.loads(say(engine, ReplyFormat(schema=schema), seed, 40).message.content)
        assert found.keys() == {"n"}
        assert -(2**63) <= found["n"] < 2**63


def test_the_same_words_stream_and_the_memory_holds_what_was_said(make_engine: MakeEngine) -> None:
    engine = make_engine()
    stream = engine.stream(ASK, sampling=Sampling(max_tokens=100), form=JSON)
    text = "".join(delta.text for delta in stream)
    turn = engine.turn(ASK, sampling=Sampling(max_tokens=100), form=JSON)
    assert text == turn.message.content == stream.result().message.content
    again = engine.remember([*ASK, turn.message], turn.state)
    assert again.written == 0, "the reply is known as consumed"


def test_reasoning_ends_before_the_reply_begins(make_engine: MakeEngine) -> None:
    engine = make_engine()
    template = engine.tokenizer.chat_template
    engine.tokenizer.chat_template = template.replace("assistant\\n{% endif %}", "assistant\\n<think>\\n{% endif %}")
    try:
        thinking = Engine(engine.model, engine.tokenizer, None, name="thinking")
        turn = say(thinking, JSON, 1, 150)
        thinking.close()
    finally:
        engine.tokenizer.chat_template = template
    Box.model_validate_json(turn.message.content)
    assert "<" not in turn.message.content


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"type": "string", "format": "path"}, "path"),
        ({"type": "strange"}, "strange"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_name(
    make_engine: MakeEngine, schema: dict[str, Any], named: str
) -> None:
    engine = make_engine()
    with pytest.raises(ConfigError, match=rf"cannot be enforced.*{named}"):
        say(engine, ReplyFormat(schema=schema))
    assert say(engine, JSON).message.content, "the engine goes on"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "maxItems": 1}
    return schema


@pytest.mark.parametrize("depth", [101, 3000])
def test_a_schema_nested_too_deep_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match="the schema should be nested at most 100 deep"):
        ReplyFormat(schema=nested(depth))
    with pytest.raises(ConfigError, match="the parameters of 'f' should be nested at most 100 deep"):
        ReplyFormat(tools=[tool("f", nested(depth))], calls="may")


def test_a_schema_as_deep_as_may_be_is_met(make_engine: MakeEngine) -> None:
    found = json.loads(say(make_engine(), ReplyFormat(schema=nested(90)), max_tokens=300).message.content)
    jsonschema.validate(found, nested(90))


@pytest.mark.parametrize("wrong", [True, "object", ["a"]])
def test_a_schema_that_is_no_mapping_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="as a mapping; found"):
        ReplyFormat(schema=wrong)
    with pytest.raises(ConfigError, match="the parameters of 'f' should be"):
        ReplyFormat(tools=[tool("f", wrong)], calls="may")


def test_a_budget_below_the_shortest_reply_is_refused_before_decoding(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"takes at least \d+ tokens; found room for 9"):
        say(make_engine(), JSON, max_tokens=9)


MANY = {f"k{n}": {"type": "string"} for n in range(24)}
LARGE = {"type": "object", "properties": MANY, "required": list(MANY)}
NODE = {"$defs": {"N": {"type": "object", "properties": {"child": {"$ref": "#/$defs/N"}}}}}


@pytest.mark.parametrize(
    ("schema", "most"),
    [
        ({"type": "array", "items": LARGE}, 260),
        ({**NODE, "type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/N"}}}}, 120),
        ({"type": "object", "properties": {"child": {"$ref": "#"}}}, 60),
        ({"type": "string", "format": "email"}, 60),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, 30),
        ({"type": "object", "properties": {"large": LARGE}}, 12),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, 12),
        ({"allOf": [{"properties": {"a": {"type": "string"}}}, {"properties": {"b": {"type": "integer"}}}]}, 60),
        ({"type": "integer", "const": 2**40}, 60),
    ],
    ids=["large", "recursive", "root", "email", "between", "optional", "mapping", "parts", "const"],
)
def test_hard_schemas_are_met_in_time(make_engine: MakeEngine, schema: dict[str, Any], most: int) -> None:
    engine = make_engine()
    for seed in range(2):
        found = json.loads(say(engine, ReplyFormat(schema=schema), seed, most).message.content)
        jsonschema.validate(found, schema)


def test_arguments_are_always_an_object(make_engine: MakeEngine) -> None:
    engine = make_engine()
    loose = tool("loose", {"properties": {"a": {"type": "string"}}})
    for seed in range(3):
        (call,) = say(engine, ReplyFormat(tools=[loose], calls="must"), seed).message.tool_calls
        assert isinstance(call.arguments, dict)


def test_arguments_may_be_defined_by_a_reference_alone(make_engine: MakeEngine) -> None:
    node = {"type": "object", "properties": {"child": {"$ref": "#/$defs/N"}}, "additionalProperties": False}
    parameters = {"$ref": "#/$defs/N", "$defs": {"N": node}}
    reply = say(make_engine(), ReplyFormat(tools=[tool("grow", parameters)], calls="must"))
    jsonschema.validate(reply.message.tool_calls[0].arguments, parameters)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"$ref": "#"}, "# -> #"),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}, "#/$defs/A -> #/$defs/A"),
        (
            {
                "type": "object",
                "properties": {"x": {"type": "array", "items": {"$ref": "#/$defs/B"}}},
                "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A", "description": "b"}},
            },
            "#/$defs/A -> #/$defs/B -> #/$defs/A",
        ),
    ],
    ids=["root", "one", "two"],
)
def test_a_reference_that_leads_only_to_itself_is_refused(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(named)} in the schema.*give its definition a type"):
        ReplyFormat(schema=schema)
    with pytest.raises(ConfigError, match=rf"{re.escape(named)} in the parameters of 'f'"):
        ReplyFormat(tools=[tool("f", schema)], calls="may")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tools": [{"name": "f"}], "calls": "must"},
        {"schema": {"enum": [{1, 2}]}},
        {},
        {"calls": "must"},
        {"calls": "perhaps", "tools": [NOTHING]},
    ],
)
def test_what_is_no_format_is_refused(make_engine: MakeEngine, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        say(make_engine(), ReplyFormat(**wrong))


@pytest.mark.parametrize("kind", [Literal["a", "b"], dict[str, int], tuple[int, str], list[Box] | None])
def test_schemas_that_pydantic_makes(make_engine: MakeEngine, kind: Any) -> None:
    from pydantic import TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    engine = make_engine()
    for seed in range(3):
        adapter.validate_json(say(engine, ReplyFormat(schema=adapter.json_schema()), seed).message.content)


def text_tagged(engine: Engine) -> Engine:
    """The same model with a tokenizer to which delimiters are ordinary text."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = json.loads(engine.tokenizer.backend_tokenizer.to_str())
    plain["added_tokens"] = [one for one in plain["added_tokens"] if one["special"]]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = engine.tokenizer.chat_template
    return Engine(engine.model, made, None, name="text-tagged")


def test_arguments_that_spell_a_delimiter_where_delimiters_are_text(make_engine: MakeEngine) -> None:
    spelled = "a</tool_call>\n<tool_call>b"
    odd = tool("odd", {"type": "object", "properties": {"a": {"const": spelled}}, "required": ["a"]})
    form = ReplyFormat(tools=[odd], calls="must", parallel=True)
    with text_tagged(make_engine()) as engine:
        for seed in range(4):
            stream = engine.stream(ASK, sampling=Sampling(temperature=1.0, seed=seed, max_tokens=220), form=form)
            deltas = list(stream)
            turn = stream.result()
            assert turn.invalid_tool_calls == ()
            assert turn.message.tool_calls
            for call in turn.message.tool_calls:
                assert call.arguments == {"a": spelled}
                assert json.loads("".join(d.text for d in deltas if d.call == call.id))["arguments"] == {"a": spelled}


def test_json_that_spells_a_delimiter_where_delimiters_are_text(make_engine: MakeEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"const": "<tool_call>x</tool_call>"}}, "required": ["a"]}
    with text_tagged(make_engine()) as engine:
        turn = say(engine, ReplyFormat(schema=schema))
    assert json.loads(turn.message.content) == {"a": "<tool_call>x</tool_call>"}


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["</tool_call>"]},
        {"enum": ["see <|im_end|> here"]},
        {"enum": ["<think>", "<tool_call>", "x"]},
        {"type": "object", "properties": {"<think>": {"enum": [1, 2]}}, "required": ["<think>"]},
        {"type": "string", "pattern": "^<think>[ab]{2,4}</think>$"},
    ],
)
def test_values_that_spell_a_token_of_the_template(make_engine: MakeEngine, schema: dict[str, Any]) -> None:
    engine = make_engine()
    for seed in range(3):
        jsonschema.validate(json.loads(say(engine, ReplyFormat(schema=schema), seed).message.content), schema)
        given = {"type": "object", "properties": {"value": schema}, "required": ["value"]}
        (call,) = say(engine, ReplyFormat(tools=[tool("pick", given)], calls="must"), seed).message.tool_calls
        jsonschema.validate(dict(call.arguments), given)


QUESTION = [Message("user", "Hello there, how are you?")]
BOOK = {
    "type": "function",
    "function": {
        "name": "book_a_flight",
        "parameters": {
            "type": "object",
            "properties": {
                "destination": {"type": "string", "maxLength": 5},
                "travellers": {"type": "integer", "minimum": 1, "maximum": 99},
                "conditions": {"enum": ["refundable", "rebookable"]},
            },
            "required": ["destination", "travellers", "conditions"],
        },
    },
}
FORMS = {
    "call": ReplyFormat(tools=[BOOK], calls="must"),
    "calls": ReplyFormat(tools=[BOOK], calls="must", parallel=True),
    "text, then a call": ReplyFormat(tools=[BOOK], calls="may"),
    "json": ReplyFormat(schema=BOOK["function"]["parameters"]),  # type: ignore[index]
}


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the model choose where there is no choice, and read one token at a time."""

    def patch() -> None:
        real, read = Constraint.follow, turns._read
        monkeypatch.setattr(Constraint, "follow", lambda own: real(own) if own.closing else None)

        def each(context: Any, sequence: Any, tokens: Any, segment: int) -> Any:
            for token in tokens:
                yield from read(context, sequence, [token], segment)

        monkeypatch.setattr(turns, "_read", each)

    return patch


def assert_same(found: Turn, expected: Turn) -> None:
    assert found.usage == expected.usage
    assert_same_turn(found, expected)


@pytest.mark.parametrize("strategy", ["token", "sentence"])
def test_tokens_and_memory_are_those_of_one_by_one(
    make_engine: MakeEngine, one_by_one: Callable[[], None], strategy: str
) -> None:
    engine = make_engine(write_strategy=strategy)
    cases = list(zip(FORMS.values(), (101, 106, 160, 120), ("all", "input", "all", "off"), strict=True))

    def run(form: ReplyFormat, most: int, write: Any) -> Turn:
        engine.forget_prefills()
        return engine.turn(QUESTION, sampling=Sampling(max_tokens=most), form=form, write=write)

    quick = [run(*case) for case in cases]
    one_by_one()
    for case, turn in zip(cases, quick, strict=True):
        assert_same(turn, run(*case))
    assert {turn.finish_reason for turn in quick} >= {"length", "tool_calls"}


@pytest.mark.parametrize(
    ("stop", "names"),
    [
        ("light", ("calls", "text, then a call")),
        ('ion": "', ("call", "json")),
        ("refund", ("call", "json")),
        ("}}", ("call", "calls")),
    ],
)
def test_a_stop_string_within_takes_back_what_is_behind_it(
    make_engine: MakeEngine, one_by_one: Callable[[], None], stop: str, names: tuple[str, ...]
) -> None:
    engine = make_engine()
    sampling = Sampling(max_tokens=120, stop=(stop,))

    def run(form: ReplyFormat) -> Turn:
        engine.forget_prefills()
        return engine.turn(QUESTION, sampling=sampling, form=form)

    quick = [run(FORMS[name]) for name in names]
    one_by_one()
    for name, turn in zip(names, quick, strict=True):
        assert_same(turn, run(FORMS[name]))


def test_a_call_without_a_choice_needs_one_pass(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    nothing = {"type": "function", "function": {"name": "nothing", "parameters": {"type": "object", "properties": {}}}}
    passes: list[int] = []
    real = ModelRunner.forward

    def forward(own: ModelRunner, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(tokens.shape[1])
        return real(own, tokens, *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    turn = engine.turn(QUESTION, form=ReplyFormat(tools=[nothing], calls="must"))
    assert turn.message.tool_calls[0].name == "nothing"
    assert len(turn.token_ids) > 10
    assert len(passes) <= 3, "the prompt in two parts, and the reply with what closes it"


def test_in_company_each_is_as_it_is_alone(make_engine: MakeEngine) -> None:
    engine = make_engine()
    forms = [*FORMS.values(), None]

    def run(number: int) -> Turn:
        sampling = Sampling(temperature=(0.0, 1.0)[number % 2], seed=number, max_tokens=110 + 10 * (number % 4))
        return engine.turn([Message("user", f"Hello {number}.")], sampling=sampling, form=forms[number % 5])

    alone = [run(number) for number in range(10)]  # each form at both temperatures
    assert_same_at_once(run, range(10), alone)
