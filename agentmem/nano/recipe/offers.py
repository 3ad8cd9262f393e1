"""Tools in LangChain's form.

*Lookups* take one string; *functions* take integers; *creators* take the name of something and further details of it;
*actions* are commands whose arguments, if any, are in the request; *remembered* tools are commands of which one or two
arguments were stated earlier and are left out of the request. Topics and names are drawn or invented; `requests` holds
the sentences that call for a tool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from agentmem.nano.recipe.pools import ACTIONS, ATTRIBUTES, FIRMS, JOBS, KINDS, WORDS
from agentmem.nano.recipe.toolchat import invented_word

# Common subjects of other people's tests: no tool is about them.
_WITHHELD = {"weather", "person", "joke"}
TOPICS = tuple(word for word in WORDS if word not in _WITHHELD)
PREPOSITIONS = ("in", "in", "of", "of", "for", "at")
_LOOKUP_VERBS = ("get", "get", "get", "find", "lookup", "fetch", "check", "read", "search", "query", "show")
_PLACE_PARAMETERS = ("place", "location", "city", "town", "area", "country", "region", "site", "where")
_ITEM_PARAMETERS = ("name", "item", "query", "product", "key", "of", "thing", "id", "subject")
_EXTRA_PARAMETERS = ("column", "target", "path", "path", "file", "query", "text", "module", "topic", "item", "source")
_COUNTS = ("times", "count", "repeats", "n", "limit")
# Parameters that are attributes are filled from memory; no other parameters are.
_NOUNS = tuple(word for word in WORDS if word not in {name.split()[-1] for name in ATTRIBUTES})


@dataclass(frozen=True)
class Offer:
    """A tool and its purpose.

    Attributes:
        kind: "lookup", "function", "creator", "action" or "remembered".
        tool: the description as a chat template takes it.
        subject: the topic, the function's name, what is created, or what the command is about.
        doing: for a command, what it does: "run the tests".
        recalled: for each parameter that the request leaves out, the attribute whose value it takes.
    """

    kind: str
    tool: Mapping[str, Any]
    subject: str
    doing: str = ""
    recalled: Mapping[str, str] = field(default_factory=dict)

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
    """A description in the form and key order of LangChain's `convert_to_openai_tool`."""
    parameters: dict[str, Any] = {"properties": dict(properties)}
    if properties:
        parameters["required"] = list(properties)
    parameters["type"] = "object"
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _documented(rng: Random, text: str, properties: Mapping[str, Mapping[str, Any]], about: str = "") -> str:
    """A description as in a docstring; for some tools it continues with the arguments and the result."""
    if not properties or rng.random() > (0.4 if about else 0.25):
        return text
    last = about or text.rstrip(".").split(" ")[-1]
    wording = (
        f"The {{p}} of the {last}",
        f"The {last}'s {{p}}",
        f"The {last}'s {{p}} in its own {rng.choice(WORDS)}",
        "The {p}",
        f"{{P}} of the {last}",
        f"What {{p}} it has in {last}",
    )
    lines = [text, "", "    Args:"]
    for name in properties:
        spoken = name.replace("_", " ")
        if about and rng.random() < 0.5:
            spoken = spoken.removeprefix(f"{about} ")
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


