"""Tools of any kind in OpenAI's form.

LangChain's own conversion is used as far as it goes. It writes references out, which has no end where a class holds
itself (a tree of nodes): there it gives up and permits anything. So the parameters of such tools are taken from
pydantic, references and all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from langchain_core.tools import BaseTool, StructuredTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from agentmem.errors import ConfigError

Tool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool

_HERE = "#/$defs/"


def openai_tool(tool: Tool, strict: bool | None = None) -> dict[str, Any]:
    """A tool in OpenAI's form.

    Raises:
        ConfigError: it is no function with a name, or of a kind that cannot be described.
    """
    plain = _converted(convert_to_openai_tool, tool, strict=strict)
    function = plain.get("function")
    if plain.get("type") != "function" or not isinstance(function, Mapping) or not function.get("name"):
        raise ConfigError(f"a tool is a function with a name; found {plain!r}; leave out others")
    own = _own_schema(tool)
    if own is None or not _holds_itself(own):
        return plain
    parameters = _untitled(_rooted(own))
    parameters.pop("description", None)  # LangChain puts it beside the parameters
    return {**plain, "function": {**function, "parameters": parameters}}


def json_schema(schema: Any) -> dict[str, Any]:
    """The JSON schema of a class, a TypedDict or a function.

    Raises:
        ConfigError: it has none.
    """
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    return _converted(convert_to_json_schema, schema)


def _converted(convert: Callable[..., dict[str, Any]], given: Any, **options: Any) -> dict[str, Any]:
    if isinstance(given, Mapping) and "$ref" in given and "title" not in given:
        given = _rooted(given)
    try:
        return convert(given, **options)
    except RecursionError:
        raise ConfigError(
            f"{getattr(given, '__name__', given)!r} holds itself, which only pydantic classes and JSON schemas can; "
            "make it a pydantic class"
        ) from None
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"this cannot be described as a function or a schema: {error}") from error


def _own_schema(tool: Tool) -> dict[str, Any] | None:
    """The schema that pydantic has of a tool's arguments; None for what is given as a schema already."""
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
    """Whether one of a schema's definitions leads back to itself."""
    try:
        TopologicalSorter({name: set(_named(one)) for name, one in schema.get("$defs", {}).items()}).prepare()
    except CycleError:
        return True
    return False


def _named(schema: Any) -> Iterator[str]:
    """The definitions that a schema refers to."""
    if isinstance(schema, Mapping):
        to = schema.get("$ref")
        if isinstance(to, str) and to.startswith(_HERE):
            yield to.removeprefix(_HERE)
    for one in schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ():
        yield from _named(one)


def _rooted(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that is nothing but a reference to one of its definitions, as that definition."""
    definitions, to = schema.get("$defs", {}), str(schema.get("$ref", ""))
    found = definitions.get(to.removeprefix(_HERE)) if to.startswith(_HERE) else None
    return {**found, "$defs": definitions} if found is not None else dict(schema)


def _untitled(schema: Any, *, names: bool = False) -> Any:
    """A schema without the titles that pydantic makes of names. ``names``: the keys are names, not keywords."""
    if isinstance(schema, Mapping):
        return {
            key: _untitled(one, names=not names and key in ("properties", "$defs"))
            for key, one in schema.items()
            if names or key != "title"
        }
    return [_untitled(one) for one in schema] if isinstance(schema, list) else schema
