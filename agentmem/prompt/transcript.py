"""What a prompt shows: which messages (`Window`), and their tokens with the owner of each (`Transcript`).

Which messages show depends only on the messages, sizes and constants, never on free memory, so that a turn gives the
same result on any machine. A tool call is never separated from its results: models answer a result without its call
with nonsense.

The ids are exactly those of the template's normal rendering, tokenised as one text; control tokens inside message texts
are plain text (see `agentmem.prompt.template`). Each token belongs to the message in whose part of the text it starts:
header, content and end of a message are all its own (see `agentmem.prompt.message_spans`).

Adapters that write sentence by sentence also need sentences. A text is cut before the white space that follows . ! ? ;
or : (and any closing quotes or brackets), and at blank lines. The white space begins the next sentence, as it begins
the next word in most tokenizers.

A transcript owns its engine's only cache of seen messages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from agentmem.errors import ConfigError, TranscriptError, WindowError
from agentmem.messages import Message, MessageCache
from agentmem.prompt.message_spans import NOBODY, Layout, MessageSpans
from agentmem.prompt.template import ChatTemplate, Span, Tools
from agentmem.record import History

DEFAULT_TOKENS = 4096
_SENTENCE_END = re.compile(r"""(?<=[.!?;:])["'”’»)\]}]*(?=\s)|(?<!\s)(?=\s*\n[^\S\n]*\n)""")
_LOOK_BACK = 16  # so many messages at the end may be new since a history was last read
_HISTORY_BYTES = 250  # per message of a history that was read: index, digest and chain


@dataclass(frozen=True)
class Window:
    """Limits on what a prompt shows: the last messages that fit.

    Attributes:
        tokens: at most this many tokens in all, including system messages and overhead; None: no limit.
        messages: at most this many messages, not counting system messages; None: no limit. The last message, with
            the tool calls and results that belong to it, always shows, even beyond this limit.

    Raises:
        ConfigError: a limit is not a positive integer.
    """

    tokens: int | None = DEFAULT_TOKENS
    messages: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "messages"):
            limit = getattr(self, name)
            if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
                raise ConfigError(f"a window's {name} are a positive integer or None; found {limit!r}")

    def clip(self, limit: int | None) -> Window:
        """This window limited to the tokens that a model can read (None: no limit)."""
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

        All system messages show, and as many of the latest other messages as fit; an assistant message with tool calls
        counts as one with the results that answer it. The latest such group always shows.

        Args:
            messages: the whole history.
            sizes: the token count of each message; only those that decide what is shown are looked up.
            overhead: tokens that belong to no message: preamble, tools, generation prompt.
            system: indices of the system messages, if known: a long history need not be searched for them then.

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

    A group is one message, or an assistant message with tool calls together with the tool messages that answer it: by
    the call's id, or by their position after the call where ids are missing. Messages in between (a human who wrote
    before the last result had arrived) join the group, so that a group is always contiguous. Nothing before a group is
    looked at, except for the call that a result answers.
    """
    group: list[int] = []  # newest first
    reach = len(messages)  # the earliest message that must be shown together with any from here on
    for place in reversed(range(len(messages))):
        if messages[place].role == "system":
            continue
        group.append(place)
        reach = min(reach, _caller(messages, place))
        if reach >= place:
            yield group[::-1]
            group = []


def _caller(messages: Sequence[Message], place: int) -> int:
    """The index of the message that this one must be shown with: the call that it answers, or else itself."""
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
        limit: most tokens of a pass; a longer message is a pass of its own.

    Returns:
        The indices of the messages in each pass.
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


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    Attributes:
        text: the rendered text.
        input_ids: its tokens.
        owner: for each token the index of its message; the number of messages for the generation prompt; -1 for
            text that belongs to no message (a BOS token, a default system prompt, a list of tools).
        messages: the messages that were rendered.
        sentences: for each token the number of its sentence, or -1; None if sentences were not requested.
    """

    text: str
    input_ids: list[int]
    owner: list[int]
    messages: tuple[Message, ...]
    sentences: list[int] | None = None

    def message_segments(self) -> list[int]:
        """Segments for the `message` strategy: the owner of each token, and -1 for messages that are never written.

        The generation prompt belongs to the segment of the reply that it opens, whose number is the number of messages.
        """
        writes = [*(message.writes for message in self.messages), True, False]  # the last entry has index -1
        return [owner if writes[owner] else -1 for owner in self.owner]

    def sentence_segments(self) -> list[int]:
        """Segments for the `sentence` strategy, numbered through the conversation; only content tokens have one.

        Raises:
            ValueError: the conversation was rendered without `sentences=True`.
        """
        if self.sentences is None:
            raise ValueError("sentence segments were not asked for while rendering; pass sentences=True to render")
        return list(self.sentences)

    def sizes(self) -> list[int]:
        """The number of tokens of each message."""
        counts = [0] * (len(self.messages) + 2)
        for owner in self.owner:
            counts[owner] += 1
        return counts[: len(self.messages)]


