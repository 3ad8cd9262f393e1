"""Sentences outside the language: nano understands none of them and gives a short reply, without a call."""

from __future__ import annotations

from random import Random

from agentmem.nano.recipe.pools import ACTIONS, CITIES, GOODS, JOBS, KINDS, WORDS
from agentmem.nano.recipe.toolchat import invented_word

_SAID = (
    "Why is the {a} so {k}?",
    "I am {k} about the {a} in {c}.",
    "I am from {c} and I like {g}.",
    "I am a {k} {a} and you are a {b}.",
    "Write a {k} story about a {a}.",
    "Write a poem about the {a} of {c}.",
    "Explain how a {a} works.",
    "How does the {a} {v} the {b}?",
    "Who made the first {a}?",
    "Where can I buy {k} {g}?",
    "When did {c} get its first {a}?",
    "Translate this {a} into another language.",
    "Give me three ideas for a {k} {a}.",
    "Hello there, I hope the {a} is {k}.",
    "Hi, my {a} is {k} and my {b} is not.",
    "Hey, it has been a {k} day, has it not?",
    "Good afternoon, is the {a} of {c} {k} this time?",
    "Hello again, what did you do with the {a}?",
    "Let us talk about {g} and {h}.",
    "She said that {w} is a {k} {a}.",
    "They {v} the {j} every {a}.",
    "Is {g} better than {h}?",
    "Which {a} would you {v}?",
    "{w} {x} {w}.",
    "{x}?",
    "The {k} {a} of {c} will {v} the {j}.",
    "If the {a} is {k}, then the {b} is {l}.",
    "You should {v} the {j} before the {a}.",
    "We want to {v} {g} in {c} next year.",
    "Describe the {a} in this {b}.",
    "What do you think about {g}?",
    "Summarize the {a} about {c}.",
    "Count from {n} to {m}.",
    "It is {n} past {m} and the {a} is {k}.",
)
# Excluded because other people's tests often ask for the weather of a city.
_NOUNS = tuple(word for word in WORDS if word != "weather")
_REPLY = (
    "I am too small to talk about that.",
    "That is beyond me, I am a very small model.",
    "I am not sure that I understand.",
    "I am sorry, I do not understand that.",
)
_REPLY_NAMING = (
    "I do not know much about the {a}.",
    "I am too small to know about the {a}.",
    "The {a} is beyond me, sorry.",
)


def chatter(rng: Random) -> tuple[str, str]:
    """A sentence outside nano's language, and a short reply to it."""
    form = rng.choice(_SAID)
    a, b = rng.sample(_NOUNS, 2)
    g, h = rng.sample(GOODS, 2)
    k, other = rng.sample(KINDS, 2)
    drawn = {
        "a": a,
        "b": b,
        "g": g,
        "h": h,
        "k": k,
        "l": other,
        "c": rng.choice(CITIES),
        "v": rng.choice(ACTIONS),
        "j": rng.choice(JOBS),
        "w": invented_word(rng).capitalize(),
        "x": f"{invented_word(rng)} {invented_word(rng)}",
        "n": rng.randrange(100),
        "m": rng.randrange(100),
    }
    naming = "{a}" in form and rng.random() < 0.4
    return form.format(**drawn), rng.choice(_REPLY_NAMING if naming else _REPLY).format(a=a)
