"""What nano can do besides recalling: calls of tools, reports, quoted facts; from its prompt and from memory alone.

    python benchmarks/nano_skills.py                                the shipped weights (minutes)
    python benchmarks/nano_skills.py --model DIR --questions 24     others; fewer questions a line
    python benchmarks/nano_skills.py --page docs/results/nano_skills.md

Every question is drawn anew in nano's language, from seeds that no training has. An answer is right when it is right to
the letter: every call with its name, parameters and values, every sentence as the curriculum has it. Replies are nano's
own, greedy and bound by no grammar.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track

import agentmem
from agentmem import Engine, MemoryState, Message, Sampling, Window, load
from agentmem.nano.recipe import toolchat
from agentmem.nano.recipe.offers import Offer, draw_offers
from agentmem.nano.recipe.turns import Talk, Tools, Turn, facts_message, tools_of
from agentmem.training.intervals import share

Question = tuple[Sequence[Message], Turn, Tools]
"""What was said before, the turn whose first message asks and whose second one is right, and the tools at hand."""


def offered(kind: str, count: int, told: bool = True) -> Callable[[Random], Question]:
    """A request for a tool of a kind, among so many; what it needs was told before, or never."""

    def draw(rng: Random) -> Question:
        talk = Talk(rng)
        offer, offers = _one_of(rng, kind, count)
        before: list[Message] = []
        for attribute in sorted(set(offer.recalled.values())) if told else ():
            before += talk.tell(attribute)
        return before, talk.offer_call([offer]), tools_of(offers)

    return draw


def _one_of(rng: Random, kind: str, count: int) -> tuple[Offer, Sequence[Offer]]:
    while True:
        offers = draw_offers(rng, count)
        for offer in offers:
            if offer.kind == kind:
                return offer, offers


def unoffered(rng: Random) -> Question:
    """A question that no tool answers."""
    offers = draw_offers(rng, 2)
    return (), Talk(rng).unoffered(offers), tools_of(offers)


def reported(rng: Random) -> Question:
    """The report of what a tool returned."""
    offer, offers = _one_of(rng, "lookup", 1)
    user, call, result, report = Talk(rng).offer_call([offer])
    return (user, call), (result, report), tools_of(offers)


def cited(count: int) -> Callable[[Random], Question]:
    """A question for one of so many quoted facts."""

    def draw(rng: Random) -> Question:
        facts = toolchat.draw_facts(rng, count)
        return (facts_message(facts, None),), Talk(rng).ask_fact(facts, rng.choice(facts)), ()

    return draw


LINES: dict[str, Callable[[Random], Question]] = {
    "a lookup": offered("lookup", 1),
    "a function of integers": offered("function", 1),
    "a creator, with a quoted name of any script": offered("creator", 1),
    "a command that says all it needs": offered("action", 1),
    "a command that needs what was told": offered("remembered", 1),
    "the same, never told: says so, no call": offered("remembered", 1, told=False),
    "a lookup, among three tools": offered("lookup", 3),
    "a function, among three": offered("function", 3),
    "a creator, among three": offered("creator", 3),
    "a command that says all, among three": offered("action", 3),
    "a command that needs what was told, among three": offered("remembered", 3),
    "a question that no tool answers": unoffered,
    "a result reported": reported,
    **{f"the right one of {n} quoted fact{'s' * (n > 1)}, cited": cited(n) for n in range(1, 6)},
}
RECALLING = ("a command that needs what was told", "a command that needs what was told, among three")


def right(engine: Engine, question: Question, *, remembered: bool) -> bool:
    """Whether nano's reply is the right one; ``remembered``: with what was said before in the memory alone.

    It is told then as a user tells it, turn by turn, and nano replies itself.
    """
    before, (asked, wanted, *_), tools = question
    state: MemoryState | None = None
    messages = [*before, asked]
    if remembered:
        messages = []
        for said in before[::2]:
            messages.append(said)
            told = engine.turn(messages, state, window=Window(messages=1), sampling=Sampling(max_tokens=48))
            messages.append(told.message)
            state = told.state
        messages.append(asked)
    turn = engine.turn(
        messages,
        state,
        tools=tools,
        memory=remembered,
        window=Window(messages=1) if remembered else Window(),
        sampling=Sampling(max_tokens=96),
    )
    reply = turn.message
    calls = [(call.name, call.arguments) for call in reply.tool_calls]
    return calls == [(call.name, call.arguments) for call in wanted.tool_calls] and reply.content == wanted.content


def main(
    model: str = "nano",
    questions: Annotated[int, typer.Option(min=1, help="A line.")] = 60,
    seed: int = 0,
    page: Annotated[Path | None, typer.Option(help="Write the table as a page.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    rows = []
    with load(model) as engine:
        for line, draw in track(LINES.items(), console=Console(stderr=True)):
            cells = [line]
            for remembered in (False, True):
                if remembered and line not in RECALLING:
                    cells.append("")
                    continue
                found = share(
                    [
                        (int(right(engine, draw(Random(f"skills {seed} {line} {i}")), remembered=remembered)), 1)
                        for i in range(questions)
                    ]
                )
                cells.append(f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})")
            rows.append(cells)
    text = "\n".join(
        [
            "# What else nano can do",
            "",
            "Whole replies right to the letter, from everything in the prompt, and with what was told in the memory",
            f"alone. {questions} fresh questions a line; in brackets 95 % intervals. Made by",
            "`python benchmarks/nano_skills.py --page docs/results/nano_skills.md`; its head says what is counted.",
            "",
            "| | from the prompt | from memory |",
            "|---|---|---|",
            *(f"| {' | '.join(cells)} |" for cells in rows),
            "",
            f"{platform.machine()}, {os.cpu_count()} cores, one thread; agentmem {agentmem.__version__}, torch "
            f"{torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}; "
            f"{datetime.now(UTC):%Y-%m-%d}",
        ]
    )
    print(text)
    if page is not None:
        page.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
