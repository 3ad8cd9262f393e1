"""Whole conversations for training: all in the prompt (the base), or statements first, questions later (memory)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from agentmem.messages import Message
from agentmem.nano.recipe import language, toolchat
from agentmem.nano.recipe.offers import Offer, draw_offer, draw_offers, remembered
from agentmem.nano.recipe.pools import ATTRIBUTES
from agentmem.nano.recipe.turns import PROJECT, Talk, Tools, Turn, facts_message, tools_of

FACT_COUNTS = (1, 2, 2, 2, 3, 3, 3, 4, 4, 5)


@dataclass(frozen=True)
class Episode:
    """A conversation and the tools that its system turn lists."""

    messages: tuple[Message, ...]
    tools: Tools = ()


@dataclass(frozen=True)
class Question:
    """A final turn; the model has to produce its assistant messages.

    Attributes:
        turn: the messages.
        system: the system message in its prompt, if any.
        tools: the tools in its prompt.
    """

    turn: Turn
    system: Message | None = None
    tools: Tools = ()


@dataclass(frozen=True)
class MemoryEpisode:
    """Turns that are written, and independent questions, each of which is asked after all of them.

    Attributes:
        system: the system message that every written turn shows and that is never written, if any.
        turns: the turns that are written, oldest first.
        recalls: indices of the turns that ask for something stated before.
        shown: how many of the last turns a question's prompt still shows.
        questions: the final turns.
        tools: the tools in the system turn of some written turns.
        equipped: indices of the turns that show these tools.
    """

    system: Message | None
    turns: tuple[Turn, ...]
    recalls: frozenset[int]
    shown: int
    questions: tuple[Question, ...]
    tools: Tools = ()
    equipped: frozenset[int] = frozenset()


def _system(rng: Random, share: float = 0.35) -> Message | None:
    return Message("system", language.system_text(rng)) if rng.random() < share else None


def _episode(system: Message | None, turns: Sequence[Turn], tools: Tools = ()) -> Episode:
    return Episode((*([system] if system else []), *(m for turn in turns for m in turn)), tools)


def chat_episode(rng: Random, *, bindings: int, fillers: int, asks: int) -> Episode:
    """Stating, changing and asking, with small talk in between, all of it visible; some questions have no answer."""
    talk = Talk(rng)
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
    return _episode(system, turns)


def tool_episode(rng: Random) -> Episode:
    """A conversation with one to four named tools in which some messages ask for a call and some do not."""
    talk = Talk(rng)
    system = _system(rng, 0.4)
    tools = toolchat.draw_tools(rng, rng.choice((1, 1, 2, 2, 3, 4)))
    turns = []
    for _ in range(rng.choice((2, 2, 3, 4))):
        kind = rng.random()
        if kind < 0.75:
            turns.append(talk.named_call(tools))
        elif kind < 0.87:
            turns.append(talk.tell())
        else:
            turns.append(talk.ask() if talk.told else talk.filler())
    return _episode(system, turns, tuple(tools))


def offer_episode(rng: Random) -> Episode:
    """A conversation with tools in LangChain's form; what some of them need is stated before they are used."""
    talk = Talk(rng)
    system = _system(rng, 0.25)
    offers = draw_offers(rng, rng.choices((1, 2, 3, 4, 5), (5, 6, 7, 3, 1))[0])
    needed = sorted({name for offer in offers for name in offer.recalled.values()})
    rng.shuffle(needed)
    turns = []
    for attribute in needed:
        if rng.random() < 0.8:
            turns.append(talk.tell(attribute))
            if rng.random() < 0.2:
                turns.append(talk.change(attribute))
    talk.kept |= set(needed) - set(talk.told)
    if needed and rng.random() < 0.4:
        turns.insert(rng.randint(0, len(turns)), talk.tell())
    # Tools make up most of the prompt, so each conversation calls them a few times.
    for i in range(rng.choice((2, 3, 3, 4, 5))):
        kind = rng.random()
        if kind < (0.85 if i == 0 else 0.75):
            turns.append(talk.offer_call(offers))
        elif kind < 0.85:
            turns.append(talk.unoffered(offers))
        elif kind < 0.9:
            turns.append(talk.change() if talk.told and rng.random() < 0.6 else talk.tell())
        elif kind < 0.96:
            turns.append(talk.ask() if talk.askable else talk.ask_unknown())
        else:
            turns.append(talk.filler())
    return _episode(system, turns, tools_of(offers))


def fact_episode(rng: Random) -> Episode:
    """A conversation whose system message quotes facts; answers to questions about them give the source's number.

    Most questions are about several of the facts. What the user said and no fact states is answered without a number.
    Where the user and a fact disagree, the fact wins and the answer says so.
    """
    talk = Talk(rng)
    facts = toolchat.draw_facts(rng, rng.choice(FACT_COUNTS))
    talk.kept = {fact.subject for fact in facts} & set(ATTRIBUTES)
    asked = rng.sample(facts, min(len(facts), rng.choice((1, 2, 2, 3, 3, 4))))
    disputed = [fact for fact in asked if fact.subject in talk.kept]
    turns: list[Turn] = []
    for fact in disputed:
        if rng.random() < 0.4:
            turns.append(talk.tell(fact.subject))
    if rng.random() < 0.25:
        turns.append(talk.tell())
    late: list[Turn] = [talk.ask_fact(facts, fact) for fact in asked]
    kind = rng.random()
    if talk.askable and kind < 0.75:
        late.append(talk.ask())
    elif kind < 0.08:
        late.append(talk.ask_unknown())
    elif kind < 0.14:
        late.append(talk.filler())
    rng.shuffle(turns)
    rng.shuffle(late)
    return _episode(facts_message(facts, _system(rng, 0.4)), [*turns, *late])


