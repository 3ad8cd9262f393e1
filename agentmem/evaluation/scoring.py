"""Scores replies to questions with short answers by their text: no model, and little to gain by guessing.

    states           whether a reply states an answer: what the tasks call right
    locomo_f1        the F1 of LoCoMo's own evaluation
    hotpot_f1        the F1 of HotpotQA's own evaluation
    hotpot_exact     its exact match

The published scores are there for comparison with published figures. They give a part of the credit to replies that
share some words with the answer, which a constant reply does too; so `right` is decided by `states`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from agentmem.errors import MissingExtraError
from agentmem.training.judging import contains
from agentmem.training.words import content_words

_ASIDE = re.compile(r"\([^()]*[^\W\d_][^()]*\)")  # brackets with a letter in them; those of "+49 (0) 62" are none
_DOUBT = {"1"}  # "one" is a pronoun as often as it is a number

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def states(answer: str, question: str, reply: str) -> bool:
    """Whether a reply states a short answer.

    All words of the answer are in the reply, in any order. Letter case, plural s, articles, pronouns and prepositions
    do not count, number words are numbers, and what the answer has in brackets is not asked for. Where the answer has a
    number, the reply names no other one but those of the question, so that a list of numbers is not right. An answer
    that begins with yes or no must be what the reply begins with.
    """
    needed, said = content_words(_ASIDE.sub(" ", answer)), content_words(reply)
    if not needed:  # a title like "That"
        return contains(reply, answer.strip("\"' ."))
    if needed[0] in ("yes", "no"):
        return said[:1] == needed[:1]
    words, own = frozenset(said), frozenset(needed)
    if not own <= words:
        return False
    numbers = _numbers(own)
    return not numbers or _numbers(words) <= numbers | _numbers(frozenset(content_words(question))) | _DOUBT


def _numbers(words: frozenset[str]) -> frozenset[str]:
    return frozenset(word for word in words if word[0].isdigit())


# The scores of others, in their own definitions.


def locomo_f1(category: int, answer: str, reply: str) -> float:
    """The F1 of LoCoMo's `evaluation.py`, for its categories 1 to 4.

    Tokens are Porter stems without articles, "and" and punctuation. Category 1 has several answers with commas between:
    the mean over them of the best F1 of any part of the reply. Of category 3 the first alternative counts.

    Raises:
        MissingExtraError: nltk is not installed.
    """
    if category == 1:
        parts = [_locomo_tokens(part) for part in reply.split(",")]
        answers = [_locomo_tokens(part) for part in answer.split(",")]
        return sum(max(_f1(part, tokens) for part in parts) for tokens in answers) / len(answers)
    if category == 3:
        answer = answer.split(";")[0]
    return _f1(_locomo_tokens(reply), _locomo_tokens(answer))


@lru_cache(maxsize=8192)
def _locomo_tokens(text: str) -> tuple[str, ...]:
    stem = porter_stem()
    return tuple(stem(word) for word in _without(text.replace(",", ""), "a|an|the|and"))


def hotpot_f1(answer: str, reply: str) -> float:
    """The F1 of HotpotQA's evaluation: words without articles and punctuation; "yes" and "no" must be equal."""
    own, said = _without(answer, "a|an|the"), _without(reply, "a|an|the")
    closed = ({"yes"}, {"no"}, {"noanswer"})
    if own != said and (set(own) in closed or set(said) in closed):
        return 0.0
    return _f1(said, own)


def hotpot_exact(answer: str, reply: str) -> float:
    """1 if answer and reply are equal but for articles, punctuation and letter case; else 0."""
    return float(_without(answer, "a|an|the") == _without(reply, "a|an|the"))


def same_text(answer: str, reply: str, *, whole: bool) -> bool:
    """Whether a reply is an answer, or has it as a part; articles, punctuation and letter case do not count."""
    own, said = (" ".join(_without(text, "a|an|the")) for text in (answer, reply))
    return own == said if whole else own in said


def _without(text: str, articles: str) -> Sequence[str]:
    return re.sub(rf"\b(?:{articles})\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _f1(said: Sequence[str], answer: Sequence[str]) -> float:
    same = sum((Counter(said) & Counter(answer)).values())
    return 2 * same / (len(said) + len(answer)) if same else 0.0


@lru_cache(maxsize=1)
def porter_stem() -> Callable[[str], str]:
    """The function that stems a word.

    Raises:
        MissingExtraError: nltk is not installed.
    """
    try:
        from nltk.stem import PorterStemmer
    except ImportError:
        raise MissingExtraError("nltk", "eval") from None
    stemmer: Any = PorterStemmer()
    return lambda word: str(stemmer.stem(word))
