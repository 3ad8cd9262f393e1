"""KV that outlives a turn: of prompts that were just read, exact, and of earlier turns, stale.

`PrefillCache` serves retries, regenerations and branches of one checkpoint. An entry stands in only for the same
computation: same tokens and written segments, read from the same matrices, cut at the same places. So a hit gives bit
for bit the numbers of a fresh prefill. KV that an earlier turn left can never hit, since its matrices were others (see
docs/engine.md).

`StaleKVCache` holds just that, for turns that ask for it with `kv="carry"`. Such KV was computed from an older state
than the turn's own, so what rests on it is not what the turn is defined to compute: it is near it, and it depends on
what this cache happens to hold. It is never given to an exact turn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor

from agentmem.delta.passes import Pending


@dataclass(frozen=True)
class PrefillKey:
    """What identifies a prefill.

    Attributes:
        start: digest of what the matrices at its start follow from (those at the turn's start, and what was written
            before the prompt), and of the salt that keeps the prefills of some callers apart.
        ids: the tokens.
        segments: for each token the segment that it writes, -1 = it does not.
        read_only_prefix_len: tokens before the first one that writes; they are read in a call of their own.
    """

    start: bytes
    ids: tuple[int, ...]
    segments: tuple[int, ...]
    read_only_prefix_len: int

    @property
    def prefix(self) -> PrefillKey:
        """The part before the first token that writes; it leaves the state as it was."""
        n = self.read_only_prefix_len
        return PrefillKey(self.start, self.ids[:n], self.segments[:n], n)


@dataclass
class Prefill:
    """What reading a prompt gave; `logits` [V] is None for a read-only prefix alone."""

    cache: Any
    length: int
    state: Tensor | None
    logits: Tensor | None
    pending: Pending | None = None


class PrefillCache:
    """The most recent prefills, at most `limit` tokens in all. An entry is taken out by its user."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[PrefillKey, Prefill] = OrderedDict()

    def take(self, key: PrefillKey) -> Prefill | None:
        """The prefill of this whole prompt, else of its read-only prefix, else None."""
        exact = self._entries.pop(key, None)
        n = key.read_only_prefix_len
        if exact is not None or n == 0:
            return exact
        prefix = key.prefix
        for other in reversed(self._entries):
            if other.read_only_prefix_len == n and other.prefix == prefix:
                cache = self._entries.pop(other).cache
                crop(cache, n)
                return Prefill(cache, n, None, None)
        return None

    def put(self, key: PrefillKey, prefill: Prefill) -> None:
        """Keep a prefill whose cache its user is done with; tokens beyond the prompt are cut off."""
        if prefill.length > self._limit:
            return
        crop(prefill.cache, prefill.length)
        try:
            _release_tail(prefill.cache)
        except RuntimeError:  # no memory for the copy, on a GPU or a CPU; the turn is done all the same
            return
        self._entries[key] = prefill
        while sum(entry.length for entry in self._entries.values()) > self._limit:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


@dataclass(frozen=True)
class StaleKV:
    """What a turn read: its tokens, and the keys and values of each layer for them."""

    ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]  # [1, heads, tokens, d] each


class StaleKVCache:
    """What the latest turns read, by the state that they returned; at most `limit` tokens in all."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[str, str | None], StaleKV] = OrderedDict()

    def find(self, digest: str, salt: str | None, ids: Sequence[int]) -> Any:
        """A cache that begins with as many of `ids` as the turn that returned this state has read; None for none.

        The entry stays, so that branches of one state find the same.
        """
        entry = self._entries.get((digest, salt))
        if entry is None:
            return None
        self._entries.move_to_end((digest, salt))
        length = len(commonprefix((entry.ids, tuple(ids))))  # noqa: RUF071 - of tuples, item by item
        if length == 0:
            return None
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(entry.layers):
            cache.update(keys[:, :, :length], values[:, :, :length], index)  # an update copies
        return cache

    def put(self, digest: str, salt: str | None, ids: Sequence[int], cache: Any) -> None:
        """Keep what a turn has in its cache; `ids`: at least the tokens that are there."""
        length = int(cache.get_seq_length())
        if not 0 < length <= self._limit:
            return
        self._entries.pop((digest, salt), None)
        # A dynamic cache grows by new tensors; those it has now never change.
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        self._entries[digest, salt] = StaleKV(tuple(ids[:length]), layers)
        while sum(len(entry.ids) for entry in self._entries.values()) > self._limit:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


def crop(cache: Any, length: int) -> None:
    """Cut a dynamic cache back to its first `length` tokens."""
    extra = int(cache.get_seq_length()) - length
    if extra > 0:
        cache.crop(-extra)


def _release_tail(cache: Any) -> None:
    """Hold no more than the cache's tokens: what was cut off it, a reply say, lies behind them in the same memory."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            part = getattr(layer, name)
            if part.untyped_storage().nbytes() > part.nbytes:
                setattr(layer, name, part.clone(memory_format=torch.contiguous_format))
