"""Converts tools, tool choice and structured output from the forms of LangChain and OpenAI for the engine.

The various spellings of one thing are brought into one form here; what that form means is defined in
`agentmem.generation.reply_format`. LangChain's own conversion of tools is used where it works. It expands references,
which never ends where a class refers to itself (a tree of nodes); there it gives up and permits anything. So the
parameters of such tools are taken from pydantic, with references.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal

from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool, StructuredTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from agentmem import ReplyFormat
from agentmem.errors import ConfigError
from agentmem.messages import Message

Tool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool
Method = Literal["function_calling", "json_schema", "json_mode"]

_METHODS = ("function_calling", "json_schema", "json_mode")
_ANY = ("any", "required", True)
_DEFINITIONS = "#/$defs/"


def openai_tool(tool: Tool, strict: bool | None = None) -> dict[str, Any]:
    """A tool in OpenAI's form.

    Raises:
        ConfigError: the tool is not a function with a name, or cannot be described; or its parameters have a reference
            that leads only to itself.
    """
    plain: dict[str, Any] = _without_nulls(_converted(convert_to_openai_tool, tool, strict=strict))
    function = plain.get("function")
    if plain.get("type") != "function" or not isinstance(function, Mapping) or not function.get("name"):
        raise ConfigError(f"a tool is a function with a name; found {plain!r}; leave out others")
    ReplyFormat([plain], "may")  # checks the references
    own = _own_schema(tool)
    if own is None or not _holds_itself(own):
        return plain
    parameters = _untitled(_rooted(own))
    parameters.pop("description", None)  # LangChain puts the description next to the parameters
    return {**plain, "function": {**function, "parameters": parameters}}


def openai_tools(tools: Sequence[Tool], strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools in OpenAI's form, one for each name.

    Raises:
        ConfigError: see `openai_tool`; or two tools of one name have different parameters.
    """
    by_name: dict[str, dict[str, Any]] = {}
    for tool in tools:
        plain = openai_tool(tool, strict)
        name = plain["function"]["name"]
        first = by_name.setdefault(name, plain)
        if _arguments(first) != _arguments(plain):
            raise ConfigError(f"every tool has a name of its own; found two that are called {name!r}; rename one")
    return list(by_name.values())


def _arguments(tool: Mapping[str, Any]) -> Any:
    parameters = _untitled(tool["function"].get("parameters", {}))
    return {key: parameters[key] for key in ("properties", "required") if parameters.get(key)}


def json_schema(schema: Any) -> dict[str, Any]:
    """The JSON schema of a class, a TypedDict or a function.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    return _converted(convert_to_json_schema, schema)


def _converted(convert: Callable[..., dict[str, Any]], described: Any, **options: Any) -> dict[str, Any]:
    if isinstance(described, Mapping):
        ReplyFormat(schema=described)  # checks the references, and how deep it is nested
        if "$ref" in described and "title" not in described:
            described = _rooted(described)
    try:
        return convert(described, **options)
    except RecursionError:
        raise ConfigError(
            f"{getattr(described, '__name__', described)!r} holds itself, which only pydantic classes and JSON schemas "
            "can; make it a pydantic class"
        ) from None
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"this cannot be described as a function or a schema: {error}") from error


def _without_nulls(schema: Any) -> Any:
    """The schema without keywords whose value is null, such as "required": some programs write these for no value."""
    if isinstance(schema, Mapping):
        return {
            key: _without_nulls(item)
            for key, item in schema.items()
            if item is not None or key in ("default", "const", "enum")
        }
    return schema


def _own_schema(tool: Tool) -> dict[str, Any] | None:
    """Pydantic's schema of a tool's arguments; None for a tool that was given as a schema."""
    if isinstance(tool, Mapping):
        return None
    if isinstance(tool, type):
        return tool.model_json_schema() if is_basemodel_subclass(tool) and issubclass(tool, BaseModel) else None
    made = tool if isinstance(tool, BaseTool) else StructuredTool.from_function(tool, description="-")
    schema = made.tool_call_schema
    if isinstance(schema, dict):
        return schema
    return schema.model_json_schema() if issubclass(schema, BaseModel) else None


def _holds_itself(schema: Mapping[str, Any]) -> bool:
    """Whether one of a schema's definitions refers, directly or indirectly, to itself."""
    try:
        TopologicalSorter(
            {name: set(_references(definition)) for name, definition in schema.get("$defs", {}).items()}
        ).prepare()
    except CycleError:
        return True
    return False


def _references(schema: Any) -> Iterator[str]:
    """The definitions that a schema refers to."""
    if isinstance(schema, Mapping):
        target = schema.get("$ref")
        if isinstance(target, str) and target.startswith(_DEFINITIONS):
            yield target.removeprefix(_DEFINITIONS)
    for item in schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ():
        yield from _references(item)


