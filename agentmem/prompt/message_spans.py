"""Finds which part of a rendered conversation belongs to which message, for any chat template.

A template is a program: it may strip reasoning from earlier turns, group tool results in one turn, trim text, or add a
system prompt. So nothing is assumed about prefixes. Instead the conversation is rendered a second time with private-use
characters (sentinels) inside every message's text; their positions in the result show what came from which message.
They must change nothing else: with the sentinels removed, the second rendering must equal the first. If it does not,
the sentinels are not used, and spans are taken from renderings of the conversation's beginnings. If these do not match
either, an error is raised.

Between the texts of two adjacent messages come the end of the first and the head of the second. Where the end stops is
learned from a small conversation of the same shape that ends there, rendered once and cached.
"""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from agentmem.errors import TranscriptError
from agentmem.messages import Message, MessageCache, ToolCall
from agentmem.prompt.template import ChatTemplate, Span, Text, Tools

NOBODY = -1

# Sentinels: four characters per message, from a block that the texts do not use. One begins a text and one ends it, one
# is put before and after a call's name, and one after every reasoning tag, since templates drop what precedes it.
_PRIVATE_USE = re.compile("[\U000f0000-\U0010ffff]")
_STEP = 4
_BEGIN, _RESUME, _END, _NAME = range(4)

_LEAD = re.compile(r"<[^<>/\s][^<>\s]*>\s*")  # left outside the sentinels: templates compare how a text starts and ends
_TRAIL = re.compile(r"\s*</?[^<>\s]+>\Z")
_TAG_END = re.compile(r"</?think>\s*")

_USER = Message("user", "x")
_REPLY = Message("assistant", "x")
# The id has nine characters: some templates accept no other length.
_CALL = Message("assistant", "", tool_calls=(ToolCall("x", {}, "000000000"),))
_RESULT = Message("tool", "x", tool_call_id="000000000", name="x")
_SYSTEM = Message("system", "x")


@dataclass(frozen=True)
class Layout:
    """A rendered conversation and the messages that its parts belong to.

    Attributes:
        text: the rendered text.
        owners: (owner, start, stop), ascending and without gaps. The owner is a message's index, the number of messages
            for the generation prompt, or -1 for text that belongs to no message.
        contents: for each message the span of its own text, without outer white space; None where it has none.
    """

    text: Text
    owners: list[tuple[int, int, int]]
    contents: list[Span | None]


@dataclass
class _Places:
    """The positions of a message's own strings in the rendered text."""

    first: int
    last: int
    content: Span | None = None


@dataclass(frozen=True)
class _Request:
    """What is rendered: the messages, their form for the template, the tools, and whether a reply is opened."""

    messages: Sequence[Message]
    conversation: list[dict[str, Any]]
    tools: Tools | None
    add_generation_prompt: bool


