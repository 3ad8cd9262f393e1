"""No value that the examples tell the embedded model is in its training data."""

from __future__ import annotations

import re
from dataclasses import astuple
from random import Random

from agentmem.messages import Message
from agentmem.nano.recipe.chatml import render
from agentmem.nano.recipe.episodes import draw_episode, draw_memory_episode
from agentmem.nano.recipe.pools import ATTRIBUTES
from analysis_agent import phrases as analysis
from coding_assistant import phrases as coding
from hybrid_rag.parts import TOLD

VALUES = sorted({*astuple(coding.Settings()), *astuple(analysis.Terms()), *TOLD, "whole rule", "bar chart"})
QUESTIONS = ("ask", "remembered", "offer", "fact", "unknown", "tool")


def curriculum(seed: int) -> str:
    """A conversation for the base and one for the adapter, as the model reads them."""
    rng = Random(f"examples {seed}")
    base = draw_episode(rng, long=seed % 7 == 0, skills=0.6)
    memory = draw_memory_episode(rng, bindings=6, fillers=3, changes=1, asks=1, calls=1, questions=QUESTIONS)
    asked: list[Message] = [m for question in memory.questions for m in question.turn]
    told = [m for turn in memory.turns for m in turn]
    return "".join(piece.text for piece in [*render(base.messages, base.tools), *render(told), *render(asked)])


def test_no_value_is_in_a_pool() -> None:
    pools = {value.lower() for one in ATTRIBUTES.values() for value in one.values}
    assert not pools & {value.lower() for value in VALUES}


def test_the_curriculum_never_says_one() -> None:
    said = re.compile("|".join(rf"\b{re.escape(value)}\b" for value in VALUES))
    seen = re.compile(r"\bpytest\b")
    texts = [curriculum(seed) for seed in range(1_500)]
    assert not [found for text in texts if (found := said.search(text))]
    assert any(seen.search(text) for text in texts), "a pool's value would be found"
