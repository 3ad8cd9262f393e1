"""Whole conversations for training: all in the prompt (the base), or told first and asked later (memory)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from agentmem.messages import Message
from agentmem.nano import language, toolchat
from agentmem.nano.pools import ATTRIBUTES

Turn = tuple[Message, ...]


@dataclass(frozen=True)
class Episode:
    """A conversation and the tools that its system turn lists."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Question:
    """A final turn: its assistant messages are what has to be produced.

    Attributes:
        turn: the messages.
        system: the system message that its prompt shows, if any.
        tools: the tools of its prompt.
    """

    turn: Turn
    system: Message | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class MemoryEpisode:
    """Turns that are written, and questions that are each asked after them, independently of one another.

    Attributes:
        system: the system message that every written turn shows and that is never written, if any.
        turns: the turns that are written, oldest first.
        recalls: which of the turns ask for something told before them.
        shown: how many of the last turns a question's prompt still shows.
        questions: the final turns.
    """

    system: Message | None
    turns: tuple[Turn, ...]
    recalls: frozenset[int]
    shown: int
    questions: tuple[Question, ...]


@dataclass
class _Talk:
    """A conversation under way: what has been told so far and where it may go."""

    rng: Random
    told: dict[str, language.Binding] = field(default_factory=dict)

    def tell(self) -> Turn:
        free = [name for name in ATTRIBUTES if name not in self.told]
        binding = language.draw_bindings(self.rng, 1, attributes=free)[0]
        self.told[binding.attribute] = binding
        return _turn(*language.tell(self.rng, binding))

    def change(self) -> Turn:
        binding = language.redraw(self.rng, self.told[self.rng.choice(sorted(self.told))])
        self.told[binding.attribute] = binding
        return _turn(*language.change(self.rng, binding))

    def ask(self) -> Turn:
        attribute = self.rng.choice(sorted(self.told))
        return _turn(language.ask(self.rng, attribute), language.answer(self.told[attribute]))

    def ask_unknown(self) -> Turn:
        attribute = self.rng.choice([name for name in ATTRIBUTES if name not in self.told])
        return _turn(language.ask(self.rng, attribute), language.unknown(attribute))

    def filler(self) -> Turn:
        return _turn(*language.filler(self.rng))

    def take(self, step: str) -> Turn:
        """One step by name: "tell", "change", "ask", "unknown" or "filler"."""
        makers = {
            "tell": self.tell,
            "change": self.change,
            "ask": self.ask,
            "unknown": self.ask_unknown,
            "filler": self.filler,
        }
        return makers[step]()


def _turn(user: str, reply: str) -> Turn:
    return (Message("user", user), Message("assistant", reply))


def tool_turn(rng: Random, tools: list[dict[str, Any]]) -> Turn:
    """A request, the call that answers it, the tool's result and the sentence that reports it."""
    said, call = toolchat.request(rng, rng.choice(tools))
    returned, report = toolchat.result(rng)
    return (
        Message("user", said),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", returned, name=call.name),
        Message("assistant", report),
    )


def _facts_message(facts: list[toolchat.Fact], plain: Message | None) -> Message:
    head = f"{plain.content}\n\n" if plain else ""
    return Message("system", head + toolchat.facts_block(facts))


def _system(rng: Random, share: float = 0.35) -> Message | None:
    return Message("system", language.system_text(rng)) if rng.random() < share else None


def chat_episode(rng: Random, *, bindings: int, fillers: int, asks: int) -> Episode:
    """Telling, changing and asking with small talk in between, all of it visible; some asks find nothing told."""
    talk = _Talk(rng)
    system = _system(rng)
    steps = ["tell"] * bindings + ["filler"] * fillers + ["ask"] * asks + ["change"] * rng.choice((0, 0, 1, 2))
    rng.shuffle(steps)
    turns: list[Turn] = []
    for step in steps:
        if step == "tell":
            turns.append(talk.tell())
        elif step == "filler":
            turns.append(talk.filler())
        elif not talk.told or (step == "ask" and rng.random() < 0.15):
            turns.append(talk.ask_unknown())
        else:
            turns.append(talk.ask() if step == "ask" else talk.change())
    messages = [message for turn in turns for message in turn]
    return Episode((*([system] if system else []), *messages))


