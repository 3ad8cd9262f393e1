"""What each arm of a measurement may know: whose memory it has, and what of the conversation its prompt shows.

    memory         the conversation's own memory
    zero           an empty memory
    foreign        the memory of another conversation of the same length
    bare           the model without memory, and the question alone
    whole          the model without memory, and the whole conversation in the prompt
    whole_memory   a memory that starts empty and is written as the prompt, the whole conversation, is read: the setting
                   of the delta-mem paper's main table
    whole_foreign  the same prompt read with the memory of another conversation, and nothing written: what steering does
                   to the form of replies, whatever is remembered
    window         the model without memory, and the last messages
    retrieval      the model without memory, and the passages that fit the question best (BM25)
    static         the model with a static LoRA in place of a memory, and the question alone
    static_whole   the same, and the whole conversation in the prompt
    dense          the model without memory, and the passages that are nearest to the question by a sentence model
    llmlingua      the model without memory, and the whole conversation compressed by LLMLingua-2
    window_memory  the conversation's own memory, and the last messages
    memory_bank    the model without memory, and passages and summaries that fade (`agentmem.training.memory_bank`)
    hybrid         `memory`, whose reply stands where what was said bears it out (`agentmem.training.drafts`); elsewhere
                   `retrieval`, with so many tokens less as the first prompt had
    dense_hybrid   the same of `memory` and `dense`
    constant       no model: the one answer that is right most often among questions of a kind

The last messages and the best passages get the same number of tokens. A new arm that combines these parts is a line of
`SETUPS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentmem.errors import MissingExtraError
from agentmem.messages import Message

Arm = Literal[
    "memory",
    "zero",
    "foreign",
    "bare",
    "whole",
    "whole_memory",
    "whole_foreign",
    "static",
    "static_whole",
    "window",
    "retrieval",
    "dense",
    "memory_bank",
    "llmlingua",
    "window_memory",
    "hybrid",
    "dense_hybrid",
    "constant",
]


@dataclass(frozen=True)
class ArmSetup:
    """What an arm may know.

    Attributes:
        memory: whose memory it has; None: the model without memory.
        shows: what the prompt shows of the conversation beside its system messages and the question: nothing, the last
            messages, the passages that fit the question best, those that a `Ranker` finds nearest to it, what a
            `MemoryBank` finds, all of them as a `Compressor` leaves them, or all of them.
        title: what a reader is told.
        static: whether the model has a static LoRA (`agentmem.training.static`).
        parts: the arm that drafts a reply, and the one that is asked where the draft does not stand; None: one turn.
    """

    memory: Literal["own", "foreign", "empty"] | None
    shows: Literal["nothing", "last", "best", "nearest", "bank", "compressed", "all"]
    title: str
    static: bool = False
    parts: tuple[Arm, Arm] | None = None


SETUPS: dict[Arm, ArmSetup] = {
    "memory": ArmSetup("own", "nothing", "its own memory"),
    "zero": ArmSetup("empty", "nothing", "an empty memory"),
    "foreign": ArmSetup("foreign", "nothing", "the memory of another conversation"),
    "bare": ArmSetup(None, "nothing", "question alone, no memory"),
    "whole": ArmSetup(None, "all", "whole conversation in the prompt, no memory"),
    "whole_memory": ArmSetup("empty", "all", "whole conversation in the prompt, written into a memory as it is read"),
    "whole_foreign": ArmSetup("foreign", "all", "whole conversation in the prompt, the memory of another one"),
    "static": ArmSetup(None, "nothing", "question alone, a static LoRA in place of memory", static=True),
    "static_whole": ArmSetup(None, "all", "whole conversation in the prompt, a static LoRA", static=True),
    "window": ArmSetup(None, "last", "last messages in the prompt, no memory"),
    "retrieval": ArmSetup(None, "best", "best passages by BM25 in the prompt, no memory"),
    "dense": ArmSetup(None, "nearest", "nearest passages by a sentence model in the prompt, no memory"),
    "memory_bank": ArmSetup(None, "bank", "passages and summaries that fade (as MemoryBank) in the prompt, no memory"),
    "llmlingua": ArmSetup(None, "compressed", "whole conversation compressed by LLMLingua-2 in the prompt, no memory"),
    "window_memory": ArmSetup("own", "last", "its own memory, and last messages in the prompt"),
    "hybrid": ArmSetup(
        "own",
        "best",
        "its own memory; best passages by BM25 where its reply fails",
        parts=("memory", "retrieval"),
    ),
    "dense_hybrid": ArmSetup(
        "own", "nearest", "its own memory; nearest passages where its reply fails", parts=("memory", "dense")
    ),
    "constant": ArmSetup(None, "nothing", "best constant answer, no model"),
}

ARMS: tuple[Arm, ...] = tuple(SETUPS)
RETRIEVING: tuple[Arm, ...] = tuple(arm for arm, setup in SETUPS.items() if setup.shows in ("best", "bank"))
"""The arms that search by words, which bm25s is needed for."""
STATIC: tuple[Arm, ...] = tuple(arm for arm, setup in SETUPS.items() if setup.static)
"""The arms that a static LoRA is needed for."""
COMPRESSED: tuple[Arm, ...] = tuple(arm for arm, setup in SETUPS.items() if setup.shows == "compressed")
"""The arms that a `Compressor` is needed for."""
NEAREST: tuple[Arm, ...] = tuple(arm for arm, setup in SETUPS.items() if setup.shows == "nearest")
"""The arms that search by meaning, which a `Ranker` is needed for."""
Ranker = Callable[[Sequence[str], str], Sequence[float]]
"""Scores the passages of a conversation, all of them at each call, for a question; the largest is the best."""
Compressor = Callable[[Sequence[str], float], str]
"""Leaves about a share of the words of some passages."""
CONTROLLED: tuple[Arm, ...] = ("memory", "zero", "foreign")
"""The arms that a score needs."""
BASIC: tuple[Arm, ...] = (*CONTROLLED, "bare", "whole")
"""The controlled arms, and the model without memory at both ends: told nothing, told everything."""

_INTRODUCTION = "Earlier in this conversation:"
_LEAST_SHARE, _LESS = 0.005, 0.8  # of a conversation's words; what is left of them where they do not fit
_MISFITS = 8  # passages in a row that are too long for what is left of the budget, after which no more are tried
_PASSAGE = 300  # characters; some 70 tokens, so that the smallest budgets in use hold one


def excerpts(
    told: Sequence[Message], question: str, fits: Callable[[Message], bool], rank: Ranker | None = None
) -> Message | None:
    """What fits a question best, quoted in one system message in the order in which it was said.

    Long messages are cut into passages between sentences, so that a small budget holds some of them. Passages are taken
    by their score, and where scores are equal (as where no word of the question occurs) the later one first, so
    that the budget is used as far as whole passages fill it.

    Args:
        told: the conversation; its system messages are not quoted.
        question: the text that is searched with.
        fits: whether a prompt with such a message is within the budget.
        rank: scores the passages; None: BM25.

    Returns:
        The message, which is never written; None if none fits.

    Raises:
        MissingExtraError: bm25s is needed and not installed.
    """
    spoken = [
        (message.role, passage) for message in told if message.role != "system" for passage in passages(message.content)
    ]
    texts = [text for _, text in spoken]
    return quote(spoken, (rank or bm25_scores)(texts, question) if texts else (), fits)


def compressed(
    told: Sequence[Message], share: float, fits: Callable[[Message], bool], compress: Compressor
) -> Message | None:
    """A whole conversation in one system message, compressed as far as it takes.

    Args:
        told: the conversation; its system messages are left out.
        share: of its words, where to begin; less is left until it fits.
        fits: whether a prompt with such a message is within the budget.
        compress: leaves a share of the words.

    Returns:
        The message, which is never written; None if nothing fits.
    """
    spoken = [(message.role, message.content) for message in told if message.role != "system"]
    found = _quoted(spoken)
    if not spoken or fits(found):
        return found if spoken else None
    share = min(1.0, share)
    while share > _LEAST_SHARE:
        text = compress([f"{role}: {text}" for role, text in spoken], share)
        found = Message("system", f"{_INTRODUCTION}\n{text}", write=False)
        if text and fits(found):
            return found
        share *= _LESS
    return None


def quote(
    spoken: Sequence[tuple[str, str]], scores: Sequence[float], fits: Callable[[Message], bool]
) -> Message | None:
    """The best of some passages in one system message, in the order in which they are given.

    Args:
        spoken: who said a passage, and its text.
        scores: one for each; where they are equal, the later passage is taken first.
        fits: whether a prompt with such a message is within the budget.

    Returns:
        The message, which is never written; None if no passage fits.
    """
    taken: list[int] = []
    found: Message | None = None
    misfits = 0
    for place in sorted(range(len(spoken)), key=lambda place: (-scores[place], -place)):
        quoted = _quoted([spoken[i] for i in sorted([*taken, place])])
        if fits(quoted):
            taken.append(place)
            found, misfits = quoted, 0
        elif (misfits := misfits + 1) == _MISFITS:
            break
    return found


def passages(text: str, most: int = _PASSAGE) -> list[str]:
    """A text as passages of whole sentences, of at most `most` characters; a longer sentence is a passage alone."""
    if len(text) <= most:
        return [text] if text.strip() else []
    cut = list[str]()
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
        if cut and len(cut[-1]) + 1 + len(sentence) <= most:
            cut[-1] += f" {sentence}"
        elif sentence.strip():
            cut.append(sentence)
    return cut


def _quoted(spoken: Sequence[tuple[str, str]]) -> Message:
    lines = [f"{role}: {text}" for role, text in spoken]
    return Message("system", "\n".join([_INTRODUCTION, *lines]), write=False)


def bm25_scores(texts: Sequence[str], query: str) -> list[float]:
    """The BM25 score of each text for a query, by bm25s with its English stop words.

    Raises:
        MissingExtraError: bm25s is not installed.
    """
    bm25s = import_bm25s()
    words = bm25s.tokenize(list(texts), return_ids=False, show_progress=False)
    asked = bm25s.tokenize([query], return_ids=False, show_progress=False)[0]
    known = {word for of_text in words for word in of_text}
    if not (asked := [word for word in asked if word in known]):  # an index without words cannot be made
        return [0.0] * len(texts)
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    return [float(score) for score in index.get_scores(asked)]


def import_bm25s() -> Any:
    """The package bm25s.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise MissingExtraError("bm25s", "eval") from None
    return bm25s
