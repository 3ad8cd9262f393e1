"""Deltas of a turn as LangChain's message chunks, which add up to the message that `invoke` gives."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from agentmem_langgraph.messages import REASONING, invalid_calls, response_metadata, usage

if TYPE_CHECKING:
    from agentmem import Delta, Turn


class ChunkWriter:
    """Makes a chunk of each delta and, at the end, the one with usage, metadata and tool calls."""

    def __init__(self) -> None:
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
        return None  # a call is shown when it is whole and known to be valid

    def last(self, turn: Turn, model_name: str) -> ChatGenerationChunk:
        """What is left of the text, the tool calls, and all that is said once."""
        content, calls = turn.message.content, turn.message.tool_calls
        chunks = [
            tool_call_chunk(name=call.name, args=json.dumps(dict(call.arguments)), id=call.id, index=index)
            for index, call in enumerate(calls)
        ]
        chunks += [
            tool_call_chunk(name=None, args=call["args"], id=None, index=index)
            for index, call in enumerate(invalid_calls(turn), start=len(calls))
        ]
        return _chunk(
            AIMessageChunk(
                content=content[len(self._text.sent) :],
                tool_call_chunks=chunks,
                response_metadata=response_metadata(turn, model_name),
                usage_metadata=usage(turn),
                chunk_position="last",
            )
        )


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
