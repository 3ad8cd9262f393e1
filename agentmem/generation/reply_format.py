"""The format that a reply must have (JSON of a schema, or tool calls), and its grammar.

A `ReplyFormat` becomes a grammar in llguidance's Lark form: the delimiters of calls are tokens where the tokenizer has
tokens for them, and the JSON between them follows the schemas. Schemas are closed first (an object with named
properties takes no others, an integer fits in 64 bits), since a grammar permits whatever is not forbidden.

Pure functions: no model, no tokenizer. `guided` follows the grammar while a reply is decoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentmem.errors import ConfigError
from agentmem.generation.output_parser import Tags
from agentmem.messages import MOST_NESTED, is_nested_too_deep

Calls = Literal["none", "may", "must"]

# The widest 64-bit integers that a double holds exactly; grammars are built with doubles.
_WIDEST = 2**63 - 2**10
# How JSON is written: as by json.dumps, which is how chat templates show earlier calls.
_SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAPS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


@dataclass(frozen=True)
class ReplyFormat:
    """What a reply must be.

    Attributes:
        tools: function descriptions in OpenAI form; only these may be called, with arguments that fit their
            schemas.
        calls: "must" (a call and nothing else), "may" (text, then calls if the model wants any) or "none".
        parallel: whether one reply may hold several calls.
        schema: a JSON schema: a reply without calls is JSON that fits it. None: such a reply is free text.

    Raises:
        ConfigError: calls without a tool to call, options that do not constrain the reply at all, or a schema that is
            no mapping, is nested deeper than `MOST_NESTED`, or has a reference that leads only to itself.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    calls: Calls = "none"
    parallel: bool = False
    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.calls not in ("none", "may", "must"):
            raise ConfigError(f"calls must be none, may or must; found {self.calls!r}")
        if self.calls != "none" and not self.tools:
            raise ConfigError(f"calls={self.calls!r} needs a tool to call; found none")
        if self.calls == "none" and self.schema is None:
            raise ConfigError("a reply format says what calls or what JSON is expected; found neither")
        for tool in self.tools:
            function = tool.get("function")
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise ConfigError(
                    f"a tool is {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}; found {tool!r}"
                )
            _check_schema(function.get("parameters"), f"the parameters of {function['name']!r}")
        _check_schema(self.schema, "the schema")


def lark(form: ReplyFormat, tags: Tags, *, thinking: bool) -> str:
    """The grammar of a format.

    Args:
        form: the format.
        tags: how the tokenizer spells the delimiters of calls and reasoning.
        thinking: whether the prompt has opened a reasoning block, which must end before the reply begins.
    """
    delimiters = {tag: f"<[{token}]>" for token, tag in tags.by_token.items()}
    opening, closing, thought = (
        delimiters.get(tag, json.dumps(tag)) for tag in ("<tool_call>", "</tool_call>", "</think>")
    )
    rules = []
    alternatives = []
    if form.calls != "none":
        for number, tool in enumerate(form.tools):
            rules.append(f"tool_{number}: %json {json.dumps(_call_schema(tool))}")
        tools = " | ".join(f"tool_{number}" for number in range(len(form.tools)))
        rules.append(f'call: {opening} "\\n" ({tools}) "\\n" {closing}')
        rules.append('calls: call ("\\n" call)*' if form.parallel else "calls: call")
        alternatives.append("calls")
    if form.schema is not None:
        rules.append(f"json: %json {json.dumps({**closed(form.schema), 'x-guidance': _SPELLING})}")
        alternatives.append("json")
    elif form.calls == "may":
        alternatives = ["TEXT calls?"]
    start = " | ".join(alternatives)
    if thinking:
        start = f'TEXT {thought} ("\\n\\n")? ({start})'
    # Control tokens match no expression, so text cannot contain a delimiter.
    return "\n".join(["%llguidance {}", f"start: {start}", *rules, "TEXT: /(.|\\n)*/"])


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same schema, permitting no more than it names: objects are closed, and integers fit in 64 bits."""
    result: dict[str, Any] = dict(schema)
    for key in _MAPS:
        if isinstance(result.get(key), Mapping):
            result[key] = {name: _closed_any(part) for name, part in result[key].items()}
    for key in _LISTS:
        if isinstance(result.get(key), Sequence) and not isinstance(result[key], str):
            # Several schemas for one object: each may name only some of its properties, so none of them is closed.
            open_parts = key == "allOf" or (key != "prefixItems" and "properties" in result)
            result[key] = [part if open_parts else _closed_any(part) for part in result[key]]
    for key in _SINGLE:
        if key in result:
            result[key] = _closed_any(result[key])
    # Next to other schemas for the same object, `properties` does not list everything that it may have.
    if "properties" in result and not result.keys() & {"additionalProperties", "$ref", "allOf", "anyOf", "oneOf"}:
        result["additionalProperties"] = False
    types = result.get("type")
    integer = types == "integer" or (isinstance(types, list) and "integer" in types and "number" not in types)
    if integer and not result.keys() & {"const", "enum"}:
        least, most = (
            result.get("minimum", result.get("exclusiveMinimum")),
            result.get("maximum", result.get("exclusiveMaximum")),
        )
        if least is None and (most is None or most > -_WIDEST):
            result["minimum"] = -_WIDEST
        if most is None and (least is None or least < _WIDEST):
            result["maximum"] = _WIDEST
    return result


def _closed_any(schema: Any) -> Any:
    return closed(schema) if isinstance(schema, Mapping) else schema


def _call_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the JSON between the delimiters of a call: the tool's name and its arguments."""
    function = tool["function"]
    arguments = closed(function.get("parameters") or {"type": "object", "properties": {}})
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": _rebased(_objects_only(arguments), "#/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
        "x-guidance": _SPELLING,
    }


