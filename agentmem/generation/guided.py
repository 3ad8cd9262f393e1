"""Guided decoding: keeps a reply within its grammar, token by token, and finishes it within the budget.

`Grammars` prepares a tokenizer for llguidance once; a `Constraint` serves one reply. Before each token it computes
which tokens are allowed; if only one is, the model is not asked. A token that opens something, and every token near the
end of the budget, is accepted only if the reply can still be finished after it. If it cannot, a short ending is written
instead, so that the reply is valid within any budget. Endings are found by search: inside a string it prefers what
closes the string, outside it what closes objects, and sometimes any token. Where no ending is found at the start (for a
pattern that demands certain last letters, say), the reply is not ended early, and the budget may cut it off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentmem.errors import ConfigError
from agentmem.generation.output_parser import Tags
from agentmem.generation.reply_format import ReplyFormat, lark

# This close to the end of the budget every token is checked; earlier if the known ending is longer.
_CHECKED_TOKENS = 200
_MARGIN = 64
# Bytes of tokens that may open something which takes many tokens to close.
_OPENERS = frozenset(b'{[":,')
# Characters that end a value, inside a string and outside of one, in order of preference; then those that patterns and
# string formats (dates, addresses) may require.
_STRING_ENDERS, _VALUE_ENDERS = '"', '}],:1023456789"ntf[{'
_PATTERN_LETTERS = "@.-:/_T Z+0123456789aeE"
_ATTEMPTS = 16
_LONGEST_ENDING, _LONGEST_RETRY = 4096, 400


_Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Any, tags: Tags, end_ids: frozenset[int], width: int) -> None:
        """`width`: the number of logits (V), which may be larger than the tokenizer's vocabulary."""
        self._tokenizer = tokenizer
        self._tags = tags
        self._end_ids = sorted(end_ids)
        self._width = width
        self._prepared: Any = None
        self._vocabulary = _Vocabulary({}, {}, frozenset())
        self._lock = Lock()

    def constraint(self, form: ReplyFormat, *, thinking: bool, budget: int) -> Constraint:
        """The constraint of one reply.

        Args:
            form: what the reply must be.
            thinking: whether the prompt opened a reasoning block.
            budget: most tokens in the reply.

        Raises:
            ConfigError: the schema cannot be enforced (the message names the part of it), or no valid reply fits the
                budget.
        """
        import llguidance

        prepared = self._ready()
        try:
            grammar = lark(form, self._tags, thinking=thinking)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a schema is plain JSON; found something else in it ({error})") from error
        matcher = llguidance.LLMatcher(prepared, grammar, log_level=0)
        if matcher.is_error():
            problem = matcher.get_error().strip().splitlines()[0]
            raise ConfigError(
                f"this schema cannot be enforced: {problem}; leave that out of the schema, and check it afterwards"
            )
        return Constraint(matcher, prepared, self._width, self._end_ids, self._vocabulary, budget)

    def _ready(self) -> Any:
        with self._lock:
            if self._prepared is None:
                import llguidance.hf

                width = max(self._width, len(self._tokenizer))  # some tokenizers have more tokens than their model
                prepared = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=width, eos_token=self._end_ids)
                added = frozenset(self._tokenizer.get_added_vocab().values())
                spelled = {
                    prepared.decode_bytes([token]): token
                    for token in range(self._width - 1, -1, -1)
                    if token not in added
                }
                letters = {
                    letter: spelled[letter.encode()]
                    for letter in {*_STRING_ENDERS, *_VALUE_ENDERS, *_PATTERN_LETTERS}
                    if letter.encode() in spelled
                }
                self._vocabulary = _Vocabulary(letters, spelled, added)
                self._prepared = prepared
            return self._prepared


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens by the bytes that they stand for.

    Attributes:
        letters: single characters that end or fill a value.
        spelled: all tokens except the added ones, by their bytes.
        added: tokens that were added to the tokenizer's vocabulary, control tokens among them.
    """

    letters: Mapping[str, int]
    spelled: Mapping[bytes, int]
    added: frozenset[int]


class Constraint:
    """The grammar of one reply, and the position that the reply has reached in it.

    Attributes:
        closing: whether the constraint now writes the rest of the reply, so that it ends within the budget.
    """

    def __init__(
        self,
        matcher: Any,
        tokenizer: Any,
        width: int,
        end_ids: Sequence[int],
        vocabulary: _Vocabulary,
        budget: int,
    ) -> None:
        self.closing = False
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._width = width
        self._end_ids = list(end_ids)
        self._vocabulary = vocabulary
        self._added = np.array([token for token in vocabulary.added if token < width], dtype=np.int64)
        self._left = budget
        self._place = _JsonPlace()
        ending = self._find_ending(matcher, self._place)
        if ending is not None and len(ending) > budget:
            raise ConfigError(
                f"the shortest reply of this format takes at least {len(ending)} tokens; found room for {budget}; "
                "raise max_tokens, or make the window or the prompt smaller"
            )
        self._ending = ending or []
        self._can_finish = ending is not None
        self._checked_tokens = max(_CHECKED_TOKENS, len(self._ending) + _MARGIN)

    def follow(self) -> int | None:
        """The token that is forced now, committed; None where there is a choice.

        Where the reply has to end this is an end token, which is not committed.
        """
        if self.closing:
            return self._close()
        if self._matcher.is_stopped() and self._matcher.is_accepting():
            return self._end_ids[0]
        forced = self._forced(self._matcher)
        # No need to check the budget: the ending found before starts with this token.
        return self._commit(forced[0]) if forced and forced[0] < self._width else None

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [V] with -inf for every token that is not allowed now. Call it where `follow` returned None."""
        allowed = _allowed(self._matcher, self._width)
        for token in self._added[allowed[self._added]]:
            allowed[token] = self._fits(self._matcher, int(token))
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def take(self, token: int) -> int:
        """Commit a token that the mask allowed, or another one if the reply could not be finished after it.

        Returns:
            The token to feed; an end token, which is not committed, if the reply ends here.
        """
        if token in self._end_ids:
            return token
        left, text = self._left - 1, self._bytes(token)
        if self._can_finish and (left < self._checked_tokens or _OPENERS & set(text)):
            matcher = self._matcher.deep_copy()
            matcher.consume_token(token)
            ending = self._find_ending(matcher, self._place.after(text))
            if ending is not None:
                self._checked_tokens = max(self._checked_tokens, len(ending) + _MARGIN)
            if len(ending) > left if ending is not None else left < self._checked_tokens:
                ending = self._find_ending(self._matcher, self._place)
                if ending is not None and len(ending) <= self._left:
                    self._ending, self.closing = ending, True
                    return self._close()
        return self._commit(token)

    def _close(self) -> int:
        return self._commit(self._ending.pop(0)) if self._ending else self._end_ids[0]

    def _bytes(self, token: int) -> bytes:
        text: bytes = self._tokenizer.decode_bytes([token])
        return text

    def _commit(self, token: int) -> int:
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar refused token {token}, which it had allowed: {self._matcher.get_error()}")
        self._place = self._place.after(self._bytes(token))
        self._left -= 1
        return token

    def _fits(self, matcher: Any, token: int) -> bool:
        """Whether the grammar accepts a token; end tokens always fit, since the grammar need not contain them."""
        return token in self._end_ids or matcher.deep_copy().try_consume_tokens([token]) == 1

    def _forced(self, matcher: Any) -> list[int]:
        """The tokens that must come next, tokenised as the mask would allow them.

        Text that happens to spell an added token (`"<think>"` as a value) is not that token, and the grammar refuses
        the token there; the text is spelled with ordinary tokens, one at a time.
        """
        forced: list[int] = matcher.compute_ff_tokens()
        if not any(token in self._vocabulary.added for token in forced):
            return forced
        fitting: int = matcher.deep_copy().try_consume_tokens(forced)
        if fitting:
            return forced[:fitting]
        text = bytes(matcher.compute_ff_bytes())
        for end in range(len(text), 0, -1):
            token = self._vocabulary.spelled.get(text[:end])
            if token is not None and self._fits(matcher, token):
                return [token]
        return []

    def _find_ending(self, matcher: Any, place: _JsonPlace) -> list[int] | None:
        """A short ending of the reply, in tokens without the end token; None if none was found."""
        best: list[int] | None = None
        for attempt in range(_ATTEMPTS):
            # The first attempt takes the shortest way; later attempts choose at random, more often each time.
            most = _LONGEST_ENDING if best is None and attempt == 0 else _LONGEST_RETRY
            ending = self._try_ending(matcher.deep_copy(), place, Random(attempt), attempt / _ATTEMPTS, most)
            if ending is not None and (best is None or len(ending) < len(best)):
                best = ending
            if best is not None and (attempt == 0 or len(best) < _MARGIN):
                break
        return best

    def _try_ending(
        self, matcher: Any, place: _JsonPlace, rng: Random, randomness: float, most: int
    ) -> list[int] | None:
        """One ending of at most `most` tokens: forced ones first, then those that close something, then any."""
        ending: list[int] = []
        while not matcher.is_accepting():
            if len(ending) >= most or matcher.is_stopped():
                return None
            step = self._forced(matcher) or self._choose(_allowed(matcher, self._width), place, rng, randomness)
            if not step or matcher.try_consume_tokens(step) != len(step):
                return None
            for token in step:
                place = place.after(self._bytes(token))
            ending += step
        return ending

    def _choose(self, allowed: _Mask, place: _JsonPlace, rng: Random, randomness: float) -> list[int]:
        allowed[self._end_ids] = False
        allowed[self._added] = False  # an added token that is needed would be forced
        enders = self._of_letters(allowed, _STRING_ENDERS if place.quoted else _VALUE_ENDERS)
        if enders and rng.random() >= randomness:
            return enders[:1]
        letters = self._of_letters(allowed, _PATTERN_LETTERS)
        if letters and rng.random() < 0.7:
            return [rng.choice(letters)]
        others = np.flatnonzero(allowed)
        return [int(others[rng.randrange(len(others))])] if len(others) else []

    def _of_letters(self, allowed: _Mask, letters: str) -> list[int]:
        ids = (self._vocabulary.letters.get(letter) for letter in letters)
        return [token for token in ids if token is not None and allowed[token]]


@dataclass(frozen=True)
class _JsonPlace:
    """Whether the next byte is inside a JSON string.

    Tracked byte by byte, since a token may end inside a character and the text need not be JSON at all (reasoning, the
    delimiters of calls): a parser of partial JSON accepts neither.
    """

    quoted: bool = False
    escaped: bool = False

    def after(self, text: bytes) -> _JsonPlace:
        """The place after a piece of text."""
        quoted, escaped = self.quoted, self.escaped
        for byte in text:
            if quoted and escaped:
                escaped = False
            elif quoted and byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                quoted = not quoted
        return _JsonPlace(quoted, escaped)


def _allowed(matcher: Any, width: int) -> _Mask:
    """Which tokens a matcher allows now: [V]."""
    packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little")[:width].astype(bool)