def _rooted(schema: Mapping[str, Any]) -> dict[str, Any]:
    """If a schema is only a reference to one of its definitions, that definition; else the schema.

    Raises:
        ConfigError: it has a reference that leads only to itself.
    """
    ReplyFormat(schema=schema)  # checks the references
    definitions = schema.get("$defs", {})
    while (target := str(schema.get("$ref", ""))).startswith(_DEFINITIONS):
        definition = definitions.get(target.removeprefix(_DEFINITIONS))
        if not isinstance(definition, Mapping):
            break
        schema = {**definition, "$defs": definitions}
    return dict(schema)


def _untitled(schema: Any, *, names: bool = False) -> Any:
    """The schema without the titles that pydantic derives from names. `names`: its keys are names, not keywords."""
    if isinstance(schema, Mapping):
        return {
            key: _untitled(item, names=not names and key in ("properties", "$defs"))
            for key, item in schema.items()
            if names or key != "title"
        }
    return [_untitled(item) for item in schema] if isinstance(schema, list) else schema


def chosen_tool(tool_choice: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    """A tool choice as "auto", "none", "any", or "=" followed by the name of a tool.

    Raises:
        ConfigError: no tool has that name, or the choice is none of these.
    """
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(tool_choice, Mapping):  # {"type": "any"}, {"type": "tool", "name": ...}, {"function": {"name": ...}}
        named = tool_choice.get("function", tool_choice)
        name = named.get("name") if isinstance(named, Mapping) else None
        tool_choice = tool_choice.get("type") if name is None else name
    if tool_choice in (None, "auto"):
        return "auto"
    if tool_choice in ("none", False):
        return "none"
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
    """The format that a reply must have; None where the model is free.

    Args:
        tools: in OpenAI's form.
        tool_choice: any spelling.
        response_format: OpenAI's `{"type": "json_schema" | "json_object" | "text", ...}`, or None; "json_object"
            may also have a "schema".
        parallel: whether a reply may hold several calls; by default one if a call is forced, else any number.

    Raises:
        ConfigError: an unknown choice or format.
    """
    choice, schema = chosen_tool(tool_choice, tools), wanted_schema(response_format)
    if choice in ("auto", "none"):
        offered = tools if choice == "auto" else ()
        strict = any(tool["function"].get("strict") for tool in offered)
        if schema is None and not strict:
            return None
        return ReplyFormat(offered, "may" if offered else "none", parallel is not False, schema)
    named = [tool for tool in tools if choice in ("any", f"={tool['function']['name']}")]
    return ReplyFormat(named, "must", bool(parallel), schema)


def with_schema_shown(messages: Sequence[Message], response_format: Any) -> list[Message]:
    """The messages, with the schema of a `json_schema` format shown in the leading system message.

    A model that does not know the schema can only satisfy it blindly. Callers of the other formats explain in their
    messages what they want.
    """
    shown = list(messages)
    if isinstance(response_format, Mapping) and response_format.get("type") == "json_schema":
        text = f"Answer with JSON that fits this schema:\n{json.dumps(wanted_schema(response_format))}"
        if shown and shown[0].role == "system":
            shown[0] = replace(shown[0], content=f"{shown[0].content}\n\n{text}")
        else:
            shown.insert(0, Message("system", text))
    return shown


def wanted_schema(response_format: Any) -> Mapping[str, Any] | None:
    """The JSON schema of a `response_format`; None if it asks for text.

    Raises:
        ConfigError: it has none of OpenAI's forms.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema", {"type": "object"})
    else:
        described = response_format.get("json_schema") if kind == "json_schema" else None
        schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ConfigError(
            "response_format is {'type': 'json_schema', 'json_schema': {'name': ..., 'schema': ...}}, "
            f"{{'type': 'json_object', 'schema': ...}} or {{'type': 'text'}}; found {response_format!r}"
        )
    return schema


def structured(
    model: Any, schema: Any, method: str, *, include_raw: bool, strict: bool | None, options: Mapping[str, Any]
) -> Runnable[Any, Any]:
    """A model whose replies must fit a schema, and the parser that turns them into objects of that schema.

    Raises:
        ConfigError: unknown method, or a schema is required.
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
        chain: Runnable[Any, Any] = bound | parser
        return chain
    parsed = RunnablePassthrough.assign(
        parsed=lambda outputs: parser.invoke(_raw(outputs)), parsing_error=lambda _: None
    )
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _response_format(schema: Any, method: str) -> dict[str, Any]:
    if schema is None:
        return {"type": "json_object"}
    if isinstance(schema, Mapping) and isinstance(schema.get("schema"), Mapping) and "name" in schema:
        plain = dict(schema["schema"])  # OpenAI's json_schema form
    else:
        plain = json_schema(schema)
    if method == "json_mode":
        return {"type": "json_object", "schema": plain}
    return {"type": "json_schema", "json_schema": {"name": plain.get("title", "reply"), "schema": plain}}


def _raw(outputs: Mapping[str, Any]) -> AIMessage:
    message: AIMessage = outputs["raw"]
    return message
