"""Copying threads from any LangGraph checkpointer into a `SQLAlchemySaver`, through LangGraph's public interface.

A thread is copied checkpoint by checkpoint, parents first, and of each its pending writes before the checkpoint itself.
So a copy that is interrupted leaves threads as they were at an earlier time, and the next one goes on from there. One
checkpoint is held at a time.

Nothing that the target has is changed. Where it holds checkpoints or writes of a thread that the source does not have,
the two have parted, and a thread that has news on both sides is a failure.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import ormsgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import WRITES_IDX_MAP, BaseCheckpointSaver, CheckpointTuple, PendingWrite
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import EXT_DELTA_SNAPSHOT, JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from agentmem.errors import ConfigError, StorageError
from agentmem_sql.ids import check_ids
from agentmem_sql.saver import SQLAlchemySaver, plain_serde

Saver = BaseCheckpointSaver[Any]
Key = tuple[str, str]  # a checkpoint's namespace and id
Slot = tuple[str, int]  # of a pending write: its task, and the index of a special channel or the rank among the others


class Outline(NamedTuple):
    """A checkpoint without its values: its parent, and where its pending writes lie."""

    parent: str | None
    slots: set[Slot]


Outlines = dict[Key, Outline]

_KEEP_ONE = "keep one of the two: delete the thread in the target and copy again, or leave it out of thread_ids"
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

    def add(self, thread: ThreadTransfer) -> None:
        """Count a thread in."""
        self.threads += 1
        self.checkpoints += thread.checkpoints
        self.writes += thread.writes
        self.skipped += thread.skipped
        self.failures += [thread] * (thread.error is not None)


class TransferError(StorageError):
    """Some threads could not be copied; the others were.

    Attributes:
        report: what was copied, and for each thread that was not the error.
    """

    def __init__(self, report: TransferReport) -> None:
        failed = report.failures
        named = "; ".join(str(thread.error) for thread in failed[:_NAMED])
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
        TransferError: some threads could not be copied (its `report` says why): they went on in both places or
            are two different ones, they hold a value that is damaged or that the target does not store, or
            the source does not have them. All others were copied.
        StorageError: the target cannot be written. Errors of the source's driver come through as they are.
        ConfigError: the source works inside an event loop only, or `thread_ids` is one string or holds no ids.
    """
    if type(source).get_tuple is BaseCheckpointSaver.get_tuple:
        raise _needs_loop(source)
    try:
        return _copy(source, target, thread_ids, on_thread)
    except asyncio.InvalidStateError as error:  # so LangGraph's asynchronous checkpointers answer within their loop
        raise _needs_loop(source) from error


async def acopy_threads(
    source: BaseCheckpointSaver[Any],
    target: SQLAlchemySaver,
    *,
    thread_ids: Sequence[str] | None = None,
    on_thread: OnThread | None = None,
) -> TransferReport:
    """`copy_threads` for a task, from any checkpointer. It works, and calls `on_thread`, in another thread.

    A task that is cancelled ends when the thread that is being copied is.
    """
    stopped = threading.Event()

    def after(thread: ThreadTransfer) -> None:
        if on_thread is not None:
            on_thread(thread)
        if stopped.is_set():
            raise _Stopped

    if type(source).get_tuple is BaseCheckpointSaver.get_tuple:
        source = _FromThread(source, asyncio.get_running_loop())
    copying = asyncio.ensure_future(asyncio.to_thread(_copy, source, target, thread_ids, after))
    try:
        return await asyncio.shield(copying)
    except asyncio.CancelledError:
        stopped.set()
        await asyncio.wait({copying})
        copying.exception()  # seen: the caller asked for the cancellation and gets that
        raise


def _needs_loop(source: Saver) -> ConfigError:
    return ConfigError(
        f"copy_threads was given a {type(source).__name__}, which works inside an event loop only; "
        "await acopy_threads(...) instead"
    )


