"""KV of prompts that were just read, for retries, regenerations and branches of one checkpoint.

An entry may stand in only for the same computation: same tokens and written segments, read from the same matrices,
cut at the same places. So a hit gives bit for bit the numbers of a fresh prefill. KV that an earlier turn left can
never hit, since its matrices were others (see docs/engine.md).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agentmem.delta.passes import Pending


@dataclass(frozen=True)
class Prompt:
    """What identifies a prefill.

    Attributes:
        start: digest of what the matrices at its start follow from: those at the turn's start, and what was written
            before the prompt.
        ids: the tokens.
        segments: for each token the segment that it writes, -1 = it does not.
        border: tokens before the first one that writes; they are read in a call of their own.
    """

    start: bytes
    ids: tuple[int, ...]
    segments: tuple[int, ...]
    border: int

    @property
    def head(self) -> Prompt:
        """The part before the border, which leaves the state as it was."""
        n = self.border
        return Prompt(self.start, self.ids[:n], self.segments[:n], n)


@dataclass
class Prefill:
    """A prompt's result; ``logits`` is None for a head alone."""

    cache: Any
    length: int
    state: Tensor | None
    logits: Tensor | None
    pending: Pending | None = None


class PrefixCache:
    """The most recent prefills, at most ``limit`` tokens in all. An entry is taken out by its user."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[Prompt, Prefill] = OrderedDict()

    def take(self, prompt: Prompt) -> Prefill | None:
        """The prefill of this whole prompt, else of its head, else None."""
        whole = self._entries.pop(prompt, None)
        if whole is not None or prompt.border == 0:
            return whole
        head = prompt.head
        for known in reversed(self._entries):
            if known.border == head.border and known.head == head:
                found = self._entries.pop(known)
                crop(found.cache, head.border)
                return Prefill(found.cache, head.border, None, None)
        return None

    def put(self, prompt: Prompt, prefill: Prefill) -> None:
        """Keep a prefill whose cache its user is done with; tokens beyond the prompt are cut off."""
        if prefill.length > self._limit:
            return
        crop(prefill.cache, prefill.length)
        try:
            _own(prefill.cache)
        except RuntimeError:  # no memory for it, on a GPU or a CPU; the turn is done all the same
            return
        self._entries[prompt] = prefill
        while sum(entry.length for entry in self._entries.values()) > self._limit:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


def _own(cache: Any) -> None:
    """Hold no more than the cache's tokens: what was cut off it, a reply say, lies behind them in the same memory."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            part = getattr(layer, name)
            if part.untyped_storage().nbytes() > part.nbytes:
                setattr(layer, name, part.clone(memory_format=torch.contiguous_format))


def crop(cache: Any, length: int) -> None:
    """Cut a dynamic cache back to its first ``length`` tokens."""
    extra = int(cache.get_seq_length()) - length
    if extra > 0:
        cache.crop(-extra)