class Transcript:
    """Renders messages through one tokenizer's chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template; it is not changed.
        options: further variables for the template, such as `{"enable_thinking": False}`.
        cache: the cache of seen messages of a transcript of the same tokenizer, to be shared; None: one of its own.

    Raises:
        TranscriptError: the tokenizer cannot be used.
    """

    def __init__(
        self, tokenizer: Any, options: Mapping[str, Any] | None = None, cache: MessageCache | None = None
    ) -> None:
        self.cache = MessageCache() if cache is None else cache
        self._template = ChatTemplate(tokenizer, options, self.cache)
        self._spans = MessageSpans(self._template, self.cache)

    def takes_tools(self) -> bool:
        """Whether the chat template shows tools; where it does not, `render` refuses them."""
        return self._template.takes_tools()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
        sentences: bool = False,
    ) -> Rendered:
        """The tokens of a conversation and the message that each belongs to.

        Args:
            messages: at least one.
            tools: JSON schemas of the tools.
            add_generation_prompt: whether to open the assistant's next turn.
            sentences: whether to find sentences too.

        Raises:
            TranscriptError: the template refuses the messages, or its text cannot be assigned to them.
        """
        if not messages:
            raise TranscriptError("at least one message was expected; found none")
        layout = self._spans.find(messages, tools, add_generation_prompt)
        ids, starts = self._template.encode(layout.text.text, layout.text.plain)
        owner = _owners(starts, layout)
        numbers = self._sentences(messages, layout, ids, starts) if sentences else None
        return Rendered(layout.text.text, ids, owner, tuple(messages), numbers)

    def history(self, messages: Sequence[Message]) -> History:
        """A history in the form that records use. The part that was read at an earlier turn is taken from the cache."""
        messages = list(messages)
        beginning = None
        for stop in range(len(messages), max(0, len(messages) - _LOOK_BACK), -1):
            kept: History | None = self.cache.get(("history", messages[stop - 1].digest()))
            # Comparing lists tests identity first, so a thousand messages take microseconds.
            if kept is not None and messages[: len(kept.messages)] == kept.messages:
                beginning = kept
                break
        history = History.read(messages, beginning)
        kept = history.unchangeable()
        if kept.messages and kept is not beginning:
            size = sum(_HISTORY_BYTES + len(message.content) for message in kept.messages)
            self.cache.put(("history", kept.messages[-1].digest()), kept, size)
        return history

    def size(self, message: Message) -> int:
        """The number of tokens that a message takes up in a conversation, header and end included.

        Counted for the message alone and cached, so that a long history costs nothing. Templates that treat a message
        differently by its position (reasoning of earlier turns, grouped results) may use a few tokens more or fewer.
        """
        key = ("size", message.digest())
        size: int | None = self.cache.get(key)
        if size is None:
            size = self._count(message)
            self.cache.put(key, size, 0)
        return size

    def overhead(self, *, tools: Tools | None = None, add_generation_prompt: bool = False) -> int:
        """The number of tokens of a conversation that belong to no message: preamble, tools, generation prompt."""
        key = ("overhead", repr(list(tools or ())), add_generation_prompt)
        overhead: int | None = self.cache.get(key)
        if overhead is None:
            rendered = self.render([Message("user", "x")], tools=tools, add_generation_prompt=add_generation_prompt)
            overhead = sum(owner != 0 for owner in rendered.owner)
            self.cache.put(key, overhead, sys.getsizeof(key[1]))
        return overhead

    def closing_text(self, message: Message | None = None) -> str:
        """The text that the template writes after the content of a message of this role (None: the assistant's).

        Raises:
            TranscriptError: the template cannot render such a message.
        """
        role = message.role if message else "assistant"
        text = self._spans.end(Message(role, "x"))
        if text is None:
            raise TranscriptError(
                f"a chat template that can render a {role} message was expected, to learn how it ends; "
                "this one refuses it or drops it"
            )
        return text

    def closing_ids(self, message: Message | None = None) -> list[int]:
        """The tokens with which the template closes a message after its content, see `closing_text`."""
        return self._template.encode(self.closing_text(message))[0]

    def _count(self, message: Message) -> int:
        if message.tool_calls:
            return self.render([Message("user", "x"), message]).sizes()[1]
        content = self._template.content(message)
        head, end = self._spans.head(message.role) or "", self._spans.end(message) or ""
        plain = [(len(head) + a, len(head) + b) for a, b in content.plain]
        return len(self._template.encode(head + content.text + end, plain)[0])

    def _sentences(self, messages: Sequence[Message], layout: Layout, ids: list[int], starts: list[int]) -> list[int]:
        segments = [-1] * len(ids)
        count = 0
        order = sorted((span, i) for i, span in enumerate(layout.contents) if span is not None)
        for (start, stop), index in order:
            places = [k for k, place in enumerate(starts) if start <= place < stop]
            if not messages[index].writes or not places:
                continue
            lengths = self._piece_lengths(layout, (start, stop), [ids[k] for k in places])
            numbers = [count + n for n, length in enumerate(lengths) for _ in range(length)]
            for k, number in zip(places, numbers, strict=True):
                segments[k] = number
            count += len(lengths)
        return segments

    def _piece_lengths(self, layout: Layout, span: Span, content: list[int]) -> list[int]:
        """Tokens per sentence; the whole content as one sentence if the sentences encode differently on their own."""
        start, stop = span
        lengths: list[int] = []
        joined: list[int] = []
        for piece in split_sentences(layout.text.text[start:stop]):
            end = start + len(piece)
            plain = [
                (max(a, start) - start, min(b, end) - start) for a, b in layout.text.plain if a < end and b > start
            ]
            ids, _ = self._template.encode(piece, plain)
            lengths.append(len(ids))
            joined += ids
            start = end
        return [length for length in lengths if length] if joined == content else [len(content)]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order; joined they give the text. White space alone is not a sentence."""
    cuts = [0, *(match.end() for match in _SENTENCE_END.finditer(text.rstrip())), len(text)]
    return [text[a:b] for a, b in pairwise(cuts) if a < b]


def sentence_numbers(text: str, ids: Sequence[int], encode: Callable[[str], list[int]]) -> list[int]:
    """The sentence of each token, counted from 0; all 0 if the sentences encode differently on their own."""
    pieces = [encode(piece) for piece in split_sentences(text)]
    if [token for piece in pieces for token in piece] != list(ids):
        return [0] * len(ids)
    return [number for number, piece in enumerate(pieces) for _ in piece]


def _owners(starts: list[int], layout: Layout) -> list[int]:
    """The owner of each token: the owner of the text in which it starts."""
    owners: list[int] = []
    spans = iter([*layout.owners, (NOBODY, len(layout.text.text), len(layout.text.text) + 1)])
    owner, _, stop = next(spans)
    for start in accumulate(starts, max):  # bytes of one character share a start; starts never decrease
        while start >= stop:
            owner, _, stop = next(spans)
        owners.append(owner)
    return owners
