"""What tools return, and the sentence that reports it without another call."""

from __future__ import annotations

import json
from random import Random

from agentmem.nano.recipe.pools import KINDS, WORDS
from agentmem.nano.recipe.toolchat import result

_SENTENCES = (
    "It is {k}.",
    "It is {k} and {l}.",
    "It's {k}.",
    "It's {k} today.",
    "The {a} is {k}.",
    "The {a} of the {b} is {k}.",
    "There is a {a} near the {b}.",
    "No {a} was found.",
    "The {a} has {n} parts.",
    "{A} {n} is {k}.",
)
_DONE = (
    "Done.",
    "OK.",
    "Created.",
    "Saved.",
    "Sent.",
    "It worked.",
    "Created a {a}.",
    "The {a} was saved.",
    "{n} passed.",
)
_ERRORS = ("the {a} is {k}", "no {a} found", "{a} {n} is not valid", "the {a} did not reply", "unknown {a}")


def _filled(rng: Random, form: str) -> str:
    a, b = rng.sample(WORDS, 2)
    k, other = rng.sample(KINDS, 2)
    return form.format(a=a, b=b, A=a.capitalize(), k=k, l=other, n=rng.randrange(10 ** rng.choice((1, 2, 3))))


def plain(rng: Random) -> tuple[str, str]:
    """A number, seldom negative, or a word."""
    if rng.random() < 0.65:
        value = str(rng.randrange(10 ** rng.choice((1, 2, 3, 4, 5))) * rng.choice((1, 1, 1, 1, 1, 1, -1)))
    else:
        value = rng.choice((*WORDS, *KINDS))
    return value, f"The result is {value}."


def sentence(rng: Random) -> tuple[str, str]:
    """A short sentence; the report repeats it."""
    said = _filled(rng, rng.choice(_SENTENCES))
    return said, said


def done(rng: Random) -> tuple[str, str]:
    """A word that says that something was done; the report repeats it."""
    said = _filled(rng, rng.choice(_DONE))
    return said, said


def record(rng: Random) -> tuple[str, str]:
    """A JSON object of one or two fields."""
    values: dict[str, int | str] = {}
    for key in rng.sample(("result", "total", "state", *rng.sample(WORDS, 5)), rng.choice((1, 1, 1, 2))):
        number = rng.random() < 0.6
        values[key] = rng.randrange(10 ** rng.choice((1, 2, 3, 4))) if number else rng.choice((*WORDS, *KINDS))
    report = " and ".join(f"the {key} is {value}" for key, value in values.items())
    return json.dumps(values), f"{report[:1].upper()}{report[1:]}."


def failure(rng: Random) -> tuple[str, str]:
    """An error, which the report names."""
    why = _filled(rng, rng.choice(_ERRORS))
    return f"Error: {why}.", f"The tool failed: {why}."


_MAKERS = {"plain": plain, "sentence": sentence, "done": done, "record": record, "failure": failure, "named": result}
_SHARES = {
    "named": {"named": 60, "sentence": 12, "done": 8, "record": 12, "failure": 8},
    "function": {"plain": 80, "sentence": 4, "record": 8, "failure": 8},
    "lookup": {"plain": 40, "sentence": 36, "record": 16, "failure": 8},
    "creator": {"plain": 10, "sentence": 10, "done": 60, "record": 12, "failure": 8},
    "action": {"plain": 20, "sentence": 20, "done": 40, "record": 12, "failure": 8},
    "remembered": {"plain": 15, "sentence": 20, "done": 40, "record": 15, "failure": 10},
}


def outcome(rng: Random, kind: str) -> tuple[str, str]:
    """What a tool of this kind ("named" or an offer's kind) returns, and its report."""
    shares = _SHARES[kind]
    return _MAKERS[rng.choices(list(shares), list(shares.values()))[0]](rng)
