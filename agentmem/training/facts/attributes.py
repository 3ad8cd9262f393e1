"""What can be stated: some hundred and fifty attributes of a person, a project, an analysis and a customer case.

Each has a noun phrase in the user's words, a kind of values, and statements ({v} is the value) and questions of its own
(`attribute_table`). Every attribute can also be stated and asked for in the general wordings (`wordings`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from agentmem.training.facts.attribute_table import TABLE
from agentmem.training.facts.splits import Split, split_of

Domain = Literal["person", "project", "analysis", "customer"]


@dataclass(frozen=True)
class FactAttribute:
    """Something that has a single value at any time.

    Attributes:
        noun: the user's name for it: "my dog's name", "the deploy window".
        kind: the kind of its values (`values.OPEN_KINDS` or `values.POOLS`).
        domain: what it is an attribute of.
        statements: its own sentences that state it.
        questions: its own questions, in the user's words.
    """

    noun: str
    kind: str
    domain: Domain
    statements: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()

    @property
    def reply_noun(self) -> str:
        """The assistant's name for it: "your dog's name"."""
        return second_person(self.noun)

    @property
    def key(self) -> str:
        """An identifier for tool arguments: "dog_name", "deploy_window"."""
        noun = re.sub(r"^(my|our|the) ", "", self.noun).replace("'s", "")
        return re.sub(r"\W+", "_", noun).lower()


_SWAPS = {"my": "your", "our": "your", "i": "you", "we": "you", "me": "you", "us": "you", "am": "are", "i'm": "you're"}


def second_person(text: str) -> str:
    """The user's words as the assistant repeats them: my becomes your."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        other = _SWAPS.get(word.lower(), word)
        return other.capitalize() if word[0].isupper() and word != "I" else other

    return re.sub(r"\b(?:[Ii]'m|my|My|our|Our|I|we|We|me|us|am)\b", swap, text)


def _parse(domain: Domain, head: str, statements: str, questions: str) -> FactAttribute:
    noun, kind = (field.strip() for field in head.split("|"))
    parts = (tuple(text.strip() for text in line.split(" ; ")) for line in (statements, questions))
    return FactAttribute(noun, kind, domain, *parts)


def _blocks(table: str) -> Iterator[tuple[str, str, str]]:
    lines = table.strip().splitlines()
    return zip(lines[::3], lines[1::3], lines[2::3], strict=True)


_DOMAINS: tuple[Domain, ...] = ("person", "project", "analysis", "customer")

ATTRIBUTES: tuple[FactAttribute, ...] = tuple(
    _parse(domain, *block) for domain in _DOMAINS for block in _blocks(TABLE[domain])
)


def attributes(split: Split | None = None) -> tuple[FactAttribute, ...]:
    """The attributes of one part, or all of them."""
    return tuple(a for a in ATTRIBUTES if split is None or split_of(a.noun, "attribute") == split)
