"""Tool calls, tool results and quoted facts in nano's language.

Names, parameters and values are drawn anew, many of them invented letter by letter, so that a call can only be made by
copying from the request, and a result only be reported by reading it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from agentmem.messages import ToolCall
from agentmem.nano.recipe.language import ask_about
from agentmem.nano.recipe.pools import ATTRIBUTES, PARAMETERS, SYLLABLES, VERBS, WORDS

_REQUEST = (
    "Call {tool} with {args}.",
    "Please call {tool} with {args}.",
    "Use {tool} with {args}.",
    "Please use the tool {tool} with {args}.",
    "Run {tool} with {args}.",
    "{Spoken} with {args}.",
    "Please {spoken} with {args}.",
    "Please {spoken} for {args}.",
)
_BARE = {*WORDS, *ATTRIBUTES["home town"].values, *ATTRIBUTES["name"].values}
# A tool from other people's tests: nano is never trained on it.
WITHHELD = "get_weather"
_REQUEST_BARE = ("Call {tool}.", "Please use {tool}.", "Run the tool {tool}.", "Please {spoken}.")
_ONSETS = (
    *(
        "b",
        "br",
        "c",
        "ch",
        "cl",
        "cr",
        "d",
        "dr",
        "f",
        "fl",
        "fr",
        "g",
        "gl",
        "gr",
        "h",
        "j",
        "k",
        "kl",
        "l",
        "m",
        "n",
    ),
    *(
        "p",
        "ph",
        "pl",
        "pr",
        "qu",
        "r",
        "s",
        "sc",
        "sh",
        "sk",
        "sl",
        "sn",
        "sp",
        "st",
        "str",
        "t",
        "th",
        "tr",
        "v",
        "w",
    ),
)
_VOWELS = (*"aeiou", *"aeiou", "ai", "au", "ea", "ee", "ie", "io", "oo", "ou")
_CODAS = ("", "", "", *"nrsltmx", "ck", "nd", "nt", "st", "ng", "rn", "lt")
_ARGUMENT = ("{p} {v}", "{p} {v}", "{p} = {v}", '{p} "{v}"', "{p}: {v}")


@dataclass(frozen=True)
class Fact:
    """A sentence about `subject` ("retry limit") that can be quoted, and the value it states."""

    subject: str
    value: str

    @property
    def sentence(self) -> str:
        """The fact as it is written in a facts block."""
        return f"The {self.subject} is {self.value}."


def invented_word(rng: Random) -> str:
    """A pronounceable word without meaning: of plain syllables, or of such as no tokenizer has as one token."""
    if rng.random() < 0.5:
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3))))
    syllables = (
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2, 3)))
    )
    return "".join(syllables)


def _some_value(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(WORDS)
    if kind < 0.55:
        return rng.choice(ATTRIBUTES[rng.choice(sorted(ATTRIBUTES))].values)
    if kind < 0.7:
        return invented_word(rng)
    if kind < 0.8:
        return invented_word(rng).capitalize()
    return str(rng.randrange(10 ** rng.choice((1, 2, 3, 4, 5))))


def _some_string(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(WORDS)
    if kind < 0.65:
        return rng.choice(ATTRIBUTES[rng.choice(("home town", "name"))].values)
    if kind < 0.8:
        return str(rng.randrange(10 ** rng.choice((1, 2, 3, 4))))
    word = invented_word(rng)
    return word.capitalize() if kind < 0.85 else word


def draw_tool(rng: Random) -> dict[str, Any]:
    """A function tool with up to three parameters, as a chat template takes it (`{"type": "function", ...}`)."""
    kind = rng.random()
    if kind < 0.3:
        name = rng.choice(VERBS)
    elif kind < 0.8:
        name = f"{rng.choice(VERBS)}_{rng.choice(WORDS)}"
    elif kind < 0.9:
        name = f"{rng.choice(VERBS)}_{rng.choice(WORDS)}_{rng.choice(WORDS)}"
    else:
        name = invented_word(rng)
    names = [*PARAMETERS, *PARAMETERS, *rng.sample(WORDS, 12), invented_word(rng)]
    words = rng.sample(names, rng.choice((0, 1, 1, 1, 2, 2, 3)))
    parameters = list(dict.fromkeys(words))
    properties = {p: {"type": rng.choice(("string", "string", "integer"))} for p in parameters}
    schema: dict[str, Any] = {"properties": properties, "required": parameters, "type": "object"}
    if rng.random() < 0.5:
        schema = {"type": "object", "properties": properties, "required": parameters}
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.6:
        spoken = name.replace("_", " ").capitalize()
        function["description"] = rng.choice(
            (f"{spoken}.", f"{spoken} for the user.", f"{spoken} {rng.choice(WORDS)}.")
        )
    return {"type": "function", "function": function | {"parameters": schema}}


def draw_tools(rng: Random, n: int) -> list[dict[str, Any]]:
    """`n` tools of distinct names."""
    tools: dict[str, dict[str, Any]] = {}
    while len(tools) < n:
        tool = draw_tool(rng)
        if tool["function"]["name"].startswith(WITHHELD):
            continue
        tools.setdefault(tool["function"]["name"], tool)
    return list(tools.values())


def request(rng: Random, tool: Mapping[str, Any]) -> tuple[str, ToolCall]:
    """A user message that asks for a call of `tool`, and the matching call."""
    function = tool["function"]
    name = function["name"]
    arguments: dict[str, Any] = {}
    for parameter, kind in function["parameters"]["properties"].items():
        integer = kind["type"] == "integer"
        arguments[parameter] = rng.randrange(10 ** rng.choice((1, 2, 3, 4))) if integer else _some_string(rng)
    spoken = name.replace("_", " ")
    names = {"tool": name, "spoken": spoken, "Spoken": spoken[:1].upper() + spoken[1:]}
    if not arguments:
        return rng.choice(_REQUEST_BARE).format(**names), ToolCall(name, {})
    # Strings that are not known words are quoted in the request, where their tokens are the same as in the call.
    bare = all(isinstance(v, int) or v in _BARE for v in arguments.values())
    form = rng.choice(_ARGUMENT) if bare else '{p} "{v}"'
    said = [form.format(p=p, v=v) for p, v in arguments.items()]
    args = ", ".join(said) if rng.random() < 0.3 else " and ".join(said)
    return rng.choice(_REQUEST).format(args=args, **names), ToolCall(name, arguments)


def result(rng: Random) -> tuple[str, str]:
    """What a tool returns (plain text or a small JSON object), and the assistant's sentence that reports it."""
    value: int | str = rng.choice(WORDS) if rng.random() < 0.5 else rng.randrange(10 ** rng.choice((1, 2, 3, 4, 5)))
    if rng.random() < 0.6:
        return str(value), f"The result is {value}."
    key = rng.choice(("result", *rng.sample(WORDS, 3)))
    return json.dumps({key: value}), f"The {key} is {value}."