def chatter_episode(rng: Random) -> Episode:
    """Sentences outside the language mixed with others; in a third of the conversations tools are available."""
    talk = Talk(rng)
    system = _system(rng)
    steps = ["chatter"] * rng.choice((1, 2, 3)) + ["tell"] * rng.choice((0, 1, 1, 2)) + ["filler"] * rng.choice((0, 1))
    rng.shuffle(steps)
    turns = [talk.take(step) for step in steps]
    if talk.told:
        turns.append(talk.ask())
    tools: Tools = ()
    if rng.random() < 0.35:
        tools = tools_of(draw_offers(rng, rng.choice((1, 1, 2))))
    return _episode(system, turns, tools)


def draw_episode(rng: Random, *, long: bool = False, skills: float = 0.4) -> Episode:
    """A conversation for the base model.

    `skills` is the share of conversations with named tools (12 % of it), tools in LangChain's form (55 %), facts (25 %)
    and sentences outside the language (8 %); `long` conversations continue for up to about 24 turns of small talk.
    """
    kind = rng.random()
    if kind < skills:
        share = kind / skills
        if share < 0.12:
            return tool_episode(rng)
        if share < 0.67:
            return offer_episode(rng)
        return fact_episode(rng) if share < 0.92 else chatter_episode(rng)
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
    calls: int = 0,
    shown: int = 0,
    system: bool = False,
    tooled: float = 0.0,
    questions: Sequence[str] = ("ask",),
) -> MemoryEpisode:
    """A conversation that states things first and asks for them later.

    Small talk and `calls` tool turns fall anywhere among and after the statements; changes and questions fall after the
    first statement. Tool turns show the tools, and so does a fifth of the other turns. `system` adds a plain system
    message in front. `questions` gives the kinds of the final turns: "ask" (about a stated binding), "unknown",
    "filler", "chatter", "tool" (named), "offer" (a lookup, function or creator), "remembered" (a call that needs
    something stated earlier), "unoffered" or "fact"; `tooled` is the share of the first four whose prompts show tools
    nonetheless.
    """
    talk = Talk(rng)
    steps = ["tell"] * bindings + ["filler"] * fillers + ["call"] * calls
    rng.shuffle(steps)
    for step in ["change"] * changes + ["ask"] * asks:
        steps.insert(rng.randint(steps.index("tell") + 1, len(steps)), step)
    head = Message("system", language.system_text(rng)) if system else None
    offers = _recallless(rng, rng.choice((1, 1, 1, 2))) if calls else ()
    turns = tuple(talk.offer_call(offers) if step == "call" else talk.take(step) for step in steps)
    recalls = frozenset(i for i, step in enumerate(steps) if step == "ask")
    equipped = frozenset(i for i, step in enumerate(steps) if calls and (step == "call" or rng.random() < 0.2))
    asked = tuple(_question(talk, kind, head, offers, tooled) for kind in questions)
    return MemoryEpisode(head, turns, recalls, shown, asked, tools_of(offers), equipped)


def _recallless(rng: Random, n: int) -> tuple[Offer, ...]:
    """Tools whose requests contain everything that they need."""
    while True:
        first = draw_offer(rng)
        if first.kind != "remembered":
            break
    offers: tuple[Offer, ...] = (first,)
    while len(offers) < n:
        offers = tuple(o for o in draw_offers(rng, n + 1, first=first) if o.kind != "remembered")[:n]
    return offers


def _question(
    talk: Talk, kind: str, system: Message | None, offers: tuple[Offer, ...] = (), tooled: float = 0.0
) -> Question:
    rng = talk.rng
    if kind == "tool":
        tools = toolchat.draw_tools(rng, rng.choice((1, 2, 3)))
        return Question(talk.named_call(tools), system, tuple(tools))
    if kind == "fact":
        return _fact_question(talk, system)
    if kind in ("offer", "unoffered"):
        shown = offers or _recallless(rng, rng.choice((1, 1, 2)))
        said = talk.offer_call(shown) if kind == "offer" else talk.unoffered(shown)
        return Question(said, system, tools_of(shown))
    if kind == "remembered":
        told = rng.random() < 0.75 or len(talk.told) == len(ATTRIBUTES)
        names = sorted(talk.told) if told else [name for name in ATTRIBUTES if name not in talk.told]
        needed = remembered(rng, rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2)))))
        shown = draw_offers(rng, rng.choice((1, 1, 2)), first=needed)
        return Question(talk.offer_call([needed]), system, tools_of(shown))
    at_hand = tools_of(offers or draw_offers(rng, rng.choice((1, 1, 2)))) if rng.random() < tooled else ()
    return Question(talk.take(kind), system, at_hand)


def _fact_question(talk: Talk, system: Message | None) -> Question:
    """A question with facts in its prompt: about one of them, about one that contradicts the user, or about none."""
    rng = talk.rng
    facts = toolchat.draw_facts(rng, rng.choice(FACT_COUNTS))
    told = [name for name in PROJECT if name in talk.told and all(name != fact.subject for fact in facts)]
    fact = rng.choice(facts)
    kind = rng.random()
    if told and kind < 0.3:
        other = language.redraw(rng, talk.told[rng.choice(told)])
        facts[facts.index(fact)] = fact = toolchat.Fact(other.attribute, other.value)
    talk.kept = {fact.subject for fact in facts}
    try:
        uncited = kind > 0.8 and talk.askable
        return Question(talk.ask() if uncited else talk.ask_fact(facts, fact), facts_message(facts, system))
    finally:
        talk.kept = set()
