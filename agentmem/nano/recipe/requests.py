"""Requests that need one of the offered tools, usually without naming it, and the call that answers each.

Lookups are requested in ordinary words, functions as `f(3)`. Requests for creators give a name in quotes, and any
further details. Commands are short ("Run the tests."). Where a command needs something stated earlier, the assistant
first says what it needs and what the value is, and then makes the call; if it was never stated, the assistant says so
and makes no call. (A share of the calls comes without those words, as a forced call does.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from agentmem.messages import ToolCall
from agentmem.nano.recipe.language import Binding, answer, unknown, yours
from agentmem.nano.recipe.offers import PREPOSITIONS, TOPICS, Offer, a
from agentmem.nano.recipe.pools import ATTRIBUTES, CITIES, FIRMS, GOODS, KINDS, WORDS
from agentmem.nano.recipe.spans import draw_span, quoted
from agentmem.nano.recipe.toolchat import invented_word

_LOOKUP_ASK = (
    "What is the {t} {p} {v}?",
    "What is the {t} {p} {v}?",
    "What is the {t} {p} {v} today?",
    "What is the current {t} {p} {v}?",
    "What's the {t} {p} {v}?",
    "Tell me the {t} {p} {v}.",
    "Please tell me the {t} {p} {v}.",
    "Can you tell me the {t} {p} {v}?",
    "Do you know the {t} {p} {v}?",
    "How is the {t} {p} {v}?",
    "What {t} does {v} have?",
    "Find the {t} {p} {v}.",
    "Please look up the {t} {p} {v}.",
    "I need the {t} {p} {v}.",
    "I want to know the {t} {p} {v}.",
    "Show me the {t} {p} {v}.",
    "How high is the {t} {p} {v}?",
)
_FUNCTION_ASK = (
    "What is the value of {call}?",
    "What is the value of {call}?",
    "What is {call}?",
    "Compute {call}.",
    "Calculate {call}.",
    "Please compute {call}.",
    "What does {call} give?",
    "What does {call} return?",
    "Evaluate {call}.",
    "Tell me {call}.",
    "I need the value of {call}.",
)
_FUNCTION_OF = ("Apply {f} to {x}.", "Compute {f} of {x}.", "What is {f} of {x}?", "What does {f} give for {x}?")
_USE = ("", "", "", " Use the tool.", " Use the tool.", " Please use the tool.", " Use a tool.", " Call the tool.")
_NAMED = ("named", "named", "called", "with the name")
_CREATE = ("Create", "Create", "Create", "Add", "Please create", "Please add", "Make", "Register", "I need", "Set up")
_GLOSSED = (
    " ({g}) - {d}",
    " ({g}) - {d}",
    " ({g}) - {d}",
    " [{g}] - {d}",
    " ({g}) \N{EN DASH} {d}",
    " ({g}), {d}.",
    " ({g}): {d}",
    " ({g}) with the {p} {d}.",
)
_PLAIN = (
    " - {d}",
    " - {d}",
    " \N{EM DASH} {d}",
    ", {d}.",
    " with the {p} {d}.",
    " with {p} {d}.",
    ", the {p} is {d}.",
    ". The {p} is {d}.",
)
_DO = (
    "{Doing}.",
    "{Doing}.",
    "{Doing}",
    "Please {doing}.",
    "Can you {doing}?",
    "Could you {doing} now?",
    "{Doing} now.",
    "{Doing} again.",
    "Now {doing}.",
    "I want you to {doing}.",
    "Go on and {doing}.",
    "It is time to {doing}.",
)
_OUTRIGHT = 0.1  # share of the calls from memory that do not first say what the value is
_FOLDERS = ("src", "docs", "data", "tests", "lib", "app")
_ENDINGS = ("py", "py", "md", "txt", "csv", "json", "toml")


@dataclass(frozen=True)
class ToolRequest:
    """A user message that needs a tool, and the answer to it.

    Attributes:
        said: the message.
        call: the call; None where something it needs was never stated.
        saying: what the assistant says before the call, or instead of it.
    """

    said: str
    call: ToolCall | None
    saying: str = ""


def place_or_thing(rng: Random) -> str:
    """Something to look up: one to three words, some with a comma and two capitals."""
    kind = rng.random()
    if kind < 0.3:
        name = rng.choice((*CITIES, *ATTRIBUTES["home town"].values))
    elif kind < 0.42:
        return rng.choice((*GOODS, *WORDS))
    elif kind < 0.5:
        return f"{rng.choice(KINDS).lower()} {rng.choice(GOODS)}"
    elif kind < 0.55:
        return rng.choice((*ATTRIBUTES["name"].values, *ATTRIBUTES["team lead"].values))
    elif kind < 0.6:
        return f"{rng.choice(WORDS)} {rng.randrange(10 ** rng.choice((1, 2, 3)))}"
    elif kind < 0.8:
        name = invented_word(rng).capitalize()
    else:
        name = f"{invented_word(rng).capitalize()} {invented_word(rng).capitalize()}"
    if rng.random() < 0.35:
        name += f", {rng.choice('ABCDEFGIKLMNOPRSTUVW')}{rng.choice('ABCDEGHIKLMNOPRSTUVXYZ')}"
    return name


def _file(rng: Random) -> str:
    """A file's path."""
    stem = rng.choice(WORDS) if rng.random() < 0.6 else invented_word(rng)
    name = f"{stem}.{rng.choice(_ENDINGS)}" if rng.random() < 0.8 else f"{stem}_{rng.choice(WORDS)}.py"
    return name if rng.random() < 0.5 else f"{rng.choice(_FOLDERS)}/{name}"


