"""Copying threads from any LangGraph checkpointer into a `SQLAlchemySaver`, through LangGraph's public interface.

A thread is copied checkpoint by checkpoint in the order of their ids, so parents come first; and the pending writes of
a checkpoint are copied before the checkpoint itself. So a copy that is interrupted leaves threads as they were at an
earlier time, and the next copy continues there. Only one checkpoint at a time is in memory.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ormsgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import WRITES_IDX_MAP, BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import EXT_DELTA_SNAPSHOT, JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from agentmem.errors import ConfigError, StorageError
from agentmem_sql.content import is_langgraphs
from agentmem_sql.rows import check_ids
from agentmem_sql.saver import SQLAlchemySaver, plain_serde

Saver = BaseCheckpointSaver[Any]
Key = tuple[str, str]  # a checkpoint's namespace and id
OnThread = Callable[[str], object]

_NAMED = 3  # failures listed in an error message

# Errors of values that cannot be read or stored, in any serializer: the other threads are still copied. Errors of a
# source's driver are not among them; an error caused by one of those concerns every thread.
_OF_A_THREAD = (StorageError, TypeError, ValueError, LookupError, AttributeError)
_OF_ALL = (DBAPIError, PoolTimeout, OSError)


# Of a checkpoint its parent, and for each task and channel how many pending writes it has.
_Outlines = dict[Key, tuple[str | None, Counter[tuple[str, str]]]]


@dataclass
class TransferReport:
    """What was copied.

    Attributes:
        threads: number of threads that were examined.
        checkpoints: number of checkpoints that were copied.
        writes: number of pending writes that were copied.
        skipped: number of threads that had nothing new.
        failures: the threads that were not copied completely, and why.
    """

    threads: int = 0
    checkpoints: int = 0
    writes: int = 0
    skipped: int = 0
    failures: dict[str, StorageError] = field(default_factory=dict)


class TransferError(StorageError):
    """Some threads could not be copied; the others were.

    Attributes:
        report: what was copied, and the error of each thread that was not.
    """

    def __init__(self, report: TransferReport) -> None:
        failed = [str(error) for error in report.failures.values()]
        named = "; ".join(failed[:_NAMED]) + "; ..." * (len(failed) > _NAMED)
        super().__init__(f"{len(failed)} of {report.threads} threads were not copied, the others were: {named}")
        self.report = report


def copy_threads(
    source: BaseCheckpointSaver[Any],
    target: SQLAlchemySaver,
    *,
    thread_ids: Sequence[str] | None = None,
    on_thread: OnThread | None = None,
) -> TransferReport:
    """Copy threads with all checkpoints, metadata and pending writes, unchanged.

    What the target already has is not copied again: repeat the call after an interruption, or to copy what is new in
    the source. A thread that has new checkpoints only in the target is left alone.

    Args:
        source: any LangGraph checkpointer with synchronous methods, such as SqliteSaver, PostgresSaver or
            InMemorySaver, or a SQLAlchemySaver with other protection.
        target: the saver to copy to.
        thread_ids: the threads to copy; None for all.
        on_thread: called with each thread's id when it is done, to show progress.

    Returns:
        What was copied, if there was no failure.

    Raises:
        TransferError: some threads could not be copied (its `report` says why): both sides have new checkpoints, or
            hold two different threads of one id; a value is damaged, or the target cannot store it; or the source does
            not have the thread. All others were copied.
        StorageError: the target cannot be written. Errors of the source's driver are raised unchanged.
        ConfigError: `thread_ids` is a single string or holds something that is not an id; or a saver is something else.
    """
    if not isinstance(source, BaseCheckpointSaver) or not isinstance(target, SQLAlchemySaver):
        raise ConfigError(f"expected a checkpointer and a SQLAlchemySaver to copy to, found {source!r} and {target!r}")
    named: dict[Any, _Outlines] = {thread: {} for thread in check_ids(() if thread_ids is None else thread_ids)}
    target.setup()  # first, since a target that cannot be opened is not the failure of one thread
    source = verbatim(source, target.serde)
    report = TransferReport()
    for thread, outlines in (_outlines(source, None) if thread_ids is None else named).items():
        report.threads += 1
        before, where = (report.checkpoints, report.writes), f"thread {str(thread)[:80]!r}"
        try:
            there = outlines or _outlines(source, _at(thread)).get(thread, {})
            for ns, checkpoint_id in _copy_thread(source, target, thread, there, report):
                where = f"thread {str(thread)[:80]!r} at checkpoint {checkpoint_id!r} in namespace {ns!r}"
            report.skipped += before == (report.checkpoints, report.writes)
        except _OF_A_THREAD as error:
            if isinstance(error, ConfigError) or isinstance(error.__cause__, _OF_ALL):
                raise
            said = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
            report.failures[str(thread)] = failure = StorageError(f"{where}: {said}")
            failure.__cause__ = error
        if on_thread is not None:
            on_thread(str(thread))
    if report.failures:
        raise TransferError(report)
    return report


async def acopy_threads(
    source: BaseCheckpointSaver[Any],
    target: SQLAlchemySaver,
    *,
    thread_ids: Sequence[str] | None = None,
    on_thread: OnThread | None = None,
) -> TransferReport:
    """As `copy_threads`, in another thread, from which LangGraph's asynchronous checkpointers can also be called.

    If the task is cancelled, the copying ends with the thread that it is at.
    """
    wanted = True

    def after(thread: str) -> None:
        if on_thread is not None:
            on_thread(thread)
        if not wanted:
            raise asyncio.CancelledError

    try:
        return await asyncio.to_thread(copy_threads, source, target, thread_ids=thread_ids, on_thread=after)
    finally:
        wanted = False


def _copy_thread(
    source: Saver, target: SQLAlchemySaver, thread: Any, there: _Outlines, report: TransferReport
) -> Iterator[Key]:
    """Copy what the target lacks of a thread, whose checkpoints are `there` in the source; gives each before its turn.

    Raises:
        StorageError: it is not there, or went on in both places.
    """
    if not there:
        raise StorageError("expected the thread in the source, found none; leave it out")
    name = str(thread)
    here = _outlines(verbatim(target, target.serde), _at(name)).get(name, {})
    lacking = {key: writes - here[key][1] if key in here else writes for key, (_, writes) in there.items()}
    ahead = [key for key, (_, writes) in here.items() if key not in there or writes - there[key][1]]
    if ahead and (lacking.keys() - here.keys() or any(lacking.values())):
        raise StorageError(
            "expected a thread that went on in the source alone, found checkpoints or writes in the target that the "
            f"source does not have (checkpoint {ahead[0][1]!r}), and others the other way round; keep one of the two: "
            "delete the thread in the target and copy again, or leave it out"
        )
    # The last copy may have met a checkpoint without children in the middle of a run, and what a task asks and is
    # answered is replaced in its course.
    followed = {(ns, parent) for (ns, _), (parent, _) in here.items()}
    for key in () if ahead else sorted(there, key=lambda key: (key[1], key[0])):
        parent, writes = there[key]
        if key in here and not lacking[key] and (key in followed or not writes):
            continue
        yield key
        read = source.get_tuple(_at(thread, key))
        if read is None:  # it was deleted since the thread was listed
            continue
        if key not in here and (key[0], parent) not in there:
            _refuse_pruned(source, read)
        _put_writes(target, _at(name, key), read)  # first: if a checkpoint is there, so are they
        report.writes += lacking[key].total()
        if key not in here:
            # Every channel counts as new: what the parent holds at the same version need not be what this one holds.
            versions = dict(read.checkpoint["channel_versions"])
            target.put(_at(name, (key[0], parent or "")), read.checkpoint, read.metadata, versions)
            report.checkpoints += 1


def _put_writes(target: SQLAlchemySaver, to: RunnableConfig, read: CheckpointTuple) -> None:
    """Copy the pending writes of a checkpoint.

    LangGraph orders them by the path of their task, which its interface does not tell, then by the task. A number that
    counts up where the tasks' order goes down stands for it.
    """
    pending, path, last = read.pending_writes or [], 0, ""
    for task in dict.fromkeys(task for task, _, _ in pending):
        path, last = path + (task < last), task
        for special in (True, False):  # only calls with nothing but special channels replace what is there
            of_task = ((name, value) for of, name, value in pending if of == task)
            writes = [(name, value) for name, value in of_task if (name in WRITES_IDX_MAP) == special]
            if writes:
                target.put_writes(to, writes, task, f"{path:08}" if path else "")


def _refuse_pruned(source: Saver, read: CheckpointTuple) -> None:
    """Refuse a checkpoint that keeps for its delta channels what pruned ancestors wrote: it would be lost."""
    counted: Any = read.metadata.get("counters_since_delta_snapshot") or {}
    empty = [name for name in counted if name not in read.checkpoint["channel_values"]]
    if isinstance(source, SQLAlchemySaver) and empty:
        histories = source.get_delta_channel_history(config=read.config, channels=empty)
        if any(history["writes"] or "seed" in history for history in histories.values()):
            raise StorageError(
                f"expected a thread whose delta channels {empty} follow from its checkpoints, found one whose earlier "
                "checkpoints were pruned, and LangGraph's interface has no place for what they left; copy it before it "
                "is pruned, or after the graph has stored the channels' next snapshot"
            )


def _at(thread: Any, key: Key | None = None) -> RunnableConfig:
    if key is None:
        return {"configurable": {"thread_id": thread}}
    return {"configurable": {"thread_id": thread, "checkpoint_ns": key[0], "checkpoint_id": key[1]}}


def _outlines(saver: Saver, config: RunnableConfig | None) -> dict[Any, _Outlines]:
    """The checkpoints of a thread, or of all, by thread. A thread's id is the source's, which need not be a string."""
    threads: defaultdict[Any, _Outlines] = defaultdict(dict)
    for stored in saver.list(config):
        at = stored.config["configurable"]
        parent = None if stored.parent_config is None else stored.parent_config["configurable"]["checkpoint_id"]
        writes = Counter((task, channel) for task, channel, _ in stored.pending_writes or ())
        threads[at["thread_id"]][at.get("checkpoint_ns", ""), at["checkpoint_id"]] = parent, writes
    return threads


def verbatim(saver: Saver, serde: SerializerProtocol) -> Saver:
    """A clone that deserialises values to plain data only, if `serde` would store them the same.

    Then no class of the application is called, and values whose class is not at hand or not allowed lose nothing.
    """
    inner = plain_serde(saver.serde)
    if not is_langgraphs(inner) or not is_langgraphs(plain_serde(serde)):
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
