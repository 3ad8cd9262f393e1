"""LangChain's messages to agentmem's and back.

A memory recognises a message that it has consumed by its digest. So a reply that went out as an AIMessage
must come back as the same message, whether it was streamed or not, and nothing that a graph may add later
(ids, usage, metadata, reasoning) may count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages import InvalidToolCall as InvalidCall
from langchain_core.messages import ToolCall as Call
from langchain_core.messages.ai import UsageMetadata

from agentmem.errors import TranscriptError
from agentmem.messages import LONGEST_KEPT, ROLES, Message, Role, ToolCall
from agentmem_langgraph.calls import NOT_JSON, CallText

if TYPE_CHECKING:
    from agentmem import Turn

REASONING = "reasoning_content"
"""Where an AIMessage keeps its reasoning (in additional_kwargs); LangChain's content blocks read it there."""

_KEPT = 4096
"""Messages that are kept as the engine takes them; a history is given anew at every turn."""

_PLAIN: dict[type[BaseMessage], Role] = {AIMessage: "assistant", HumanMessage: "user", SystemMessage: "system"}
_MARK = "agentmem"  # additional_kwargs["agentmem"] = {"write": False}
# Blocks of an AI message that are no text: calls stand in `tool_calls` too, and reasoning is never sent back.
_NOT_SAID = {"tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "reasoning", "thinking"}


def to_engine(messages: Sequence[BaseMessage]) -> list[Message]:
    """The same messages for the engine, one for one.

    Raises:
        TranscriptError: a kind of message or content that a text model cannot be shown.
    """
    # Done for a whole history at every turn, and pydantic's isinstance and attributes are slow: what most messages are,
    # text without calls and marks, is taken as it lies.
    found = []
    for message in messages:
        kind, has = type(message), vars(message)
        text = has["content"]
        plain = kind in _PLAIN and type(text) is str and not has["additional_kwargs"] and not has.get("tool_calls")
        short = plain and len(text) <= LONGEST_KEPT
        found.append(_said(kind, text, has["name"]) if short else _to_engine(message))
    return found


@lru_cache(maxsize=_KEPT)
def _said(kind: type[BaseMessage], text: str, name: str | None) -> Message:
    return _known(_PLAIN[kind], text, "", name or "", True)


def _to_engine(message: BaseMessage) -> Message:
    kind = _role_of(type(message))
    role, text, name, write = kind or _role(message), _text(message), message.name or "", _write_flag(message)
    answers = ""
    if kind == "assistant" and (given := cast(AIMessage, message).tool_calls):
        calls = tuple(ToolCall(c["name"], c["args"], c["id"] or "") for c in given)
        return Message(role, text, tool_calls=calls, name=name, write=write)
    if kind == "tool":
        message = cast(ToolMessage, message)
        answers = message.tool_call_id
        if message.status == "error" and not text.startswith("Error"):
            text = f"Error: {text}"  # templates show a tool's text alone
    if len(text) > LONGEST_KEPT:
        return Message(role, text, tool_call_id=answers, name=name, write=write)
    return _known(role, text, answers, name, write)


@lru_cache(maxsize=_KEPT)
def _known(role: Role, text: str, tool_call_id: str, name: str, write: bool) -> Message:
    """A message without calls. The same for the same values, so that the digests of a long history are at hand."""
    return Message(role, text, tool_call_id=tool_call_id, name=name, write=write)


@lru_cache(maxsize=64)
def _role_of(kind: type[BaseMessage]) -> Role | None:
    """The role of all messages of a kind, if there is one."""
    roles: dict[type[BaseMessage], Role] = {**_PLAIN, ToolMessage: "tool"}
    return next((role for base, role in roles.items() if issubclass(kind, base)), None)


def _role(message: BaseMessage) -> Role:
    if isinstance(message, ChatMessage) and message.role in ROLES and message.role != "tool":
        return message.role  # type: ignore[return-value]
    raise TranscriptError(
        f"a human, AI, system or tool message was expected; found {type(message).__name__} "
        f"({getattr(message, 'role', message.type)!r}); convert or remove it first"
    )


def _write_flag(message: BaseMessage) -> bool:
    if _MARK not in message.additional_kwargs:
        return True
    mark = message.additional_kwargs[_MARK]
    write = mark.get("write", True) if isinstance(mark, Mapping) else None
    if not isinstance(write, bool):
        raise TranscriptError(
            f'additional_kwargs["{_MARK}"] is {{"write": True}} or {{"write": False}}; found {mark!r}'
        )
    return write


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for block in message.content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif not (isinstance(message, AIMessage) and block.get("type") in _NOT_SAID):
            raise TranscriptError(
                f"a text model reads text; found a block of type {block.get('type')!r} in a {message.type} "
                "message; describe it in text, or leave it out"
            )
    return "".join(texts)


def to_ai_message(turn: Turn, model_name: str) -> AIMessage:
    """What a turn said, with usage, and with the digest of the new memory in place of the memory."""
    return AIMessage(
        content=turn.message.content,
        tool_calls=[
            Call(name=call.name, args=dict(call.arguments), id=call.id, type="tool_call")
            for call in turn.message.tool_calls
        ],
        invalid_tool_calls=invalid_calls(turn),
        additional_kwargs={REASONING: turn.reasoning} if turn.reasoning else {},
        response_metadata=response_metadata(turn, model_name),
        usage_metadata=usage(turn),
    )


def invalid_calls(turn: Turn) -> list[InvalidCall]:
    """Calls that could not be read: name and arguments as far as they go, else the whole text, with a mark.

    The mark is no JSON. Without it LangChain would complete the cut-off call of a stream to a valid one.
    """
    found = []
    for call in turn.invalid_tool_calls:
        text = CallText(call.id, 0)
        text.push(call.text)
        args = f"{NOT_JSON}{call.text}" if text.name is None else f"{text.arguments}{text.mark}"
        found.append(
            InvalidCall(name=text.name, args=args, id=call.id or None, error=call.error, type="invalid_tool_call")
        )
    return found


def response_metadata(turn: Turn, model_name: str) -> dict[str, Any]:
    """model_name, finish_reason, memory (new digest, tokens written and read).

    Edits, carried tokens and what the prompt left out of a message (`truncation`) where there are any.
    """
    metadata: dict[str, Any] = {
        "model_name": model_name,
        "finish_reason": turn.finish_reason,
        "memory": {
            "digest": turn.state.digest if turn.state else None,
            "written": turn.written,
            "read": turn.read,
        },
    }
    if turn.usage.carried_tokens:
        metadata["carried"] = turn.usage.carried_tokens
    if turn.edits:
        metadata["edits"] = list(turn.edits)
    if turn.truncation is not None:
        cut = turn.truncation
        metadata["truncation"] = {"rule": cut.rule, "messages": list(cut.messages), "tokens": cut.tokens}
    return metadata


def usage(turn: Turn) -> UsageMetadata:
    """Token counts in LangChain's form."""
    used = turn.usage
    return UsageMetadata(
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
        total_tokens=used.input_tokens + used.output_tokens,
        input_token_details={"cache_read": used.cache_read_tokens},
    )
