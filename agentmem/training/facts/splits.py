"""Divides a vocabulary into a training part and a held-out part, by a hash of each text, so that no list is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_SHARE = 0.1


def split_of(text: str, kind: str) -> Split:
    """The part that a text belongs to; `kind` ("value", "wording", "attribute") keeps the divisions independent."""
    digest = hashlib.blake2b(f"{kind}\0{text}".encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest) < HELDOUT_SHARE * 2**64 else "train"


def part(texts: Iterable[str], kind: str, split: Split) -> tuple[str, ...]:
    """The texts that belong to a part, in their given order."""
    return tuple(text for text in texts if split_of(text, kind) == split)


def wordings(texts: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """The wordings of one act that a part may use; always at least one.

    With few wordings the hash may put all of them on one side. Then the one with the smallest hash is held out, so that
    the two parts are disjoint and neither is empty; a single wording is shared by both parts.
    """
    chosen = part(texts, "wording", split)
    if len(texts) > 1 and (not chosen or len(chosen) == len(texts)):
        odd = min(texts, key=lambda text: hashlib.blake2b(text.encode()).digest())
        chosen = (odd,) if split == "heldout" else tuple(text for text in texts if text != odd)
    return chosen or texts
