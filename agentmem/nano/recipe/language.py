"""The generated language in which nano is told things, corrected, and asked.

A *binding* is an attribute and its value in one conversation ("favorite color", "teal"). Bindings are drawn anew for
every conversation, so weights cannot hold them: a correct answer comes from the prompt or from memory. Every function
that takes a `random.Random` is deterministic in it, and held-out conversations are new seeds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from agentmem.nano.recipe.pools import ATTRIBUTES, WORDS


@dataclass(frozen=True)
class Binding:
    """An attribute (a key of `ATTRIBUTES`) and the value that it has in this conversation."""

    attribute: str
    value: str


_TELL = (
    "{Mine} is {v}.",
    "{Mine} is {v}.",
    "{Mine} is {v}.",
    "Please remember that {mine} is {v}.",
    "Remember that {mine} is {v}.",
    "Please note that {mine} is {v}.",
    "By the way, {mine} is {v}.",
    "FYI, {mine} is {v}.",
    "Note: {mine} is {v}.",
    "I want you to know that {mine} is {v}.",
    "Remember this: {v} is {mine}.",
)
_CHANGE = (
    "Actually, {mine} is now {v}.",
    "Actually, {mine} is {v}.",
    "Correction: {mine} is {v}.",
    "Please change {mine} to {v}.",
    "Update: {mine} is {v} now.",
    "{Mine} is now {v}.",
    "I changed my mind, {mine} is {v}.",
)
_ACKNOWLEDGE = ("Got it, {answer}", "Noted, {answer}", "OK, {answer}", "Understood, {answer}")
_ACKNOWLEDGE_CHANGE = ("Updated, {answer}", "OK, {answer}", "Got it, {answer}")
_ASK = (
    "What is {mine}?",
    "What is {mine}?",
    "What is {mine}?",
    "What was {mine} again?",
    "Do you remember {mine}?",
    "Please tell me {mine}.",
    "Tell me {mine}.",
    "Remind me, what is {mine}?",
    "Can you tell me {mine}?",
    "What did I say {mine} is?",
)

_SMALL_TALK = (
    ("Hello!", "Hello! How can I help?"),
    ("Hi there.", "Hi! What can I do for you?"),
    ("Good morning.", "Good morning to you!"),
    ("Good evening.", "Good evening to you!"),
    ("How are you?", "I am fine, thank you."),
    ("How is it going?", "All is well here."),
    ("Thanks!", "You are welcome."),
    ("Thank you very much.", "You are very welcome."),
    ("That was helpful.", "I am glad to hear that."),
    ("It is raining today.", "I hope you stay dry."),
    ("The sun is shining.", "That sounds lovely."),
    ("I am a bit tired.", "You should take a short break."),
    ("I had a long day.", "I hope you can rest now."),
    ("I need a break.", "Take your time."),
    ("What can you do?", "I can remember what you tell me."),
    ("Who are you?", "I am nano, a very small model."),
    ("Are you a robot?", "I am a small language model."),
    ("Tell me a joke.", "I am too small for jokes."),
    ("Sing a song.", "I can not sing, sorry."),
    ("I will be back soon.", "See you soon!"),
    ("Let us go on.", "Sure, let us go on."),
    ("One moment please.", "Sure, take your time."),
    ("I am back.", "Welcome back!"),
    ("Let me think.", "Of course."),
    ("That is funny.", "I am happy to amuse you."),
    ("I am learning a lot.", "That is great to hear."),
    ("Work is busy this week.", "I wish you a calm weekend."),
    ("My coffee is cold.", "Time for a fresh cup."),
    ("The meeting was boring.", "At least it is over now."),
    ("I fixed a bug today.", "Well done!"),
    ("The tests are green.", "That is good news."),
    ("The build is slow.", "Maybe it needs a cache."),
    ("I like this project.", "I like it too."),
    ("See you tomorrow.", "Good bye!"),
)
_SMALL_TALK_ABOUT = (
    ("I saw a {a} near the {b} today.", "A {a} near the {b}, how nice."),
    ("We talked about the {a} and the {b}.", "The {a} and the {b} are good topics."),
    ("The {a} is next to the {b}.", "I see, next to the {b}."),
    ("I read something about the {a}.", "The {a} is interesting."),
    ("My friend has a new {a}.", "I hope your friend enjoys the {a}."),
    ("Do you like the {a}?", "Yes, the {a} is fine."),
    ("I forgot the {a} at the {b}.", "I hope the {b} still has it."),
    ("There was a {a} in the news.", "I have not heard about the {a}."),
)
_SYSTEM = (
    "You are a helpful assistant.",
    "You are nano, a helpful assistant.",
    "You are a coding assistant.",
    "You are an analysis assistant.",
    "You are a friendly assistant. Answer in one sentence.",
    "Answer briefly.",
    "Be short and precise.",
)


def mine(attribute: str) -> str:
    """How the user names the attribute: "my favorite color", "the test command"."""
    return f"{'my' if ATTRIBUTES[attribute].owner == 'user' else 'the'} {attribute}"


def yours(attribute: str) -> str:
    """How the assistant names the attribute: "your favorite color", "the test command"."""
    return f"{'your' if ATTRIBUTES[attribute].owner == 'user' else 'the'} {attribute}"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def draw_bindings(rng: Random, n: int, *, attributes: Sequence[str] | None = None) -> list[Binding]:
    """Draw `n` bindings of distinct attributes, each value uniform in its pool.

    `attributes` limits the choice; ValueError if there are fewer than `n`.
    """
    names = rng.sample(sorted(attributes or ATTRIBUTES), n)
    return [Binding(name, rng.choice(ATTRIBUTES[name].values)) for name in names]


def redraw(rng: Random, binding: Binding) -> Binding:
    """The same attribute with another value."""
    others = [v for v in ATTRIBUTES[binding.attribute].values if v != binding.value]
    return Binding(binding.attribute, rng.choice(others))


def _say(form: str, binding: Binding) -> str:
    name = mine(binding.attribute)
    return form.format(mine=name, Mine=_capitalised(name), v=binding.value)


def _acknowledge(form: str, binding: Binding) -> str:
    return form.format(answer=f"{yours(binding.attribute)} is {binding.value}.")


def tell(rng: Random, binding: Binding) -> tuple[str, str]:
    """A user message that states the binding, and the reply that repeats it in the form of an answer."""
    return _say(rng.choice(_TELL), binding), _acknowledge(rng.choice(_ACKNOWLEDGE), binding)


def change(rng: Random, binding: Binding) -> tuple[str, str]:
    """A user message that replaces the attribute's value by `binding.value`, and the reply to it."""
    return _say(rng.choice(_CHANGE), binding), _acknowledge(rng.choice(_ACKNOWLEDGE_CHANGE), binding)


