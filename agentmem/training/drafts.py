"""Whether what was said bears out a reply that was drafted from memory alone.

A memory that steers leans towards an answer and cannot cite it; a text that was kept can be read, and says nothing of
what it was not searched for. Together: the memory drafts, and the text decides by its words whether the draft stands.
No model is asked. Where the draft does not stand, and where more was said than a memory was trained to hold, the prompt
shows passages instead (the arm `hybrid`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from agentmem.messages import Message
from agentmem.training.contexts import passages
from agentmem.training.facts.wordings import says_it_was_not_told
from agentmem.training.words import content_words

_WORDS = """what which who whom whose when where why how tell told say said know remember recall remind mention
    mentioned give gave given need forgot look back again once more still please can could would will should let yes no
    not ok okay thank just now also"""
_ASKING = frozenset(_WORDS.split())
"""Words that ask or confirm, whatever it is about."""

_SEEKING = re.compile(
    r"\b(what|which|who|whom|whose|when|where|why|how|tell|say|remind|remember|recall|know|forgot)\b", re.IGNORECASE
)
_REQUEST = re.compile(r"\W*((yes|no|sure|ok|okay|and|please)\W+)*(can|could|will|would|may|shall)\b", re.IGNORECASE)
MOST_TOLD = 1024
"""The most tokens of a conversation whose memory is asked for a draft; an adapter is trained with talks of hundreds."""

_FIT = 0.5  # of the question's words that the best passage has; what bears a draft out has so many of them


def stands(draft: str, question: str, told: Sequence[Message]) -> bool:
    """Whether a conversation bears a draft out.

    It does if one passage has every word that the draft adds to the question, and is about the question: no passage
    has more than twice as many of the question's words. A draft that adds nothing (an answer to "A or B?") must be in
    a passage as it is. A draft that says that something was not told stands if no passage has a word of the question.

    A message that asks for nothing ("Yes, book two tickets.") has no words to look its reply up by: what a good reply
    says again was said in many passages, none of which is about the message. There any other draft stands.

    Args:
        draft: the reply, with the arguments of its calls if there are any.
        question: the user's message that it replies to.
        told: the conversation; its system messages bear nothing out.
    """
    spoken = [
        frozenset(content_words(passage))
        for message in told
        if message.role != "system"
        for passage in passages(message.content)
    ]
    asked, said = _words(question), _words(draft)
    fits = [len(asked & words) for words in spoken]
    best = max(fits, default=0)
    if says_it_was_not_told(draft):
        return best == 0
    if not _asks(question):
        return True
    claims = said - asked or said
    return bool(claims) and any(claims <= words and fit >= _FIT * best for words, fit in zip(spoken, fits, strict=True))


def _asks(message: str) -> bool:
    """Whether a message asks for what was said: by a word that seeks, or by a question that is no request.

    A question mark is enough in any other language than English.
    """
    questions = re.findall(r"[^.!?？\n]*[?？]", message)
    return bool(_SEEKING.search(message)) or any(not _REQUEST.match(question) for question in questions)


def _words(text: str) -> frozenset[str]:
    return frozenset(content_words(text)) - _ASKING
