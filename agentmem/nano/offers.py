"""Tools as LangChain gives them, and requests that need one of them, mostly without naming it.

*Lookups* take one string and are asked in ordinary words; *functions* take integers and are asked as ``f(3)``;
*creators* take a quoted name and a description; *remembered* tools need an argument that was told earlier and that the
request leaves out. Topics, names and values are drawn or invented.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from agentmem.messages import ToolCall
from agentmem.nano.pools import ACTIONS, ATTRIBUTES, CITIES, FIRMS, GOODS, JOBS, KINDS, WORDS
from agentmem.nano.spans import draw_span, quoted
from agentmem.nano.toolchat import invented_word

# Subjects of other people's tests: a model is never trained to look them up.
_WITHHELD = {"weather", "person", "joke"}
TOPICS = tuple(word for word in WORDS if word not in _WITHHELD)
_PREPOSITIONS = ("in", "in", "of", "of", "for", "at")
_LOOKUP_VERBS = ("get", "get", "get", "find", "lookup", "fetch", "check", "read", "search", "query", "show")
_PLACE_PARAMETERS = ("place", "location", "city", "town", "area", "country", "region", "site", "where")
_ITEM_PARAMETERS = ("name", "item", "query", "product", "key", "of", "thing", "id", "subject")
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
_EXTRA_PARAMETERS = ("column", "target", "path", "of", "module", "topic", "item", "subject", "on", "source")
# Parameters that are attributes are remembered, no others are.
_NOUNS = tuple(word for word in WORDS if word not in ATTRIBUTES)
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
_CREATE = ("Create", "Create", "Add", "Please create", "Please add", "Make", "Register", "I need")
_TAIL = (
    " - {d}",
    " ({g}) - {d}",
    " ({g}) - {d}",
    ", {d}.",
    " ({g}), {d}.",
    " with the {p} {d}.",
    " with {p} {d}.",
    ", the {p} is {d}.",
)
_DO = (
    "{Doing}.",
    "{Doing}.",
    "Please {doing}.",
    "Can you {doing}?",
    "Could you {doing} now?",
    "{Doing} now.",
    "Now {doing}.",
    "I want you to {doing}.",
    "Go on and {doing}.",
    "It is time to {doing}.",
)


@dataclass(frozen=True)
class Offer:
    """A tool and what it is for.

    Attributes:
        kind: "lookup", "function", "creator" or "remembered".
        tool: as a chat template takes it.
        subject: the topic, the function's name, what is created, or the attribute that has to be remembered.
        doing: for a remembered one, what it does: "run the tests".
    """

    kind: str
    tool: Mapping[str, Any]
    subject: str
    doing: str = ""

    @property
    def name(self) -> str:
        """The tool's name."""
        return str(self.tool["function"]["name"])

    @property
    def properties(self) -> Mapping[str, Mapping[str, Any]]:
        """The tool's parameters."""
        properties: Mapping[str, Mapping[str, Any]] = self.tool["function"]["parameters"]["properties"]
        return properties


