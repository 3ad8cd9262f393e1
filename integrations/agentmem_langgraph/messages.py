"""LangChain's messages as the engine takes them.

A memory recognises a message that it has consumed by its digest. So a reply that went out as an AIMessage must come
back as the same message, and nothing that a graph may add later (ids, names, usage, metadata, reasoning) may count.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import cast

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from agentmem.errors import TranscriptError
from agentmem.messages import ROLES, Message, MessageCache, Role, ToolCall

_ROLES: dict[type[BaseMessage], Role] = {
    AIMessage: "assistant",
    HumanMessage: "user",
    SystemMessage: "system",
    ToolMessage: "tool",
}
_MARK = "agentmem"  # additional_kwargs["agentmem"] = {"write": False}
# Blocks that no text stands for. Whatever else other providers put into an AI message beside its text (reasoning, calls
# that stand in `tool_calls` too, citations, server tools) is left out.
_MEDIA = {
    "image",
    "image_url",
    "input_image",
    "audio",
    "input_audio",
    "video",
    "video_url",
    "file",
    "input_file",
    "media",
}

_Key = tuple[Role, str, str, str, bool]  # role, text, tool_call_id, name, write: all of a message but calls
_MESSAGE_BYTES = 600  # a message's object with its digest, and the key's other strings


def to_engine(messages: Sequence[BaseMessage], cache: MessageCache | None = None) -> list[Message]:
    """The same messages for the engine, one for one.

    Args:
        messages: LangChain's.
        cache: the engine's cache of seen messages. From it equal messages come as the same object, so that the digests
            of a long history are at hand.

    Raises:
        TranscriptError: a kind of message or content that a text model cannot be shown.
    """
    # Done for a whole history at every turn, and pydantic's isinstance and attributes are slow: what most messages are,
    # text without calls and marks, is taken as it lies.
    keys: list[_Key] = []
    for message in messages:
        role, fields = _ROLES.get(type(message)), vars(message)
        text = fields["content"]
        marked = fields["additional_kwargs"] or fields.get("tool_calls")
        if role is None or role == "tool" or type(text) is not str or marked:
            keys.append(_key(message))
        else:
            keys.append((role, text, "", fields["name"] or "", True))
    kept = [None] * len(keys) if cache is None else cache.get_all(keys)
    return [
        _converted(message, key, cache) if equal is None or vars(message).get("tool_calls") else equal
        for equal, message, key in zip(kept, messages, keys, strict=True)
    ]


def _converted(message: BaseMessage, key: _Key, cache: MessageCache | None) -> Message:
    role, text, tool_call_id, name, write = key
    if role == "assistant" and isinstance(message, AIMessage) and message.tool_calls:
        # Arguments may be changed in place, so a message with calls is made anew each time.
        calls = tuple(ToolCall(call["name"], call["args"], call["id"] or "") for call in message.tool_calls)
        return Message(role, text, tool_calls=calls, name=name, write=write)
    converted = Message(role, text, tool_call_id=tool_call_id, name=name, write=write)
    if cache is not None:
        cache.put(key, converted, sys.getsizeof(text) + _MESSAGE_BYTES)
    return converted


def _key(message: BaseMessage) -> _Key:
    role, text = _role(message), _text(message)
    tool_call_id = ""
    if role == "tool":
        result = cast(ToolMessage, message)
        tool_call_id = result.tool_call_id
        if result.status == "error" and not text.startswith("Error"):
            text = f"Error: {text}"  # templates show a tool's text alone
    return role, text, tool_call_id, message.name or "", _write_flag(message)


def _role(message: BaseMessage) -> Role:
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    if isinstance(message, ChatMessage) and message.role in ROLES and message.role != "tool":
        return cast(Role, message.role)
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
    content = message.content
    if content is None or isinstance(content, str):  # other code makes messages without content
        return content or ""
    spoken = isinstance(message, AIMessage)
    return "".join(block if isinstance(block, str) else _block_text(block, message.type, spoken) for block in content)


def _block_text(block: Mapping[str, object], kind: str, spoken: bool) -> str:
    """The text of a content block; `spoken`: by an AI."""
    for name in ("text", "refusal") if spoken else ("text",):
        if (text := block.get(name)) is not None and isinstance(text, str) and block.get("type") in _TEXT_TYPES:
            return text
    if spoken and block.get("type") not in _MEDIA:
        return ""
    raise TranscriptError(
        f"a text model reads text; found a block of type {block.get('type')!r} in a {kind} "
        "message; describe it in text, or leave it out"
    )


_TEXT_TYPES = {"text", "output_text", "input_text", "refusal"}
