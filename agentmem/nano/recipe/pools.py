"""What nano's language can be about: attributes of the user and of the project, each with a pool of values.

The pools are in `pools.txt`. Rules: attribute names are unique; a value occurs once in its pool; and no value of a pool
is contained in another one, compared by whole words, so that a reply cannot name a value by accident.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Literal


@dataclass(frozen=True)
class Attribute:
    """Something that can be stated, changed and asked for.

    Attributes:
        name: the phrase that names it ("favorite color", "test command").
        owner: "user" (referred to with my and your) or "project" (with the).
        values: the possible values; guessing is right once in that many times.
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
"""Plain nouns from which small talk, tool names, parameters and quoted facts are built."""
VERBS = _WORDS["verbs"]
PARAMETERS = _WORDS["parameters"]
SYLLABLES = _WORDS["syllables"]
"""The parts of invented words."""
CITIES = _WORDS["cities"]
GOODS = _WORDS["goods"]
KINDS = _WORDS["kinds"]
"""Adjectives."""
FIRMS = _WORDS["firms"]
ACTIONS = _WORDS["actions"]
"""Verbs of requests that leave an argument to be filled from memory."""
JOBS = _WORDS["jobs"]
"""The objects of such requests."""
