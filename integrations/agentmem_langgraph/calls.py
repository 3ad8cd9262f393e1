"""Tool calls while they are decoded: the name as soon as it is known, then the arguments as they come.

What a model writes for a call is `{"name": ..., "arguments": {...}}`; LangChain wants the name once and the text of the
arguments in pieces. A call that is written in another form, or not to its end, is known for what it is only at the end.
"""

from __future__ import annotations

import json
import re

from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
# No JSON begins so.
NOT_JSON = "<tool_call>"


class CallText:
    """One call's text as it comes.

    Attributes:
        name: the tool's; None while unknown.
        arguments: the JSON of the arguments so far.
        whole: the arguments are complete.
    """

    def __init__(self, call: str, index: int) -> None:
        """``call``: its id; ``index``: its place among the calls of the reply."""
        self.name: str | None = None
        self.arguments = ""
        self.whole = False
        self._call = call
        self._index = index
        self._head = ""
        self._open = ""  # the brackets to be closed, innermost last
        self._quoted = self._escaped = False

    def push(self, text: str) -> ToolCallChunk | None:
        """Add text; gives what there is to show of it."""
        if self.name is not None:
            more = self._take(text)
            return self._chunk(args=more) if more else None
        self._head += text
        found = _HEAD.match(self._head)
        if found is None:
            return None
        try:
            self.name = json.loads(found[1])
        except ValueError:  # a control character, or half an escape
            return None
        return self._chunk(name=self.name, args=self._take(self._head[found.end() :]), call=self._call)

    @property
    def mark(self) -> str:
        """What makes these arguments no JSON: a bracket that closes another than the one that is open.

        After anything else LangChain would complete a call that was cut off to a valid one.
        """
        inside = "\\" * self._escaped + '"' * self._quoted
        return inside + ("]" if self._open.endswith("}") else "}") + NOT_JSON

    def refuse(self) -> ToolCallChunk:
        """What makes a call that was begun an invalid one."""
        return self._chunk(args=self.mark)

    def _take(self, text: str) -> str:
        """The part of a text that belongs to the arguments."""
        for at, letter in enumerate(text):
            if self.whole:
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
                self.whole = not self._open
        self.arguments += text
        return text

    def _chunk(self, *, args: str, name: str | None = None, call: str | None = None) -> ToolCallChunk:
        return tool_call_chunk(name=name, args=args, id=call, index=self._index)
