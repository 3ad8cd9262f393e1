"""Tool choice and structured output in LangChain's and OpenAI's words, as a ``ReplyFormat`` of the engine.

What a caller may write for one thing is brought into one form here; what it means is in
``agentmem.generation.reply_format``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.pydantic import is_basemodel_subclass

from agentmem import ReplyFormat
from agentmem.errors import ConfigError
from agentmem.messages import Message
from agentmem_langgraph.tools import json_schema, openai_tool

Method = Literal["function_calling", "json_schema", "json_mode"]

_METHODS = ("function_calling", "json_schema", "json_mode")
_ANY = ("any", "required", True)


def chosen(tool_choice: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    """A tool choice as "auto", "none", "any" or "=" and the name of a tool.

    Raises:
        ConfigError: no tool has that name, or the choice is none of those.
    """
    if tool_choice in (None, "auto"):
        return "auto"
    if tool_choice in ("none", False):
        return "none"
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(tool_choice, Mapping):
        tool_choice = tool_choice.get("function", tool_choice).get("name")
    if tool_choice in names:
        return f"={tool_choice}"
    if tool_choice in _ANY and names:
        return "any"
    raise ConfigError(
        f"tool_choice is 'auto', 'none', 'any' or the name of a tool ({', '.join(names) or 'there is none'}); "
        f"found {tool_choice!r}"
    )


def reply_format(
    tools: Sequence[Mapping[str, Any]], tool_choice: Any, response_format: Any, *, parallel: bool | None
) -> ReplyFormat | None:
    """What a reply is bound to be; None where the model may say what it wants.

    Args:
        tools: in OpenAI's form.
        tool_choice: any spelling.
        response_format: OpenAI's ``{"type": "json_schema" | "json_object" | "text", ...}``, or None; "json_object" may
            name a "schema" as well.
        parallel: whether a reply may hold several calls; by default one where a call is forced, else any number.

    Raises:
        ConfigError: a choice or format that does not exist.
    """
    choice, schema = chosen(tool_choice, tools), wanted_schema(response_format)
    if choice in ("auto", "none"):
        offered = tools if choice == "auto" else ()
        strict = any(tool["function"].get("strict") for tool in offered)
        if schema is None and not strict:
            return None
        return ReplyFormat(offered, "may" if offered else "none", parallel is not False, schema)
    named = [tool for tool in tools if choice in ("any", f"={tool['function']['name']}")]
    return ReplyFormat(named, "must", bool(parallel), schema)


def explained(messages: Sequence[Message], response_format: Any) -> list[Message]:
    """The messages, the schema of a ``json_schema`` format shown in the leading system message.

    A model that does not know the schema can only stumble along it. Callers of the other formats say in their messages
    what they want.
    """
    found = list(messages)
    if isinstance(response_format, Mapping) and response_format.get("type") == "json_schema":
        told = f"Answer with JSON that fits this schema:\n{json.dumps(wanted_schema(response_format))}"
        if found and found[0].role == "system":
            found[0] = replace(found[0], content=f"{found[0].content}\n\n{told}")
        else:
            found.insert(0, Message("system", told))
    return found


def wanted_schema(response_format: Any) -> Mapping[str, Any] | None:
    """The JSON schema of a ``response_format``; None where it asks for text.

    Raises:
        ConfigError: it is none of OpenAI's forms.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema", {"type": "object"})
    else:
        given = response_format.get("json_schema") if kind == "json_schema" else None
        schema = given.get("schema") if isinstance(given, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ConfigError(
            "response_format is {'type': 'json_schema', 'json_schema': {'name': ..., 'schema': ...}}, "
            f"{{'type': 'json_object', 'schema': ...}} or {{'type': 'text'}}; found {response_format!r}"
        )
    return schema


def parsing(
    model: Any, schema: Any, method: str, *, include_raw: bool, strict: bool | None, options: Mapping[str, Any]
) -> Runnable[Any, Any]:
    """A model whose replies are bound to a schema, and the parser that makes the schema's objects of them.

    Raises:
        ConfigError: the method does not exist, or needs a schema.
    """
    if method not in _METHODS or (schema is None and method != "json_mode"):
        raise ConfigError(
            f"with_structured_output takes a schema and method {', '.join(_METHODS)}; found {schema!r} and {method!r}"
        )
    as_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    named = dict(options)
    if schema is not None:
        named["ls_structured_output_format"] = {"kwargs": {"method": method}, "schema": schema}
    parser: BaseOutputParser[Any]
    if method == "function_calling":
        tool = openai_tool(schema, strict)
        bound = model.bind_tools([tool], tool_choice="any", **named)
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)
            if as_class
            else JsonOutputKeyToolsParser(key_name=tool["function"]["name"], first_tool_only=True)
        )
    else:
        bound = model.bind(response_format=_response_format(schema, method), **named)
        parser = PydanticOutputParser(pydantic_object=schema) if as_class else JsonOutputParser()
    if not include_raw:
        answered: Runnable[Any, Any] = bound | parser
        return answered
    parsed = RunnablePassthrough.assign(parsed=lambda found: parser.invoke(_raw(found)), parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _response_format(schema: Any, method: str) -> dict[str, Any]:
    if schema is None:
        return {"type": "json_object"}
    if isinstance(schema, Mapping) and isinstance(schema.get("schema"), Mapping) and "name" in schema:
        plain = dict(schema["schema"])  # OpenAI's form of a json_schema
    else:
        plain = json_schema(schema)
    if method == "json_mode":
        return {"type": "json_object", "schema": plain}
    return {"type": "json_schema", "json_schema": {"name": plain.get("title", "reply"), "schema": plain}}


def _raw(found: Mapping[str, Any]) -> AIMessage:
    message: AIMessage = found["raw"]
    return message