def _objects_only(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema restricted to objects, whatever else it permitted."""
    if schema.get("type") == "object":
        return schema
    if not schema.keys() & {"$ref", "allOf", "anyOf", "oneOf"}:
        return {**schema, "type": "object"}
    stay = ("$defs", "definitions")  # where references point
    definitions: dict[str, Any] = {key: schema[key] for key in stay if key in schema}
    return {"allOf": [{key: schema[key] for key in schema.keys() - definitions}, {"type": "object"}], **definitions}


def _check_schema(schema: Any, where: str) -> None:
    """Refuse what no grammar can be made of.

    Raises:
        ConfigError: says what was found where.
    """
    if not isinstance(schema, Mapping | None):
        raise ConfigError(f"{where} should be a JSON schema as a mapping; found {type(schema).__name__}")
    if is_nested_too_deep(schema):
        raise ConfigError(
            f"{where} should be nested at most {MOST_NESTED} deep; found it deeper; put its inner parts into $defs and "
            "refer to them"
        )
    _check_references(schema, where)


def _check_references(schema: Any, where: str) -> None:
    """Refuse a schema in which following a reference leads back to it, and to nothing that a value could be.

    Raises:
        ConfigError: names the reference.
    """
    pending, seen = [schema], set[int]()
    while pending:
        part = pending.pop()
        if isinstance(part, Mapping | list | tuple) and id(part) not in seen:  # an object that holds itself is no JSON
            seen.add(id(part))
            pending += part.values() if isinstance(part, Mapping) else part
        followed: list[str] = []
        while isinstance(part, Mapping) and isinstance(reference := part.get("$ref"), str):
            if reference in followed:
                raise ConfigError(
                    f"expected references that lead to a type, found {' -> '.join([*followed, reference])} in {where}, "
                    "which leads only to itself; give its definition a type"
                )
            followed.append(reference)
            part = _pointed(schema, reference)


def _pointed(schema: Any, reference: str) -> Any:
    """The part of a schema that a reference points to; None for another document, or nothing."""
    first, *names = reference.split("/")
    for name in names if first == "#" else ["#"]:
        key = name.replace("~1", "/").replace("~0", "~")
        schema = schema.get(key) if isinstance(schema, Mapping) else None
    return schema


def _rebased(schema: Any, to: str) -> Any:
    """The schema with its internal references pointing to its new place in a larger schema."""
    if isinstance(schema, Mapping):
        return {
            key: to + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _rebased(value, to)
            for key, value in schema.items()
        }
    if isinstance(schema, list | tuple):
        return [_rebased(part, to) for part in schema]
    return schema
