"""Single turns of a conversation: statements, questions, small talk, calls and quoted facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from agentmem.messages import Message, ToolCall
from agentmem.nano.recipe import language, toolchat
from agentmem.nano.recipe.chatter import chatter
from agentmem.nano.recipe.offers import Offer
from agentmem.nano.recipe.outcomes import outcome
from agentmem.nano.recipe.pools import ATTRIBUTES, VERBS, WORDS
from agentmem.nano.recipe.requests import request_of, unoffered

Turn = tuple[Message, ...]
Tools = tuple[Mapping[str, Any], ...]
STRANGE = 0.35
"""The share of stated and changed values that are drawn from all words and not from their attribute's pool."""
_ANY = tuple(sorted({*VERBS, *(v for a in ATTRIBUTES.values() for v in a.values if " " not in v and not v.isdigit())}))
PROJECT = tuple(sorted(a.name for a in ATTRIBUTES.values() if a.owner == "project"))


@dataclass
class Talk:
    """A conversation in progress.

    Attributes:
        rng: the source of all random choices.
        told: the latest value of each attribute that was stated.
        kept: attributes that are never stated or asked for at random (because facts state them).
    """

    rng: Random
    told: dict[str, language.Binding] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)

    @property
    def values(self) -> dict[str, str]:
        """The stated values, by attribute."""
        return {name: binding.value for name, binding in self.told.items()}

    @property
    def askable(self) -> list[str]:
        """The stated attributes that no fact states."""
        return sorted(set(self.told) - self.kept)

    def _free(self) -> list[str]:
        return [name for name in ATTRIBUTES if name not in self.told and name not in self.kept]

    def tell(self, attribute: str | None = None) -> Turn:
        """State an attribute that was not stated yet, or the given one."""
        binding = language.draw_bindings(self.rng, 1, attributes=[attribute] if attribute else self._free())[0]
        binding = self._tell(binding)
        return turn(*language.tell(self.rng, binding))

    def change(self, attribute: str | None = None) -> Turn:
        """Change the value of a stated attribute."""
        binding = self._tell(language.redraw(self.rng, self.told[attribute or self.rng.choice(sorted(self.told))]))
        return turn(*language.change(self.rng, binding))

    def _tell(self, binding: language.Binding) -> language.Binding:
        """Record what is stated: the binding, or sometimes its attribute with a value from outside its pool."""
        if self.rng.random() < STRANGE and not binding.value.isdigit():
            binding = language.Binding(binding.attribute, _strange(self.rng))
        self.told[binding.attribute] = binding
        return binding

    def ask(self) -> Turn:
        """Ask for something that was stated."""
        attribute = self.rng.choice(self.askable)
        return turn(language.ask(self.rng, attribute), language.answer(self.told[attribute]))

    def ask_unknown(self) -> Turn:
        """Ask for something that was never stated."""
        attribute = self.rng.choice(self._free())
        return turn(language.ask(self.rng, attribute), language.unknown(attribute))

    def filler(self) -> Turn:
        """Small talk."""
        return turn(*language.filler(self.rng))

    def chatter(self) -> Turn:
        """A sentence outside the language."""
        return turn(*chatter(self.rng))

    def take(self, step: str) -> Turn:
        """One step by name: "tell", "change", "ask", "unknown", "filler" or "chatter"."""
        makers = {
            "tell": self.tell,
            "change": self.change,
            "ask": self.ask,
            "unknown": self.ask_unknown,
            "filler": self.filler,
            "chatter": self.chatter,
        }
        return makers[step]()

    def named_call(self, tools: Sequence[Mapping[str, Any]]) -> Turn:
        """A request that names one of the tools, its call, the result and the report."""
        said, call = toolchat.request(self.rng, self.rng.choice(tools))
        return self._called(said, call, "named")

    def offer_call(self, offers: Sequence[Offer]) -> Turn:
        """A request that needs one of the tools; no call where it needs something that was never stated."""
        offer = self.rng.choice(offers)
        asked = request_of(self.rng, offer, self.values)
        if asked.call is None:
            return turn(asked.said, asked.saying)
        return self._called(asked.said, asked.call, offer.kind, asked.saying)

    def unoffered(self, offers: Sequence[Offer]) -> Turn:
        """A question that fits none of the tools."""
        return turn(*unoffered(self.rng, offers))

    def _called(self, said: str, call: ToolCall, kind: str, saying: str = "") -> Turn:
        returned, report = outcome(self.rng, kind)
        return (
            Message("user", said),
            Message("assistant", saying, tool_calls=(call,)),
            Message("tool", returned, name=call.name),
            Message("assistant", report),
        )

    def ask_fact(self, facts: Sequence[toolchat.Fact], fact: toolchat.Fact) -> Turn:
        """Ask for a quoted fact; the reply cites it, and also names what the user stated if that differs."""
        told = self.told.get(fact.subject)
        said = toolchat.ask_fact(self.rng, fact)
        return turn(said, toolchat.cite(facts, fact, told.value if told else None))


def _strange(rng: Random) -> str:
    """A value from no particular pool: a word, or two words that may never have occurred together."""
    words = [rng.choice((rng.choice(_ANY), rng.choice(WORDS))) for _ in range(rng.choice((1, 2, 2)))]
    return " ".join(words)


def turn(user: str, reply: str) -> Turn:
    """A user message and the reply to it."""
    return (Message("user", user), Message("assistant", reply))


def tools_of(offers: Sequence[Offer]) -> Tools:
    """The tools as a system turn lists them."""
    return tuple(offer.tool for offer in offers)


def facts_message(facts: Sequence[toolchat.Fact], plain: Message | None) -> Message:
    """The system message that quotes the facts, after a plain one if there is one."""
    head = f"{plain.content}\n\n" if plain else ""
    return Message("system", head + toolchat.facts_block(facts))
