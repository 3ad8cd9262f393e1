"""What nano's language can talk about: attributes of the user and of the project, each with its pool of values.

The pools stand in `pools.txt`. The contract: attribute names are unique; a value occurs once in its pool; no value
of a pool is part of another value of that pool when both are read as whole words, so that a reply names at most what
it means to name.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Literal


@dataclass(frozen=True)
class Attribute:
    """Something that can be told, changed and asked.

    Attributes:
        name: the phrase that names it ("favorite color", "test command").
        owner: whose it is; "user" is spoken of with my and your, "project" with the.
        values: what it can be; chance is one in so many.
    """

    name: str
    owner: Literal["user", "project"]
    values: tuple[str, ...]


def _read() -> tuple[dict[str, Attribute], dict[str, tuple[str, ...]]]:
    attributes: dict[str, Attribute] = {}
    words: dict[str, tuple[str, ...]] = {}
    for line in files("agentmem.nano.recipe").joinpath("pools.txt").read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        head, _, listed = line.partition(" = ")
        kind, _, name = head.partition(": ")
        values = tuple(listed.split(", "))
        if kind == "words":
            words[name] = values
        else:
            attributes[name] = Attribute(name, "user" if kind == "user" else "project", values)
    return attributes, words


ATTRIBUTES, _WORDS = _read()
WORDS = _WORDS["nouns"]
"""Plain nouns that small talk, tool names, parameters and quoted facts are put together from."""
VERBS = _WORDS["verbs"]
PARAMETERS = _WORDS["parameters"]
SYLLABLES = _WORDS["syllables"]
"""What invented words are made of."""
CITIES = _WORDS["cities"]
GOODS = _WORDS["goods"]
KINDS = _WORDS["kinds"]
"""Adjectives."""
FIRMS = _WORDS["firms"]
ACTIONS = _WORDS["actions"]
"""Verbs of requests that leave an argument to memory."""
JOBS = _WORDS["jobs"]
"""What such requests are about."""
