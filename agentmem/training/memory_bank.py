"""A store in the manner of MemoryBank (Zhong et al., 2023), as a baseline: turns, summaries of them, and forgetting.

A conversation is cut into sessions of a few turns. The model itself, without memory, summarises each session. What is
kept fades by Ebbinghaus' curve, exp(-t / (5 S)): t is the number of sessions since something was last said or
recalled, and its strength S is 1, and 1 more for each time that a later user message recalled it. A question finds
passages and summaries by BM25 (MemoryBank itself: by embeddings), weighted by how much of them is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agentmem.messages import Message
from agentmem.training.contexts import bm25_scores, passages, quote

SESSION_TURNS = 8
"""How many turns (a user message and what follows it) are a session, a day in MemoryBank."""

SUMMARY_TOKENS = 64
"""Most tokens of a summary."""

_SCALE = 5  # days in which a memory of strength 1 falls to 1/e in MemoryBank's code
_INSTRUCTION = "Summarise what was said below in at most three sentences. Keep names, numbers and dates."


@dataclass
class Kept:
    """Something that is kept: a passage as it was said, or a summary.

    Attributes:
        role: who said it; "summary" for one.
        text: its text.
        session: the session that it was last said or recalled in, from 0.
        strength: 1, and 1 for each time that it was recalled.
    """

    role: str
    text: str
    session: int
    strength: int = 1

    def left(self, now: int) -> float:
        """How much of it is left in session `now`, from 0 to 1."""
        return math.exp(-(now - self.session) / (_SCALE * self.strength))


@dataclass
class MemoryBank:
    """What is kept of a conversation; make one with `fill`."""

    kept: list[Kept] = field(default_factory=list)
    now: int = 0

    @classmethod
    def fill(cls, told: Sequence[Message], summarise: Callable[[Message], str]) -> MemoryBank:
        """Keep a conversation, session by session.

        Args:
            told: its messages; those of the system are not kept.
            summarise: replies to a prompt that has an instruction and the text of a session.

        Raises:
            MissingExtraError: bm25s is not installed.
        """
        bank = cls()
        for bank.now, session in enumerate(_sessions(told)):
            for message in session:
                if message.role == "user":
                    bank._recall(message.content)
            bank.kept += [Kept(m.role, text, bank.now) for m in session for text in passages(m.content)]
            said = "\n".join(f"{message.role}: {message.content}" for message in session)
            summary = summarise(Message("user", f"{_INSTRUCTION}\n\n{said}")).strip()
            if summary:
                bank.kept.append(Kept("summary", summary, bank.now))
        return bank

    def excerpts(self, question: str, fits: Callable[[Message], bool]) -> Message | None:
        """As `agentmem.training.contexts.excerpts`, from what is kept and by how much of it is left."""
        return quote([(each.role, each.text) for each in self.kept], self._scores(question), fits)

    @property
    def bytes(self) -> int:
        """Bytes of all texts that are kept."""
        return sum(len(each.text.encode()) for each in self.kept)

    def _recall(self, text: str) -> None:
        """Strengthen what a user message recalls: the one that fits it best, if any does."""
        scores = self._scores(text)
        if scores and max(scores) > 0:
            best = self.kept[scores.index(max(scores))]
            best.session, best.strength = self.now, best.strength + 1

    def _scores(self, text: str) -> list[float]:
        if not self.kept:
            return []
        scores = bm25_scores([each.text for each in self.kept], text)
        return [score * each.left(self.now) for score, each in zip(scores, self.kept, strict=True)]


def _sessions(told: Sequence[Message]) -> list[list[Message]]:
    """The spoken messages in lists of `SESSION_TURNS` turns; the first has what comes before the first user message."""
    sessions: list[list[Message]] = []
    users = 0
    for message in told:
        if message.role == "system":
            continue
        if not sessions or (message.role == "user" and users and users % SESSION_TURNS == 0):
            sessions.append([])
        users += message.role == "user"
        sessions[-1].append(message)
    return sessions
