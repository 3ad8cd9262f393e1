"""Deltas of a turn as LangChain's message chunks, which add up to the message that `invoke` gives."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from agentmem_langgraph.calls import CallText
from agentmem_langgraph.messages import REASONING, invalid_calls, response_metadata, usage

if TYPE_CHECKING:
    from agentmem import Delta, Turn


class ChunkWriter:
    """Makes a chunk of each delta and, at the end, the one with usage, metadata and tool calls."""

    def __init__(self) -> None:
        self._calls: dict[str, CallText] = {}  # those that are shown as they come, by id
        self._text = _Trimmed()
        self._reasoning = _Trimmed(leading=False)

    def chunk(self, delta: Delta) -> ChatGenerationChunk | None:
        """The chunk of a delta, or None while there is nothing to show."""
        if delta.kind == "text":
            shown = self._text.push(delta.text)
            return _chunk(AIMessageChunk(content=shown)) if shown else None
        # Beside reasoning and calls the engine strips the text.
        self._text.leading = False
        if delta.kind == "reasoning" and (shown := self._reasoning.push(delta.text)):
            return _chunk(AIMessageChunk(content="", additional_kwargs={REASONING: shown}))
        if delta.call:
            call = self._calls.setdefault(delta.call, CallText(delta.call, len(self._calls)))
            piece = call.push(delta.text)
            return _chunk(AIMessageChunk(content="", tool_call_chunks=[piece])) if piece else None
        return None

    def last(self, turn: Turn, model_name: str) -> ChatGenerationChunk:
        """What is left of the text, the tool calls, and all that is said once."""
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
        """Whether something of a call was shown already."""
        return call in self._calls and self._calls[call].name is not None


class _Trimmed:
    """Passes text on as far as it is known to be part of the whole message's text.

    White space is held back until something follows it. A text that starts with white space waits until it is
    clear whether that belongs to it, at the latest for the end: models seldom start so.
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


def _chunk(message: AIMessageChunk) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=message)
