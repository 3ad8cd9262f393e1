"""Copying threads from any LangGraph checkpointer into a ``SQLAlchemySaver``, exactly and again and again.

A thread is copied checkpoint by checkpoint, parents first, and of each its pending writes before the checkpoint
itself. So a copy that is interrupted leaves threads as they were at an earlier time, and the next one goes on from
there. One checkpoint is held at a time.

Nothing that the target has is changed. Where it holds checkpoints of a thread that the source does not have, the
two have parted, and a thread that has news on both sides is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import WRITES_IDX_MAP, BaseCheckpointSaver, CheckpointTuple
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from agentmem.errors import ConfigError, StorageError
from agentmem_sql.cache import Thread
from agentmem_sql.driving import adrive, drive
from agentmem_sql.packing import Packer
from agentmem_sql.pending import Slot, calls, paths, slots
from agentmem_sql.saver import SQLAlchemySaver
from agentmem_sql.sources import Ask, Asking, Entry, Key, OfOurs, Source, job, source_of, stored

T = TypeVar("T")

_NAMED = 3  # failures that an error message names

# What a value that cannot be read or stored raises, in any serializer. Errors of a source's driver are not among
# them: they concern every thread, as do those that a database of ours was kept from its work by.
_OF_ALL = (DBAPIError, PoolTimeout, OSError)
_OF_A_THREAD = (StorageError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class ThreadTransfer:
    """What became of one thread.

    Attributes:
        thread_id: the thread.
        checkpoints: how many were copied.
        writes: how many pending writes were copied.
        error: why it was not, or not wholly, copied.
    """

    thread_id: str
    checkpoints: int = 0
    writes: int = 0
    error: StorageError | None = None

    @property
    def skipped(self) -> bool:
        """Whether there was nothing new."""
        return self.error is None and not self.checkpoints and not self.writes


@dataclass
class TransferReport:
    """What was copied.

    Attributes:
        threads: how many threads were looked at.
        checkpoints: how many were copied.
        writes: how many pending writes were copied.
        skipped: how many threads had nothing new.
        failures: the threads that were not, or not wholly, copied.
    """

    threads: int = 0
    checkpoints: int = 0
    writes: int = 0
    skipped: int = 0
    failures: list[ThreadTransfer] = field(default_factory=list)

    def add(self, one: ThreadTransfer) -> None:
        """Count a thread in."""
        self.threads += 1
        self.checkpoints += one.checkpoints
        self.writes += one.writes
        self.skipped += one.skipped
        if one.error is not None:
            self.failures.append(one)


class TransferError(StorageError):
    """Some threads could not be copied; the others were.

    Attributes:
        report: what was copied, and for each thread that was not the error.
    """

    def __init__(self, report: TransferReport) -> None:
        failed = report.failures
        named = "; ".join(str(one.error) for one in failed[:_NAMED])
        more = f"; and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        super().__init__(f"{len(failed)} of {report.threads} threads were not copied, the others were: {named}{more}")
        self.report = report


OnThread = Callable[[ThreadTransfer], object]


def copy_threads(
    source: BaseCheckpointSaver[Any],
    target: SQLAlchemySaver,
    *,
    thread_ids: Sequence[str] | None = None,
    on_thread: OnThread | None = None,
) -> TransferReport:
    """Copy threads with all checkpoints, metadata and pending writes, as they are.

    What the target has already stays and is not copied again: repeat the call after an interruption, or to fetch
    what came in since. A thread that went on in the target alone is left alone.

    Args:
        source: any LangGraph checkpointer with synchronous methods, such as SqliteSaver, PostgresSaver,
            InMemorySaver, or a SQLAlchemySaver that is encrypted otherwise.
        target: where to.
        thread_ids: which threads; None for all.
        on_thread: called after each thread, for showing progress.

    Returns:
        What was copied, if all of it was.

    Raises:
        TransferError: some threads could not be copied (its ``report`` says why): they went on in both places or
            are two different ones, they hold a value that is damaged or that the target does not store, or
            the source does not have them. All others were copied.
        StorageError: the target cannot be written. Errors of the source's driver come through as they are.
        ConfigError: the source works inside an event loop only.
    """
    return drive(_copy(source, target, thread_ids, on_thread), _now)


async def acopy_threads(
    source: BaseCheckpointSaver[Any],
    target: SQLAlchemySaver,
    *,
    thread_ids: Sequence[str] | None = None,
    on_thread: OnThread | None = None,
) -> TransferReport:
    """``copy_threads`` for a task, from any checkpointer: one without asynchronous methods is read in a thread."""
    return await adrive(_copy(source, target, thread_ids, on_thread), _soon)


def _now(asked: Ask[Any] | OfOurs[Any]) -> Any:
    return asked.now() if isinstance(asked, Ask) else asked.saver._run(asked.steps)


async def _soon(asked: Ask[Any] | OfOurs[Any]) -> Any:
    return await (asked.soon() if isinstance(asked, Ask) else asked.saver._arun(asked.steps))


def _copy(
    saver: BaseCheckpointSaver[Any],
    target: SQLAlchemySaver,
    thread_ids: Sequence[str] | None,
    on_thread: OnThread | None,
) -> Asking[TransferReport]:
    source = source_of(saver, target.serde)
    report = TransferReport()
    yield OfOurs(target, job(_nothing))  # a target that cannot be opened is no failure of a thread
    chosen = (yield from source.threads()) if thread_ids is None else dict.fromkeys(map(str, thread_ids))
    for thread in chosen:
        copying = _Copying(source, target, thread)
        error: StorageError | None = None
        try:
            yield from copying.run()
        except _OF_A_THREAD as caught:
            if isinstance(caught, ConfigError) or isinstance(caught.__cause__, _OF_ALL):
                raise
            error = copying.failure(caught)
        done = ThreadTransfer(thread, copying.checkpoints, copying.writes, error)
        report.add(done)
        if on_thread is not None:
            on_thread(done)
    if report.failures:
        raise TransferError(report)
    return report


class _Copying:
    """One thread on its way."""

    def __init__(self, source: Source, target: SQLAlchemySaver, thread: str) -> None:
        self.checkpoints = 0
        self.writes = 0
        self._source = source
        self._target = target
        self._thread = thread
        self._at: Key | None = None

    def failure(self, error: Exception) -> StorageError:
        """The error as one of ours, naming the thread and checkpoint."""
        where = f"thread {self._thread[:80]!r}"
        if self._at is not None:
            where += f" at checkpoint {self._at[1]!r}" + (f" in namespace {self._at[0]!r}" if self._at[0] else "")
        said = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
        found = StorageError(f"{where}: {said}")
        found.__cause__ = error
        return found

    def run(self) -> Asking[None]:
        """Copy what the target lacks."""
        here: Mapping[Key, Entry] = yield OfOurs(self._target, stored(self._target, self._thread))
        there = yield from self._source.index(self._thread)
        if not there:
            raise StorageError("expected the thread in the source, found none; leave it out of thread_ids")
        new = [key for key in _parents_first(there) if key not in here]
        grown = [key for key in here.keys() & there.keys() if _slots(there[key]) - _slots(here[key])]
        parted = [key for key in here if key not in there or _slots(here[key]) - _slots(there[key])]
        if parted and (new or grown):
            raise StorageError(
                "expected a thread that went on in the source alone, found checkpoints or writes in the target "
                f"that the source does not have (checkpoint {parted[0][1]!r}), and {len(new) + len(grown)} the other "
                "way round; keep one of the two: delete the thread in the target and copy again, or leave it out "
                "of thread_ids"
            )
        yield from self._compare(here, there, replaceable=bool(new or grown))
        for key in grown:
            yield from self._add_writes(key, there[key], known=_slots(here[key]))
        for key in new:
            yield from self._add(key, there[key])
        self._at = None

    def _compare(self, here: Mapping[Key, Entry], there: Mapping[Key, Entry], *, replaceable: bool) -> Asking[None]:
        """See to the writes of checkpoints that both have and that the last copy may have met in the middle of a run.

        What a task raised (an interrupt, an error) and was answered is replaced in the course of a run, in the source
        as in the target; where the source went on, it is replaced here.
        """
        parents = {(ns, entry.parent) for (ns, _), entry in here.items()}
        for key in [key for key in here if key not in parents and key in there and here[key].writes]:
            self._at = key
            found = yield from self._source.read(self._thread, key)
            pending = [] if found is None else found.pending_writes or []
            known = {write.slot: write for write in here[key].writes}
            packer = Packer(self._target._serde, self._target._store.vault, Thread())
            places = zip(slots(pending), pending, strict=True)
            others = [(slot, w) for slot, w in places if slot in known and packer.pack(w[2]) != known[slot].digest]
            fixed = [slot.task for slot, (_, channel, _) in others if channel not in WRITES_IDX_MAP or not replaceable]
            if fixed:
                raise StorageError(
                    f"expected what task {fixed[0]!r} wrote in the source, found something else in the target, where "
                    "the run was continued; keep one of the two: delete the thread in the target and copy again, or "
                    "leave it out of thread_ids"
                )
            for slot, (task, channel, value) in others:
                yield self._put_writes(key, [(channel, value)], task, known[slot].path or "")
                self.writes += 1

    def _add(self, key: Key, entry: Entry) -> Asking[None]:
        """Copy a checkpoint, its writes first: if it is there, so are they."""
        found = yield from self._add_writes(key, entry, known=set())
        if found is None:
            return
        checkpoint = found.checkpoint
        unversioned = checkpoint["channel_values"].keys() - checkpoint["channel_versions"].keys()
        if unversioned:
            raise StorageError(
                f"expected a version for every channel that has a value, found none for {sorted(unversioned)}; "
                "the checkpoint was not made by LangGraph"
            )
        at: dict[str, Any] = {"thread_id": self._thread, "checkpoint_ns": key[0]}
        if found.parent_config is not None:
            at["checkpoint_id"] = found.parent_config["configurable"]["checkpoint_id"]
        config: RunnableConfig = {"configurable": at}
        # Every channel counts as new: what the parent holds at the same version need not be what this one holds.
        versions = dict(checkpoint["channel_versions"])
        store, serde = self._target._store, self._target._serde
        yield OfOurs(self._target, store.put(serde, config, checkpoint, found.metadata, versions))
        self.checkpoints += 1

    def _add_writes(self, key: Key, entry: Entry, *, known: set[Slot]) -> Asking[CheckpointTuple | None]:
        """Copy the writes of a checkpoint that are not ``known``; gives the checkpoint."""
        self._at = key
        found = yield from self._source.read(self._thread, key)
        if found is None:  # it was taken out since the thread was listed
            return None
        pending = found.pending_writes or []
        places = slots(pending)
        for call in calls(pending, paths(pending, entry.writes)):
            if not call.slots <= known:
                yield self._put_writes(key, call.writes, call.task, call.path)
        self.writes += len(set(places) - known)
        return found

    def _put_writes(self, key: Key, writes: Sequence[tuple[str, Any]], task: str, path: str) -> OfOurs[None]:
        at = {"thread_id": self._thread, "checkpoint_ns": key[0], "checkpoint_id": key[1]}
        store, serde = self._target._store, self._target._serde
        return OfOurs(self._target, store.put_writes(serde, {"configurable": at}, writes, task, path))


def _parents_first(entries: Mapping[Key, Entry]) -> list[Key]:
    """Checkpoints by id, but none before its parent: ids made by different processes may be out of order."""
    done: set[Key] = set()
    ordered: list[Key] = []
    for ns, checkpoint in sorted(entries, key=lambda key: (key[1], key[0])):
        chain: list[Key] = []
        at: str | None = checkpoint
        while at is not None and (ns, at) in entries and (ns, at) not in done:
            done.add((ns, at))
            chain.append((ns, at))
            at = entries[ns, at].parent
        ordered += reversed(chain)
    return ordered


def _slots(entry: Entry) -> set[Slot]:
    return {write.slot for write in entry.writes}


def _nothing(_connection: Connection) -> None:
    """The work of opening a database."""