def tool_episode(rng: Random) -> Episode:
    """A conversation with one to four tools in which some messages ask for a call and some do not."""
    talk = _Talk(rng)
    system = _system(rng, 0.5)
    tools = toolchat.draw_tools(rng, rng.choice((1, 1, 2, 2, 3, 4)))
    turns = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        kind = rng.random()
        if kind < 0.65:
            turns.append(tool_turn(rng, tools))
        elif kind < 0.8:
            turns.append(talk.tell())
        else:
            turns.append(talk.ask() if talk.told else talk.filler())
    return Episode((*([system] if system else []), *(m for turn in turns for m in turn)), tuple(tools))


def fact_episode(rng: Random) -> Episode:
    """A conversation whose system message quotes facts; questions about them are answered with the source's number."""
    talk = _Talk(rng)
    facts = toolchat.draw_facts(rng, rng.choice((1, 2, 3, 3, 4, 5)))
    quoted = {fact.subject for fact in facts}
    for name in quoted & set(ATTRIBUTES):
        talk.told[name] = language.Binding(name, "")
    turns = []
    for _ in range(rng.choice((1, 2, 3, 4))):
        kind = rng.random()
        asked = sorted(name for name in talk.told if name not in quoted)
        if kind < 0.65:
            fact = rng.choice(facts)
            turns.append(_turn(toolchat.ask_fact(rng, fact), toolchat.cite(facts, fact)))
        elif kind < 0.8:
            turns.append(talk.tell())
        elif asked:
            binding = talk.told[rng.choice(asked)]
            turns.append(_turn(language.ask(rng, binding.attribute), language.answer(binding)))
        else:
            turns.append(talk.filler() if kind < 0.9 else talk.ask_unknown())
    head = _facts_message(facts, _system(rng, 0.5))
    return Episode((head, *(m for turn in turns for m in turn)))


def draw_episode(rng: Random, *, long: bool = False, skills: float = 0.4) -> Episode:
    """A conversation for the base model.

    ``skills`` is the share of tool and fact conversations; ``long`` ones go on for up to some 24 turns of small talk.
    """
    kind = rng.random()
    if kind < 0.6 * skills:
        return tool_episode(rng)
    if kind < skills:
        return fact_episode(rng)
    if long:
        return chat_episode(rng, bindings=rng.randint(1, 8), fillers=rng.randint(4, 24), asks=rng.randint(2, 6))
    return chat_episode(rng, bindings=rng.randint(1, 5), fillers=rng.randint(0, 2), asks=rng.randint(2, 6))


def draw_memory_episode(
    rng: Random,
    *,
    bindings: int,
    fillers: int = 0,
    changes: int = 0,
    asks: int = 0,
    shown: int = 0,
    system: bool = False,
    questions: Sequence[str] = ("ask",),
) -> MemoryEpisode:
    """A conversation that is told first and asked later.

    Small talk falls anywhere among and after the told bindings; changes and asks fall after the first of them.
    ``system`` puts a plain system message before it. ``questions`` says what the final turns are:
    "ask" (about a told binding), "unknown", "filler", "tool" or "fact".
    """
    talk = _Talk(rng)
    steps = ["tell"] * bindings + ["filler"] * fillers
    rng.shuffle(steps)
    for step in ["change"] * changes + ["ask"] * asks:
        steps.insert(rng.randint(steps.index("tell") + 1, len(steps)), step)
    head = Message("system", language.system_text(rng)) if system else None
    turns = tuple(talk.take(step) for step in steps)
    recalls = frozenset(i for i, step in enumerate(steps) if step == "ask")
    return MemoryEpisode(head, turns, recalls, shown, tuple(_question(talk, kind, head) for kind in questions))


def _question(talk: _Talk, kind: str, system: Message | None) -> Question:
    rng = talk.rng
    if kind == "tool":
        tools = toolchat.draw_tools(rng, rng.choice((1, 2, 3)))
        return Question(tool_turn(rng, tools), system, tuple(tools))
    if kind == "fact":
        facts = toolchat.draw_facts(rng, rng.choice((1, 2, 3, 4)))
        fact = rng.choice(facts)
        turn = _turn(toolchat.ask_fact(rng, fact), toolchat.cite(facts, fact))
        return Question(turn, _facts_message(facts, system))
    return Question(talk.take(kind), system)
