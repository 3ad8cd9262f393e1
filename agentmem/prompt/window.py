"""Which messages a prompt shows, and how history that no prompt showed is cut for reading.

Both depend on messages, sizes and constants only, never on free memory, so that a turn gives the same on
any machine. A tool call is never parted from its results: models answer a result without its call with
nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from agentmem.errors import ConfigError, WindowError
from agentmem.messages import Message

DEFAULT_TOKENS = 4096


@dataclass(frozen=True)
class Window:
    """The last messages that fit.

    Attributes:
        tokens: at most so many tokens in all, system messages and overhead included; None: no limit.
        messages: at most so many messages, system messages not counted; None: no limit. The last message and
            the tool calls and results that belong to it always show, however many they are.

    Raises:
        ConfigError: a limit is no positive integer.
    """

    tokens: int | None = DEFAULT_TOKENS
    messages: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "messages"):
            limit = getattr(self, name)
            if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
                raise ConfigError(f"a window's {name} are a positive integer or None; found {limit!r}")

    def clip(self, limit: int | None) -> Window:
        """This window, with no more tokens than a model can read (None: any number)."""
        if limit is None or (self.tokens is not None and self.tokens <= limit):
            return self
        return replace(self, tokens=limit)

    def visible(
        self,
        messages: Sequence[Message],
        sizes: Sequence[int],
        overhead: int = 0,
        system: Sequence[int] | None = None,
    ) -> list[int]:
        """Indices of the messages to show, ascending.

        All system messages, and of the others as many of the last as fit, an assistant message with tool
        calls and the results that answer it counting as one. The last of these always shows.

        Args:
            messages: the whole history.
            sizes: tokens of each message; only those are asked for that decide what is shown.
            overhead: tokens that belong to no message: preamble, tools, generation prompt.
            system: indices of the system messages, where these are known: a long history is then not looked through.

        Raises:
            WindowError: system messages and the last message with its tool group do not fit.
        """
        if len(sizes) != len(messages):
            raise ValueError(f"one size per message was expected; found {len(sizes)} for {len(messages)}")
        if system is None:
            system = [i for i, message in enumerate(messages) if message.role == "system"]
        shown = list(system)
        fixed = sum(sizes[i] for i in shown)
        groups = tool_groups(messages)
        last = next(groups, [])
        tokens, count = overhead + fixed + sum(sizes[i] for i in last), len(last)
        if self.tokens is not None and tokens > self.tokens:
            raise WindowError(self._too_small(overhead, fixed, tokens - overhead - fixed))
        shown += last
        for group in groups:
            tokens += sum(sizes[i] for i in group)
            count += len(group)
            if not self._holds(tokens, count):
                break
            shown += group
        return sorted(shown)

    def _holds(self, tokens: int, count: int) -> bool:
        return (self.tokens is None or tokens <= self.tokens) and (self.messages is None or count <= self.messages)

    def _too_small(self, overhead: int, system: int, last: int) -> str:
        return (
            f"a window of {self.tokens} tokens cannot show what every prompt needs: "
            f"{system} tokens of system messages, {last} of the last message with "
            f"the tool calls and results that belong to it, {overhead} of tools and prompt; widen the window (the "
            "model's own limit permitting) or shorten these messages"
        )


def tool_groups(messages: Sequence[Message]) -> Iterator[list[int]]:
    """Indices of all but system messages in groups that are shown together or not at all, newest first.

    A group is one message, or an assistant message with tool calls and the tool messages that answer it: by
    the call's id, or standing behind the call where ids are missing. Where other messages stand in between
    (a human who spoke before the last result was in), they join the group, so that a group is always an
    unbroken run. Nothing before a group is looked at, but for the call that a result answers.
    """
    group: list[int] = []  # newest first
    reach = len(messages)  # the earliest place that anything from here on must be shown with
    for place in reversed(range(len(messages))):
        if messages[place].role == "system":
            continue
        group.append(place)
        reach = min(reach, _caller(messages, place))
        if reach >= place:
            yield group[::-1]
            group = []


def _caller(messages: Sequence[Message], place: int) -> int:
    """The place that a message must be shown with: that of the call which it answers, else its own."""
    result = messages[place]
    if result.role != "tool" or result.tool_calls:
        return place
    latest = place
    for before in reversed(range(place)):
        calls = messages[before].tool_calls if messages[before].role != "system" else ()
        if any(call.id and call.id == result.tool_call_id for call in calls):
            return before
        if calls and latest == place:
            latest = before
            if not result.tool_call_id:
                break
    return latest


def pieces(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut messages into passes of at most `limit` tokens between messages, oldest first.

    Args:
        sizes: tokens of each message.
        limit: of one piece; a longer message is a piece of its own.

    Returns:
        Indices of the messages of each piece.
    """
    cut: list[list[int]] = []
    left = 0
    for index, size in enumerate(sizes):
        if not cut or size > left:
            cut.append([])
            left = limit
        cut[-1].append(index)
        left -= size
    return cut
