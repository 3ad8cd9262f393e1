"""Holds a reply to its grammar, token by token, and closes it in time.

``Grammars`` prepares a tokenizer for llguidance once; a ``Constraint`` serves one reply. Before each token it says what
may come; what must come needs no model to choose it. A token that opens something, and every token near the end of the
budget, is taken only if the reply could still be finished after it: if not, a short way to the end is followed instead,
so that whatever the budget, the reply is whole. Ways are found by trying: what closes a string within one, what closes
objects outside, and now and then anything. Where no way is found from the start (a pattern that ends in certain
letters, say) nothing is closed in time.
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

# Within so many tokens of the end every token is looked at, and as many more as the way has grown long.
_ZONE = 200
_MARGIN = 64
# Tokens that may open what takes long to close.
_OPENERS = frozenset(b'{[":,')
# What brings a value to its end, within a string and outside; then characters that patterns and formats ask for.
_WITHIN, _OUTSIDE = '"', '}],:1023456789"ntf[{'
_ASKED = "@.-:/_T Z+0123456789aeE"
_TRIES = 16
_LONGEST_WAY = 4096


_Bits = np.ndarray[Any, np.dtype[np.bool_]]


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Any, tags: Tags, end_ids: frozenset[int], width: int) -> None:
        """``width``: how many logits the model gives, which may be more than the tokenizer has tokens."""
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
            thinking: whether the prompt opened a region of reasoning.
            budget: most tokens of the reply.

        Raises:
            ConfigError: a schema that cannot be enforced (the message names what in it), or no reply is short
                enough for the budget.
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

                width = max(self._width, len(self._tokenizer))  # some tokenizers know more than their model
                prepared = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=width, eos_token=self._end_ids)
                added = frozenset(self._tokenizer.get_added_vocab().values())
                spelled = {
                    prepared.decode_bytes([token]): token
                    for token in range(self._width - 1, -1, -1)
                    if token not in added
                }
                letters = {
                    one: spelled[one.encode()] for one in {*_WITHIN, *_OUTSIDE, *_ASKED} if one.encode() in spelled
                }
                self._vocabulary = _Vocabulary(letters, spelled, added)
                self._prepared = prepared
            return self._prepared


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens by what they spell.

    Attributes:
        letters: single characters that close or fill a value.
        spelled: all tokens but the added ones, by their bytes.
        added: tokens that the tokenizer's vocabulary was extended by, control tokens among them.
    """

    letters: Mapping[str, int]
    spelled: Mapping[bytes, int]
    added: frozenset[int]


