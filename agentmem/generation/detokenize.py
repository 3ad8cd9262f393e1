"""Token ids to text while they arrive: whole characters only, and stop strings wherever tokens break.

Knows tokens and text, no model. `Detokenizer` keeps for every token how much text stood after it, so that a cut in the
text can be traced back to the tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"  # what a tokenizer shows for an unfinished character
# Tokens after which bytes that make no character are shown as they are. `tokenizers.decoders.DecodeStream` does the
# work of `push` but for this: it holds such bytes until a character follows, for ever if none does.
_PATIENCE = 8


class Detokenizer:
    """The text of one reply, token by token.

    Attributes:
        ids: the tokens so far.
        text: their text, up to the last finished character.
        ends: for each token, the length of `text` after it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""
        self.ends: list[int] = []
        # Decoding starts one piece early, for tokenizers whose first token of a text loses its space.
        self._context_start = 0
        self._shown = 0  # tokens whose text stands in `text`

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes: often its own, empty inside a character."""
        self.ids.append(token)
        context = self._decode(self.ids[self._context_start : self._shown])
        extended = self._decode(self.ids[self._context_start :])
        piece = ""
        if not extended.endswith(_REPLACEMENT) or len(self.ids) - self._shown > _PATIENCE:
            piece = extended[len(context) :]
            self.text += piece
            self._context_start, self._shown = self._shown, len(self.ids)
        self.ends.append(len(self.text))
        return piece

    def tokens_within(self, length: int) -> int:
        """How many tokens lie within the first `length` characters, up to one that finishes a character."""
        ends, count = self.ends, len(self.ends)
        while count and ends[count - 1] > length:
            count -= 1
        # Tokens that added no text are the beginning of a character that is not finished.
        while count and ends[count - 1] == (ends[count - 2] if count > 1 else 0):
            count -= 1
        return count

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class StopFinder:
    """Looks for the first stop string in a growing text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._searched = 0
        self._longest = max((len(stop) for stop in self._stops), default=0)

    def find(self, text: str) -> int | None:
        """Where the first stop string begins, or None."""
        start = max(0, self._searched - self._longest + 1)
        positions = [at for stop in self._stops if (at := text.find(stop, start)) >= 0]
        self._searched = len(text)
        return min(positions) if positions else None

    def safe(self, text: str) -> int:
        """Length of the part of `text` in which no stop string can begin any more."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return len(text) - length
        return len(text)
