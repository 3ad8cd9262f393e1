"""Where one sentence ends and the next begins, for adapters that write sentence by sentence.

A text is cut before the white space that follows . ! ? ; or : (with closing quotes or brackets), and at
blank lines. The white space opens the next piece, as it does in most tokenizers' words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

_CUT = re.compile(r"""(?<=[.!?;:])["'”’»)\]}]*(?=\s)|(?<!\s)(?=\s*\n[^\S\n]*\n)""")


def split_sentences(text: str) -> list[str]:
    """The pieces of a text, in order; joined they are the text. White space alone is no piece."""
    cuts = [0, *(match.end() for match in _CUT.finditer(text.rstrip())), len(text)]
    return [text[a:b] for a, b in pairwise(cuts) if a < b]


def sentence_numbers(text: str, ids: Sequence[int], encode: Callable[[str], list[int]]) -> list[int]:
    """The sentence of each token of a text, from 0; all 0 where the sentences alone give other tokens."""
    pieces = [encode(piece) for piece in split_sentences(text)]
    if [token for piece in pieces for token in piece] != list(ids):
        return [0] * len(ids)
    return [number for number, piece in enumerate(pieces) for _ in piece]
