"""Judges replies by their text alone: no model, and no credit for guesses.

A right reply contains an accepted value as a whole (not as part of a longer word, number or path), none of the values
that are ruled out, and few words, so that neither an enumeration nor an echo of the conversation can be right. Letter
case does not count, since a value may begin a sentence. A question with a check of its own (`Ask.check`) is judged by
that, and by its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from agentmem.messages import Message
from agentmem.training.conversations import Ask

MAX_WORDS = 30
"""Most words of a right reply."""


@dataclass(frozen=True)
class Verdict:
    """What a reply is: `right`, and whether it contains a value that is ruled out (`named_forbidden`)."""

    right: bool
    named_forbidden: bool


def judge(ask: Ask, reply: Message, *, max_words: int | None = MAX_WORDS) -> Verdict:
    """Judge the reply to a question. Where a tool call is the right reply, its arguments must have the value.

    `max_words`: most words of a right reply; None: any number.
    """
    arguments = " ".join(json.dumps(dict(call.arguments), ensure_ascii=False) for call in reply.tool_calls)
    named_forbidden = any(contains(f"{reply.content} {arguments}", value) for value in ask.forbidden)
    if ask.check is not None:
        right = ask.check(reply.content)
    elif ask.reply.tool_calls:
        same = [call.name for call in reply.tool_calls] == [call.name for call in ask.reply.tool_calls]
        right = same and any(contains(arguments, value) for value in ask.values)
    else:
        right = any(contains(reply.content, value) for value in ask.values)
    short = max_words is None or len(reply.content.split()) <= max_words
    return Verdict(right and short and not named_forbidden, named_forbidden)


def is_judged(ask: Ask) -> bool:
    """Whether replies to a question can be judged by their text; otherwise only its loss can be measured."""
    return bool(ask.values) or ask.check is not None


def contains(text: str, value: str) -> bool:
    """Whether a text contains a value as a whole: "12" is not in "120", "12.5", "v12" or "12/3"."""
    pattern = _as_a_whole(value)
    return pattern is not None and pattern.search(text.casefold()) is not None


def named(text: str, values: Iterable[str]) -> set[str]:
    """Which values a text contains as wholes; one that is only there as part of a longer one does not count."""
    text, there = text.casefold(), set[str]()
    for value in sorted(values, key=len, reverse=True):
        if (pattern := _as_a_whole(value)) is not None and pattern.search(text) is not None:
            there.add(value)
            text = pattern.sub("\n", text)
    return there


@lru_cache(maxsize=4096)
def _as_a_whole(value: str) -> re.Pattern[str] | None:
    words = r"\s+".join(re.escape(word) for word in value.casefold().split())
    # A sign between two letters or digits joins them to one path, version, date, time or number.
    return re.compile(rf"(?<!\w)(?<!\w[./:,@_\\-]){words}(?!\w)(?![./:,@_\\-]\w)") if words else None
