"""KV that earlier turns left, for turns that ask for it with ``kv="carry"``.

Such KV was computed from an older state than the turn's own, so what rests on it is not what the turn is defined to
compute: it is near it, and it depends on what this cache happens to hold. It is never given to an exact turn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

KV = Literal["exact", "carry"]
KVS: tuple[str, ...] = get_args(KV)


@dataclass(frozen=True)
class Left:
    """What a turn left: its tokens, and the keys and values of each layer for them."""

    ids: tuple[int, ...]
    layers: tuple[tuple[Any, Any], ...]  # [1, heads, tokens, d] each


class CarriedCache:
    """What the latest turns left, by the digest of the state that they returned; at most ``limit`` tokens in all."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[str, Left] = OrderedDict()

    def find(self, digest: str, ids: Sequence[int]) -> Any:
        """A cache that begins with as many of ``ids`` as the turn that returned this state has read; None for none.

        The entry stays, so that branches of one state find the same.
        """
        left = self._entries.get(digest)
        if left is None:
            return None
        self._entries.move_to_end(digest)
        shared = next((n for n, (a, b) in enumerate(zip(left.ids, ids, strict=False)) if a != b), None)
        length = min(len(left.ids), len(ids)) if shared is None else shared
        if length == 0:
            return None
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(left.layers):
            cache.update(keys[:, :, :length], values[:, :, :length], index)  # an update copies
        return cache

    def put(self, digest: str, ids: Sequence[int], cache: Any) -> None:
        """Keep what a turn has in its cache; ``ids``: at least the tokens that are there."""
        length = int(cache.get_seq_length())
        if not 0 < length <= self._limit:
            return
        self._entries.pop(digest, None)
        # A dynamic cache grows by new tensors; those it has now never change.
        self._entries[digest] = Left(tuple(ids[:length]), tuple((layer.keys, layer.values) for layer in cache.layers))
        while sum(len(left.ids) for left in self._entries.values()) > self._limit:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
