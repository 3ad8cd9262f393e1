"""The engine's own message type: what a chat template needs, and nothing of any agent framework.

A message is a value. Its digest covers what a prompt shows of it: role, text, tool calls (name, canonical arguments,
id) and tool_call_id, so that two spellings of one message count as one. It never covers the name, which agents put on
their replies afterwards, nor reasoning or the write flag.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Literal, get_args

from agentmem.errors import TranscriptError

Role = Literal["system", "user", "assistant", "tool"]

ROLES: tuple[str, ...] = get_args(Role)

CACHE_BYTES = 64 << 20
"""Most bytes that a cache of messages takes, by its own estimate."""

_ENTRY_BYTES = 200  # a dict's entry, the key's tuple and the value's object, roughly


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

    @cached_property
    def writes(self) -> bool:
        """Whether the write policy lets this message into memory."""
        return self.write and self.role != "system"

    def digest(self, *, with_name: bool = False) -> bytes:
        """SHA-256 over everything that makes this message the same message.

        Args:
            with_name: the name as well, as the records of older states do.

        Raises:
            TranscriptError: a tool call's arguments are no JSON object.
        """
        # Arguments are the caller's own objects and may change in place; nothing else can.
        if with_name or self.tool_calls:
            return self._computed_digest(self.name if with_name else "")
        return self._kept_digest

    @cached_property
    def _kept_digest(self) -> bytes:
        return self._computed_digest("")

    def _computed_digest(self, name: str) -> bytes:
        calls = [[call.name, dict(call.arguments), call.id] for call in self.tool_calls]
        try:
            body = [self.role, self.content, calls, self.tool_call_id, name]
            text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise TranscriptError(
                f"the arguments of a tool call must be a JSON object, so that the message can be recognised "
                f"later; found {[call.arguments for call in self.tool_calls]!r} ({error})"
            ) from error
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class MessageCache:
    """What was worked out about the messages that were seen lately, bounded by bytes. It changes no result.

    Entries live in two generations. New ones and those that are used join the young generation; when that has half of
    the bytes it becomes the old one, and what was in the old one is dropped. So a lookup costs one dict access.
    Thread-safe.

    Args:
        limit: most bytes of all entries together.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._young: dict[Hashable, tuple[Any, int]] = {}
        self._old: dict[Hashable, tuple[Any, int]] = {}
        self._young_bytes = self._old_bytes = 0
        self._lock = Lock()

    def get(self, key: Hashable) -> Any:
        """The value kept for a key, or None."""
        entry = self._young.get(key)
        if entry is None:
            entry = self._old.get(key)
            if entry is None:
                return None
            self.put(key, entry[0], entry[1] - _ENTRY_BYTES)
        return entry[0]

    def get_all(self, keys: Iterable[Hashable]) -> list[Any]:
        """The values kept for keys, None for those that are not there."""
        young = self._young
        return [entry[0] if (entry := young.get(key)) is not None else self.get(key) for key in keys]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep a value, which takes so many bytes with its key; one that takes half of the limit is not kept."""
        size += _ENTRY_BYTES
        if size > self._limit // 2:
            return
        with self._lock:
            if self._young_bytes + size > self._limit // 2:
                self._old, self._old_bytes = self._young, self._young_bytes
                self._young, self._young_bytes = {}, 0
            self._young_bytes += size - self._young.get(key, (None, 0))[1]
            self._young[key] = value, size

    @property
    def size(self) -> int:
        """Bytes that are taken, by estimate."""
        return self._young_bytes + self._old_bytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._young, self._old = {}, {}
            self._young_bytes = self._old_bytes = 0
