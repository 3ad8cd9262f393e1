"""The engine's own message type: what a chat template needs, independent of any agent framework.

A message is a value. Its digest covers what a prompt shows of it: role, text, tool calls (name, canonical arguments,
id) and tool_call_id, so that two spellings of one message are the same message. The digest never covers the name, which
agents add to their replies afterwards, nor reasoning or the write flag.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from reprlib import repr as short_repr
from threading import Lock
from typing import Any, Literal, get_args

from agentmem.errors import TranscriptError

Role = Literal["system", "user", "assistant", "tool"]

ROLES: tuple[str, ...] = get_args(Role)

CACHE_BYTES = 64 << 20
"""Largest size of a message cache in bytes, by its own estimate."""

MOST_NESTED = 100
"""How deep containers may lie in one another in JSON that a prompt or a grammar holds."""

_ENTRY_BYTES = 200  # roughly: a dict entry, the key's tuple and the value's object


@dataclass(frozen=True)
class ToolCall:
    """One call requested by the assistant: the tool's name, the arguments (a JSON object), the call's id."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One chat message.

    Attributes:
        role: who speaks.
        content: the text.
        tool_calls: the calls that an assistant message requests, in order.
        tool_call_id: for a tool message, the id of the call that it answers.
        name: the speaker's or the tool's name, if any.
        write: False for a message that is shown but never written and never recorded (retrieved facts). System
            messages are never written, whatever the value.

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
        # Callers often have a list; a tuple makes the message an immutable value.
        object.__setattr__(self, "tool_calls", tuple(self.tool_calls))

    @cached_property
    def writes(self) -> bool:
        """Whether this message may be written into memory."""
        return self.write and self.role != "system"

    def digest(self, *, with_name: bool = False) -> bytes:
        """SHA-256 over everything that identifies this message.

        Args:
            with_name: include the name, as the records of older states do.

        Raises:
            TranscriptError: a tool call's arguments are not a JSON object, or nested deeper than `MOST_NESTED`.
        """
        # Arguments are the caller's own objects and may change in place; nothing else can, so only they forbid caching.
        if with_name or self.tool_calls:
            return self._computed_digest(self.name if with_name else "")
        return self._kept_digest

    @cached_property
    def _kept_digest(self) -> bytes:
        return self._computed_digest("")

    def _computed_digest(self, name: str) -> bytes:
        if is_nested_too_deep([call.arguments for call in self.tool_calls]):
            raise TranscriptError(
                f"the arguments of a tool call must be nested at most {MOST_NESTED} deep; found deeper ones in "
                f"{', '.join(call.name for call in self.tool_calls)}; flatten them, or pass them on as text"
            )
        try:
            calls = [[call.name, dict(call.arguments), call.id] for call in self.tool_calls]
            body = [self.role, self.content, calls, self.tool_call_id, name]
            text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise TranscriptError(
                f"the arguments of a tool call must be a JSON object, so that the message can be recognised "
                f"later; found {short_repr([call.arguments for call in self.tool_calls])} ({error})"
            ) from error
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def as_messages(messages: Any) -> tuple[Message, ...]:
    """The messages of a history.

    Raises:
        TranscriptError: one of them is no `Message`, or a single text was given.
    """
    history = tuple(messages) if isinstance(messages, Iterable) else (None,)
    if not all(isinstance(message, Message) for message in history):
        raise TranscriptError(
            f"a history is a list of agentmem.Message; found {short_repr(messages)}; "
            "write [agentmem.Message('user', 'text')]"
        )
    return history


def is_nested_too_deep(value: Any) -> bool:
    """Whether mappings and lists lie deeper than `MOST_NESTED` in one another, as in one that holds itself.

    What works on such data calls itself for every level, and ends in a RecursionError.
    """
    level = [value]
    for _ in range(MOST_NESTED + 1):
        inside = {id(part): part for part in level if isinstance(part, Mapping | list | tuple)}
        if not inside:
            return False
        level = [part for each in inside.values() for part in (each.values() if isinstance(each, Mapping) else each)]
    return True


class MessageCache:
    """Keeps what was computed about recently seen messages, up to a number of bytes. It affects no result.

    Entries are in two generations. New entries, and old ones when they are used, go into the young generation. When
    that reaches half of the limit it becomes the old one, and the previous old generation is dropped. So a lookup costs
    one dict access.
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
        """The value stored for a key, or None."""
        entry = self._young.get(key)
        if entry is None:
            entry = self._old.get(key)
            if entry is None:
                return None
            self.put(key, entry[0], entry[1] - _ENTRY_BYTES)
        return entry[0]

    def get_all(self, keys: Iterable[Hashable]) -> list[Any]:
        """The values stored for keys; None for those that are missing."""
        young = self._young
        return [entry[0] if (entry := young.get(key)) is not None else self.get(key) for key in keys]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Store a value of `size` bytes, key included; a value that takes half of the limit or more is not stored."""
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
        """Bytes in use, by estimate."""
        return self._young_bytes + self._old_bytes

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            self._young, self._old = {}, {}
            self._young_bytes = self._old_bytes = 0
