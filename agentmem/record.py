"""What a memory has consumed, and how a given history lines up with it.

A record is a value: a count, a chain digest over all consumed messages and the 8-byte digests of the last
256. It answers one question: which messages of this history are new? Messages that never write (system
messages, retrieved facts) are never consumed and never new, so they play no part here.

The rules of `ConsumedRecord.align`, in order:

1. The history starts with everything that was consumed (the chain digest says so): what follows is new.
2. Otherwise the history is aligned with the tail by a longest common subsequence in which every *break* (a
   stretch of consumed messages that is missing between two matches, or after the last one) counts as one
   match less. Breaks at the head are free: histories are trimmed there. Matched messages are consumed. With
   a full tail, so are those before the first match, which are taken to be older than the tail. All others
   are new, in their place.

Counting breaks decides what repeated equal messages ("ok", "done") stand for; where no message repeats the
result is the plain longest common subsequence. Equal scores are decided by fewer unmatched messages before
the last match (with a full tail: between the first and the last), then by fewer breaks, then by the later
place in the tail, then by the later place in the history. So a trimmed history continues the end of the
tail, and what comes after is new even when it repeats something older.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentmem.errors import ConfigError, CorruptStateError, HistoryEditedError, StateMismatchError
from agentmem.messages import LONGEST_KEPT, Message

OnEdit = Literal["write", "error", "rebuild"]

TAIL = 256  # messages remembered one by one
DIGEST = 8  # bytes of each one's digest
CHAIN = 32  # bytes of the chain digest

# One int64 orders the partial alignments that end at a given pair: score first (matches - breaks), then the
# number of matches, then the place of the first match (only with a full tail, where what comes before it is
# free).
_SCORE = 1 << 44
_MATCH = 1 << 32
_NONE = -1  # no alignment ends here; every real one has a positive key


@dataclass(frozen=True)
class Alignment:
    """Which messages of a history are new. All lists hold indices into the history, in ascending order.

    Attributes:
        new: to be written, once, in this order.
        consumed: already in the memory.
        edits: those of `new` that stand before a consumed message.
        silent: those that never write.
        rebuild: start from the zero state; `new` then names every message that writes.
    """

    new: list[int] = field(default_factory=list)
    consumed: list[int] = field(default_factory=list)
    edits: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    rebuild: bool = False


@dataclass(frozen=True)
class ConsumedRecord:
    """Everything that a memory knows about the messages written into it.

    Attributes:
        count: how many messages were consumed.
        chain: 32 bytes, chain' = SHA-256(chain || digest) message by message, from zeros.
        tail: the 8-byte digests of the last `min(count, 256)` messages, oldest first.

    Raises:
        CorruptStateError: the three do not fit together.
    """

    count: int
    chain: bytes
    tail: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 0:
            raise CorruptStateError(f"a record's count is an integer from 0 up; found {self.count!r}")
        for name, expected in (("chain", CHAIN), ("tail", DIGEST * min(self.count, TAIL))):
            value = getattr(self, name)
            if not isinstance(value, bytes):
                raise CorruptStateError(f"a record's {name} is bytes; found {type(value).__name__}")
            if len(value) != expected:
                raise CorruptStateError(
                    f"the record of {self.count} consumed messages has a {name} of {expected} bytes; found {len(value)}"
                )

    @property
    def recent(self) -> tuple[bytes, ...]:
        """The digests of the last messages that were consumed, at most 256, oldest first; 8 bytes each."""
        return tuple(self.tail[at : at + DIGEST] for at in range(0, len(self.tail), DIGEST))

    @classmethod
    def empty(cls) -> ConsumedRecord:
        """Nothing consumed."""
        return cls(0, bytes(CHAIN), b"")

    def extend(self, messages: Sequence[Message]) -> ConsumedRecord:
        """The record after these messages, in order; those that never write are left out."""
        return self._extend(message.digest()[:DIGEST] for message in messages if message.writes)

    def _extend(self, digests: Iterable[bytes]) -> ConsumedRecord:
        count, chain, tail = self.count, self.chain, bytearray(self.tail)
        for digest in digests:
            count += 1
            chain = _link(chain, digest)
            tail += digest
        return ConsumedRecord(count, chain, bytes(tail[-TAIL * DIGEST :]))

    def merge(self, branches: Sequence[ConsumedRecord]) -> ConsumedRecord:
        """This record plus what each branch consumed since, branch after branch.

        Branches that each consumed at most 256 messages give exactly the record of the concatenated
        messages. The chain of a longer branch cannot be redone from its tail, so it enters the merged chain
        as a whole: later histories are then recognised by the tail.

        Raises:
            StateMismatchError: a branch does not continue this record.
        """
        merged = self
        for branch in branches:
            added = branch.count - self.count
            digests = _split(branch.tail)[max(0, len(branch.tail) // DIGEST - added) :] if added > 0 else []
            if added < 0 or (added <= TAIL and self._extend(digests).chain != branch.chain):
                raise StateMismatchError(
                    f"a branch that continues the record {_name(self)} was expected; found {_name(branch)}; "
                    "merge only memories that come from the same base"
                )
            if added <= TAIL:
                merged = merged._extend(digests)
            else:
                chain = hashlib.sha256(merged.chain + branch.chain).digest()
                merged = ConsumedRecord(merged.count + added, chain, branch.tail)
        return merged

    def align(self, history: Sequence[Message], on_edit: OnEdit = "write") -> Alignment:
        """Find what is new in a history.

        Args:
            history: the whole history as given, system messages included.
            on_edit: what an unmatched message before a matched one does. "write" reports it in `edits`,
                "error" raises, "rebuild" asks for all messages anew.

        Raises:
            HistoryEditedError: `on_edit` is "error" and a message before a consumed one is new or changed.
        """
        if on_edit not in ("write", "error", "rebuild"):
            raise ConfigError(f'on_edit is "write", "error" or "rebuild"; found {on_edit!r}')
        places, silent, digests, chains = _read(list(history))
        if self.count < len(chains) and chains[self.count] == self.chain:
            return Alignment(new=places[self.count :], consumed=places[: self.count], silent=silent)
        consumed = [places[j] for j in self._matched(digests)]
        old = set(consumed)
        new = [i for i in places if i not in old]
        edits = [i for i in new if consumed and i < consumed[-1]]
        if edits and on_edit == "error":
            message = history[edits[0]]
            raise HistoryEditedError(
                f"message {edits[0]} ({message.role}: {_excerpt(message)!r}) stands before consumed ones, "
                "but was itself never consumed as it is now; restore it, continue from an earlier state, or "
                'pass on_edit="write" or on_edit="rebuild"'
            )
        if edits and on_edit == "rebuild":
            return Alignment(new=places, edits=edits, silent=silent, rebuild=True)
        return Alignment(new=new, consumed=consumed, edits=edits, silent=silent)

    def _matched(self, digests: list[bytes]) -> list[int]:
        """Indices into `digests` of the consumed ones, ascending, where these are not its beginning."""
        tail = _split(self.tail)
        full = len(tail) == TAIL and self.count > TAIL
        matched = _match(tail, digests, free_head=full)
        if full and matched:
            return [*range(matched[0]), *matched]
        return matched


class _Read(NamedTuple):
    """What a history says to records.

    Attributes:
        places: of the messages that are written.
        silent: places of the others.
        digests: of these.
        chains: of the first n of these, n from 0 on.
    """

    places: list[int]
    silent: list[int]
    digests: list[bytes]
    chains: list[bytes]


# A turn is given its thread's whole history again, with the same messages before the new ones: the last that were read.
# Up to the first message with tool calls, whose arguments may be changed in place, or that is too long to be kept.
_KNOWN: deque[tuple[list[Message], _Read]] = deque(maxlen=8)


def _read(history: list[Message]) -> _Read:
    # Lists are compared by identity first, so a thousand messages take microseconds.
    begins = [one for one in tuple(_KNOWN) if history[: len(one[0])] == one[0]]
    known, read = max(begins, key=lambda one: len(one[0]), default=([], _Read([], [], [], [bytes(CHAIN)])))
    found = _Read(read.places.copy(), read.silent.copy(), read.digests.copy(), read.chains.copy())
    fixed = len(known)
    for place in range(len(known), len(history)):
        message = history[place]
        if message.writes:
            digest = message.digest()[:DIGEST]
            found.places.append(place)
            found.digests.append(digest)
            found.chains.append(_link(found.chains[-1], digest))
        else:
            found.silent.append(place)
        if fixed == place and not message.tool_calls and len(message.content) <= LONGEST_KEPT:
            fixed = place + 1
    if fixed > len(known):
        count = sum(place < fixed for place in found.places)
        kept = found.places[:count], found.silent[: fixed - count], found.digests[:count], found.chains[: count + 1]
        _KNOWN.append((history[:fixed], _Read(*kept)))
    return found


def _match(tail: list[bytes], digests: list[bytes], *, free_head: bool) -> list[int]:
    """Indices into `digests` of the best alignment with `tail` (the module docstring says what is best)."""
    known = set(tail)
    places = np.array([j for j, digest in enumerate(digests) if digest in known], dtype=np.int64)
    if not len(places):
        return []
    numbers = {digest: n for n, digest in enumerate(known)}
    left = np.array([numbers[digest] for digest in tail], dtype=np.int64)
    right = np.array([numbers[digests[j]] for j in places], dtype=np.int64)
    equal: NDArray[np.bool_] = left[:, None] == right[None, :]  # [tail, history]
    keys, best = _keys(equal, places if free_head else np.zeros_like(places))
    i, j = _last_pair(equal, keys, places)
    return [int(places[j]) for j in _walk_back(keys, best, i, j)]


def _keys(equal: NDArray[np.bool_], start: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The key of the best alignment that ends with each pair, and its running maximum along the history."""
    rows, columns = equal.shape
    keys = np.full((rows, columns), _NONE, dtype=np.int64)
    best = np.full((rows, columns), _NONE, dtype=np.int64)
    adjacent = np.full(columns, _NONE, dtype=np.int64)  # best[i - 1], one column back
    broken = np.full(columns, _NONE, dtype=np.int64)  # best of all rows before that, one column back
    for i in range(rows):
        after_break = np.where(broken > 0, broken - _SCORE, _NONE)
        previous = np.maximum(np.maximum(adjacent, after_break), start)
        keys[i] = np.where(equal[i], previous + _SCORE + _MATCH, _NONE)
        best[i] = np.maximum.accumulate(keys[i])
        broken = np.maximum(broken, adjacent)
        adjacent = np.concatenate(([_NONE], best[i, :-1]))
    return keys, best