class MessageSpans:
    """Finds the message that each part of a text belongs to; caches what it has learned about its template."""

    def __init__(self, template: ChatTemplate, cache: MessageCache) -> None:
        self._template = template
        self._cache = cache
        self._by_role: dict[tuple[str, str], str | None] = {}  # the text around messages without calls

    def find(self, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool) -> Layout:
        """Render messages and find the part of the text that belongs to each.

        Raises:
            TranscriptError: the template refuses the messages, or the parts of its text cannot be assigned to them.
        """
        request = _Request(messages, self._template.prepare(messages), tools, add_generation_prompt)
        text = self._template.render(request.conversation, tools, add_generation_prompt)
        places = self._places(request, text)
        return self._by_prefixes(request, text) if places is None else self._by_places(request, text, places)

    def end(self, message: Message) -> str | None:
        """The text that the template writes from the message's last string to the end of its turn; None: unknown."""
        if message.tool_calls:
            return self._kept(("end", message.digest()), lambda: self._learn_end(message))
        key = ("end", message.role)
        if key not in self._by_role:
            self._by_role[key] = self._learn_end(message)
        return self._by_role[key]

    def head(self, role: str) -> str | None:
        """The text that the template writes before a message of that role, unless it is the first; None: unknown."""
        key = ("head", role)
        if key not in self._by_role:
            self._by_role[key] = self._learn_head(role)
        return self._by_role[key]

    def _kept(self, key: tuple[str, str | bytes], learn: Callable[[], str | None]) -> str | None:
        kept: tuple[str | None] | None = self._cache.get(key)
        if kept is None:
            kept = (learn(),)
            self._cache.put(key, kept, sys.getsizeof(kept[0]) + sys.getsizeof(key[1]))
        return kept[0]

    # Sentinels

    def _places(self, request: _Request, text: Text) -> list[_Places] | None:
        """The positions of each message's strings in `text`; None if the sentinels changed the text."""
        base = _free_block(text.text, len(request.messages) * _STEP)
        if base is None:
            return None
        for style in (_around, _behind, _after):
            places = self._read_sentinels(request, text, base, style)
            if places is not None:
                return places
        return None

    def _read_sentinels(
        self, request: _Request, text: Text, base: int, style: Callable[[Message, str, str], str]
    ) -> list[_Places] | None:
        messages, conversation = request.messages, request.conversation
        sentinels = re.compile(f"[{chr(base)}-{chr(base + len(messages) * _STEP - 1)}]")
        with_sentinels = []
        for index, (message, plain) in enumerate(zip(messages, conversation, strict=True)):
            own = "".join(chr(base + index * _STEP + kind) for kind in range(_STEP))
            with_sentinels.append({**plain, "content": style(message, plain["content"], own)})
            if message.tool_calls:
                with_sentinels[-1]["tool_calls"] = [_around_name(call, own[_NAME]) for call in plain["tool_calls"]]
        try:
            marked = self._template.render(with_sentinels, request.tools, request.add_generation_prompt)
        except TranscriptError:
            return None  # only the sentinels are refused: the template accepted the messages themselves
        if sentinels.sub("", marked.text) != text.text:
            return None
        by_owner: dict[int, _Places] = {}
        open_at: dict[int, int] = {}
        for seen, match in enumerate(sentinels.finditer(marked.text)):
            at = match.start() - seen
            owner, kind = divmod(ord(match.group()) - base, _STEP)
            places = by_owner.setdefault(owner, _Places(at, at))
            places.first, places.last = min(places.first, at), max(places.last, at)
            if kind in (_BEGIN, _RESUME):
                open_at.setdefault(owner, at)
            elif kind == _END and messages[owner].content.strip():
                places.content = (open_at.get(owner, at), at)
        if len(by_owner) != len(messages) or _plain_without(sentinels, marked) != text.plain:
            return None
        for index, places in by_owner.items():
            _widen(places, messages[index].content.strip(), conversation[index]["content"], text.text)
        return [by_owner[i] for i in range(len(messages))]

    def _by_places(self, request: _Request, text: Text, places: list[_Places]) -> Layout:
        messages, tools = request.messages, request.tools
        order = sorted(range(len(messages)), key=lambda i: (places[i].first, places[i].last, i))
        rendered = text.text
        owners: list[tuple[int, int, int]] = []
        start = self._preamble_end(messages[order[0]], tools, rendered[: places[order[0]].first])
        owners.append((NOBODY, 0, start))
        for a, b in pairwise(order):
            if places[a].last > places[b].first:
                return self._by_prefixes(request, text)
            gap = rendered[places[a].last : places[b].first]
            stop = places[a].last + self._cut(messages[a], messages[b].role, gap)
            owners.append((a, start, stop))
            start = stop
            if tools:  # some templates list the tools before the last question
                head = self.head(messages[b].role)
                rest = rendered[stop : places[b].first]
                if head and head.strip() and rest.endswith(head):
                    start = places[b].first - len(head)
                    owners.append((NOBODY, stop, start))
        last = order[-1]
        stop = len(rendered)
        if request.add_generation_prompt:
            stop = places[last].last + self._prompt_start(request, last, rendered[places[last].last :])
        owners += [(last, start, stop), (len(messages), stop, len(rendered))]
        return Layout(text, [s for s in owners if s[1] < s[2]], [place.content for place in places])

    def _preamble_end(self, first: Message, tools: Tools | None, gap: str) -> int:
        """The length of the text before the first message, in the text that precedes its own strings."""
        key = json.dumps(list(tools), sort_keys=True, default=str) if tools else ""
        preamble, head = self._kept(("preamble", key), lambda: self._learn_preamble(tools)), self.head(first.role)
        if preamble and gap.startswith(preamble):
            return len(preamble)
        return len(gap) - len(head) if head and gap.endswith(head) else 0

    def _cut(self, message: Message, next_role: str, gap: str) -> int:
        """Where the message ends in the text between its last string and the next message's first."""
        end = self.end(message)
        if end is None:
            head = self.head(next_role)
            return len(gap) - len(head) if head and gap.endswith(head) else 0
        # White space at the end of the content is outside the sentinels; the template may have kept it.
        outer = message.content[len(message.content.rstrip()) :] if not message.tool_calls else ""
        skips = [0, len(outer)] if outer and gap.startswith(outer) else [0]
        for skip in skips:
            if gap.startswith(end, skip):
                return skip + len(end)
        if end and (at := gap.rfind(end)) >= 0:  # the template adds something before the end: tools, a date
            return at + len(end)
        # A turn that continues (grouped tool results) has only part of the usual end: the common part, in complete
        # tags.
        agreed = (re.match(r"(?s).*[>\]\s]|", end[: _agreement(end, gap[skip:])]) for skip in skips)
        return max(skip + match.end() for skip, match in zip(skips, agreed, strict=True) if match)

    def _prompt_start(self, request: _Request, last: int, gap: str) -> int:
        """Where the generation prompt begins in the text after the last message's last string."""
        end = self.end(request.messages[last])
        if end and gap.startswith(end):
            return len(end)
        closed = self._template.render(request.conversation, request.tools).text
        opened = self._template.render(request.conversation, request.tools, True).text
        return _agreement(closed, opened) - (len(opened) - len(gap))

    # Learning from small conversations

    def _small(self, messages: Sequence[Message], tools: Tools | None = None) -> tuple[str, list[_Places]] | None:
        request = _Request(messages, self._template.prepare(messages), tools, False)
        try:
            text = self._template.render(request.conversation, tools)
        except TranscriptError:
            return None  # the template refuses such a conversation, so nothing can be learned from it
        places = self._places(request, text)
        return None if places is None else (text.text, places)

    def _learn_end(self, message: Message) -> str | None:
        openings: dict[str, list[Message]] = {
            "system": [_SYSTEM],
            "user": [_USER],
            "assistant": [_USER, message if message.tool_calls else _REPLY],
            "tool": [_USER, _CALL, _RESULT],
        }
        small = self._small(openings[message.role])
        return None if small is None else small[0][small[1][-1].last :]

    def _learn_head(self, role: str) -> str | None:
        openings = {
            "system": [_SYSTEM],
            "user": [_USER, _REPLY, _USER],
            "assistant": [_USER, _REPLY, _USER],
            "tool": [_USER, _CALL, _RESULT],
        }
        opening = openings[role]
        small = self._small(opening)
        if small is None:
            return None
        text, places = small
        if role == "system":
            return text[: places[0].first].removeprefix(self._template.begin)
        at = 1 if role == "assistant" else 2
        gap, end = text[places[at - 1].last : places[at].first], self.end(opening[at - 1])
        return gap[len(end) :] if end is not None and gap.startswith(end) else None

    def _learn_preamble(self, tools: Tools | None) -> str:
        small, head = self._small([_USER], tools), self.head("user")
        if small is None or head is None:
            return ""
        text, places = small
        start = text[: places[0].first]
        return start.removesuffix(head) if start.endswith(head) else ""

    # Renderings of the conversation's beginnings

    def _by_prefixes(self, request: _Request, text: Text) -> Layout:
        """Find owners by rendering the first message, the first two messages, and so on."""
        messages, tools, rendered = request.messages, request.tools, text.text
        owners: list[tuple[int, int, int]] = []
        contents: list[Span | None] = []
        start = 0
        for index, message in enumerate(messages):
            beginning = self._template.render(request.conversation[: index + 1], tools).text
            stop = len(beginning)
            if not rendered.startswith(beginning) or stop < start:
                agree = _agreement(rendered, beginning)
                raise TranscriptError(
                    "the chat template changes its text when messages are marked, so its text for messages 0 "
                    f"to {index} was expected to begin that for all {len(messages)}; they part at character "
                    f"{agree}: {beginning[agree : agree + 40]!r} and {rendered[agree : agree + 40]!r}"
                )
            core = message.content.strip()
            at = rendered.find(core, start, stop) if core else -1
            contents.append((at, at + len(core)) if at >= 0 else None)
            if start == stop and (core or message.tool_calls):
                raise TranscriptError(
                    f"the chat template of {self._template.name} has no place for message {index} ({message.role}), so "
                    "the model would never see it; leave it out, or use a tokenizer with another template"
                )
            if index == 0 and at >= 0:
                start = self._preamble_end(message, tools, rendered[:at])
                owners.append((NOBODY, 0, start))
            owners.append((index, start, stop))
            start = stop
        if not request.add_generation_prompt:
            owners[-1] = (len(messages) - 1, owners[-1][1], len(rendered))
            start = len(rendered)
        owners.append((len(messages), start, len(rendered)))
        return Layout(text, [s for s in owners if s[1] < s[2]], contents)


