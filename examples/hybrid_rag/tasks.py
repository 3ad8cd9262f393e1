"""Generated conversations, each with one question, in five kinds. Values are drawn anew for each.

- telling: a setting is told among others and small talk, and asked for;
- changing: it is told and later changed;
- a rule: it is told how tests are run, and then a tool has to be called so;
- contradictions: a document states otherwise than the user, and is right;
- exact numbers: documents state them, and the conversation says nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from langchain_core.messages import AIMessage

from agentmem.nano import language
from agentmem.nano.language import Binding

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


def draw(kind: str, rng: Random) -> Task:
    """A task of a kind of ``KINDS``."""
    return _MAKERS[kind](rng)


def _telling(rng: Random) -> Task:
    told = language.draw_bindings(rng, 4, attributes=SETTINGS)
    return _task(_mixed(rng, told), told, language.ask(rng, told[0].attribute), _names(told[0]))


def _changing(rng: Random) -> Task:
    told = language.draw_bindings(rng, 4, attributes=SETTINGS)
    new = language.redraw(rng, told[0])
    turns = [*_mixed(rng, told), language.change(rng, new), language.filler(rng)]
    return _task(turns, [*told, new], language.ask(rng, new.attribute), _names(new))


def _rule(rng: Random) -> Task:
    rule = language.draw_bindings(rng, 1, attributes=["test command"])[0]
    told = [rule, *language.draw_bindings(rng, 3, attributes=SETTINGS)]

    def right(reply: AIMessage) -> bool:
        return [call["args"] for call in reply.tool_calls] == [{"test_command": rule.value}]

    return _task(_mixed(rng, told), told, "Run the tests.", right, tools=(RUN_TESTS,))


def _contradiction(rng: Random) -> Task:
    told = language.draw_bindings(rng, 4, attributes=SETTINGS)
    fact = language.redraw(rng, told[0])

    def right(reply: AIMessage) -> bool:
        # Before the citation stands what is claimed; behind it may stand what the user said.
        return language.is_correct(reply.text.partition("[")[0], fact)

    documents = (language.answer(fact), *_stated(rng, 2).values())
    return _task(_mixed(rng, told), told, language.ask(rng, fact.attribute), right, documents=documents)


def _number(rng: Random) -> Task:
    told = language.draw_bindings(rng, 4, attributes=SETTINGS)
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


def _names(binding: Binding) -> Callable[[AIMessage], bool]:
    return lambda reply: language.is_correct(reply.text, binding)


def _stated(rng: Random, n: int) -> dict[str, str]:
    """Sentences with numbers, by what they are about."""
    return {subject: f"The {subject} is {rng.randrange(100, 1000)}." for subject in rng.sample(_NUMBERS, n)}