def _tool(name: str, description: str, properties: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The shape and order of LangChain's ``convert_to_openai_tool``."""
    parameters: dict[str, Any] = {"properties": dict(properties)}
    if properties:
        parameters["required"] = list(properties)
    parameters["type"] = "object"
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _documented(rng: Random, text: str, properties: Mapping[str, Mapping[str, Any]]) -> str:
    """A description as a docstring has it: of a third of the tools it goes on with the arguments and the result."""
    if not properties or rng.random() > 0.35:
        return text
    last = text.rstrip(".").split(" ")[-1]
    wording = (
        f"The {{p}} of the {last}",
        f"The {last}'s {{p}}",
        "The {p}",
        f"{{P}} of the {last}",
        f"What {{p}} it has in {last}",
    )
    lines = [text, "", "    Args:"]
    for name in properties:
        spoken = name.replace("_", " ")
        lines.append(f"        {name}: " + rng.choice(wording).format(p=spoken, P=spoken.capitalize()) + ".")
    if rng.random() < 0.5:
        result = rng.choice(
            ("A message about", "The result of", "A confirmation about", "The value of", "What is known about")
        )
        lines += ["", "    Returns:", f"        {result} the {last}."]
    return "\n".join(lines)


def _parameter(rng: Random, kind: str, description: str, share: float = 0.2) -> dict[str, Any]:
    return {"description": description, "type": kind} if rng.random() < share else {"type": kind}


def a(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def place_or_thing(rng: Random) -> str:
    """What can be looked up: one to three words, some of them with a comma and two capitals."""
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


def _topic(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(TOPICS)
    return f"{rng.choice(TOPICS)} {rng.choice(TOPICS)}" if kind < 0.88 else invented_word(rng)


def lookup(rng: Random) -> Offer:
    """A tool of one string that looks something up."""
    topic = _topic(rng)
    words = topic.replace(" ", "_")
    verb = rng.choice(_LOOKUP_VERBS)
    name = f"{verb}_{words}" if rng.random() < 0.8 else rng.choice((words, f"{words}_lookup", f"{words}_of"))
    place = rng.random() < 0.6
    parameter = rng.choice(_PLACE_PARAMETERS if place else _ITEM_PARAMETERS)
    if rng.random() < 0.1:
        parameter = rng.choice(WORDS)
    said = rng.choice((verb, "get", "look up", "return")).capitalize().replace("Lookup", "Look up")
    target = rng.choice((f" {rng.choice(_PREPOSITIONS)} {a(parameter)}",) * 4 + ("",))
    properties = {parameter: _parameter(rng, "string", f"The {parameter}.", 0.15)}
    return Offer("lookup", _tool(name, _documented(rng, f"{said} the {topic}{target}.", properties), properties), topic)


def function(rng: Random) -> Offer:
    """A tool of integers: mostly one, seldom none."""
    word = rng.choice((invented_word(rng), invented_word(rng), rng.choice(TOPICS), rng.choice(KINDS).lower()))
    kind = rng.random()
    if kind < 0.35:
        name = f"{word}_{rng.choice(('function', 'function', 'function', 'score', 'value', 'number', 'it', 'sum'))}"
    elif kind < 0.5:
        name = f"{rng.choice(('double', 'add', 'scale', 'shift', 'compute', 'apply', 'count'))}_{word}"
    else:
        name = word if kind < 0.85 else rng.choice("fghpqruvw")
    count = rng.choices((0, 1, 2, 3), (15, 60, 20, 5))[0]
    names = rng.choice((("input", "other", "third"), ("x", "y", "z"), ("a", "b", "c"), ("n", "m", "k"),
                        ("number", "by", "plus"), ("value", "step", "limit"), rng.sample(WORDS, 3)))  # fmt: skip
    properties: dict[str, dict[str, Any]] = {}
    for parameter in names[:count]:
        properties[parameter] = _parameter(rng, "integer", f"The {parameter}.", 0.12)
        if rng.random() < 0.12:
            bound = 10 ** rng.choice((2, 4, 5))
            properties[parameter] = {"exclusiveMaximum": bound, "exclusiveMinimum": -bound, "type": "integer"}
    spoken = name.replace("_", " ")
    text = rng.choice((f"Apply {a(spoken)} to an input.", f"Apply a {word} function to a number.", f"Compute {spoken}.",
                       f"Compute the {spoken} of a number.", f"Calculate {spoken}.", f"The {spoken}."))  # fmt: skip
    return Offer("function", _tool(name, _documented(rng, text, properties), properties), name)


def creator(rng: Random) -> Offer:
    """A tool of one or two strings that makes something with a name."""
    noun = rng.choice((*WORDS, *FIRMS))
    name = rng.choice((f"create_{noun}", f"add_{noun}", f"new_{noun}", f"{rng.choice(KINDS).lower()}_{noun}",
                       f"{noun}_create", f"make_{noun}"))  # fmt: skip
    first = rng.choice((f"{noun}_name", f"{noun}_name", "name", "name", "title"))
    second = rng.choice(("description", "description", "description", "note", "details", "kind", "about"))
    text = rng.choice((f"Create {a(noun)}.", f"Add {a(noun)}.", f"Make a new {noun}.",
                       f"Tool for creating {a(noun)} with a name."))  # fmt: skip
    both = rng.random() < 0.8
    properties = {first: _parameter(rng, "string", f"The name of the {noun}.", 0.12)}
    if both:
        properties[second] = _parameter(rng, "string", f"The {second}.", 0.12)
    return Offer("creator", _tool(name, _documented(rng, text, properties), properties), noun)


def remembered(rng: Random, attribute: str | None = None) -> Offer:
    """A tool that needs an attribute which its request does not give; any attribute unless one is given."""
    attribute = attribute or rng.choice(sorted(ATTRIBUTES))
    parameter = attribute.replace(" ", "_")
    verb = rng.choice((*ACTIONS, invented_word(rng)) if rng.random() < 0.05 else ACTIONS)
    thing = rng.choice((attribute.split()[0], attribute.split()[-1])) if rng.random() < 0.35 else ""
    thing = thing if thing.isalpha() and thing not in ("favorite", "main") else rng.choice((*JOBS, *JOBS, *WORDS))
    if thing == "test":
        thing = "tests"
    name = rng.choice(
        (f"{verb}_{thing}", f"{verb}_{thing}", f"{verb}_{thing}", f"{verb}_the_{thing}", f"{thing}_{verb}")
    )
    numeric = all(value.isdigit() for value in ATTRIBUTES[attribute].values)
    kind = "integer" if numeric and rng.random() < 0.5 else "string"
    properties = {parameter: _parameter(rng, kind, f"The {attribute}.", 0.25)}
    more = rng.random()
    if more < 0.4:
        extra = rng.choice((*_EXTRA_PARAMETERS, *rng.sample(_NOUNS, 3)))
        properties[extra] = {"type": "string"}
    elif more < 0.5:
        properties[rng.choice(("times", "count", "repeats", "n", "limit"))] = {"type": "integer"}
    if len(properties) > 1 and rng.random() < 0.4:
        properties = dict(reversed(properties.items()))
    text = rng.choice((f"{verb} the {thing}.", f"{verb} the {thing} with the {attribute}.", f"{verb} {thing}."))
    return Offer(
        "remembered",
        _tool(name, _documented(rng, text.capitalize(), properties), properties),
        attribute,
        f"{verb} the {thing}",
    )


_MAKERS = {"lookup": lookup, "function": function, "creator": creator, "remembered": remembered}
KINDS_OF_OFFERS = tuple(_MAKERS)


def draw_offer(rng: Random) -> Offer:
    """A tool of any kind."""
    return _MAKERS[rng.choices(KINDS_OF_OFFERS, (34, 26, 18, 22))[0]](rng)


def draw_offers(rng: Random, n: int, *, first: Offer | None = None) -> tuple[Offer, ...]:
    """``n`` tools of distinct names and subjects in any order, ``first`` among them."""
    drawn = [first] if first else []
    while len(drawn) < n:
        offer = draw_offer(rng)
        if all(offer.name != other.name and offer.subject != other.subject for other in drawn):
            drawn.append(offer)
    rng.shuffle(drawn)
    return tuple(drawn)


def ask_topic(rng: Random, topic: str, value: str) -> str:
    """A question about a topic, in ordinary words."""
    return rng.choice(_LOOKUP_ASK).format(t=topic, p=rng.choice(_PREPOSITIONS), v=value)


def unoffered(rng: Random, offers: Sequence[Offer]) -> tuple[str, str]:
    """A question that none of the tools looks up, and the reply without a call."""
    taken = {word for offer in offers for word in offer.subject.split()}
    topic = rng.choice([word for word in TOPICS if word not in taken])
    if rng.random() < 0.4:
        topic = f"{topic} {rng.choice([word for word in TOPICS if word not in taken])}"
    return ask_topic(rng, topic, place_or_thing(rng)), f"I do not know the {topic} yet."


def _integer(rng: Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 1, 2, 2, 3, 3, 4, 5))) * rng.choice((1,) * 9 + (-1,))


def _ask_function(rng: Random, offer: Offer) -> tuple[str, ToolCall]:
    arguments = {parameter: _integer(rng) for parameter in offer.properties}
    numbers = [str(value) for value in arguments.values()]
    if numbers and rng.random() < 0.15:
        said = rng.choice(_FUNCTION_OF).format(f=offer.name, x=" and ".join(numbers))
    else:
        said = rng.choice(_FUNCTION_ASK).format(call=f"{offer.name}({', '.join(numbers)})")
    return said + rng.choice(_USE), ToolCall(offer.name, arguments)


def _description(rng: Random) -> str:
    kind, firm = rng.choice(KINDS), rng.choice(FIRMS)
    return rng.choice((a(f"{kind} {firm}"), a(f"{kind} {rng.choice(WORDS)} {firm}"), f"{rng.choice(GOODS)} {firm}"))


def _ask_creator(rng: Random, offer: Offer) -> tuple[str, ToolCall]:
    span = draw_span(rng)
    said = f"{rng.choice(_CREATE)} {a(offer.subject)} {rng.choice(_NAMED)} {quoted(rng, span)}"
    first, *second = offer.properties
    arguments: dict[str, Any] = {first: span}
    if not second:
        return said + rng.choice((".", "", " ({g})")).format(g=_gloss(rng)), ToolCall(offer.name, arguments)
    arguments[second[0]] = _description(rng)
    tail = rng.choice(_TAIL).format(g=_gloss(rng), d=arguments[second[0]], p=second[0])
    return said + tail, ToolCall(offer.name, arguments)


def _gloss(rng: Random) -> str:
    return f"{rng.choice(WORDS).capitalize()} {rng.choice((*FIRMS, *WORDS)).capitalize()}"


def _ask_remembered(rng: Random, offer: Offer, value: str | None) -> tuple[str, ToolCall | None]:
    doing = offer.doing
    arguments: dict[str, Any] = {}
    for parameter, schema in offer.properties.items():
        integer = schema["type"] == "integer"
        if parameter == offer.subject.replace(" ", "_"):
            arguments[parameter] = int(value or 0) if integer else value
        elif integer:
            arguments[parameter] = rng.randint(2, 99)
            doing += f" {arguments[parameter]} times"
        else:
            arguments[parameter] = rng.choice((*WORDS, *CITIES, *GOODS))
            doing += f" {rng.choice(('of', 'of', 'for', 'on', 'in', 'with'))} {arguments[parameter]}"
    said = rng.choice(_DO).format(doing=doing, Doing=doing[:1].upper() + doing[1:])
    return said, None if value is None else ToolCall(offer.name, arguments)


def request_of(rng: Random, offer: Offer, told: Mapping[str, str]) -> tuple[str, ToolCall | None]:
    """A user message that needs the tool, and the call; no call where what it needs was never told.

    ``told`` holds the latest value of every attribute that was told.
    """
    if offer.kind == "function":
        return _ask_function(rng, offer)
    if offer.kind == "creator":
        return _ask_creator(rng, offer)
    if offer.kind == "remembered":
        return _ask_remembered(rng, offer, told.get(offer.subject))
    value = place_or_thing(rng)
    return ask_topic(rng, offer.subject, value), ToolCall(offer.name, {next(iter(offer.properties)): value})