def _around(message: Message, text: str, sentinels: str) -> str:
    """The text with sentinels inside its outer white space and tags, so that trimming and comparing still work."""
    begin, resume, end = sentinels[_BEGIN], sentinels[_RESUME], sentinels[_END]
    core = text.strip()
    lead = match.end() if (match := _LEAD.match(core)) else 0
    trail = match.start() if (match := _TRAIL.search(core, lead)) else len(core)
    if lead >= trail:
        return _behind(message, text, sentinels)
    inner = _TAG_END.sub(rf"\g<0>{resume}", core[lead:trail])
    at = text.find(core)
    return text[:at] + core[:lead] + begin + inner + end + core[trail:] + text[at + len(core) :]


def _around_name(call: dict[str, Any], sentinel: str) -> dict[str, Any]:
    """A call with a sentinel before and after its name."""
    return {**call, "function": {**call["function"], "name": f"{sentinel}{call['function']['name']}{sentinel}"}}


def _behind(message: Message, text: str, sentinels: str) -> str:
    """The text with sentinels at its end, before outer white space."""
    stop = len(text.rstrip()) or len(text)
    return _after(message, text[:stop], sentinels) + text[stop:]


def _after(message: Message, text: str, sentinels: str) -> str:
    """The text with sentinels at its very end; none if the message has calls, whose names carry them."""
    # Templates test whether a call comes with text, so a call's text must stay as it is.
    return text if message.tool_calls else text + sentinels[_BEGIN] + sentinels[_END]


