"""The words of a text that its content is compared by."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen"""
_NUMBERS = {word: str(n) for n, word in enumerate(_UNITS.split())} | {
    word: str(10 * n) for n, word in enumerate(_TENS, 2)
}
_FUNCTION_WORDS = """a an the of in on at to for from by with and or as it its this that these those there is are was
    were be been am do does did has have had i you he she we they me him her us them my your his our their"""
_EMPTY = frozenset(_FUNCTION_WORDS.split())
_TOKEN = re.compile(r"(\d+(?:,\d{3})+|\d+(?:[.:]\d+)*)(?:st|nd|rd|th)?|[^\W\d_]+")


@lru_cache(maxsize=8192)
def content_words(text: str) -> tuple[str, ...]:
    """The words of a text that count, in the form in which they are compared.

    Letter case, plural s, articles, pronouns and prepositions do not count, and number words are numbers.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    plain = re.sub(r"'(s|re|ve|m|ll|d)\b", "", plain).replace("%", " percent ")
    found = list[str]()
    for match in _TOKEN.finditer(plain):
        word = match[1] or match[0]
        if match[1]:
            found.append(word.replace(",", "").removesuffix(":00"))
        elif word in _NUMBERS:
            found.append(_NUMBERS[word])
        elif word not in _EMPTY:
            found.append(word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] != "s" else word)
    return tuple(found)
