"""What the demo's user says: drawn from a seed, equal in every process, light to import.

Facts are stated among small talk, one of them is changed later, and the demo asks for each of them: eight facts in its
own language to nano, four in natural English to other models. The other thread states the same attributes with other
values. The fact store holds none of these values.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from agentmem.nano.recipe.language import Binding, ask, change, draw_bindings, filler, is_correct, redraw, tell
from agentmem.nano.recipe.pools import ATTRIBUTES
from agentmem.nano.recipe.toolchat import Fact
from agentmem.training.episodes import EpisodeConfig, FactEpisodes
from agentmem.training.facts.values import POOLS
from agentmem.training.judging import contains

OF_EACH_KIND = 4  # so many facts about the user, and as many about the project
SMALL_TALK = 4
ENGLISH_FACTS = 4

_SOURCES = {
    "retry limit": "runbook.md, section 3",
    "upload limit": "handbook.pdf, page 12",
    "page size": "api.md, line 48",
    "session length": "security.md, section 2",
    "invoice total": "invoices.csv, row 7",
}


@dataclass(frozen=True)
class SourcedFact:
    """An exact fact for the store, with its source."""

    fact: Fact
    source: str


@dataclass(frozen=True)
class Script:
    """One run of the demo.

    Attributes:
        said: the user's messages in the thread, in order, small talk included.
        change: the message among `said` that replaces `old` by another value.
        old: the fact as it was first stated.
        new: the same fact after the change.
        questions: a question about every stated fact, with the value at the end.
        other: the user's messages in the other thread.
        elsewhere: the values stated there, by attribute.
        facts: the contents of the fact store.
        asked_fact: the exact fact that is asked for.
        fact_question: the question about it.
    """

    said: tuple[str, ...]
    change: str
    old: Binding
    new: Binding
    questions: tuple[tuple[str, Binding], ...]
    other: tuple[str, ...]
    elsewhere: dict[str, Binding]
    facts: tuple[SourcedFact, ...]
    asked_fact: SourcedFact
    fact_question: str


def draw_script(seed: int, model: str = "nano") -> Script:
    """The script that follows from a seed, in a language that the model knows."""
    rng = Random(f"demo {seed}")
    if model != "nano":
        return _english(seed, rng)
    bindings = [b for owner in ("user", "project") for b in draw_bindings(rng, OF_EACH_KIND, attributes=_owned(owner))]
    rng.shuffle(bindings)
    old = rng.choice(bindings[:-1])
    new = redraw(rng, old)
    steps = [(b, tell(rng, b)[0]) for b in bindings] + [(None, filler(rng)[0]) for _ in range(SMALL_TALK)]
    rng.shuffle(steps)
    correction = change(rng, new)[0]
    after = next(i for i, (binding, _) in enumerate(steps) if binding == old) + 1
    steps.insert(rng.randint(after, len(steps)), (new, correction))
    holds = [new if b == old else b for b in bindings]
    elsewhere = [_another(rng, b, {old, new}) for b in bindings]
    facts = _facts(rng, {b.value for b in [*bindings, new, *elsewhere]})
    asked_fact = rng.choice(facts)
    return Script(
        said=tuple(text for _, text in steps),
        change=correction,
        old=old,
        new=new,
        questions=tuple((ask(rng, b.attribute), b) for b in holds),
        other=tuple(tell(rng, b)[0] for b in elsewhere),
        elsewhere={b.attribute: b for b in elsewhere},
        facts=facts,
        asked_fact=asked_fact,
        fact_question=f"What is the {asked_fact.fact.subject}?",
    )


def is_right(reply: str, binding: Binding) -> bool:
    """Whether a reply has the binding's value, and, where the values of the attribute are a short list, no other."""
    if binding.attribute in ATTRIBUTES:
        return is_correct(reply, binding)
    return contains(reply, binding.value)


def _english(seed: int, rng: Random) -> Script:
    config = EpisodeConfig(
        facts=(ENGLISH_FACTS, ENGLISH_FACTS),
        fillers=(SMALL_TALK, SMALL_TALK),
        several=0.0,
        changes=1.0,
        rules=0.0,
        open_values=0.0,
        two_words=0.0,
        questions=ENGLISH_FACTS,
        acts=(("ask", 1.0),),
        kinds=tuple(POOLS),
    )
    episode = FactEpisodes(seed, config).episode(0)
    correction = next(turn for turn in episode.turns if turn.act in ("change", "correct"))
    (changed,) = correction.facts
    attribute = changed.attribute.noun
    elsewhere = {}
    for question in episode.questions:
        assert question.attribute is not None
        noun, pool = question.attribute.noun, POOLS[question.attribute.kind]
        others = [value for value in pool if value not in (question.value, question.old)]
        elsewhere[noun] = Binding(noun, rng.choice(others))
    facts = _facts(rng, set())
    asked_fact = rng.choice(facts)
    return Script(
        said=tuple(turn.user.content for turn in episode.turns),
        change=correction.user.content,
        old=Binding(attribute, changed.old),
        new=Binding(attribute, changed.value),
        questions=tuple(
            (question.user.content, Binding(question.attribute.noun, question.value))
            for question in episode.questions
            if question.attribute is not None
        ),
        other=tuple(f"{b.attribute[0].upper()}{b.attribute[1:]} is {b.value}." for b in elsewhere.values()),
        elsewhere=elsewhere,
        facts=facts,
        asked_fact=asked_fact,
        fact_question=f"What is the {asked_fact.fact.subject}?",
    )


def _owned(owner: str) -> list[str]:
    return [name for name, attribute in ATTRIBUTES.items() if attribute.owner == owner]


def _another(rng: Random, binding: Binding, taken: set[Binding]) -> Binding:
    """The same attribute with a value that it never has in the thread."""
    while (drawn := redraw(rng, binding)) in taken:
        pass
    return drawn


def _facts(rng: Random, taken: set[str]) -> tuple[SourcedFact, ...]:
    free = [number for number in map(str, range(100, 1000)) if number not in taken]
    values = rng.sample(free, len(_SOURCES))
    return tuple(SourcedFact(Fact(s, v), source) for (s, source), v in zip(_SOURCES.items(), values, strict=True))
