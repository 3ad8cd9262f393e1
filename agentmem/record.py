"""What a memory has consumed, and how the next history lines up with it.

A record is a value. It describes the last history that was passed to the memory, all of which has been consumed: how
many messages were ever written, a chain digest over that history, and the 8-byte digests of its last 256 messages (the
*tail*), in the order of that history. It answers one question: which messages of the next history are new? Messages
that are never written (system messages, retrieved facts) are never consumed and never new, so they are ignored here.

The rules of `ConsumedRecord.align`, in order:

1. If the history starts with the complete last history (its chain digest matches), everything after that is new.
2. Otherwise the history is aligned with the tail by a longest common subsequence in which every *break* (a run of
   consumed messages that is missing between two matches, or after the last one) counts as one match less. Missing
   messages at the head cost nothing, since histories are trimmed there. Matched messages are consumed. With a full
   tail, the messages before the first match are consumed too: they are taken to be older than the tail. So is a message
   that merely moved. Before the last match, that is any message that the tail holds elsewhere, unmatched. After the
   last match it is one only if the history lacks nothing of the tail except its head, and never if it is the last
   message, since people say the same thing twice. All other messages are new. A history that has nothing in common with
   the tail is taken to continue the last one.

Counting breaks decides which message a repeated one ("ok", "done") is; where no message repeats, the result is the
plain longest common subsequence. Ties are broken by fewer unmatched messages before the last match (with a full tail:
between the first and the last), then by fewer breaks, then by the later position in the tail, then by the later
position in the history. So a trimmed history continues the end of the tail, and what comes after is new even if it
repeats something older.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentmem.errors import ConfigError, CorruptStateError, HistoryEditedError, StateMismatchError
from agentmem.messages import Message

OnEdit = Literal["write", "error", "rebuild"]

TAIL = 256  # number of messages whose digests are kept
DIGEST = 8  # bytes of each digest in the tail
CHAIN = 32  # bytes of the chain digest

# One int64 orders the partial alignments that end at a given pair: first by score (matches - breaks), then by the
# number of matches, then by the position of the first match (only with a full tail, where what comes before it is
# free).
_SCORE = 1 << 44
_MATCH = 1 << 32
_NONE = -1  # no alignment ends here; the key of an alignment is positive


class History(NamedTuple):
    """A history in the form that records use.

    Attributes:
        messages: the whole history.
        places: indices of the messages that may be written.
        silent: indices of the others.
        digests: digests of the messages that may be written, 8 bytes each.
        chains: chain digests of the first n of these, for n from 0 on.
    """

    messages: list[Message]
    places: list[int]
    silent: list[int]
    digests: list[bytes]
    chains: list[bytes]

    @classmethod
    def read(cls, messages: Sequence[Message], beginning: History | None = None) -> History:
        """Read a history; `beginning` is the result of reading its first messages earlier."""
        history = cls(list(messages), [], [], [], [bytes(CHAIN)])
        start = 0
        if beginning is not None:
            _, places, silent, digests, chains = beginning
            history = cls(list(messages), places.copy(), silent.copy(), digests.copy(), chains.copy())
            start = len(beginning.messages)
        for place in range(start, len(messages)):
            message = messages[place]
            if not message.writes:
                history.silent.append(place)
                continue
            digest = message.digest()[:DIGEST]
            history.places.append(place)
            history.digests.append(digest)
            history.chains.append(_link(history.chains[-1], digest))
        return history

    def unchangeable(self) -> History:
        """The part that can be cached: up to the first tool call, whose arguments the caller may change in place."""
        messages = self.messages
        stop = next((place for place, message in enumerate(messages) if message.tool_calls), len(messages))
        if stop == len(messages):
            return self
        count = sum(place < stop for place in self.places)
        return History(
            messages[:stop],
            self.places[:count],
            self.silent[: stop - count],
            self.digests[:count],
            self.chains[: count + 1],
        )


@dataclass(frozen=True)
class Alignment:
    """Which messages of a history are new. All lists hold indices into the history, in ascending order.

    Attributes:
        new: to be written, once, in this order.
        consumed: already in the memory.
        edits: those of `new` that come before a consumed message.
        silent: those that are never written.
        deletions: how many messages of the last history are missing after one that was kept, and were not replaced.
        rebuild: whether to start from the zero state; `new` then lists every message that may be written.
        record: the record after `new` is written.
    """

    new: list[int] = field(default_factory=list)
    consumed: list[int] = field(default_factory=list)
    edits: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    deletions: int = 0
    rebuild: bool = False
    record: ConsumedRecord = field(default_factory=lambda: ConsumedRecord.empty(), compare=False)


@dataclass(frozen=True)
class ConsumedRecord:
    """All that a memory records about the messages written into it.

    Attributes:
        count: how many messages were ever written.
        chain: 32 bytes, chain' = SHA-256(chain || digest) over the messages of the last history, from zeros.
        tail: the 8-byte digests of the last 256 messages of that history, oldest first.

    Raises:
        CorruptStateError: the three are inconsistent.
    """

    count: int
    chain: bytes
    tail: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 0:
            raise CorruptStateError(f"a record's count is an integer from 0 up; found {self.count!r}")
        for name in ("chain", "tail"):
            value = getattr(self, name)
            if not isinstance(value, bytes):
                raise CorruptStateError(f"a record's {name} is bytes; found {type(value).__name__}")
        if len(self.chain) != CHAIN:
            raise CorruptStateError(f"a record has a chain of {CHAIN} bytes; found {len(self.chain)}")
        longest = DIGEST * min(self.count, TAIL)
        if len(self.tail) > longest or len(self.tail) % DIGEST:
            raise CorruptStateError(
                f"the record of {self.count} consumed messages has a tail of at most {longest} bytes, "
                f"{DIGEST} for each message; found {len(self.tail)}"
            )

    @property
    def recent(self) -> tuple[bytes, ...]:
        """The digests of the last messages of the last history, at most 256, oldest first; 8 bytes each."""
        return tuple(_split(self.tail))

    @classmethod
    def empty(cls) -> ConsumedRecord:
        """The record of a memory that has consumed nothing."""
        return cls(0, bytes(CHAIN), b"")

    def extend(self, messages: Sequence[Message]) -> ConsumedRecord:
        """The record after these messages are appended to the last history; those never written are left out."""
        return self._extend(message.digest()[:DIGEST] for message in messages if message.writes)

    def _extend(self, digests: Iterable[bytes]) -> ConsumedRecord:
        count, chain, tail = self.count, self.chain, bytearray(self.tail)
        for digest in digests:
            count += 1
            chain = _link(chain, digest)
            tail += digest
        return ConsumedRecord(count, chain, bytes(tail[-TAIL * DIGEST :]))

    def merge(self, branches: Sequence[ConsumedRecord]) -> ConsumedRecord:
        """This record plus what each branch added to it, one branch after another.

        If each branch added at most 256 messages to the end of the history, the result is exactly the record of the
        joined history. The chain of a longer branch cannot be recomputed from its tail, so the merged chain includes it
        as it is; later histories are then recognised by the tail.

        Raises:
            StateMismatchError: a branch does not continue this record.
        """
        merged = self
        for branch in branches:
            written, added = branch.count - self.count, self.additions(branch)
            merged = merged._extend(added)
            if written > TAIL and len(added) == TAIL:
                merged = ConsumedRecord(merged.count, hashlib.sha256(merged.chain + branch.chain).digest(), branch.tail)
            merged = ConsumedRecord(merged.count + written - len(added), merged.chain, merged.tail)
        return merged

    def additions(self, later: ConsumedRecord) -> list[bytes]:
        """Digests of what the last history of a later record has beyond this one's, in order; at most the last 256.

        Raises:
            StateMismatchError: the other record cannot have started from this one.
        """
        written, digests = later.count - self.count, _split(later.tail)
        if 0 <= written <= len(digests):  # the usual case: this history with something appended
            added = digests[len(digests) - written :]
            if self._extend(added).chain == later.chain:
                return added
        # The later record has read another history: edited, trimmed, or a different one.
        tail = _split(self.tail)
        missing, added = Counter(tail), []
        for digest in digests:
            if missing[digest]:
                missing[digest] -= 1
            else:
                added.append(digest)
        older = len(tail) == TAIL  # the other history may begin before this tail does
        if written < 0 or (len(added) > written and not older):
            raise StateMismatchError(
                f"a branch that continues the record {_name(self)} was expected; found {_name(later)}; "
                "merge only memories that come from the same base"
            )
        return added[-written:] if written else []

    def align(self, history: Sequence[Message] | History, on_edit: OnEdit = "write") -> Alignment:
        """Find the new messages of a history.

        Args:
            history: the whole history, system messages included; or the result of `History.read`.
            on_edit: what to do about an unmatched message before a matched one, or a deletion: "write" reports them,
                "error" raises for an edit, "rebuild" asks for all messages to be written again.

        Raises:
            HistoryEditedError: `on_edit` is "error" and a message before a consumed one is new or changed.
        """
        if on_edit not in ("write", "error", "rebuild"):
            raise ConfigError(f'on_edit is "write", "error" or "rebuild"; found {on_edit!r}')
        if not isinstance(history, History):
            history = History.read(history)
        places, silent = history.places, history.silent
        if not places:  # an empty history changes nothing: the next one is compared with the last that was not empty
            return Alignment(silent=silent, record=self)
        if self.chain in history.chains:
            start = history.chains.index(self.chain)
            record = self._after(history, len(places) - start)
            return Alignment(new=places[start:], consumed=places[:start], silent=silent, record=record)
        columns, last, deletions = self._consumed(history)
        if last is None:  # nothing in common: separate notes, or messages after the history was cleared
            return Alignment(new=places, silent=silent, record=self._extend(history.digests))
        consumed = [places[column] for column in columns]
        new = sorted(set(places) - set(consumed))
        edits = [place for place in new if place < places[last]]
        if edits and on_edit == "error":
            message = history.messages[edits[0]]
            raise HistoryEditedError(
                f"message {edits[0]} ({message.role}: {_excerpt(message)!r}) stands before consumed ones, "
                "but was itself never consumed as it is now; restore it, continue from an earlier state, or "
                'pass on_edit="write" or on_edit="rebuild"'
            )
        if (edits or deletions) and on_edit == "rebuild":
            record = ConsumedRecord.empty()._after(history, len(places))
            return Alignment(places, [], edits, silent, deletions, rebuild=True, record=record)
        return Alignment(new, consumed, edits, silent, deletions, record=self._after(history, len(new)))

    def _after(self, history: History, written: int) -> ConsumedRecord:
        """The record after this history, of which `written` messages were written."""
        return ConsumedRecord(self.count + written, history.chains[-1], b"".join(history.digests[-TAIL:]))

    def _consumed(self, history: History) -> tuple[list[int], int | None, int]:
        """What is consumed of a history that does not start with the last one.

        Returns:
            The indices of consumed messages in the history's digests, ascending; the last index that was matched in
            order; and the number of deletions.
        """
        tail = _split(self.tail)
        digests = _earlier_digests(history, tail)
        full = len(tail) == TAIL and self.count > TAIL
        matched = _match(tail, digests, free_head=full)
        if not matched:
            return [], None, 0
        rows, columns = [row for row, _ in matched], [column for _, column in matched]
        consumed = {*range(columns[0]), *columns} if full else set(columns)
        missing = Counter(tail[row] for row in set(range(len(tail))) - set(rows))
        # A head that was trimmed does not count as missing.
        present = set(digests)
        start = next(row for row, digest in enumerate(tail) if digest in present)
        everything = not Counter(tail[start:]) - Counter(digests)
        for column in sorted(set(range(len(digests))) - consumed):
            behind = column > columns[-1]
            if missing[digests[column]] and (not behind or (everything and column < len(digests) - 1)):
                missing[digests[column]] -= 1
                consumed.add(column)
        # For each gap between two matches, count what is missing there and was not replaced by something new.
        deletions = 0
        ends = [*matched[1:], (len(tail), len(digests))]
        for (row, column), (next_row, next_column) in zip(matched, ends, strict=True):
            lost = Counter(tail[row + 1 : next_row]) & missing
            missing -= lost
            replaced = 0 if next_row == len(tail) else len(set(range(column + 1, next_column)) - consumed)
            deletions += max(0, lost.total() - replaced)
        return sorted(consumed), columns[-1], deletions


def _earlier_digests(history: History, tail: list[bytes]) -> list[bytes]:
    """The history's digests; for messages with a name the older form of the digest, where the tail has that.

    Digests once covered the name as well, and states that were saved then are still recognised.
    """
    digests = list(history.digests)
    for number, place in enumerate(history.places):
        message = history.messages[place]
        if message.name and (earlier := message.digest(with_name=True)[:DIGEST]) in tail:
            digests[number] = earlier
    return digests


def _match(tail: list[bytes], digests: list[bytes], *, free_head: bool) -> list[tuple[int, int]]:
    """The best alignment as pairs of indices into `tail` and `digests` (the module docstring defines the best)."""
    numbers = {digest: number for number, digest in enumerate(set(tail))}
    places = np.array([column for column, digest in enumerate(digests) if digest in numbers], dtype=np.int64)
    if not len(places):
        return []
    left = np.array([numbers[digest] for digest in tail], dtype=np.int64)
    right = np.array([numbers[digests[column]] for column in places], dtype=np.int64)
    equal: NDArray[np.bool_] = left[:, None] == right[None, :]  # [tail, history]
    keys, best = _keys(equal, places if free_head else np.zeros_like(places))
    row, column = _last_pair(equal, keys, places)
    return [(i, int(places[j])) for i, j in _walk_back(keys, best, row, column)]


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
    """The last pair of the best alignment. Nothing after it may still match."""
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


def _walk_back(keys: NDArray[np.int64], best: NDArray[np.int64], i: int, j: int) -> list[tuple[int, int]]:
    """The pairs of the alignment that ends with (i, j), ascending; ties go to the nearest earlier pair."""
    pairs = [(i, j)]
    while True:
        rest = int(keys[i, j]) - _SCORE - _MATCH
        if rest < _MATCH:  # no match before this one
            return pairs[::-1]
        if best[i - 1, j - 1] == rest:
            i -= 1
        else:
            rest += _SCORE
            i = int(np.flatnonzero(best[: i - 1, j - 1] == rest)[-1])
        j = int(np.flatnonzero(keys[i, :j] == rest)[-1])
        pairs.append((i, j))


def _link(chain: bytes, digest: bytes) -> bytes:
    return hashlib.sha256(chain + digest).digest()


def _split(tail: bytes) -> list[bytes]:
    return [tail[i : i + DIGEST] for i in range(0, len(tail), DIGEST)]


def _name(record: ConsumedRecord) -> str:
    return f"{record.chain.hex()[:12]} of {record.count} messages"


def _excerpt(message: Message, limit: int = 60) -> str:
    text = " ".join(message.content.split()) or ", ".join(call.name for call in message.tool_calls)
    return text if len(text) <= limit else text[: limit - 1] + "…"
