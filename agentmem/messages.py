"""The engine's own message type: what a chat template needs, and nothing of any agent framework.

A message is a value. Its digest covers role, text, tool calls (name, canonical arguments, id), tool_call_id
and name, so that two spellings of one message count as one; it never covers reasoning or the write flag.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from agentmem.errors import TranscriptError

Role = Literal["system", "user", "assistant", "tool"]

ROLES: tuple[str, ...] = get_args(Role)

LONGEST_KEPT = 1 << 13
"""Characters of a message that caches keep: four thousand of them take 32 MB, four times that for rare scripts."""


@dataclass(frozen=True)
class ToolCall:
    """One call that the assistant asks for: the tool's name, the arguments (a JSON object), the call's id."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One chat message.

    Attributes:
        role: who speaks.
        content: the text.
        tool_calls: calls that an assistant message asks for, in order.
        tool_call_id: for a tool message, the id of the call that it answers.
        name: the speaker's or the tool's name, if any.
        write: False for a message that is shown but never written and never recorded (retrieved facts).
            System messages are never written, whatever this says.

    Raises:
        TranscriptError: the role is unknown, or the content is not text, or not valid Unicode.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    write: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise TranscriptError(f"a message's role is one of {', '.join(ROLES)}; found {self.role!r}")
        if not isinstance(self.content, str):
            raise TranscriptError(
                f"a message's content is text; found {type(self.content).__name__}; join text blocks first"
            )
        try:
            self.content.encode()
        except UnicodeEncodeError as error:
            raise TranscriptError(
                f"a message's content is valid Unicode; found half a surrogate pair at {error.start}; repair the text"
            ) from None
        # A list is what callers often have at hand; a tuple is what makes the message a value.
        object.__setattr__(self, "tool_calls", tuple(self.tool_calls))

    @property
    def writes(self) -> bool:
        """Whether the write policy lets this message into memory."""
        return self.write and self.role != "system"

    def digest(self) -> bytes:
        """SHA-256 over everything that makes this message the same message.

        Raises:
            TranscriptError: a tool call's arguments are no JSON object.
        """
        # Arguments are the caller's own objects and may change in place; everything else can not.
        return self._computed_digest() if self.tool_calls else self._kept_digest

    @cached_property
    def _kept_digest(self) -> bytes:
        return self._computed_digest()

    def _computed_digest(self) -> bytes:
        body = [
            self.role,
            self.content,
            [[c.name, dict(c.arguments), c.id] for c in self.tool_calls],
            self.tool_call_id,
            self.name,
        ]
        try:
            text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise TranscriptError(
                f"the arguments of a tool call must be a JSON object, so that the message can be recognised "
                f"later; found {[c.arguments for c in self.tool_calls]!r} ({error})"
            ) from error
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
