"""What a process remembers of the threads that it wrote and read.

A ``Thread`` is true for one number and one epoch of a thread: whatever it names was committed, and nothing has
been taken out of the thread since, or its epoch would be another. Who finds another epoch throws it away.
Entries are made after a commit only.

Threads are dropped least recently used first when all of them together pass the budget.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from threading import Lock

from agentmem_sql import forks
from agentmem_sql.list_tree import Node
from agentmem_sql.recall import Recalled, Run

# What a channel held at a checkpoint: its version there, and its content; no content: the channel was empty.
Held = tuple[str | int | float, bytes | None]
Held_by = Mapping[str, Held]
Body = bytes | Node | Recalled

# Bytes of memory, roughly: for a digest in a set, a value beside its bytes, parsed content, a channel that is held.
_DIGEST_COST = 120
_VALUE_COST = 130
_NODE_COST = 1800
_GROUP_COST = 500
_RUN_COST = 40  # for a message in it
_CHANNEL_COST = 250
_THREAD_COST = 3000
# Of a thread, kept at most: checkpoints whose channels are known, lists of messages, bytes of values that are none.
_CHECKPOINTS = 16
_RUNS = 8
_VALUE_BYTES = 2**20
_CALLS_BETWEEN_SUMS = 32


class Thread:
    """What is known of a thread."""

    def __init__(self, number: int | None = None, epoch: int = 0) -> None:
        """Know nothing yet but the thread's number and epoch; without a number not even that."""
        self.number = number
        self.epoch = epoch
        self.void = False  # a connection was lost since: the database may have gone back to an earlier time
        self.stored: set[bytes] = set()  # digests of content that the thread has
        self.bodies: dict[bytes, Node | Recalled] = {}  # some of it
        self.messages: dict[str, Recalled] = {}  # by the message's id
        # Full nodes by their entries: digest, and the entry for the node. True whatever the thread has.
        self.groups: dict[tuple[bytes, ...], tuple[bytes, bytes]] = {}
        self.runs: OrderedDict[str, Run] = OrderedDict()  # lists of messages, by the first one's id
        self.size = 0
        self._values: OrderedDict[bytes, bytes] = OrderedDict()
        self._value_bytes = 0
        self._held: OrderedDict[tuple[str, str], Held_by] = OrderedDict()
        self._channels = 0  # of all that are held
        self._lock = Lock()

    def held(self, ns: str, checkpoint_id: str) -> Held_by | None:
        """The channels of a checkpoint, if known."""
        return self._held.get((ns, checkpoint_id))

    def hold(self, ns: str, checkpoint_id: str, channels: Held_by) -> None:
        """Remember the channels of a checkpoint."""
        with self._lock:
            self._channels += len(channels) - len(self._held.pop((ns, checkpoint_id), ()))
            self._held[ns, checkpoint_id] = channels
            if len(self._held) > _CHECKPOINTS:
                self._channels -= len(self._held.popitem(last=False)[1])

    def group(self, entries: tuple[bytes, ...], digest: bytes, link: bytes) -> None:
        """Remember what a full node of these entries is."""
        with self._lock:
            if entries not in self.groups:
                self.size += _GROUP_COST
            self.groups[entries] = digest, link

    def run(self, run: Run) -> None:
        """Remember a list of messages in the place of the last one that began with the same message."""
        with self._lock:
            before = self.runs.pop(run.first, None)
            if before is None and len(self.runs) >= _RUNS:
                _, before = self.runs.popitem(last=False)
            self.runs[run.first] = run
            self.size += _RUN_COST * (run.count - (before.count if before else 0))

    def body(self, digest: bytes) -> Body | None:
        """Content, if known: a message that can be copied, a node, or a value's bytes."""
        found = self.bodies.get(digest)
        if found is None or (isinstance(found, Recalled) and not found.whole):
            return self._values.get(digest)
        return found

    def add(self, digest: bytes, body: Body) -> None:
        """Remember content that the thread has."""
        self.add_all(((digest, body),))

    def add_all(self, contents: Iterable[tuple[bytes, Body]]) -> None:
        """``add`` for each."""
        with self._lock:
            for digest, body in contents:
                if digest not in self.stored:
                    self.stored.add(digest)
                    self.size += _DIGEST_COST
                if isinstance(body, bytes):
                    self._add_value(digest, body)
                    continue
                if isinstance(body, Recalled):
                    self.messages[body.id] = body
                    if body.whole and (spelled := self._values.pop(digest, None)) is not None:
                        self._value_bytes -= _VALUE_COST + len(spelled)
                if digest not in self.bodies:
                    self.size += body.cost if isinstance(body, Recalled) else _NODE_COST
                self.bodies[digest] = body

    def revived(self, messages: Iterable[Recalled]) -> None:
        """Remember messages that were read; the same as ``add`` for each, in fewer steps."""
        new = {one.digest: one for one in messages}
        with self._lock:
            self.size += _DIGEST_COST * len(new.keys() - self.stored)
            self.size += sum([one.cost for digest, one in new.items() if digest not in self.bodies])
            self.stored.update(new)
            self.bodies.update(new)
            self.messages.update({one.id: one for one in new.values()})
            for digest in self._values.keys() & new.keys():
                self._value_bytes -= _VALUE_COST + len(self._values.pop(digest))

    def _add_value(self, digest: bytes, body: bytes) -> None:
        if self.body(digest) is not None:
            return
        self._values[digest] = body
        self._value_bytes += _VALUE_COST + len(body)
        while self._value_bytes > _VALUE_BYTES and len(self._values) > 1:
            _, gone = self._values.popitem(last=False)
            self._value_bytes -= _VALUE_COST + len(gone)

    @property
    def cost(self) -> int:
        """Bytes of memory, roughly."""
        return _THREAD_COST + self.size + self._value_bytes + _CHANNEL_COST * self._channels


class Cache:
    """The threads of one database that are known, up to a budget in bytes. Thread-safe."""

    def __init__(self, budget: int) -> None:
        """``budget`` 0 remembers nothing from one call to the next."""
        self._budget = budget
        self._threads: OrderedDict[str, Thread] = OrderedDict()
        self._calls = 0
        self._lock = Lock()
        forks.watch(self)

    def forked(self) -> None:
        """Know nothing: a thread of the process that this one was forked from may have been at it."""
        self._lock = Lock()
        self._threads.clear()

    def lost(self) -> None:
        """Know nothing: whoever answers after a connection was lost may not have the last commits."""
        with self._lock:
            for one in self._threads.values():
                one.void = True
            self._threads.clear()

    def get(self, thread_id: str) -> Thread:
        """What is known of a thread; an empty ``Thread`` if nothing is."""
        with self._lock:
            return self._threads.get(thread_id) or Thread()

    def at(self, thread_id: str, number: int, epoch: int) -> Thread:
        """What is known of a thread that was found to have this number and epoch."""
        with self._lock:
            found = self._threads.get(thread_id)
            if found is None or (found.number, found.epoch) != (number, epoch):
                found = Thread(number, epoch)
                if self._budget:
                    self._threads[thread_id] = found
            if self._budget:
                self._threads.move_to_end(thread_id)
                self._calls += 1
                if self._calls % _CALLS_BETWEEN_SUMS == 0:
                    self._shrink()
            return found

    def drop(self, thread_id: str) -> None:
        """Forget a thread."""
        with self._lock:
            self._threads.pop(thread_id, None)

    def _shrink(self) -> None:
        total = sum(one.cost for one in self._threads.values())
        while total > self._budget and self._threads:  # the costs may have changed since the sum
            _, gone = self._threads.popitem(last=False)
            total -= gone.cost
