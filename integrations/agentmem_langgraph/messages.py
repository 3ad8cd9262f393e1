"""Converts LangChain's messages for the engine, and a turn's reply to a LangChain message, complete or in chunks.

A memory recognises a consumed message by its digest. So a reply that was returned as an AIMessage must come back as the
same message, and nothing that a graph may add later (ids, names, usage, metadata, reasoning) may count.

Chunks add up to the complete message. Tool calls are streamed while they are decoded: first the name, as soon as it is
known, then the arguments as they come. A model writes a call as `{"name": ..., "arguments": {...}}`; LangChain wants
the name once and the text of the arguments in pieces. A call in another form, or one that is cut off, is recognised as
invalid only at the end.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages import InvalidToolCall as InvalidCall
from langchain_core.messages import ToolCall as Call
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from agentmem.errors import TranscriptError
from agentmem.messages import ROLES, Message, MessageCache, Role, ToolCall
from agentmem.text import parse_json

if TYPE_CHECKING:
    from agentmem import Delta, Turn

_ROLES: dict[type[BaseMessage], Role] = {
    AIMessage: "assistant",
    HumanMessage: "user",
    SystemMessage: "system",
    ToolMessage: "tool",
}
_MARK = "agentmem"  # additional_kwargs["agentmem"] = {"write": False}
_TEXT_TYPES = {"text", "output_text", "input_text", "text-plain", "refusal"}

_Key = tuple[Role, str, str, str, bool]  # role, text, tool_call_id, name, write: a message without calls
_MESSAGE_BYTES = 600  # a message object with its digest, and the other strings of the key

REASONING = "reasoning_content"
"""The key in additional_kwargs for an AIMessage's reasoning; LangChain's content blocks read it there."""

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_NOT_JSON = "<tool_call>"  # no JSON begins like this


def to_engine(messages: Sequence[BaseMessage], cache: MessageCache | None = None) -> list[Message]:
    """The same messages for the engine, one to one.

    Args:
        messages: LangChain's messages.
        cache: the engine's cache of seen messages. Equal messages are returned as the same object, so that the
            digests of a long history are already computed.

    Raises:
        TranscriptError: a kind of message or content that a text model cannot read.
    """
    # This runs for the whole history at every turn, and pydantic's isinstance and attributes are slow. So the common
    # case, text without calls or marks, is read directly.
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
            text = f"Error: {text}"  # templates show only a tool's text
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
    if content is None or isinstance(content, str):  # some code makes messages without content
        return content or ""
    spoken = isinstance(message, AIMessage)
    return "".join(block if isinstance(block, str) else _block_text(block, message.type, spoken) for block in content)


def _block_text(block: Mapping[str, object], kind: str, spoken: bool) -> str:
    """The text of a content block; `spoken`: whether the message is an AI's.

    What other providers put into an AI message besides its text (reasoning, calls that are also in `tool_calls`,
    citations, server tools, pictures that it drew) is left out. In other messages it would be missed, and is refused.
    """
    for name in ("text", "refusal") if spoken else ("text",):
        if (text := block.get(name)) is not None and isinstance(text, str) and block.get("type", "text") in _TEXT_TYPES:
            return text
    if spoken:
        return ""
    raise TranscriptError(
        f"a text model reads text; found a block of type {block.get('type')!r} in a {kind} "
        "message; describe it in text, or leave it out"
    )


def to_ai_message(turn: Turn, model_name: str) -> AIMessage:
    """The reply of a turn as a message, with usage and the new memory's digest (not the memory itself)."""
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
    """Calls that could not be parsed: name and arguments as far as they go, or else the whole text, followed by a mark.

    With the mark the text is not JSON. Without it LangChain would complete a truncated call in a stream to a valid one.
    """
    invalid = []
    for call in turn.invalid_tool_calls:
        text = CallText(call.id, 0)
        text.push(call.text)
        args = f"{_NOT_JSON}{call.text}" if text.name is None else f"{text.arguments}{text.mark}"
        invalid.append(
            InvalidCall(name=text.name, args=args, id=call.id or None, error=call.error, type="invalid_tool_call")
        )
    return invalid