class _FromThread(BaseCheckpointSaver[Any]):
    """A checkpointer that has asynchronous methods only, for a thread beside its event loop."""

    def __init__(self, saver: Saver, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(serde=saver.serde)
        self._saver = saver
        self._loop = loop

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return asyncio.run_coroutine_threadsafe(self._saver.aget_tuple(config), self._loop).result()

    def list(self, config: RunnableConfig | None, **options: Any) -> Iterator[CheckpointTuple]:
        listing = aiter(self._saver.alist(config, **options))

        async def following() -> CheckpointTuple | None:
            return await anext(listing, None)

        while (stored := asyncio.run_coroutine_threadsafe(following(), self._loop).result()) is not None:
            yield stored


class _Stopped(Exception):
    """The task that copies was cancelled."""


def _copy(
    source: Saver, target: SQLAlchemySaver, thread_ids: Sequence[str] | None, on_thread: OnThread | None
) -> TransferReport:
    target.setup()  # a target that cannot be opened is no failure of a thread
    source = _verbatim(source, target.serde)
    chosen = None if thread_ids is None else check_ids(thread_ids)
    threads: Mapping[Any, Outlines | None] = _all_outlines(source) if chosen is None else dict.fromkeys(chosen)
    report = TransferReport()
    for thread, outlines in threads.items():
        copying = _Copying(source, target, thread)
        error: StorageError | None = None
        try:
            copying.run(outlines or _outlines(source, _at(thread)).get(thread, {}))
        except _OF_A_THREAD as caught:
            if _concerns_all(caught):
                raise
            error = copying.failure(caught)
        result = ThreadTransfer(str(thread), copying.checkpoints, copying.writes, error)
        report.add(result)
        if on_thread is not None:
            on_thread(result)
    if report.failures:
        raise TransferError(report)
    return report


def _concerns_all(error: Exception) -> bool:
    return isinstance(error, ConfigError) or isinstance(error.__cause__, _OF_ALL)


class _Copying:
    """One thread on its way."""

    def __init__(self, source: Saver, target: SQLAlchemySaver, thread: Any) -> None:
        self.checkpoints = 0
        self.writes = 0
        self._source = source
        self._target = target
        self._written = _verbatim(target, target.serde)  # the target, to read what it has
        self._thread = thread
        self._name = str(thread)
        self._key: Key | None = None  # of the checkpoint that is being copied

    def failure(self, error: Exception) -> StorageError:
        """The error as one of ours, naming the thread and checkpoint."""
        where = f"thread {self._name[:80]!r}"
        if self._key is not None:
            where += f" at checkpoint {self._key[1]!r}" + (f" in namespace {self._key[0]!r}" if self._key[0] else "")
        said = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
        failure = StorageError(f"{where}: {said}")
        failure.__cause__ = error
        return failure

    def run(self, there: Outlines) -> None:
        """Copy what the target lacks of the checkpoints `there` in the source."""
        if not there:
            raise StorageError("expected the thread in the source, found none; leave it out of thread_ids")
        here = _outlines(self._written, _at(self._name)).get(self._name, {})
        shared = here.keys() & there.keys()
        new = [key for key in _parents_first(there) if key not in here]
        grown = {key: slots for key in shared if (slots := there[key].slots - here[key].slots)}
        parted = [key for key in here if key not in there or here[key].slots - there[key].slots]
        if parted and (new or grown):
            raise StorageError(
                "expected a thread that went on in the source alone, found checkpoints or writes in the target "
                f"that the source does not have (checkpoint {parted[0][1]!r}), and {len(new) + len(grown)} the other "
                f"way round; {_KEEP_ONE}"
            )
        # The last copy may have met a checkpoint without children in the middle of a run.
        followed = {(ns, outline.parent) for (ns, _), outline in here.items()}
        for key in [key for key in shared if key not in followed and here[key].slots]:
            changed = self._changed(key, replaceable=bool(new or grown))
            if changed:
                grown[key] = grown.get(key, set()) | changed
        for key in [*grown, *new]:
            read = self._read(key)
            if read is None:  # it was taken out since the thread was listed
                continue
            if key in grown:
                self._put_writes(read, grown[key])
                continue
            if (key[0], there[key].parent) not in there:
                self._refuse_pruned(read)
            self._put(read)
        self._key = None

    def _read(self, key: Key) -> CheckpointTuple | None:
        self._key = key
        return self._source.get_tuple(_at(self._thread, key))

    def _changed(self, key: Key, *, replaceable: bool) -> set[Slot]:
        """The pending writes of a checkpoint that hold something else in the source than in the target.

        What a task raised (an interrupt, an error) and was answered is replaced in the course of a run, in the source
        as in the target; where the source went on, it is replaced here.
        """
        dump = plain_serde(self._written.serde).dumps_typed
        both = []
        for stored in (self._read(key), self._written.get_tuple(_at(self._name, key))):
            pending = [] if stored is None else stored.pending_writes or []
            both.append(dict(zip(_slots(pending), ((write[1], dump(write[2])) for write in pending), strict=True)))
        theirs, ours = both
        changed = {slot for slot in ours.keys() & theirs.keys() if ours[slot] != theirs[slot]}
        if changed and not (replaceable and all(index < 0 for _, index in changed)):
            raise StorageError(
                f"expected what task {min(changed)[0]!r} wrote in the source, found something else in the target, "
                f"where the run was continued; {_KEEP_ONE}"
            )
        return changed

    def _refuse_pruned(self, read: CheckpointTuple) -> None:
        """Refuse a checkpoint that keeps for its delta channels what pruned ancestors wrote: it would be lost."""
        counted: Any = read.metadata.get("counters_since_delta_snapshot") or {}
        empty = [name for name in counted if name not in read.checkpoint["channel_values"]]
        if isinstance(self._source, SQLAlchemySaver) and empty:
            histories = self._source.get_delta_channel_history(config=read.config, channels=empty)
            if any(history["writes"] or "seed" in history for history in histories.values()):
                raise StorageError(
                    f"expected a thread whose delta channels {empty} follow from its checkpoints, found one whose "
                    "earlier checkpoints were pruned, and LangGraph's interface has no place for what they left; "
                    "copy it before it is pruned, or after the graph has stored the channels' next snapshot"
                )

    def _put(self, read: CheckpointTuple) -> None:
        """Copy a checkpoint, its writes first: if it is there, so are they."""
        checkpoint, values = read.checkpoint, read.checkpoint["channel_values"]
        unversioned = values.keys() - checkpoint["channel_versions"].keys()
        if unversioned:
            raise StorageError(
                f"expected a version for every channel that has a value, found none for {sorted(unversioned)}; "
                "the checkpoint was not made by LangGraph"
            )
        self._put_writes(read, set(_slots(read.pending_writes or [])))
        to = _at(self._name, (_key(read)[0], _parent(read) or ""))
        # Every channel counts as new: what the parent holds at the same version need not be what this one holds.
        self._target.put(to, checkpoint, read.metadata, dict(checkpoint["channel_versions"]))
        self.checkpoints += 1

    def _put_writes(self, read: CheckpointTuple, missing: set[Slot]) -> None:
        """Copy those pending writes of a checkpoint that are `missing`."""
        to = _at(self._name, _key(read))
        for task, path, writes, slots in _calls(read.pending_writes or []):
            if slots & missing:
                self._target.put_writes(to, writes, task, path)
        self.writes += len(missing)


def _at(thread: Any, key: Key | None = None) -> RunnableConfig:
    if key is None:
        return {"configurable": {"thread_id": thread}}
    return {"configurable": {"thread_id": thread, "checkpoint_ns": key[0], "checkpoint_id": key[1]}}


def _key(stored: CheckpointTuple) -> Key:
    at = stored.config["configurable"]
    return at.get("checkpoint_ns", ""), at["checkpoint_id"]


def _parent(stored: CheckpointTuple) -> str | None:
    return None if stored.parent_config is None else stored.parent_config["configurable"]["checkpoint_id"]


def _outlines(saver: Saver, config: RunnableConfig | None) -> dict[Any, Outlines]:
    """The checkpoints of a thread, or of all, by thread."""
    threads: defaultdict[Any, Outlines] = defaultdict(dict)
    for stored in saver.list(config):
        outline = Outline(_parent(stored), set(_slots(stored.pending_writes or [])))
        threads[stored.config["configurable"]["thread_id"]][_key(stored)] = outline
    return threads


def _all_outlines(source: Saver) -> dict[Any, Outlines]:
    """Of all threads. A thread stands under the id that the source has, which need not be a string."""
    try:
        return _outlines(source, None)
    except _OF_A_THREAD as error:
        if _concerns_all(error):
            raise
        raise StorageError(
            f"expected a source that can be listed, found a damaged one ({type(error).__name__}: {error}); name the "
            "threads to copy in thread_ids: damaged ones are then reported and the others copied"
        ) from error


def _parents_first(outlines: Outlines) -> list[Key]:
    """Checkpoints by id, but none before its parent: ids made by different processes may be out of order."""
    done: set[Key] = set()
    ordered: list[Key] = []
    for ns, checkpoint in sorted(outlines, key=lambda key: (key[1], key[0])):
        chain: list[Key] = []
        at: str | None = checkpoint
        while at is not None and (ns, at) in outlines and (ns, at) not in done:
            done.add((ns, at))
            chain.append((ns, at))
            at = outlines[ns, at].parent
        ordered += reversed(chain)
    return ordered


# Pending writes. LangGraph orders those of a checkpoint by the path of their task, the task and an index; its interface
# tells neither path nor index.


def _slots(pending: Sequence[PendingWrite]) -> list[Slot]:
    """Where writes lie, given in order."""
    ranks: defaultdict[str, int] = defaultdict(int)
    slots: list[Slot] = []
    for task, channel, _ in pending:
        if channel in WRITES_IDX_MAP:
            slots.append((task, WRITES_IDX_MAP[channel]))
        else:
            slots.append((task, ranks[task]))
            ranks[task] += 1
    return slots


def _calls(pending: Sequence[PendingWrite]) -> Iterator[tuple[str, str, list[tuple[str, Any]], set[Slot]]]:
    """The calls of `put_writes` that store writes in their order: task, path, writes, and the slots they are for.

    Paths are made up that give the same order: as few as that takes, beginning with the empty one. A checkpointer makes
    a write's index from its position in the call and leaves those alone that are there, so a task's later writes come
    with all that are before them.
    """
    slots, step = _slots(pending), 0
    paths = [""] * bool(pending)
    for before, after in pairwise(slots):
        step += after < before
        paths.append(f"{step:08}" if step else "")
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for number, (task, channel, _) in enumerate(pending):
        groups.setdefault((task, paths[number], channel in WRITES_IDX_MAP), []).append(number)
    others: defaultdict[str, list[int]] = defaultdict(list)
    for (task, path, special), members in groups.items():
        if not special:
            others[task] += members
        numbers = members if special else others[task]
        yield task, path, [pending[number][1:] for number in numbers], {slots[number] for number in members}


def _verbatim(saver: Saver, serde: SerializerProtocol) -> Saver:
    """A clone that deserialises values to plain data only, if `serde` would store them the same.

    Then no class of the application is imported or called, and nothing is lost of a value whose class is not at hand,
    or not on an allowlist.
    """
    inner = plain_serde(saver.serde)
    if type(inner) is not JsonPlusSerializer or type(plain_serde(serde)) is not JsonPlusSerializer:
        return saver
    keeping: SerializerProtocol = JsonPlusSerializer(
        pickle_fallback=inner.pickle_fallback,
        allowed_json_modules=inner._allowed_json_modules,
        __unpack_ext_hook__=_keep,
    )
    if isinstance(saver.serde, EncryptedSerializer):
        keeping = EncryptedSerializer(saver.serde.cipher, keeping)
    clone = copy.copy(saver)
    clone.serde = keeping
    return clone


def _keep(code: int, data: bytes) -> Any:
    if code == EXT_DELTA_SNAPSHOT:  # the list in it is stored as a list, whose items are shared
        return _DeltaSnapshot(ormsgpack.unpackb(data, ext_hook=_keep, option=ormsgpack.OPT_NON_STR_KEYS))
    return ormsgpack.Ext(code, data)