def _free_block(text: str, size: int) -> int | None:
    """The start of a block of `size` private-use characters that the text does not contain."""
    used = {ord(char) for char in _PRIVATE_USE.findall(text)}
    starts = range(0xF0000, 0x110000 - size, size)
    return next((at for at in starts if not any(at <= char < at + size for char in used)), None)


def _agreement(a: str, b: str) -> int:
    """The length of the longest common beginning of two texts."""
    return len(commonprefix([a, b]))  # noqa: RUF071 - texts, letter by letter, are what is compared


def _plain_without(sentinels: re.Pattern[str], marked: Text) -> tuple[Span, ...]:
    """The spans of plain text, with positions as if there were no sentinels."""
    places = [match.start() for match in sentinels.finditer(marked.text)] if marked.plain else []
    return tuple((a - bisect_left(places, a), b - bisect_left(places, b)) for a, b in marked.plain)


def _widen(places: _Places, core: str, quoted: str, text: str) -> None:
    """Extend a message's content to white space and tags outside the sentinels, where the template has kept them.

    Args:
        places: changed in place.
        core: the content without outer white space.
        quoted: the content in its form for the template, with control tokens quoted.
        text: the rendered conversation.
    """
    if places.content is None:
        return
    start, stop = places.content
    if start == stop:  # the sentinels are all at the end: as much as the template has kept
        start -= _agreement(core[::-1], text[:start][::-1])
        places.content, places.first = (start, stop), min(places.first, start)
        return
    lead = match.group() if (match := _LEAD.match(quoted.strip())) else ""
    if lead and text.endswith(lead, 0, start):
        start -= len(lead)
    trail = match.group() if (match := _TRAIL.search(quoted.strip(), len(lead))) else ""
    if trail and text.startswith(trail, stop):
        stop += len(trail)
    places.content = (start, stop)
    places.first, places.last = min(places.first, start), max(places.last, stop)
