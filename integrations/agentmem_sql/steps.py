"""What each method of the saver does, written once for threads and for tasks.

A method is a generator. It yields the work that needs a connection, and is sent what that returned, or thrown
what it raised; whoever drives it does the work in a thread or awaits it. Values are packed before and unpacked
after, so the caller's code never runs inside a transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    get_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy import Connection

from agentmem.errors import ConfigError, StorageError
from agentmem_sql.cache import Body, Cache, Held_by, Thread
from agentmem_sql.codec import Address, encode_checkpoint, encode_writes, replaces, to_tuple
from agentmem_sql.database import Database
from agentmem_sql.delta_channels import AncestorReader
from agentmem_sql.ids import check_id, check_ids
from agentmem_sql.mark_sweep import Sweeper
from agentmem_sql.packing import Packer, Unpacker
from agentmem_sql.prune import Copier, Pruner, all_but_newest
from agentmem_sql.reading import Found, Reader
from agentmem_sql.shapes import Shapes, reads_as_written
from agentmem_sql.tables import Tables
from agentmem_sql.vault import Vault
from agentmem_sql.writing import NeedsLockError, New, StaleCacheError, Writer

T = TypeVar("T")

_ATTEMPTS = 8
# Attempts that rely on what is known of the thread. Where it is pruned all the time, nothing is left out after them,
# so that nothing can be wrong.
_TRUSTING = 4


class Job(NamedTuple):
    """Work on a connection; in one transaction if it writes, which one statement may be by itself."""

    work: Callable[[Connection], Any]
    write: bool = False
    single: bool = False


Steps = Generator[Job, Any, T]


class Store:
    """Everything a saver knows about its database except how to reach it; shared by a saver and its clones."""

    def __init__(self, tables: Tables, vault: Vault, cache_bytes: int) -> None:
        self.vault = vault
        self.cache = Cache(cache_bytes)
        # A clone of the saver has another serializer, which may read the same bytes as something else.
        self._shapes: WeakKeyDictionary[SerializerProtocol, Shapes] = WeakKeyDictionary()
        self.reader = Reader(tables, vault, self.cache)
        self.ancestors = AncestorReader(self.reader, vault)
        self.sweeper = Sweeper(tables, vault)
        self.writer = Writer(tables, vault, self.sweeper)
        self.pruner = Pruner(tables, vault, self.cache, self.writer, self.ancestors, self.sweeper)
        self.copier = Copier(tables, vault, self.writer, self.pruner)
        self._keyed = not vault.encrypts

    # Writing.

    def put(
        self,
        serde: SerializerProtocol,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> Steps[RunnableConfig]:
        """Store a checkpoint and the channels in ``new_versions``; gives its config."""
        yield from self._key()
        address = Address.of(config)
        alone = looking = False
        for attempt in range(_ATTEMPTS):
            parents: Held_by
            if attempt < _TRUSTING:
                known, parents = yield from self._parents(serde, address)
            else:
                known, parents = Thread(), {}
            packer = Packer(serde, self.vault, known, trusting=bool(parents))
            merged = get_checkpoint_metadata(config, metadata)
            row, held = encode_checkpoint(packer, serde, self.vault, address, checkpoint, merged, new_versions, parents)
            new = New(address.thread, packer.new, known, packer.trusting, looking)
            try:
                work = partial(self.writer.put_checkpoint, new=new, row=row, alone=alone)
                thread = yield Job(work, write=True, single=new.fits([row]) and not alone)
            except StaleCacheError:
                self.cache.drop(address.thread)
                looking = True
            except NeedsLockError:
                alone = True
            else:
                after = self.cache.at(address.thread, *thread)
                packer.remember(after)
                after.hold(address.ns, checkpoint["id"], held)
                return address.config(checkpoint["id"])
        raise _too_often(address)

    def _key(self) -> Steps[None]:
        """Open an encrypted database before anything is packed: what digests are keyed with may be kept in it."""
        if not self._keyed:
            yield Job(_nothing)
            self._keyed = True

    def _parents(self, serde: SerializerProtocol, address: Address) -> Steps[tuple[Thread, Held_by]]:
        """What is known of a thread, and what the channels of the parent hold."""
        known = self.cache.get(address.thread)
        if address.id is None:
            return known, {}
        held = known.held(address.ns, address.id)
        if held is None:
            found: Found | None = yield Job(partial(self.reader.row, serde=serde, address=address))
            if found is not None:
                return found.known, found.checkpoint.held
        return known, held or {}

    def put_writes(
        self,
        serde: SerializerProtocol,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> Steps[None]:
        """Store what a task wrote."""
        if not writes:
            return
        yield from self._key()
        address = Address.of(config)
        put, replace, alone = self.writer.put_writes, replaces(writes), False
        # A task that was resumed writes its results together with the answers, which are there already.
        looking = any(channel in WRITES_IDX_MAP for channel, _ in writes)
        for attempt in range(_ATTEMPTS):
            known = self.cache.get(address.thread) if attempt < _TRUSTING else Thread()
            packer = Packer(serde, self.vault, known)
            rows = encode_writes(packer, self.vault, address, writes, task_id, task_path)
            new = New(address.thread, packer.new, known, packer.trusting, looking)
            try:
                work = partial(put, new=new, rows=rows, replace=replace, alone=alone)
                thread = yield Job(work, write=True, single=new.fits(rows) and not replace)
            except StaleCacheError:
                self.cache.drop(address.thread)
                looking = True
            except NeedsLockError:
                alone = True
            else:
                # Alone, what was left out came along as well, and was swept away again.
                if thread is not None and not alone:
                    packer.remember(self.cache.at(address.thread, *thread))
                return
        raise _too_often(address)

    # Reading.

    def get_tuple(self, serde: SerializerProtocol, config: RunnableConfig) -> Steps[CheckpointTuple | None]:
        """A checkpoint, or None."""
        found: Found | None = yield Job(partial(self.reader.find, serde=serde, address=Address.of(config)))
        return None if found is None else self.unpack(serde, found)

    def unpack(self, serde: SerializerProtocol, found: Found) -> CheckpointTuple:
        """What was read, as LangGraph wants it."""
        return to_tuple(self._unpacker(serde, found.checkpoint.contents, found.known), found.checkpoint)

    def _unpacker(self, serde: SerializerProtocol, contents: Mapping[bytes, Body], known: Thread) -> Unpacker:
        if not reads_as_written(serde):
            return Unpacker(serde, contents, known)
        shapes = self._shapes.get(serde)
        if shapes is None:
            shapes = self._shapes.setdefault(serde, Shapes())
        return Unpacker(serde, contents, known, shapes)

    def delta_history(
        self, serde: SerializerProtocol, config: RunnableConfig, channels: Sequence[str]
    ) -> Steps[dict[str, DeltaChannelHistory]]:
        """Seed and writes of delta channels."""
        if not channels:
            return {}
        read = partial(self.ancestors.read, address=Address.of(config), channels=list(dict.fromkeys(channels)))
        found = yield Job(read)
        if found is None:
            return {name: DeltaChannelHistory(writes=[]) for name in channels}
        histories, contents, known = found
        unpack = self._unpacker(serde, contents, known).unpack
        result: dict[str, DeltaChannelHistory] = {}
        for name, one in histories.items():
            result[name] = DeltaChannelHistory(writes=[(task, name, unpack(digest)) for task, digest in one.writes])
            if one.seed is not None:
                result[name]["seed"] = unpack(one.seed)
        return result

    # Taking out and copying.

    def delete_thread(self, database: Database, thread_id: str) -> None:
        """Remove everything of a thread."""
        thread_id = check_id(thread_id)
        database.run(partial(self.writer.delete_thread, thread_id=thread_id), write=True)
        self.cache.drop(thread_id)

    def delete_for_runs(self, database: Database, serde: SerializerProtocol, run_ids: Collection[str]) -> None:
        """Remove the checkpoints of runs."""
        if wanted := check_ids(run_ids, "run id"):
            self.pruner.delete_runs(database, serde, wanted)

    def prune(self, database: Database, serde: SerializerProtocol, thread_ids: Sequence[str], strategy: str) -> None:
        """Keep the newest checkpoint of each namespace, or nothing; each thread in a transaction of its own."""
        if strategy not in ("keep_latest", "delete"):
            raise ConfigError(f"expected the strategy 'keep_latest' or 'delete', found {strategy!r}")
        for thread_id in check_ids(thread_ids):
            if strategy == "delete":
                self.delete_thread(database, thread_id)
            else:
                self.pruner.remove(database, serde, thread_id, all_but_newest)

    def copy_thread(self, database: Database, source_id: str, target_id: str) -> None:
        """Copy a thread."""
        source_id, target_id = check_id(source_id), check_id(target_id)
        database.run(partial(self.copier.copy, source_id=source_id, target_id=target_id), write=True)


def _nothing(_connection: Connection) -> None:
    """The work of a call that only wants the database open."""


def _too_often(address: Address) -> StorageError:
    return StorageError(
        f"thread {address.thread[:80]!r} was changed by others {_ATTEMPTS} times while something was being stored "
        "in it; nothing was stored, try again"
    )