def draw_facts(rng: Random, n: int) -> list[Fact]:
    """`n` facts with distinct subjects: two nouns, "a of the b", or a project attribute."""
    facts: dict[str, Fact] = {}
    project = sorted(a.name for a in ATTRIBUTES.values() if a.owner == "project")
    while len(facts) < n:
        kind = rng.random()
        a, b = rng.sample(WORDS, 2)
        if kind < 0.25:
            subject = rng.choice(project)
            value = rng.choice(ATTRIBUTES[subject].values)
        else:
            subject = f"{a} {b}" if kind < 0.75 else f"{a} of the {b}"
            value = _some_value(rng)
            if rng.random() < 0.2:
                value = f"{value} {rng.choice(WORDS)}"
        facts.setdefault(subject, Fact(subject, value))
    return list(facts.values())


def facts_block(facts: Sequence[Fact]) -> str:
    """The block at the end of a system message: "Facts:", then one sentence per line, each followed by its number."""
    return "\n".join(["Facts:", *(f"{fact.sentence} [{i}]" for i, fact in enumerate(facts, 1))])


def ask_fact(rng: Random, fact: Fact) -> str:
    """A user message that asks for the fact's value, in the words that are used for a binding."""
    return ask_about(rng, f"the {fact.subject}")


def cite(facts: Sequence[Fact], fact: Fact, told: str | None = None) -> str:
    """The correct answer from a facts block, which is the fact's line: "The retry limit is 300. [2]".

    If the user stated another value the fact wins, and the answer says so: "The port is 3000. [1] You said 8080.".
    """
    aside = f" You said {told}." if told is not None and told != fact.value else ""
    return f"{fact.sentence} [{list(facts).index(fact) + 1}]{aside}"
