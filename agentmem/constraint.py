"""Holds a reply to its grammar, token by token, and closes it in time.

``Grammars`` prepares a tokenizer for llguidance once; a ``Constraint`` serves one reply. Before each token it says what
may come. Towards the end of the budget it looks before every token whether the reply could still be finished after it:
if not, the shortest way to the end that is known is followed instead, so that whatever the budget, the reply is whole.
"""

from __future__ import annotations

from random import Random
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentmem.errors import ConfigError
from agentmem.formats import ReplyFormat, lark
from agentmem.replies import Tags

# Within so many tokens of the end every token is looked at; before, every few tokens, in case the way grows long.
_ZONE = 200
_STRIDE = 8
_MARGIN = 64
# What brings JSON to its end, and whole values where one is asked for; tried in this order.
_ENDERS = '"}],:0123456789ntf'
_TRIES = 8
_LONGEST_WAY = 4096


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Any, tags: Tags, end_ids: frozenset[int], width: int) -> None:
        """``width``: how many logits the model gives, which may be more than the tokenizer has tokens."""
        self._tokenizer = tokenizer
        self._tags = tags
        self._end_ids = sorted(end_ids)
        self._width = width
        self._prepared: Any = None
        self._enders: list[int] = []
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
        matcher = llguidance.LLMatcher(prepared, lark(form, self._tags, thinking=thinking), log_level=0)
        if matcher.is_error():
            problem = matcher.get_error().strip().splitlines()[0]
            raise ConfigError(
                f"this schema cannot be enforced: {problem}; leave that out of the schema, and check it afterwards"
            )
        return Constraint(matcher, self._width, frozenset(self._end_ids), self._enders, budget)

    def _ready(self) -> Any:
        with self._lock:
            if self._prepared is None:
                import llguidance.hf

                self._prepared = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._width, eos_token=self._end_ids
                )
                ids = (self._prepared.tokenize_bytes(letter.encode()) for letter in _ENDERS)
                self._enders = [found[0] for found in ids if len(found) == 1]
            return self._prepared


class Constraint:
    """One reply's way through its grammar.

    Attributes:
        closing: the rest of the reply is being written by the constraint, to end within the budget.
    """

    def __init__(self, matcher: Any, width: int, end_ids: frozenset[int], enders: list[int], budget: int) -> None:
        self.closing = False
        self._matcher = matcher
        self._width = width
        self._end_ids = end_ids
        self._enders = enders
        self._left = budget
        way = self._find(matcher)
        if way is None or len(way) > budget:
            needed = "more than anybody can count" if way is None else f"at least {len(way)}"
            raise ConfigError(f"the shortest reply of this format takes {needed} tokens; found max_tokens={budget}")
        self._way = way
        self._zone = max(_ZONE, 2 * len(way) + _MARGIN)

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [V] with -inf for every token that may not come now."""
        if self.closing:
            allowed = np.zeros(self._width, dtype=bool)
            allowed[self._way[0] if self._way else sorted(self._end_ids)] = True
        else:
            allowed = _bits(self._matcher, self._width)
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def take(self, token: int) -> int | None:
        """Commit a token that the mask allowed, or another in its place if after it the reply could not end in time.

        Returns the token to feed, None if the reply ends here. End tokens are not given to it.
        """
        if self.closing:
            return self._commit(self._way.pop(0)) if self._way else None
        left = self._left - 1
        if left < self._zone or left % _STRIDE == 0:
            after = self._matcher.deep_copy()
            after.consume_token(token)
            way = self._find(after)
            if way is not None:
                self._zone = max(self._zone, len(way) + _MARGIN)
            if way is None or len(way) > left:
                # From here, before the token, the way may have been looked for some tokens ago.
                self._way = self._find(self._matcher) or []
                self.closing = True
                return self.take(token)
        return self._commit(token)

    def _commit(self, token: int) -> int:
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar refused token {token}, which it had allowed: {self._matcher.get_error()}")
        self._left -= 1
        return token

    def _find(self, matcher: Any) -> list[int] | None:
        """The shortest way to an end that was found, in tokens without the end token."""
        best: list[int] | None = None
        for attempt in range(_TRIES):
            way = self._walk(matcher.deep_copy(), Random(attempt), len(best) if best else _LONGEST_WAY)
            if way is not None and (best is None or len(way) < len(best)):
                best = way
            if attempt == 0 and best is not None:
                break
        return best

    def _walk(self, matcher: Any, rng: Random, most: int) -> list[int] | None:
        """One way to an end: forced tokens, then what closes something, then anything."""
        way: list[int] = []
        explore = rng.random() if way else 0.0
        while not matcher.is_accepting():
            if len(way) >= most or matcher.is_stopped():
                return None
            forced = matcher.compute_ff_tokens()
            if not forced:
                allowed = _bits(matcher, self._width)
                allowed[list(self._end_ids)] = False
                enders = [token for token in self._enders if allowed[token]]
                if enders and rng.random() >= explore:
                    forced = [enders[0]]
                else:
                    others = np.flatnonzero(allowed)
                    if not len(others):
                        return None
                    forced = [int(others[rng.randrange(len(others))])]
            if matcher.try_consume_tokens(forced) != len(forced):
                return None
            way += forced
        return way


def _bits(matcher: Any, width: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which tokens a matcher allows now: [V]."""
    packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little")[:width].astype(bool)
