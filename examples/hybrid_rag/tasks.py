"""Generated conversations, each with one question, in five kinds. Values are drawn anew for each: pairs of nouns.

nano knows the nouns and was not trained on their pairs, but for the few that chance put together. With `pools` values
are those that it was trained on.

- telling: a setting is told among others and small talk, and asked for;
- changing: it is told and later changed;
- a rule: it is told how tests are run, and then a tool has to be called so;
- contradictions: a document states otherwise than the user, and is right;
- exact numbers: documents state them, and the conversation says nothing of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from langchain_core.messages import AIMessage

from agentmem.nano.recipe import language
from agentmem.nano.recipe.language import Binding
from agentmem.nano.recipe.pools import WORDS

SETTINGS = ("database", "branch", "build tool", "license", "codename", "currency", "framework", "cloud region")
_NUMBERS = ("retry limit", "upload limit", "page size", "session length", "invoice total")
RUN_TESTS = {
    "type": "function",
    "function": {
        "name": "run_tests",
        "description": "Run the tests.",
        "parameters": {
            "properties": {"test_command": {"type": "string"}},
            "required": ["test_command"],
            "type": "object",
        },
    },
}


@dataclass(frozen=True)
class Task:
    """A conversation and its question.

    Attributes:
        turns: what the user says and what is replied.
        statements: what the user has stated, in order, as a store of facts would keep it.
        documents: what documents state.
        question: the question or request.
        tools: the tools at hand for it.
        right: whether a reply is right.
    """

    turns: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]
    documents: tuple[str, ...]
    question: str
    right: Callable[[AIMessage], bool]
    tools: tuple[dict[str, Any], ...] = ()


def draw(kind: str, rng: Random, *, pools: bool = False) -> Task:
    """A task of a kind of `KINDS`."""
    return _MAKERS[kind](rng, pools)


def _bindings(rng: Random, n: int, attributes: Sequence[str], pools: bool) -> list[Binding]:
    drawn = language.draw_bindings(rng, n, attributes=attributes)
    return drawn if pools else [_paired(rng, binding) for binding in drawn]


def _paired(rng: Random, binding: Binding) -> Binding:
    return Binding(binding.attribute, " ".join(rng.sample(WORDS, 2)))


def _other(rng: Random, binding: Binding, pools: bool) -> Binding:
    return language.redraw(rng, binding) if pools else _paired(rng, binding)


def _telling(rng: Random, pools: bool) -> Task:
    told = _bindings(rng, 4, SETTINGS, pools)
    return _task(_mixed(rng, told), told, language.ask(rng, told[0].attribute), _names(told[0], told))


def _changing(rng: Random, pools: bool) -> Task:
    told = _bindings(rng, 4, SETTINGS, pools)
    new = _other(rng, told[0], pools)
    turns = [*_mixed(rng, told), language.change(rng, new), language.filler(rng)]
    return _task(turns, [*told, new], language.ask(rng, new.attribute), _names(new, told))


def _rule(rng: Random, pools: bool) -> Task:
    rule = _bindings(rng, 1, ["test command"], pools)[0]
    told = [rule, *_bindings(rng, 3, SETTINGS, pools)]

    def right(reply: AIMessage) -> bool:
        return [call["args"] for call in reply.tool_calls] == [{"test_command": rule.value}]

    return _task(_mixed(rng, told), told, "Run the tests.", right, tools=(RUN_TESTS,))


def _contradiction(rng: Random, pools: bool) -> Task:
    told = _bindings(rng, 4, SETTINGS, pools)
    fact = _other(rng, told[0], pools)

    def right(reply: AIMessage) -> bool:
        # Before the citation stands what is claimed; behind it may stand what the user said.
        return _says(reply.text.partition("[")[0], fact, told)

    documents = (language.answer(fact), *_stated(rng, 2).values())
    return _task(_mixed(rng, told), told, language.ask(rng, fact.attribute), right, documents=documents)


def _number(rng: Random, pools: bool) -> Task:
    told = _bindings(rng, 4, SETTINGS, pools)
    facts = _stated(rng, 4)
    subject = next(iter(facts))

    def right(reply: AIMessage) -> bool:
        return reply.text.startswith(facts[subject])

    question = language.ask_about(rng, f"the {subject}")
    return _task(_mixed(rng, told), told, question, right, documents=tuple(facts.values()))


_MAKERS = {
    "telling": _telling,
    "changing": _changing,
    "a rule": _rule,
    "contradictions": _contradiction,
    "exact numbers": _number,
}
KINDS = tuple(_MAKERS)


def _task(
    turns: list[tuple[str, str]],
    told: list[Binding],
    question: str,
    right: Callable[[AIMessage], bool],
    *,
    documents: tuple[str, ...] = (),
    tools: tuple[dict[str, Any], ...] = (),
) -> Task:
    return Task(tuple(turns), tuple(map(language.answer, told)), documents, question, right, tools)


def _mixed(rng: Random, told: list[Binding]) -> list[tuple[str, str]]:
    """Every binding told, among small talk; small talk comes last."""
    turns = [language.tell(rng, binding) for binding in told] + [language.filler(rng) for _ in range(3)]
    rng.shuffle(turns)
    return [*turns, language.filler(rng)]


def _names(binding: Binding, told: Sequence[Binding]) -> Callable[[AIMessage], bool]:
    return lambda reply: _says(reply.text, binding, told)


def _says(text: str, binding: Binding, told: Sequence[Binding]) -> bool:
    """Whether a text has the value, as whole words, and no other that was told."""
    others = {one.value for one in told} - {binding.value}
    return _has(text, binding.value) and not any(_has(text, value) for value in others)


def _has(text: str, value: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", text) is not None


def _stated(rng: Random, n: int) -> dict[str, str]:
    """Sentences with numbers, by what they are about."""
    return {subject: f"The {subject} is {rng.randrange(100, 1000)}." for subject in rng.sample(_NUMBERS, n)}
