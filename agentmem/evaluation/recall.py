"""Measures recall: a conversation states bindings, small talk follows, then each binding is asked for.

Everything runs through `Engine.turn` with writes on, as an agent would use it. During a conversation the window shows
only the last message, so that whatever is recalled came from memory and was not read again. Each question is a branch
from the state at the end of the conversation. The arms:

    whole     the bare model with the whole conversation in the prompt
    window    the bare model with the question alone
    zeroed    the model with memory, its matrices set to zero
    foreign   the model with memory, the matrices of another conversation
    memory    the model with memory, its own
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

import numpy as np

from agentmem.engine import Engine
from agentmem.generation.sampling import Sampling
from agentmem.messages import Message
from agentmem.nano.recipe.language import Binding, ask, draw_bindings, filler, is_correct, tell
from agentmem.prompt.transcript import Window
from agentmem.state import MemoryState

Arm = Literal["whole", "window", "zeroed", "foreign", "memory"]
ARMS: tuple[Arm, ...] = get_args(Arm)
MEMORY_ARMS: tuple[Arm, ...] = ("zeroed", "foreign", "memory")

BINDINGS = (1, 2, 4, 6, 8)
FILLERS = (0, 4, 16, 64)

_LAST_MESSAGE = Window(messages=1)
_REPLY = Sampling(max_tokens=32)
_QUESTIONS = 8  # fewest questions per conversation; with fewer bindings, each is asked in several wordings


@dataclass(frozen=True)
class Cell:
    """The number of bindings that are stated, and of the user's small-talk messages that follow."""

    bindings: int
    fillers: int

    @property
    def bar(self) -> float | None:
        """The accuracy that the memory arm must reach in this cell; None where there is no bar."""
        if self.fillers <= 4:
            return 0.98 if self.bindings <= 4 else 0.95
        return 0.90 if self.fillers == 16 and self.bindings <= 4 else None

    def conversations(self, questions: int) -> int:
        """How many conversations it takes for at least `questions` questions."""
        return -(-questions // (self.bindings * self._phrasings))

    @property
    def _phrasings(self) -> int:
        return -(-_QUESTIONS // self.bindings)

    def questions(self, rng: Random, bindings: list[Binding]) -> list[tuple[Binding, str]]:
        """A question for every binding, in each of several wordings."""
        return [(b, ask(rng, b.attribute)) for b in bindings for _ in range(self._phrasings)]


CELLS = tuple(Cell(b, f) for f in FILLERS for b in BINDINGS)


@dataclass(frozen=True)
class FinishedConversation:
    """A conversation that has ended: its history, the bindings stated in it, and the state it ended with."""

    history: list[Message]
    bindings: list[Binding]
    state: MemoryState


def converse(engine: Engine, cell: Cell, rng: Random) -> FinishedConversation:
    """State the bindings, then make small talk, one engine turn after another; the replies are the model's own."""
    bindings = draw_bindings(rng, cell.bindings)
    texts = [tell(rng, b)[0] for b in bindings] + [filler(rng)[0] for _ in range(cell.fillers)]
    history: list[Message] = []
    state = engine.zero_state()
    for text in texts:
        history.append(Message("user", text))
        turn = engine.turn(history, state, window=_LAST_MESSAGE, sampling=_REPLY)
        assert turn.state is not None
        history.append(turn.message)
        state = turn.state
    return FinishedConversation(history, bindings, state)


def measure(
    engine: Engine,
    cell: Cell,
    conversations: int,
    seed: int,
    arms: dict[Arm, int],
    memoryless: dict[tuple[Arm, str], str] | None = None,
) -> Iterator[dict[Arm, tuple[int, int]]]:
    """Run conversations of one cell; yields (right, questions) of each arm, conversation by conversation.

    Args:
        arms: for each arm, how many of the conversations it takes part in (always the first ones).
        seed: conversations are drawn from (seed, cell, number).
        memoryless: answers, by question, of the arms that know nothing of the conversation; filled in here.
            Decoding is greedy, so there is one answer to a question: it is asked once and counted each time it
            occurs.
    """
    memoryless = {} if memoryless is None else memoryless
    # The foreign memory is that of the previous conversation; the first conversation gets that of an extra one.
    other_state = converse(engine, cell, _rng(seed, cell, -1)).state
    for number in range(conversations):
        rng = _rng(seed, cell, number)
        conversation = converse(engine, cell, rng)
        questions = cell.questions(rng, conversation.bindings)
        counts: dict[Arm, tuple[int, int]] = {}
        for arm in ARMS:
            if number < arms.get(arm, 0):
                right = sum(
                    is_correct(_answer(engine, arm, conversation, other_state, text, memoryless), b)
                    for b, text in questions
                )
                counts[arm] = (right, len(questions))
        other_state = conversation.state
        yield counts


def _answer(
    engine: Engine,
    arm: Arm,
    conversation: FinishedConversation,
    other_state: MemoryState,
    question: str,
    memoryless: dict[tuple[Arm, str], str],
) -> str:
    history = [*conversation.history, Message("user", question)]
    if arm == "whole":
        return engine.turn(history, window=Window(tokens=None), sampling=_REPLY, memory=False).message.content
    if arm in ("window", "zeroed"):
        if (arm, question) not in memoryless:
            memoryless[arm, question] = _memoryless_answer(engine, arm, conversation, history)
        return memoryless[arm, question]
    state = conversation.state.replaced(matrices=other_state.matrices) if arm == "foreign" else conversation.state
    return engine.turn(history, state, window=_LAST_MESSAGE, sampling=_REPLY).message.content


def _memoryless_answer(engine: Engine, arm: Arm, conversation: FinishedConversation, history: list[Message]) -> str:
    if arm == "window":
        return engine.turn(history, window=_LAST_MESSAGE, sampling=_REPLY, memory=False).message.content
    empty = conversation.state.replaced(matrices=np.zeros_like(conversation.state.matrices))
    return engine.turn(history, empty, window=_LAST_MESSAGE, sampling=_REPLY).message.content


def _rng(seed: int, cell: Cell, number: int) -> Random:
    return Random(f"recall {seed} {cell.bindings} {cell.fillers} {number}")