def response_metadata(turn: Turn, model_name: str) -> dict[str, Any]:
    """model_name, finish_reason, memory (new digest, tokens written and read).

    Where they apply: edits, deletions, the number of tokens whose KV came from an earlier turn (`carried`), and what
    the prompt left out of a message (`truncation`).
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
    if turn.deletions:
        metadata["deletions"] = turn.deletions
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


class ChunkWriter:
    """Makes a chunk from each delta and, at the end, one with usage, metadata and tool calls."""

    def __init__(self) -> None:
        self._calls: dict[str, CallText] = {}  # calls that are streamed, by id
        self._text = _Trimmed()
        self._reasoning = _Trimmed(leading=False)

    def chunk(self, delta: Delta) -> ChatGenerationChunk | None:
        """The chunk for a delta, or None if there is nothing to show yet."""
        if delta.kind == "text":
            shown = self._text.push(delta.text)
            return _chunk(AIMessageChunk(content=shown)) if shown else None
        # Next to reasoning and calls the engine strips the text's outer white space.
        self._text.leading = False
        if delta.kind == "reasoning" and (shown := self._reasoning.push(delta.text)):
            return _chunk(AIMessageChunk(content="", additional_kwargs={REASONING: shown}))
        if delta.call:
            call = self._calls.setdefault(delta.call, CallText(delta.call, len(self._calls)))
            piece = call.push(delta.text)
            return _chunk(AIMessageChunk(content="", tool_call_chunks=[piece])) if piece else None
        return None

    def last(self, turn: Turn, model_name: str) -> ChatGenerationChunk:
        """The rest of the text, the tool calls, and everything that is sent once."""
        content = turn.message.content
        places = {call: index for index, call in enumerate(self._calls)}
        chunks = []
        for call in turn.message.tool_calls:
            if not self._shown(call.id):
                place = places.setdefault(call.id, len(places))
                args = json.dumps(dict(call.arguments))
                chunks.append(tool_call_chunk(name=call.name, args=args, id=call.id, index=place))
        for invalid, refused in zip(turn.invalid_tool_calls, invalid_calls(turn), strict=True):
            if self._shown(invalid.id):
                chunks.append(self._calls[invalid.id].refuse())
            else:
                place = places.setdefault(invalid.id or f"{len(places)}", len(places))
                chunks.append(tool_call_chunk(name=None, args=refused["args"], id=refused["id"], index=place))
        return _chunk(
            AIMessageChunk(
                content=content[len(self._text.sent) :],
                tool_call_chunks=chunks,
                response_metadata=response_metadata(turn, model_name),
                usage_metadata=usage(turn),
                chunk_position="last",
            )
        )

    def _shown(self, call: str) -> bool:
        """Whether a part of a call was already sent."""
        return call in self._calls and self._calls[call].name is not None


class _Trimmed:
    """Passes text on as soon as it is certain to be part of the complete message's text.

    White space is held back until something follows it. White space at the start of a text is held until it is
    clear whether it belongs to the text, at the latest until the end; models seldom start with white space.
    """

    def __init__(self, *, leading: bool = True) -> None:
        self.leading = leading  # whether white space at the start may belong to the text
        self.sent = ""
        self._held = ""

    def push(self, text: str) -> str:
        self._held += text
        if not self.sent:
            start = self._held.lstrip()
            if self.leading and start != self._held:
                return ""
            self._held = start
        shown = self._held.rstrip()
        self._held = self._held[len(shown) :]
        self.sent += shown
        return shown


class CallText:
    """The text of one call as it is decoded.

    Attributes:
        name: the tool's name; None while unknown.
        arguments: the JSON of the arguments so far.
        complete: whether the arguments are complete.
    """

    def __init__(self, call: str, index: int) -> None:
        """`call`: the call's id; `index`: its position among the calls of the reply."""
        self.name: str | None = None
        self.arguments = ""
        self.complete = False
        self._call = call
        self._index = index
        self._head = ""
        self._open = ""  # the brackets to be closed, innermost last
        self._quoted = self._escaped = False

    def push(self, text: str) -> ToolCallChunk | None:
        """Add text; returns what can be shown of it."""
        if self.name is not None:
            more = self._take(text)
            return self._chunk(args=more) if more else None
        self._head += text
        match = _HEAD.match(self._head)
        if match is None:
            return None
        try:
            self.name = parse_json(match[1])
        except ValueError:  # a control character, or an incomplete escape
            return None
        return self._chunk(name=self.name, args=self._take(self._head[match.end() :]), call=self._call)

    @property
    def mark(self) -> str:
        """A text that makes these arguments invalid JSON: a closing bracket that does not match the open one.

        After any other text LangChain would complete a truncated call to a valid one.
        """
        inside = "\\" * self._escaped + '"' * self._quoted
        return inside + ("]" if self._open.endswith("}") else "}") + _NOT_JSON

    def refuse(self) -> ToolCallChunk:
        """The chunk that makes a call that was begun an invalid one."""
        return self._chunk(args=self.mark)

    def _take(self, text: str) -> str:
        """The part of a text that belongs to the arguments."""
        for at, letter in enumerate(text):
            if self.complete:
                text = text[:at]
                break
            if self._quoted:
                self._quoted = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._open += "}" if letter == "{" else "]"
            elif letter in "}]":
                self._open = self._open[:-1]
                self.complete = not self._open
        self.arguments += text
        return text

    def _chunk(self, *, args: str, name: str | None = None, call: str | None = None) -> ToolCallChunk:
        return tool_call_chunk(name=name, args=args, id=call, index=self._index)


def _chunk(message: AIMessageChunk) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=message)
