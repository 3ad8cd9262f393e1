"""Conversations that have nothing to do with what is asked afterwards, to fill a memory with."""

from __future__ import annotations

from collections.abc import Iterator

from agentmem.messages import Message
from agentmem.training.episodes import EpisodeConfig, FactEpisodes
from agentmem.training.sources import as_conversation


def other_talk(seed: int) -> Iterator[tuple[Message, ...]]:
    """Such conversations without end: 8 facts, and 8 turns of other talk, each."""
    episodes = FactEpisodes(seed, EpisodeConfig(facts=(8, 8), fillers=(8, 8)))
    number = 0
    while True:
        yield as_conversation(episodes.episode(number)).messages
        number += 1
