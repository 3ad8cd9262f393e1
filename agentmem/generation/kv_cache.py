"""KV kept beyond its turn: exact KV of recent prompts, and stale KV of earlier turns.

`PrefillCache` serves retries, regenerations and branches of one checkpoint. An entry is used only for exactly the same
computation: the same tokens and written segments, read from the same matrices, and cut into the same chunks. So a hit
gives bit for bit the result of a fresh prefill. KV left by an earlier turn can never hit, since that turn read other
matrices (see docs/engine.md).

`StaleKVCache` keeps just that KV, for turns that opt in with `kv="carry"`. It was computed from an older state than the
turn's own, so the result is not the one that defines the turn: it is close to it, and it depends on what happens to be
in this cache. Exact turns never use it.
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
        start: digest of everything that determines the matrices at the start (the turn's initial matrices, and what was
            written before the prompt), and of the salt that keeps the prefills of different callers apart.
        ids: the tokens.
        segments: for each token the segment that it belongs to, -1 = it is not written.
        read_only_prefix_len: number of tokens before the first one that is written; they are read in a call of their
            own.
    """

    start: bytes
    ids: tuple[int, ...]
    segments: tuple[int, ...]
    read_only_prefix_len: int

    @property
    def prefix(self) -> PrefillKey:
        """The part before the first token that is written; reading it does not change the state."""
        n = self.read_only_prefix_len
        return PrefillKey(self.start, self.ids[:n], self.segments[:n], n)


@dataclass
class Prefill:
    """The result of reading a prompt; `logits` [V] is None where only the read-only prefix was read."""

    cache: Any
    length: int
    state: Tensor | None
    logits: Tensor | None
    pending: Pending | None = None


class PrefillCache:
    """The most recent prefills, at most `limit` tokens in all. Taking an entry removes it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[PrefillKey, Prefill] = OrderedDict()

    def take(self, key: PrefillKey) -> Prefill | None:
        """The prefill of this whole prompt, or else of its read-only prefix, or else None."""
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
        """Store a prefill whose cache is no longer in use; tokens after the prompt are cut off."""
        if prefill.length > self._limit:
            return
        crop(prefill.cache, prefill.length)
        try:
            _release_tail(prefill.cache)
        except RuntimeError:  # no memory for the copy, on a GPU or a CPU; the turn itself has succeeded
            return
        self._entries[key] = prefill
        while sum(entry.length for entry in self._entries.values()) > self._limit:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()


@dataclass(frozen=True)
class StaleKV:
    """What a turn has read: its tokens, and their keys and values in each layer."""

    ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]  # [1, heads, tokens, d] each


class StaleKVCache:
    """What the latest turns have read, by the state that they returned; at most `limit` tokens in all."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[str, str | None], StaleKV] = OrderedDict()

    def find(self, digest: str, salt: str | None, ids: Sequence[int]) -> Any:
        """A cache with the longest beginning of `ids` that the turn which returned this state has read, or None.

        The entry stays, so that other branches of the same state find it too.
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
            cache.update(keys[:, :, :length], values[:, :, :length], index)  # `update` copies them
        return cache

    def put(self, digest: str, salt: str | None, ids: Sequence[int], cache: Any) -> None:
        """Store what a turn has in its cache; `ids` must cover at least the tokens in the cache."""
        length = int(cache.get_seq_length())
        if not 0 < length <= self._limit:
            return
        self._entries.pop((digest, salt), None)
        # A dynamic cache grows by making new tensors; the present ones never change.
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        self._entries[digest, salt] = StaleKV(tuple(ids[:length]), layers)
        while sum(len(entry.ids) for entry in self._entries.values()) > self._limit:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()


def crop(cache: Any, length: int) -> None:
    """Cut a dynamic cache back to its first `length` tokens."""
    extra = int(cache.get_seq_length()) - length
    if extra > 0:
        cache.crop(-extra)


def _release_tail(cache: Any) -> None:
    """Free the memory after the cache's tokens: what was cut off, a reply for example, is still held there."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            part = getattr(layer, name)
            if part.untyped_storage().nbytes() > part.nbytes:
                setattr(layer, name, part.clone(memory_format=torch.contiguous_format))