def ask_topic(rng: Random, topic: str, value: str) -> str:
    """A question about a topic, in ordinary words."""
    return rng.choice(_LOOKUP_ASK).format(t=topic, p=rng.choice(PREPOSITIONS), v=value)


def unoffered(rng: Random, offers: Sequence[Offer]) -> tuple[str, str]:
    """A question that fits none of the tools, and the reply to it without a call."""
    taken = {word for offer in offers for word in offer.subject.split()}
    topic = rng.choice([word for word in TOPICS if word not in taken])
    if rng.random() < 0.4:
        topic = f"{topic} {rng.choice([word for word in TOPICS if word not in taken])}"
    return ask_topic(rng, topic, place_or_thing(rng)), f"I do not know the {topic} yet."


def _integer(rng: Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 1, 2, 2, 3, 3, 4, 5))) * rng.choice((1,) * 9 + (-1,))


def _ask_function(rng: Random, offer: Offer) -> ToolRequest:
    arguments = {parameter: _integer(rng) for parameter in offer.properties}
    numbers = [str(value) for value in arguments.values()]
    if numbers and rng.random() < 0.15:
        said = rng.choice(_FUNCTION_OF).format(f=offer.name, x=" and ".join(numbers))
    else:
        said = rng.choice(_FUNCTION_ASK).format(call=f"{offer.name}({', '.join(numbers)})")
    return ToolRequest(said + rng.choice(_USE), ToolCall(offer.name, arguments))


def _description(rng: Random) -> str:
    """One to four words, some of them invented."""
    kind, firm, word = rng.choice(KINDS), rng.choice(FIRMS), invented_word(rng)
    strange = rng.choice((word, word.capitalize()))
    return rng.choice((a(f"{kind} {firm}"), a(f"{kind} {rng.choice(WORDS)} {firm}"), f"{rng.choice(GOODS)} {firm}",
                       a(f"{strange} {firm}"), a(f"{word.capitalize()} {rng.choice(WORDS)} {firm}"),
                       a(f"{kind} {word} {firm}"), a(rng.choice(WORDS)), strange))  # fmt: skip


def _gloss(rng: Random) -> str:
    """The meaning of a name: one to three capitalised words, existing or invented."""
    words = [
        rng.choice(WORDS) if rng.random() < 0.5 else rng.choice((*FIRMS, *KINDS)) if rng.random() < 0.6
        else invented_word(rng) for _ in range(rng.choice((1, 2, 2, 2, 3)))
    ]  # fmt: skip
    return " ".join(word.capitalize() for word in words)