class Constraint:
    """One reply's way through its grammar.

    Attributes:
        closing: the rest of the reply is being written by the constraint, to end within the budget.
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
        self._place = _Place()
        way = self._find(matcher, self._place)
        if way is not None and len(way) > budget:
            raise ConfigError(
                f"the shortest reply of this format takes at least {len(way)} tokens; found room for {budget}; "
                "raise max_tokens, or make the window or the prompt smaller"
            )
        self._way = way or []
        self._guarded = way is not None
        self._zone = max(_ZONE, len(self._way) + _MARGIN)

    def follow(self) -> int | None:
        """Commit the token that has to come now, and give it: an end token where the reply has to end (it is not
        committed); None where there is a choice."""
        if self.closing:
            return self._close()
        if self._matcher.is_stopped() and self._matcher.is_accepting():
            return self._end_ids[0]
        ahead = self._certain(self._matcher)
        # No look at the end: the way that was found to it before leads through this token.
        return self._commit(ahead[0]) if ahead and ahead[0] < self._width else None

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [V] with -inf for every token that may not come now. Where ``follow`` gave None."""
        allowed = _bits(self._matcher, self._width)
        for token in self._added[allowed[self._added]]:
            allowed[token] = self._fits(self._matcher, int(token))
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def take(self, token: int) -> int:
        """Commit a token that the mask allowed, or another in its place if after it the reply could not end in time.

        Returns the token to feed, an end token (which is not committed) if the reply ends here.
        """
        if token in self._end_ids:
            return token
        left, text = self._left - 1, self._bytes(token)
        if self._guarded and (left < self._zone or _OPENERS & set(text)):
            after = self._matcher.deep_copy()
            after.consume_token(token)
            way = self._find(after, self._place.after(text))
            if way is not None:
                self._zone = max(self._zone, len(way) + _MARGIN)
            if len(way) > left if way is not None else left < self._zone:
                here = self._find(self._matcher, self._place)
                if here is not None and len(here) <= self._left:
                    self._way, self.closing = here, True
                    return self._close()
        return self._commit(token)

    def _close(self) -> int:
        return self._commit(self._way.pop(0)) if self._way else self._end_ids[0]

    def _bytes(self, token: int) -> bytes:
        found: bytes = self._tokenizer.decode_bytes([token])
        return found

    def _commit(self, token: int) -> int:
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar refused token {token}, which it had allowed: {self._matcher.get_error()}")
        self._place = self._place.after(self._bytes(token))
        self._left -= 1
        return token

    def _fits(self, matcher: Any, token: int) -> bool:
        """Whether the grammar takes a token; an end token it need not take."""
        return token in self._end_ids or matcher.deep_copy().try_consume_tokens([token]) == 1

    def _certain(self, matcher: Any) -> list[int]:
        """What has to come, spelled as the mask would have it: it permits nothing else then.

        Text that happens to spell an added token (``"<think>"`` as a value) is not that token, and the grammar refuses
        it there; it is spelled by ordinary ones, one at a time.
        """
        ahead: list[int] = matcher.compute_ff_tokens()
        odd = next((at for at, token in enumerate(ahead) if token in self._vocabulary.added), None)
        if odd is None:
            return ahead
        fitting: int = matcher.deep_copy().try_consume_tokens(ahead)
        if fitting:
            return ahead[:fitting]
        text = bytes(matcher.compute_ff_bytes())
        for end in range(len(text), 0, -1):
            token = self._vocabulary.spelled.get(text[:end])
            if token is not None and self._fits(matcher, token):
                return [token]
        return []

    def _find(self, matcher: Any, place: _Place) -> list[int] | None:
        """A short way to an end, in tokens without the end token; None where none was found."""
        best: list[int] | None = None
        for attempt in range(_TRIES):
            # The first goes straight for the end; the others stray, further each time, until one arrives.
            most = _LONGEST_WAY if best is None and attempt == 0 else 400
            way = self._walk(matcher.deep_copy(), place, Random(attempt), attempt / _TRIES, most)
            if way is not None and (best is None or len(way) < len(best)):
                best = way
            if best is not None and (attempt == 0 or len(best) < _MARGIN):
                break
        return best

    def _walk(self, matcher: Any, place: _Place, rng: Random, stray: float, most: int) -> list[int] | None:
        """One way to an end: forced tokens, then what closes something, then anything."""
        way: list[int] = []
        while not matcher.is_accepting():
            if len(way) >= most or matcher.is_stopped():
                return None
            step = self._certain(matcher) or self._step(_bits(matcher, self._width), place, rng, stray)
            if not step or matcher.try_consume_tokens(step) != len(step):
                return None
            for token in step:
                place = place.after(self._bytes(token))
            way += step
        return way

    def _step(self, allowed: _Bits, place: _Place, rng: Random, stray: float) -> list[int]:
        allowed[self._end_ids] = False
        allowed[self._added] = False  # where one has to come it is certain
        enders = self._some(allowed, _WITHIN if place.quoted else _OUTSIDE)
        if enders and rng.random() >= stray:
            return enders[:1]
        asked = self._some(allowed, _ASKED)
        if asked and rng.random() < 0.7:
            return [rng.choice(asked)]
        others = np.flatnonzero(allowed)
        return [int(others[rng.randrange(len(others))])] if len(others) else []

    def _some(self, allowed: _Bits, letters: str) -> list[int]:
        ids = (self._vocabulary.letters.get(letter) for letter in letters)
        return [token for token in ids if token is not None and allowed[token]]


@dataclass(frozen=True)
class _Place:
    """Whether the next character stands within a JSON string."""

    quoted: bool = False
    escaped: bool = False

    def after(self, text: bytes) -> _Place:
        """The place behind a piece of text."""
        quoted, escaped = self.quoted, self.escaped
        for byte in text:
            if quoted and escaped:
                escaped = False
            elif quoted and byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                quoted = not quoted
        return _Place(quoted, escaped)


def _bits(matcher: Any, width: int) -> _Bits:
    """Which tokens a matcher allows now: [V]."""
    packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little")[:width].astype(bool)