def _topic(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(TOPICS)
    return f"{rng.choice(TOPICS)} {rng.choice(TOPICS)}" if kind < 0.88 else invented_word(rng)


def lookup(rng: Random) -> Offer:
    """A tool with one string parameter that looks something up."""
    topic = _topic(rng)
    words = topic.replace(" ", "_")
    verb = rng.choice(_LOOKUP_VERBS)
    name = f"{verb}_{words}" if rng.random() < 0.8 else rng.choice((words, f"{words}_lookup", f"{words}_of"))
    place = rng.random() < 0.6
    parameter = rng.choice(_PLACE_PARAMETERS if place else _ITEM_PARAMETERS)
    if rng.random() < 0.1:
        parameter = rng.choice(WORDS)
    said = rng.choice((verb, "get", "look up", "return")).capitalize().replace("Lookup", "Look up")
    target = rng.choice((f" {rng.choice(PREPOSITIONS)} {a(parameter)}",) * 4 + ("",))
    properties = {parameter: _parameter(rng, "string", f"The {parameter}.", 0.15)}
    return Offer("lookup", _tool(name, _documented(rng, f"{said} the {topic}{target}.", properties), properties), topic)


def function(rng: Random) -> Offer:
    """A tool with integer parameters: usually one, seldom none."""
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
    """A tool with one to three strings that creates something with a name; its own name may contain other words."""
    noun = rng.choice((*TOPICS, *FIRMS))
    other, kind, word = rng.choice(WORDS), rng.choice(KINDS).lower(), invented_word(rng)
    verb = rng.choice(("create", "create", "add", "new", "make", "register"))
    name = rng.choice((f"{verb}_{noun}",) * 4 + (f"{kind}_{noun}",) * 2 + (f"{other}_{noun}",) * 2 + (f"{word}_{noun}",)
                      * 2 + (f"{noun}_{verb}", f"{noun}_{other}", f"{verb}_{kind}_{noun}", noun))  # fmt: skip
    first = rng.choice((f"{noun}_name", f"{noun}_name", f"{noun}_name", "name", "name", "title", f"{other}_name"))
    second = rng.choice(("description", "description", "description", "note", "details", "kind", "about"))
    text = rng.choice((f"Create {a(noun)}.", f"Add {a(noun)}.", f"Make a new {noun}.", f"Register {a(noun)}.",
                       f"Tool for creating {a(noun)} with a name.", f"Tool for creating {a(noun)} with {a(kind)} name.",
                       f"Tool for making {a(noun)} with {a(word)} name.",
                       f"Store {a(noun)} in the {other}."))  # fmt: skip
    properties = {first: _parameter(rng, "string", f"The name of the {noun}.", 0.12)}
    if rng.random() < 0.8:
        properties[second] = _parameter(rng, "string", f"The {second}.", 0.12)
        if rng.random() < 0.15:
            properties[rng.choice(("city", "owner", *rng.sample(_NOUNS, 2)))] = {"type": "string"}
    return Offer("creator", _tool(name, _documented(rng, text, properties, noun), properties), noun)


def _key(rng: Random, attribute: str) -> str:
    """The parameter for an attribute: its words, or the last of them."""
    short = rng.random() < 0.25 and not attribute.startswith("favorite")
    return attribute.split()[-1] if short else attribute.replace(" ", "_")


def _command(rng: Random, attributes: Sequence[str]) -> Offer:
    """A tool that runs a command; its name and description use the words of the request."""
    verb = rng.choice((*ACTIONS, invented_word(rng)) if rng.random() < 0.05 else ACTIONS)
    thing = rng.choice((*JOBS, *JOBS, *TOPICS))
    if attributes and rng.random() < 0.35:
        word = rng.choice((attributes[0].split()[0], attributes[0].split()[-1]))
        thing = thing if not word.isalpha() or word in ("favorite", "main") else "tests" if word == "test" else word
    name = rng.choice((f"{verb}_{thing}",) * 4 + (f"{verb}_the_{thing}", f"{thing}_{verb}", verb))
    doing = rng.choice((f"{verb} the {thing}",) * 4 + (f"{verb} {thing}", f"{verb} all the {thing}"))
    if name == verb and rng.random() < 0.7:
        doing = rng.choice((f"{verb} it", f"{verb} it", f"{verb} this", f"{verb} the {thing}"))
    recalled = {_key(rng, attribute): attribute for attribute in attributes}
    properties: dict[str, dict[str, Any]] = {}
    for parameter, attribute in recalled.items():
        numeric = all(value.isdigit() for value in ATTRIBUTES[attribute].values)
        kind = "integer" if numeric and rng.random() < 0.5 else "string"
        properties[parameter] = _parameter(rng, kind, f"The {attribute}.", 0.25)
    more = rng.random()
    if more < (0.3 if attributes else 0.6):
        properties.setdefault(rng.choice((*_EXTRA_PARAMETERS, *rng.sample(_NOUNS, 3))), {"type": "string"})
    elif more < (0.4 if attributes else 0.7):
        properties.setdefault(rng.choice(_COUNTS), {"type": "integer"})
    if len(properties) > 1 and rng.random() < 0.4:
        properties = dict(reversed(properties.items()))
    text = rng.choice((f"{verb} the {thing}.", f"{verb} {thing}."))
    if attributes and rng.random() < 0.35:
        text = f"{verb} the {thing} with the {' and the '.join(attributes)}."
    tool = _tool(name, _documented(rng, text.capitalize(), properties), properties)
    return Offer("remembered" if attributes else "action", tool, f"{verb} {thing}", doing, recalled)


def action(rng: Random) -> Offer:
    """A command whose request contains everything that it needs."""
    return _command(rng, ())


def remembered(rng: Random, attributes: Sequence[str] = ()) -> Offer:
    """A command that needs one or two attributes which its request leaves out; `attributes` may say which."""
    return _command(rng, attributes or rng.sample(sorted(ATTRIBUTES), rng.choice((1, 1, 1, 2))))


_MAKERS = {"lookup": lookup, "function": function, "creator": creator, "action": action, "remembered": remembered}
KINDS_OF_OFFERS = tuple(_MAKERS)


def draw_offer(rng: Random) -> Offer:
    """A tool of any kind."""
    return _MAKERS[rng.choices(KINDS_OF_OFFERS, (24, 17, 24, 10, 25))[0]](rng)


def draw_offers(rng: Random, n: int, *, first: Offer | None = None) -> tuple[Offer, ...]:
    """`n` tools with distinct names, subjects and actions, in any order, including `first`."""
    drawn = [first] if first else []
    while len(drawn) < n:
        offer = draw_offer(rng)
        if all(
            offer.name != other.name and offer.subject != other.subject and offer.doing != (other.doing or None)
            for other in drawn
        ):
            drawn.append(offer)
    rng.shuffle(drawn)
    return tuple(drawn)