def _ask_creator(rng: Random, offer: Offer) -> ToolRequest:
    span = draw_span(rng)
    article = rng.choice((a(offer.subject),) * 6 + (f"the {offer.subject}", f"a new {offer.subject}"))
    said = f"{rng.choice(_CREATE)} {article} {rng.choice(_NAMED)} {quoted(rng, span)}"
    first, *others = offer.properties
    arguments: dict[str, Any] = {first: span}
    if not others:
        tail = rng.choice((".", "", " ({g})", " ({g}).", " [{g}]")).format(g=_gloss(rng))
        return ToolRequest(said + tail, ToolCall(offer.name, arguments))
    second, *third = others
    arguments[second] = _description(rng)
    tail = rng.choice(_GLOSSED if rng.random() < 0.55 else _PLAIN)
    said += tail.format(g=_gloss(rng), d=arguments[second], p=second)
    for parameter in third:
        arguments[parameter] = rng.choice((*CITIES, *WORDS))
        said += f"{'' if said.endswith('.') else '.'} The {parameter} is {arguments[parameter]}."
    return ToolRequest(said, ToolCall(offer.name, arguments))


def _given(rng: Random, parameter: str, doing: str) -> tuple[str, str]:
    """A value for a string argument of a command, and the command that contains it."""
    kind = rng.random()
    if parameter in ("path", "file", "module", "source") and kind < 0.8:
        doing = doing.removesuffix(" it").removesuffix(" this")
        value = _file(rng)
        return value, f"{doing} {rng.choice(('', '', '', 'in ', 'of ', 'for '))}{value}"
    if kind < 0.25:
        value = rng.choice(WORDS) if rng.random() < 0.5 else f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
        return value, f"{doing} {rng.choice(('', 'for ', 'with '))}{quoted(rng, value)}"
    value = rng.choice((*WORDS, *CITIES, *GOODS))
    return value, f"{doing} {rng.choice(('of', 'of', 'for', 'on', 'in', 'with'))} {value}"


def _command(rng: Random, offer: Offer, told: Mapping[str, str]) -> ToolRequest:
    doing = offer.doing
    arguments: dict[str, Any] = {}
    for parameter, schema in offer.properties.items():
        integer = schema["type"] == "integer"
        if parameter in offer.recalled:
            value = told.get(offer.recalled[parameter])
            arguments[parameter] = int(value) if integer and value else value
        elif integer:
            arguments[parameter] = rng.randint(2, 99)
            doing += f" {arguments[parameter]} times"
        else:
            arguments[parameter], doing = _given(rng, parameter, doing)
    said = rng.choice(_DO).format(doing=doing, Doing=doing[:1].upper() + doing[1:])
    if None in arguments.values():
        return ToolRequest(said, None, _needs(offer, told))
    outright = not offer.recalled or rng.random() < _OUTRIGHT
    return ToolRequest(said, ToolCall(offer.name, arguments), "" if outright else _needs(offer, told))


def _needs(offer: Offer, told: Mapping[str, str]) -> str:
    """ "For run_tests I need the test command. The test command is nox.", or that it is not known."""
    needed = [offer.recalled[parameter] for parameter in offer.properties if parameter in offer.recalled]
    answers = [answer(Binding(name, told[name])) if name in told else unknown(name) for name in needed]
    return " ".join([f"For {offer.name} I need {' and '.join(map(yours, needed))}.", *answers])


def request_of(rng: Random, offer: Offer, told: Mapping[str, str]) -> ToolRequest:
    """A user message that needs the tool, and its answer.

    `told` holds the latest value of every attribute that was stated.
    """
    if offer.kind == "function":
        return _ask_function(rng, offer)
    if offer.kind == "creator":
        return _ask_creator(rng, offer)
    if offer.kind in ("action", "remembered"):
        return _command(rng, offer, told)
    value = place_or_thing(rng)
    return ToolRequest(
        ask_topic(rng, offer.subject, value), ToolCall(offer.name, {next(iter(offer.properties)): value})
    )
