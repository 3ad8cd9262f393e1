"""Text to token ids, with the place where each token starts; what was encoded lately is not encoded again.

A prompt is mostly the prompt of the turn before. So a text is cut before control tokens, where a tokenizer cuts it
anyway, and each piece is looked up: only what is new is tokenised. The ids are exactly those of the whole text: a
tokenizer treats what stands between two such tokens by itself, and each piece but the first begins with one, so that
it stands where it stood. Where that does not hold (tokens that match whole words only) nothing is cut.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from agentmem.messages import MessageCache

Span = tuple[int, int]  # [start, stop) in characters
Encoded = tuple[list[int], list[int]]  # ids, and the character at which each starts

_TOKEN_BYTES = 72  # of a token that is kept: two numbers in two lists
_HEAD = 2  # characters by which tokens are grouped that a text is searched for


class Encoder:
    """Encodes texts with one fast tokenizer, which is never changed.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        cache: where encoded pieces are kept.
    """

    def __init__(self, tokenizer: Any, cache: MessageCache) -> None:
        self._tokenizer = tokenizer
        self._cache = cache
        self._control, self._cut_before = _control_tokens(tokenizer)
        self._newline = self._whole("\n")[0]

    def encode(self, text: str, plain: Sequence[Span] = ()) -> Encoded:
        """Token ids of a text and the character at which each starts; in `plain` spans control tokens are text."""
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for start, stop in [*plain, (len(text), len(text))]:
            part_ids, part_starts = self._part(text[at:start], first=at == 0)
            ids += part_ids
            starts += [at + place for place in part_starts]
            plain_ids = self._plain(text[start:stop])
            ids += plain_ids
            starts += [start] * len(plain_ids)
            at = stop
        return ids, starts

    def _part(self, text: str, *, first: bool) -> Encoded:
        """Ids and starts of a text; one from the middle of another gets no word-start of its own."""
        if not text:
            return [], []
        if not first:
            # Some tokenizers add a space to the start of any text; behind a newline they do not.
            ids, starts = self._whole("\n" + text)
            skip = len(self._newline)
            if ids[:skip] == self._newline:
                return ids[skip:], [max(0, start - 1) for start in starts[skip:]]
        return self._whole(text)

    def _whole(self, text: str) -> Encoded:
        ids: list[int] = []
        starts: list[int] = []
        pieces = list(self._cut(text))
        for (at, piece), kept in zip(pieces, self._cache.get_all(("piece", piece) for _, piece in pieces), strict=True):
            piece_ids, piece_starts = kept or self._tokenised(piece)
            ids += piece_ids
            starts += [at + start for start in piece_starts]
        return ids, starts

    def _cut(self, text: str) -> Iterator[tuple[int, str]]:
        """Pieces and where they start."""
        start = 0
        for match in self._control.finditer(text):
            if match.group() in self._cut_before and match.start() > start:
                yield start, text[start : match.start()]
                start = match.start()
        if start < len(text):
            yield start, text[start:]

    def _tokenised(self, text: str) -> Encoded:
        """Encode a piece, and keep it."""
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids: list[int] = encoded["input_ids"]
        starts: list[int] = []
        end = 0
        for token, (start, stop) in zip(ids, encoded["offset_mapping"], strict=True):
            # Some tokenizers report a token without the white space that it begins with.
            if start > end and text[end:start].isspace() and self._tokenizer.decode([token])[:1].isspace():
                start = end
            starts.append(start)
            end = max(end, stop)
        self._cache.put(("piece", text), (ids, starts), sys.getsizeof(text) + _TOKEN_BYTES * len(ids))
        return ids, starts

    def _plain(self, text: str) -> list[int]:
        """Ids of a text in which no added token is recognised: the tokenizer's pipeline without that step."""
        if not text:
            return []
        backend = self._tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, longer ones first; none at all matches nothing.

    Grouped by what they begin with: tokenizers have thousands of tokens, and one list of them all would be gone through
    at every line break of a text.
    """
    groups: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        groups.setdefault(token[:_HEAD], []).append(re.escape(token[_HEAD:]))
    heads = sorted(groups, key=len, reverse=True)
    return re.compile("|".join(f"{re.escape(head)}(?:{'|'.join(groups[head])})" for head in heads) or r"(?!)")


def _control_tokens(tokenizer: Any) -> tuple[re.Pattern[str], set[str]]:
    """What a tokenizer finds in a text before anything else, and before which of them a text may be cut.

    Not before tokens that take in the white space on their left.
    """
    tokens = {str(token.content): token for token in tokenizer.added_tokens_decoder.values() if not token.normalized}
    if any(token.single_word for token in tokens.values()):
        return any_of(()), set()
    cut_before = {text for text, token in tokens.items() if not token.lstrip and not text[:1].isspace()}
    return any_of(tokens), cut_before
