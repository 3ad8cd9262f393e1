"""What each method of the saver does with the database: the operations of a checkpointer.

Values are packed before and unpacked after the work that needs a connection, so the caller's code never runs inside a
transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
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

from agentmem.errors import ConfigError, StorageError
from agentmem_sql.content import Unpacker
from agentmem_sql.database import Database
from agentmem_sql.delta_channels import AncestorReader
from agentmem_sql.mark_sweep import Sweeper
from agentmem_sql.message_cache import CachedThread, ChannelHeads, DecodeTemplates, ThreadCache
from agentmem_sql.protection import Protection
from agentmem_sql.prune import Pruner, all_but_newest
from agentmem_sql.reader import Listing, LoadedCheckpoint, Reader
from agentmem_sql.rows import Address, Encoded, encode_checkpoint, encode_writes, to_tuple
from agentmem_sql.schema import Tables
from agentmem_sql.serializer import is_langgraphs
from agentmem_sql.statements import MOST_CONTENT, MOST_ROWS
from agentmem_sql.writer import Locked, WriteConflict, WriteMode, Writer

_ATTEMPTS = 8
# Attempts that rely on what is known of the thread. Where it is pruned all the time, nothing is left out after them,
# so that nothing can be wrong.
_RELYING = 4


class Store:
    """The threads of one database; shared by a saver and its clones, which differ in their serializers."""

    def __init__(
        self, engine: Any, *, tables: Tables, protection: Protection, cache_bytes: int, **options: Any
    ) -> None:
        """Open nothing yet; the engine and the options are those of `Database`, `cache_bytes` of the cache."""
        self.protection = protection
        self.cache = ThreadCache(cache_bytes)
        self.database = Database(engine, tables=tables, protection=protection, cache=self.cache, **options)
        # A clone of the saver has another serializer, which may read the same bytes as something else.
        self._templates: WeakKeyDictionary[SerializerProtocol, DecodeTemplates] = WeakKeyDictionary()
        self.reader = Reader(tables, protection, self.cache)
        self.ancestors = AncestorReader(self.reader, protection)
        self.sweeper = Sweeper(tables, protection)
        self.writer = Writer(tables, protection, self.sweeper)
        self.pruner = Pruner(self.database, protection, self.cache, self.writer, self.ancestors, self.sweeper)
        self._keyed = not protection.encrypts

    # Writing.

    def put(
        self,
        serde: SerializerProtocol,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint and the channels in `new_versions`; gives its config."""
        merged = get_checkpoint_metadata(config, metadata)
        encode = partial(encode_checkpoint, serde, self.protection, checkpoint, merged, new_versions)
        return self._write(serde, config, encode, self.writer.put_checkpoint, WriteMode.INSERT, checkpoint["id"])

    def put_writes(
        self,
        serde: SerializerProtocol,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str,
    ) -> None:
        """Store what a task wrote."""
        if not writes:
            return

        def encode(address: Address, known: CachedThread, _parents: ChannelHeads) -> Encoded:
            return encode_writes(serde, self.protection, writes, task_id, task_path, address, known)

        # Writes to special channels replace what the task had there, and a task that was resumed writes its results
        # together with the answers: what is there already is looked for first.
        special = any(channel in WRITES_IDX_MAP for channel, _ in writes)
        mode = WriteMode.CHECK if special else WriteMode.INSERT
        self._write(serde, config, encode, self.writer.put_writes, mode)

    def _write(
        self,
        serde: SerializerProtocol,
        config: RunnableConfig,
        encode: Callable[[Address, CachedThread, ChannelHeads], Encoded],
        put: Callable[..., Locked | None],
        mode: WriteMode,
        checkpoint_id: str = "",
    ) -> RunnableConfig:
        """Encode and write, again if it must be in another mode; gives the config of the checkpoint, if it is one.

        Raises:
            StorageError: others changed the thread every time.
        """
        if not self._keyed:  # what digests are keyed with is kept in an encrypted database
            self.database.run(lambda _: None)
            self._keyed = True
        address = Address.of(config)
        for attempt in range(_ATTEMPTS):
            relying = attempt < _RELYING
            known = self.cache.get(address.thread) if relying else CachedThread()
            parents: ChannelHeads | None = None
            if relying and checkpoint_id and address.id is not None:
                parents = known.heads.get((address.ns, address.id))
                if parents is None and (
                    stored := self.database.run(partial(self.reader.row, serde=serde, address=address))
                ):
                    known, parents = stored.known, stored.checkpoint.heads
            new = encode(address, known, parents or {})
            if mode is WriteMode.INSERT and new.packer.known.number is None:
                mode = WriteMode.CHECK
            small = len(new.packer.new) <= MOST_CONTENT and len(new.rows) <= MOST_ROWS
            write = partial(put, thread_id=address.thread, new=new, mode=mode, in_one=small)
            try:
                locked = self.database.run(write, write=True, autocommit=small and mode is WriteMode.INSERT)
            except WriteConflict as conflict:
                if conflict.mode is WriteMode.CHECK:
                    self.cache.drop(address.thread)
                if mode is not WriteMode.EXCLUSIVE:
                    mode = conflict.mode
                continue
            if locked is not None:
                contents = new.packer.stored()
                known = self.cache.at(address.thread, *locked)
                known.add_new(contents, new.packer.snapshots)
                if new.heads is not None:
                    known.remember_channels(address.ns, checkpoint_id, new.heads)
            return address.config(checkpoint_id)
        raise StorageError(
            f"thread {address.thread[:80]!r} was changed by others {_ATTEMPTS} times while something was being stored "
            "in it; nothing was stored, try again"
        )

    # Reading.

    def get_tuple(self, serde: SerializerProtocol, config: RunnableConfig) -> CheckpointTuple | None:
        """A checkpoint, or None."""
        stored = self.database.run(partial(self.reader.find, serde=serde, address=Address.of(config)))
        return None if stored is None else self._tuple(serde, stored)

    def list(
        self,
        serde: SerializerProtocol,
        config: RunnableConfig | None,
        filter: Mapping[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints, newest first; between pages nothing is held open."""
        listing = Listing(self.reader, serde, config, filter=filter, before=before, limit=limit)
        while not listing.finished:
            for stored in self.database.run(listing.next_page):
                yield self._tuple(serde, stored)

    def _tuple(self, serde: SerializerProtocol, stored: LoadedCheckpoint) -> CheckpointTuple:
        return to_tuple(stored.checkpoint, serde, stored.known, self._templates_of(serde))

    def _templates_of(self, serde: SerializerProtocol) -> DecodeTemplates | None:
        """What messages may be decoded by without the serializer; None where it may do something of the caller's."""
        if not is_langgraphs(serde) or getattr(serde, "_custom_unpack_ext_hook", True):
            return None
        return self._templates.get(serde) or self._templates.setdefault(serde, DecodeTemplates())

    def delta_history(
        self, serde: SerializerProtocol, config: RunnableConfig, channels: Sequence[str]
    ) -> dict[str, DeltaChannelHistory]:
        """Seed and writes of delta channels."""
        if not channels:
            return {}
        read = partial(self.ancestors.read, address=Address.of(config), channels=[*dict.fromkeys(channels)])
        stored = self.database.run(read)
        if stored is None:
            return {name: DeltaChannelHistory(writes=[]) for name in channels}
        histories, contents, known = stored
        unpacker = Unpacker(serde, contents, known, self._templates_of(serde))
        result: dict[str, DeltaChannelHistory] = {}
        for name, history in histories.items():
            values = unpacker.unpack_all([digest for _, digest in history.writes])
            writes = [(task, name, value) for (task, _), value in zip(history.writes, values, strict=True)]
            result[name] = DeltaChannelHistory(writes=writes)
            if history.seed is not None:
                result[name]["seed"] = unpacker.unpack(history.seed)
        return result

    # Taking out and copying.

    def delete_thread(self, thread_id: str) -> None:
        """Remove everything of a thread."""
        self.database.run(partial(self.writer.delete_thread, thread_id=thread_id), write=True)
        self.cache.drop(thread_id)

    def prune(self, serde: SerializerProtocol, thread_ids: Sequence[str], strategy: str) -> None:
        """Keep the newest checkpoint of each namespace, or nothing; each thread in a transaction of its own."""
        if strategy not in ("keep_latest", "delete"):
            raise ConfigError(f"expected the strategy 'keep_latest' or 'delete', found {strategy!r}")
        for thread_id in thread_ids:
            if strategy == "delete":
                self.delete_thread(thread_id)
            else:
                self.pruner.remove(serde, thread_id, all_but_newest)
