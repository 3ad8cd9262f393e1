"""The `facts` source: conversations in natural English whose last replies need what was said before.

An episode is a list of turns (facts stated, changed and corrected, rules given, with small talk and unrelated questions
in between) and questions about them, each asked separately after all turns. Nothing in it comes from a data set, so it
costs nothing and never runs out: episode `n` of a seed is always the same, and two episodes share values only by
chance. `agentmem.training.sources` makes conversations to train on of them.

    episodes = FactEpisodes(seed=0)
    for question in episodes.episode(0).questions:
        print(question.user.content, question.reply.content)

What a memory has learned shows on data that training never saw: `values`, `wordings` and `attributes` are each drawn
either from the training part or from the held-out part of their vocabulary, which are divided by a hash
(`facts.splits`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any, Literal, get_args

from agentmem.errors import ConfigError
from agentmem.messages import Message, ToolCall
from agentmem.training.facts import wordings as say
from agentmem.training.facts.attributes import ATTRIBUTES, FactAttribute, attributes, second_person
from agentmem.training.facts.rules import FILE_QUESTIONS, RULES, Rule, RuleCheck, file_subject
from agentmem.training.facts.splits import Split, split_of, wordings
from agentmem.training.facts.tools import REQUESTS, offered
from agentmem.training.facts.values import OPEN_KIND, OPEN_KINDS, POOLS, TWO_WORDS, Values, Vocabulary, article

_OPEN_WORDS = ("word", "name", "pair", "full_name", "title", "phrase")

TurnAct = Literal["tell", "tell_several", "change", "correct", "rule", "small_talk", "unrelated"]
QuestionAct = Literal["ask", "choice", "tool_call", "never_told", "rule_followed"]


@dataclass(frozen=True)
class ToldFact:
    """An attribute and its present value; `old` is the value before the last change, if there was one."""

    attribute: FactAttribute
    value: str
    old: str = ""


@dataclass(frozen=True)
class FactTurn:
    """A user message, the reply to it, and the facts that this turn states."""

    act: TurnAct
    user: Message
    reply: Message
    facts: tuple[ToldFact, ...] = ()

    @property
    def messages(self) -> tuple[Message, Message]:
        """Both messages."""
        return self.user, self.reply


@dataclass(frozen=True)
class FactQuestion:
    """A message whose reply needs information from earlier turns.

    Attributes:
        act: the kind of question.
        user: the message.
        reply: the correct reply.
        value: the text that a correct reply must contain; empty where `check` judges the reply.
        old: what a correct reply must not contain: the value before the last change, or of a choice the other one; else
            empty.
        attribute: the attribute that is asked for; None for a rule.
        tools: the tools in the prompt.
        check: whether a reply is correct, for questions without a value: it says that the attribute was never told, or
            follows the rule.
    """

    act: QuestionAct
    user: Message
    reply: Message
    value: str = ""
    old: str = ""
    attribute: FactAttribute | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    check: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class FactEpisode:
    """Turns, oldest first, and independent questions, each of which is asked after all of them.

    `system` is the system message in front of everything; None = there is none, and a template puts in its own.
    """

    turns: tuple[FactTurn, ...]
    questions: tuple[FactQuestion, ...]
    system: Message | None = None


@dataclass(frozen=True)
class EpisodeConfig:
    """How much is stated and asked.

    Attributes:
        facts: the smallest and largest number of facts in an episode.
        fillers: the smallest and largest number of turns with small talk or unrelated questions.
        several: how often neighbouring facts are stated in one message.
        changes: how often an episode changes or corrects one of its facts.
        rules: how often an episode has a rule.
        open_values: how often an attribute with a closed pool takes a value from an open vocabulary.
        two_words: how often an attribute with values of one word or name takes one of two.
        one_domain: how often all attributes of an episode are of one domain (a person, a project ...).
        own_wordings: how often an attribute's own statement or question is used and not a general one.
        questions: at most this many questions per episode.
        repeats: how many questions, each in a wording of its own, are about the same fact or rule.
        systems: how often an episode has a system message.
        grow: a course from easy to hard: the number of the first episode that may have the largest number of facts.
            Until then it grows; while it is 1 there is nothing but facts that are told and asked. 0 = no course.
        acts: how the questions about facts are distributed.
        kinds: kinds of values that attributes may have; empty = all.
        kind_weights: how much more often attributes of a kind are chosen than others: (("number", 3.0),).

    Raises:
        ConfigError: a range, a share or a weight is impossible, or a kind is unknown.
    """

    facts: tuple[int, int] = (1, 4)
    fillers: tuple[int, int] = (0, 3)
    several: float = 0.3
    changes: float = 0.25
    rules: float = 0.15
    open_values: float = 0.7
    two_words: float = 0.2
    one_domain: float = 0.4
    own_wordings: float = 0.4
    questions: int = 4
    repeats: int = 1
    systems: float = 0.0
    grow: int = 0
    acts: tuple[tuple[QuestionAct, float], ...] = (
        ("ask", 0.75),
        ("choice", 0.1),
        ("tool_call", 0.05),
        ("never_told", 0.1),
    )
    kinds: tuple[str, ...] = ()
    kind_weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("facts", "fillers"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ConfigError(f"{name} must be a range (fewest, most) from 0; found {(low, high)}")
        shares = ("several", "changes", "rules", "open_values", "two_words", "one_domain", "own_wordings", "systems")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be a share from 0 to 1; found {getattr(self, name)}")
        unknown = {*self.kinds, *(kind for kind, _ in self.kind_weights)} - set(OPEN_KINDS) - set(POOLS)
        if unknown:
            raise ConfigError(f"unknown kind of values {min(unknown)!r}; known: {', '.join((*OPEN_KINDS, *POOLS))}")
        if any(weight <= 0 for _, weight in self.kind_weights):
            raise ConfigError(f"kind_weights must be above 0; found {dict(self.kind_weights)}")
        acts = set(get_args(QuestionAct)) - {"rule_followed"}  # asked wherever an episode has a rule
        if strange := {act for act, _ in self.acts} - acts:
            raise ConfigError(f"acts are {', '.join(sorted(acts))}; found {min(strange)!r}")
        if self.repeats < 1 or self.grow < 0:
            raise ConfigError(f"repeats is at least 1 and grow at least 0; found {self.repeats} and {self.grow}")
        if self.questions < 1 or not self.acts or sum(weight for _, weight in self.acts) <= 0:
            raise ConfigError("an episode needs at least one question and one act of asking with a weight above 0")

    def at(self, number: int) -> EpisodeConfig:
        """The config of episode `number` where there is a course (`grow`); otherwise, and for held-out ones, this."""
        if not 0 <= number < self.grow:
            return self
        low, high = self.facts
        # A third of the course is at the smallest number: finding out what to recall takes longest.
        done = max(0.0, 1.5 * number / self.grow - 0.5)
        most = low + math.ceil(done * (high - low))
        course = replace(self, facts=(low, most))
        return replace(course, fillers=(0, 0), changes=0.0, rules=0.0, acts=(("ask", 1.0),)) if most == 1 else course


class FactEpisodes:
    """An endless source of episodes.

    Args:
        seed: determines, together with an episode's number, the episode.
        config: how much is stated and asked.
        values, wordings, attributes: the part that each is drawn from.
        vocabulary: the source of words and names; `Vocabulary.from_tokenizer` gives the largest.

    Raises:
        ConfigError: fewer attributes remain than an episode has facts.
    """

    def __init__(
        self,
        seed: int = 0,
        config: EpisodeConfig | None = None,
        *,
        values: Split = "train",
        wordings: Split = "train",
        attributes: Split = "train",
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.seed = seed
        self.config = config or EpisodeConfig()
        self._values = Values(values, vocabulary)
        self._wordings: Split = wordings
        self._attributes = _attributes(self.config, attributes)
        if len(self._attributes) <= self.config.facts[1]:
            raise ConfigError(
                f"an episode of {self.config.facts[1]} facts needs more attributes than that; of part {attributes} "
                f"there are {len(self._attributes)} of the kinds {', '.join(self.config.kinds) or 'all'}"
            )

    def episode(self, number: int) -> FactEpisode:
        """Episode `number`, the same at every call."""
        return _Draft(self, self.config.at(number), Random(f"{self.seed}/{number}")).episode()


def _attributes(config: EpisodeConfig, split: Split) -> tuple[FactAttribute, ...]:
    chosen = attributes(split)
    return tuple(a for a in chosen if not config.kinds or a.kind in config.kinds)


class _Draft:
    """An episode that is being drawn."""

    def __init__(self, source: FactEpisodes, config: EpisodeConfig, rng: Random) -> None:
        self.config, self.values, self.split = config, source._values, source._wordings
        self.rng = rng
        count = rng.randint(*self.config.facts)
        *chosen, self.untold = self._sample(source._attributes, count + 1)
        self.facts: dict[FactAttribute, ToldFact] = {}
        for attribute in chosen:
            self.facts[attribute] = ToldFact(attribute, self._value(attribute))
        self.rule = rng.choice(RULES) if rng.random() < self.config.rules else None
        self.rule_word = self.values.draw(rng, "word")

    def episode(self) -> FactEpisode:
        rng, turns = self.rng, list[FactTurn]()
        pending = list(self.facts.values())
        while pending:
            several = min(len(pending), rng.choice((2, 2, 3))) if rng.random() < self.config.several else 1
            told, pending = pending[:several], pending[several:]
            turns.append(self._tell(told[0]) if len(told) == 1 else self._tell_several(told))
        if self.rule is not None:
            turns.insert(rng.randint(0, len(turns)), self._rule(self.rule))
        for _ in range(rng.randint(*self.config.fillers)):
            turns.insert(rng.randint(0, len(turns)), self._filler())
        if self.facts and rng.random() < self.config.changes:
            attribute = rng.choice(list(self.facts))
            first = next(i for i, turn in enumerate(turns) if any(fact.attribute is attribute for fact in turn.facts))
            turns.insert(rng.randint(first + 1, len(turns)), self._change(attribute))
        system = Message("system", rng.choice(say.SYSTEMS)) if rng.random() < self.config.systems else None
        return FactEpisode(tuple(turns), self._questions(), system)

    def _sample(self, choices: tuple[FactAttribute, ...], count: int) -> list[FactAttribute]:
        """Different attributes, of one domain as often as the config says, by the weights of their kinds."""
        rng = self.rng
        if rng.random() < self.config.one_domain:
            domain = rng.choice(choices).domain
            narrow = tuple(attribute for attribute in choices if attribute.domain == domain)
            choices = narrow if len(narrow) >= count else choices
        if not self.config.kind_weights:
            return rng.sample(choices, count)
        # The largest of u ** (1 / weight) are a sample without replacement by weight (Efraimidis and Spirakis, 2006).
        weights = dict(self.config.kind_weights)
        chosen = sorted(choices, key=lambda attribute: rng.random() ** (1 / weights.get(attribute.kind, 1.0)))[-count:]
        rng.shuffle(chosen)
        return chosen

    # Turns.

    def _tell(self, fact: ToldFact) -> FactTurn:
        reply = self._choose(say.ACKNOWLEDGE)
        return self._turn("tell", self._statement(fact, opening=True), _fill(reply, fact, replied=True), (fact,))

    def _tell_several(self, facts: Sequence[ToldFact]) -> FactTurn:
        if self.rng.random() < 0.4:  # one sentence with all of them
            *clauses, last = (f"{fact.attribute.noun} is {fact.value}" for fact in facts)
            told = f"{', '.join(clauses)} and {last}."
            told = told[0].upper() + told[1:]
        else:
            told = " ".join(self._statement(fact) for fact in facts)
        text = self._choose(say.TELL_SEVERAL).replace("{facts}", told)
        plain = tuple(wording for wording in say.ACKNOWLEDGE if "{" not in wording)
        return self._turn("tell_several", text, self._choose(plain), tuple(facts))

    def _change(self, attribute: FactAttribute) -> FactTurn:
        before = self.facts[attribute]
        now = ToldFact(attribute, self._value(attribute), before.value)
        self.facts[attribute] = now
        act: TurnAct = self.rng.choice(("change", "correct"))
        text = _fill(self._choose(say.CHANGE if act == "change" else say.CORRECT), now)
        return self._turn(act, text, _fill(self._choose(say.ACKNOWLEDGE_CHANGE), now, replied=True), (now,))

    def _rule(self, rule: Rule) -> FactTurn:
        text = self._choose(rule.tellings).replace("{v}", self.rule_word)
        plain = tuple(wording for wording in say.ACKNOWLEDGE if "{" not in wording)
        return self._turn("rule", text, self._choose(plain))

    def _filler(self) -> FactTurn:
        unrelated = self.rng.random() < 0.4
        user, reply = self._choose_pair(say.QUESTIONS if unrelated else say.SMALL_TALK)
        if unrelated and self.rng.random() < 0.5:
            reply = reply.split(". ")[0] + "."
        return self._turn("unrelated" if unrelated else "small_talk", user, reply)

    def _turn(self, act: TurnAct, user: str, reply: str, facts: tuple[ToldFact, ...] = ()) -> FactTurn:
        return FactTurn(act, Message("user", user), Message("assistant", reply), facts)

    def _statement(self, fact: ToldFact, *, opening: bool = False) -> str:
        """A sentence that states the fact, never with a lower-case first letter; the value keeps its spelling."""
        lower = fact.value[0].islower()
        own, general = (
            [wording for wording in wordings(texts, self.split) if not (lower and wording.startswith("{v}"))]
            for texts in (fact.attribute.statements, say.TELL)
        )
        if own and self.rng.random() < self.config.own_wordings:
            start = self.rng.choice(say.OPENINGS) if opening else ""
            return start + _fill(self.rng.choice(own), fact)
        return _fill(self.rng.choice(general), fact)

    # Questions.

    def _questions(self) -> tuple[FactQuestion, ...]:
        rng = self.rng
        acts, weights = zip(*self.config.acts, strict=True)
        facts = rng.sample(list(self.facts.values()), min(len(self.facts), self.config.questions))
        # Facts that were changed are the most useful to ask for, so they come first.
        facts.sort(key=lambda fact: not fact.old)
        repeated = facts * self.config.repeats
        questions = [self._question(rng.choices(acts, weights)[0], fact) for fact in repeated]
        if self.rule is not None:
            questions[:0] = [self._rule_question(self.rule) for _ in range(self.config.repeats)]
        return tuple(questions[: self.config.questions]) or (self._never_told(),)

    def _question(self, act: QuestionAct, fact: ToldFact) -> FactQuestion:
        if act == "never_told":
            return self._never_told()
        if act == "choice":
            return self._choice(fact)
        if act == "tool_call":
            return self._tool_call(fact)
        own = wordings(fact.attribute.questions, self.split)
        text = self._choose(own if own and self.rng.random() < self.config.own_wordings else say.ASK)
        reply = _fill(self._choose(say.ANSWER), fact, replied=True)
        return FactQuestion("ask", _user(_fill(text, fact)), _reply(reply), fact.value, fact.old, fact.attribute)

    def _choice(self, fact: ToldFact) -> FactQuestion:
        other = fact.old or self._other_value(fact)
        a, b = self.rng.sample((fact.value, other), 2)
        text = _fill(self._choose(say.ASK_CHOICE).replace("{a}", a).replace("{b}", b), fact)
        reply = _fill(self._choose(say.ANSWER), fact, replied=True)
        return FactQuestion("choice", _user(text), _reply(reply), fact.value, other, fact.attribute)

    def _other_value(self, fact: ToldFact) -> str:
        """A value that the attribute does not have: mostly of another fact that was told, if possible of its kind."""
        others = [other for other in self.facts.values() if other is not fact]
        alike = [other for other in others if other.attribute.kind == fact.attribute.kind]
        if others and self.rng.random() < 0.7:
            return self.rng.choice(alike or others).value
        return self._value(fact.attribute)

    def _never_told(self) -> FactQuestion:
        fact = ToldFact(self.untold, "")
        own = wordings(self.untold.questions, self.split)
        text = self._choose(own if own and self.rng.random() < self.config.own_wordings else say.ASK)
        reply = _fill(self._choose(say.NEVER_TOLD), fact, replied=True)
        check = say.says_it_was_not_told
        return FactQuestion("never_told", _user(_fill(text, fact)), _reply(reply), attribute=self.untold, check=check)

    def _tool_call(self, fact: ToldFact) -> FactQuestion:
        name = self.rng.choice(list(REQUESTS))
        key = fact.attribute.key
        tool = offered(name, key, fact.attribute.reply_noun)
        call = ToolCall(name, {key: fact.value}, "call_0")
        reply = Message("assistant", "", (call,))
        text = self._choose(REQUESTS[name])
        return FactQuestion("tool_call", _user(text), reply, fact.value, fact.old, fact.attribute, (tool,))

    def _rule_question(self, rule: Rule) -> FactQuestion:
        rng = self.rng
        if rule.about_files:
            while split_of(words := file_subject(rng), "wording") != self.split:
                pass
            suffix = rng.choice((".txt", ".csv", ".py", ".md"))
            text = f"{self._choose(FILE_QUESTIONS).replace('{words}', words)} It ends in {suffix}"
            reply = f"Call it {rule.apply(words, suffix)}"
        else:
            text, plain = self._choose_pair(say.EXPLANATIONS if rule.explanations else say.QUESTIONS)
            reply = rule.apply(plain, self.rule_word)
        check = RuleCheck(rule.name, self.rule_word if rule.takes_word else "")
        return FactQuestion("rule_followed", _user(text), _reply(reply), check=check)

    # Random choices.

    def _value(self, attribute: FactAttribute) -> str:
        """A value that no fact of the episode has or had, even as a part, and that no wording or noun gives away."""
        taken = [text.lower() for fact in self.facts.values() for text in (fact.value, fact.old) if text]
        kind = attribute.kind
        if kind in OPEN_KIND and self.rng.random() < self.config.open_values:
            kind = OPEN_KIND[kind]
        if kind in TWO_WORDS and self.rng.random() < self.config.two_words:
            kind = TWO_WORDS[kind]
        # An open vocabulary has every word, but those of the frame are no values; in dates "May", in times "am" is one.
        reserved = _frame_words() if kind in _OPEN_WORDS else _words(attribute.noun)
        while True:
            value = self.values.draw(self.rng, kind)
            lower = value.lower()
            if not _words(value) & reserved and not any(lower in other or other in lower for other in taken):
                return value

    def _choose(self, texts: tuple[str, ...]) -> str:
        return self.rng.choice(wordings(texts, self.split))

    def _choose_pair(self, pairs: tuple[tuple[str, str], ...]) -> tuple[str, str]:
        replies = dict(pairs)
        user = self._choose(tuple(replies))
        return user, replies[user]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


@lru_cache(maxsize=1)
def _frame_words() -> set[str]:
    """The words that replies and wordings consist of. One of them as a value could be right by chance, or ambiguous."""
    texts = [*say.TELL, *say.ASK, *say.CHANGE, *say.CORRECT, *say.ASK_CHOICE, *say.ANSWER, *say.NEVER_TOLD]
    for attribute in ATTRIBUTES:
        texts += [attribute.noun, attribute.reply_noun, *attribute.statements, *attribute.questions]
    return set().union(*map(_words, texts)) - set("abcdefghijklmnopqrstuvwxyz")


def _user(text: str) -> Message:
    return Message("user", text)


def _reply(text: str) -> Message:
    return Message("assistant", text)


def _fill(wording: str, fact: ToldFact, *, replied: bool = False) -> str:
    """A wording with the fact filled in; `replied` addresses the user as "you"."""
    noun = fact.attribute.noun
    if replied:
        noun = second_person(noun)
    names = {
        "noun": noun,
        "Noun": noun[0].upper() + noun[1:],
        "v": fact.value,
        "old": fact.old,
        "a": article(fact.value),
    }
    return wording.format(**names)