def _last_pair(equal: NDArray[np.bool_], keys: NDArray[np.int64], places: NDArray[np.int64]) -> tuple[int, int]:
    """The pair with which the best alignment ends. Nothing after it may still match."""
    rows = equal.shape[0]
    beyond = np.logical_or.accumulate(np.logical_or.accumulate(equal[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
    extendable = np.zeros_like(equal)
    extendable[:-1, :-1] = beyond[1:, 1:]
    ends = [(int(i), int(j)) for i, j in np.argwhere(equal & ~extendable)]

    def rank(pair: tuple[int, int]) -> tuple[int, int, int, int, int]:
        i, j = pair
        key = int(keys[i, j])
        score, matches, first = key // _SCORE, key % _SCORE // _MATCH, key % _MATCH
        trailing = int(i < rows - 1)
        inserted = int(places[j]) - first + 1 - matches
        return score - trailing, -inserted, score - trailing - matches, i, j

    return max(ends, key=rank)


def _walk_back(keys: NDArray[np.int64], best: NDArray[np.int64], i: int, j: int) -> list[int]:
    """Columns of the alignment that ends with (i, j), ascending; ties go to the nearest earlier pair."""
    columns = [j]
    while True:
        rest = int(keys[i, j]) - _SCORE - _MATCH
        if rest < _MATCH:  # no match before this one
            return columns[::-1]
        if best[i - 1, j - 1] == rest:
            i -= 1
        else:
            rest += _SCORE
            i = int(np.flatnonzero(best[: i - 1, j - 1] == rest)[-1])
        j = int(np.flatnonzero(keys[i, :j] == rest)[-1])
        columns.append(j)


def _link(chain: bytes, digest: bytes) -> bytes:
    return hashlib.sha256(chain + digest).digest()


def _split(tail: bytes) -> list[bytes]:
    return [tail[i : i + DIGEST] for i in range(0, len(tail), DIGEST)]


def _name(record: ConsumedRecord) -> str:
    return f"{record.chain.hex()[:12]} of {record.count} messages"


def _excerpt(message: Message, limit: int = 60) -> str:
    text = " ".join(message.content.split()) or ", ".join(call.name for call in message.tool_calls)
    return text if len(text) <= limit else text[: limit - 1] + "…"
