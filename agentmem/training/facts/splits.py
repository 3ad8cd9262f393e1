"""Divides a vocabulary into a training part and a held-out part, by a hash of each text, so that no list is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_SHARE = {"wording": 0.25}
"""The share that is held out, by kind; of others a tenth. A tenth of some thirty wordings would be too few."""


def split_of(text: str, kind: str) -> Split:
    """The part that a text belongs to; `kind` ("value", "wording", "attribute" ...) keeps the divisions independent."""
    digest = hashlib.blake2b(f"{kind}\0{text}".encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest) < HELDOUT_SHARE.get(kind, 0.1) * 2**64 else "train"


def part(texts: Iterable[str], kind: str, split: Split) -> tuple[str, ...]:
    """The texts that belong to a part, in their given order."""
    return tuple(text for text in texts if split_of(text, kind) == split)


@lru_cache(maxsize=4096)
def wordings(texts: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """The wordings of one act that a part may use; always at least one.

    Of few wordings a hash might put all or none into a part. So a quarter of them, at least one, is held out: those
    with the smallest hashes. A single wording is shared by both parts.
    """
    count = max(1, round(len(texts) * HELDOUT_SHARE["wording"])) if len(texts) > 1 else 0
    heldout = set(sorted(texts, key=lambda text: hashlib.blake2b(text.encode()).digest())[:count])
    return tuple(text for text in texts if (text in heldout) == (split == "heldout")) or texts
