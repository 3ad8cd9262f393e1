"""The items of `/v1/responses` and the messages of a thread, in both directions."""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from langchain_core.messages import AIMessage

from agentmem_langgraph.messages import REASONING
from agentmem_serve.chat import calls_of, finish_reason
from agentmem_serve.errors import ApiError

_ID = re.compile(r"resp_([0-9a-f]{32})([\w-]+)")


def response_id(thread: str, checkpoint: str) -> str:
    """The id of a response: the thread's name and the checkpoint, so that it can be found without a table."""
    name = urlsafe_b64encode(thread.encode("utf-8", "surrogatepass")).decode().rstrip("=")
    return f"resp_{UUID(checkpoint).hex}{name}"


def place_of(response: str, param: str) -> tuple[str, str]:
    """The name of the thread and the checkpoint of a response.

    Raises:
        ApiError: this is no id of a response.
    """
    found = _ID.fullmatch(response)
    try:
        if found is None:
            raise ValueError(response)
        name = urlsafe_b64decode(found[2] + "=" * (-len(found[2]) % 4)).decode("utf-8", "surrogatepass")
    except ValueError:
        message = f"expected the id of a response of this server, found {response[:80]!r}"
        raise ApiError(404, message, code="not_found", param=param) from None
    return name, str(UUID(found[1]))


def as_chat(items: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items of an input as messages of `/v1/chat/completions`.

    Raises:
        ApiError: an item is of a kind that this server does not know.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            # The text of a reply and its calls are items of their own; in a thread they are one message.
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":  # which is shown, and never read again
            message = f"expected messages, function calls and their outputs, found an item of type {kind!r}"
            raise ApiError(400, message, param="input")
    return messages


def output_of(reply: AIMessage) -> list[dict[str, Any]]:
    """A reply as items of an output."""
    items = []
    if reasoning := reply.additional_kwargs.get(REASONING):
        items.append(reasoning_item(f"rs_{reply.id}", reasoning))
    calls = [call_item(**call) for call in calls_of(reply)]
    if reply.text or not calls:
        items.append(message_item(str(reply.id), reply.text, status_of(reply)))
    return [*items, *calls]


def message_item(name: str, text: str, status: str) -> dict[str, Any]:
    """Text as an item."""
    content = [text_part(text)] if status != "in_progress" else []
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": content}


def text_part(text: str) -> dict[str, Any]:
    """Text as a part of an item."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(id: str, name: str, arguments: str, status: str = "completed") -> dict[str, Any]:
    """A call as an item."""
    return {
        "id": f"fc_{id}",
        "type": "function_call",
        "call_id": id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def reasoning_item(name: str, text: str) -> dict[str, Any]:
    """Reasoning as an item."""
    return {"id": name, "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def status_of(reply: AIMessage) -> str:
    """Whether a reply came to its own end."""
    return "incomplete" if finish_reason(reply) == "length" else "completed"


def chat_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools as `/v1/chat/completions` has them.

    Raises:
        ApiError: one is no function.
    """
    if wrong := [tool.get("type") for tool in tools if tool.get("type") != "function"]:
        raise ApiError(400, f"expected tools of type 'function', found {wrong[0]!r}; leave it out", param="tools")
    functions = [{name: value for name, value in tool.items() if name != "type"} for tool in tools]
    return [{"type": "function", "function": function} for function in functions]


def chat_format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The format of a reply as `/v1/chat/completions` has it."""
    form = dict((text or {}).get("format") or {})
    kind = form.pop("type", "text")
    return None if kind == "text" else {"type": kind, **({kind: form} if kind == "json_schema" else {})}