def ask(rng: Random, attribute: str) -> str:
    """A user message that asks for the attribute's value."""
    return ask_about(rng, mine(attribute))


def ask_about(rng: Random, name: str) -> str:
    """A user message that asks for what `name` ("my pet", "the retry limit") is."""
    return rng.choice(_ASK).format(mine=name)


def answer(binding: Binding) -> str:
    """The one correct answer: "Your favorite color is teal."."""
    return f"{_capitalised(yours(binding.attribute))} is {binding.value}."


def unknown(attribute: str) -> str:
    """The answer to a question about something that was never stated."""
    return f"I do not know {yours(attribute)} yet."


def filler(rng: Random) -> tuple[str, str]:
    """Small talk that states no binding: a user message and its reply."""
    if rng.random() < 0.6:
        return rng.choice(_SMALL_TALK)
    said, reply = rng.choice(_SMALL_TALK_ABOUT)
    a, b = rng.sample(WORDS, 2)
    return said.format(a=a, b=b), reply.format(a=a, b=b)


def system_text(rng: Random) -> str:
    """A plain system message."""
    return rng.choice(_SYSTEM)


@cache
def _values(attribute: str) -> re.Pattern[str]:
    # Longest first, so that a value that begins like another one is matched completely.
    values = sorted(ATTRIBUTES[attribute].values, key=lambda v: (-len(v), v))
    return re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, values)) + r")(?![\w-])")


def named_values(reply: str, attribute: str) -> set[str]:
    """The values of the attribute's pool that occur in a reply as whole words (case matters)."""
    return set(_values(attribute).findall(reply))


def is_correct(reply: str, binding: Binding) -> bool:
    """Whether a reply contains the binding's value and no other value of that attribute's pool."""
    return named_values(reply, binding.attribute) == {binding.value}
