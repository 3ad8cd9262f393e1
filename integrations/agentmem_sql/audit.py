"""The audit trail: what was done to a thread, by whom and when, in the transaction that does it.

Each thread has a chain of rows. The hash of a row covers the row before it (a MAC, if the database has an hmac_key), so
a row that is changed, or removed from the middle, shows; `audit_chains` holds the number and the hash of the last one.
A chain a thread, and not one for the database, since the writers of a chain take turns: runs of different threads do
not wait for each other. The chain under `DATABASE` tells of what concerns no single thread.

No text of messages is in it. What may still point to a person (the thread's id, digests of messages, which short texts
could be guessed from, names and sources of facts) stands in the column `private`, and the hash covers only its digest:
when the thread is forgotten the column is emptied, and the chain still holds.

Whether a database has an audit trail is one of its settings, so that every process that writes to it keeps it.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from secrets import token_hex
from typing import Any, NamedTuple, TypeVar

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, CheckpointTuple
from sqlalchemy import Connection, bindparam, insert, select, update

from agentmem.telemetry import audited
from agentmem_sql.database import Database
from agentmem_sql.message_cache import ThreadCache
from agentmem_sql.protection import Protection
from agentmem_sql.prune import Pruner, ThreadRetention
from agentmem_sql.rows import Address
from agentmem_sql.schema import DIGEST_BYTES, Tables, by, thread_key
from agentmem_sql.statements import add_rows
from agentmem_sql.writer import Writer

T = TypeVar("T")

DATABASE = bytes(DIGEST_BYTES)
"""The chain of what concerns no single thread."""

START = bytes(DIGEST_BYTES)
"""What the first row of a chain follows."""

_KEPT = 256  # checkpoints of which the contents are known, so that what is new in the next one can be told


@dataclass(frozen=True)
class Event:
    """Something that was done.

    Attributes:
        name: "written", "pruned", "deleted", "copied", "forgotten", "exported", "inspected" and so on.
        public: plain data for JSON; stays for as long as the row.
        private: plain data for JSON that goes when the thread is forgotten.
    """

    name: str
    public: Mapping[str, Any] = field(default_factory=dict)
    private: Mapping[str, Any] = field(default_factory=dict)


class SaverParts(NamedTuple):
    """What a saver is made of, for packages that do more in its transactions."""

    database: Database
    protection: Protection
    cache: ThreadCache
    writer: Writer
    pruner: Pruner
    audit: Audit


class _Contents(NamedTuple):
    """What a checkpoint held: the memory's digest by channel, and a hash of each message by its channel and id."""

    memories: Mapping[str, str]
    messages: Mapping[tuple[str, Any], int]


class Audit:
    """Appends to the audit trail of one database."""

    def __init__(self, tables: Tables, protection: Protection, pruner: Pruner) -> None:
        pruner.on_removal = self._note_removal
        self._tables = tables
        self._protection = protection
        chains = tables.audit_chains
        self._head = select(chains.c.seq, chains.c.hash).where(by(chains, "chain")).with_for_update()
        advance = update(chains).where(chains.c.chain == bindparam("of"))
        self._advance = advance.values(seq=bindparam("to_seq"), hash=bindparam("to_hash"))
        self._contents: OrderedDict[tuple[str, str, str], _Contents] = OrderedDict()

    def append(self, connection: Connection, chain: str | bytes, *events: Event) -> None:
        """Append events to a chain, in the caller's transaction; `chain` is a thread's id or `DATABASE`."""
        key = thread_key(chain) if isinstance(chain, str) else chain
        head = connection.execute(self._head, {"chain": key}).one_or_none()
        if head is None:
            add_rows(connection, self._tables.audit_chains, [{"chain": key, "seq": 0, "hash": START}], replace=False)
            head = connection.execute(self._head, {"chain": key}).one()
        seq, last = head
        rows: list[dict[str, Any]] = []
        for event in events:
            seq += 1
            body, private = _json({"event": event.name, **event.public}), None
            if event.private:
                # The nonce keeps the digest from confirming guesses when the rest has gone.
                private = _json({**event.private, "nonce": token_hex(16)})
            created = time.time_ns() // 1_000_000
            private_digest = None if private is None else self._protection.row_mac([private])
            last = row_hash(self._protection, last, key, seq, created, body, private_digest)
            encrypt = self._protection.encrypt
            rows.append(
                {
                    "chain": key,
                    "seq": seq,
                    "created": created,
                    "body": encrypt(body),
                    "private": None if private is None else encrypt(private),
                    "private_digest": private_digest,
                    "hash": last,
                }
            )
        connection.execute(insert(self._tables.audit), rows)
        connection.execute(self._advance, {"of": key, "to_seq": seq, "to_hash": last})
        for event in events:
            audited(event.name, event.public)

    def noting(self, work: Callable[[Connection], T], thread_id: str, event: Event) -> Callable[[Connection], T]:
        """Work that also appends an event, if the database has an audit trail and the work does not return False."""

        def noted(connection: Connection) -> T:
            result = work(connection)
            if self._protection.audited and result is not False:
                self.append(connection, thread_id, event)
            return result

        return noted

    def _note_removal(self, connection: Connection, taken: ThreadRetention) -> None:
        """Append that checkpoints were removed from a thread, if the database has an audit trail."""
        if self._protection.audited:
            event = Event("pruned", {"checkpoints": taken.removed, "left": taken.kept})
            self.append(connection, taken.thread_id, event)

    def redact(self, connection: Connection, thread_id: str) -> None:
        """Empty the column `private` of a thread's rows, in the caller's transaction."""
        audit = self._tables.audit
        connection.execute(update(audit).where(audit.c.chain == thread_key(thread_id)).values(private=None))

    def drop(self, thread_id: str) -> None:
        """Know nothing more of a thread, whose checkpoints were rewritten."""
        for key in [key for key in list(self._contents) if key[0] == thread_id]:
            self._contents.pop(key, None)

    def written(
        self,
        open_database: Callable[[], None],
        read: Callable[[RunnableConfig], CheckpointTuple | None],
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: Mapping[str, Any],
    ) -> Event | None:
        """The event of a checkpoint that is about to be stored; None if it has no new message and no new memory, or
        the database has no audit trail.

        Messages in a delta channel are not seen: LangGraph gives a saver only what they are made from.

        Args:
            open_database: called where it was not opened yet, so that it is not known whether it has one.
            read: gives a stored checkpoint; called if the parent is not known here.
            config: names the parent.
            checkpoint: what is stored.
            metadata: its metadata; `actor`, or else `user_id`, says who acts.
        """
        if self._protection.audited is None:
            open_database()
        if not self._protection.audited:
            return None
        address = Address.of(config)
        parent = None if address.id is None else self._known(read, config, address)
        values = checkpoint["channel_values"]
        now, before = _contents_of(values), parent or _Contents({}, {})
        self._remember((address.thread, address.ns, checkpoint["id"]), now)
        memories = {name: digest for name, digest in now.memories.items() if before.memories.get(name) != digest}
        messages = [
            message
            for name, value in values.items()
            for message in _messages(value)
            if before.messages.get((name, message.id)) != now.messages[name, message.id]
        ]
        if not memories and not messages:
            return None
        noted = [message.response_metadata for message in messages if message.response_metadata]
        tokens = [note["memory"] for note in noted if isinstance(note.get("memory"), Mapping)]
        shown = [fact for note in noted for fact in note.get("facts") or () if isinstance(fact, Mapping)]
        public: dict[str, Any] = {
            "checkpoint": checkpoint["id"],
            "parent": address.id,
            "memory": [
                {
                    "channel": name,
                    "before": before.memories.get(name),
                    "after": digest,
                    "model": values[name].get("model_fingerprint"),
                    "adapter": values[name].get("adapter_fingerprint"),
                }
                for name, digest in memories.items()
            ],
            "messages": len(messages),
            "facts": len(shown),
        }
        if address.ns:
            public["namespace"] = address.ns
        if tokens:
            public["written"] = sum(int(note.get("written") or 0) for note in tokens)
            public["read"] = sum(int(note.get("read") or 0) for note in tokens)
        private = {
            "thread": address.thread,
            "actor": metadata.get("actor") or metadata.get("user_id"),
            "messages": [[message.type, message.id, message_digest(message)] for message in messages],
            "facts": [{"id": fact.get("id"), "source": fact.get("source")} for fact in shown],
        }
        return Event("written", public, private)

    def _known(
        self, read: Callable[[RunnableConfig], CheckpointTuple | None], config: RunnableConfig, address: Address
    ) -> _Contents | None:
        contents = self._contents.get((address.thread, address.ns, address.id or ""))
        if contents is None and (stored := read(config)) is not None:
            contents = _contents_of(stored.checkpoint["channel_values"])
        return contents

    def _remember(self, key: tuple[str, str, str], contents: _Contents) -> None:
        self._contents[key] = contents
        while len(self._contents) > _KEPT:
            try:
                self._contents.popitem(last=False)
            except KeyError:  # another thread was first
                break


def row_hash(
    protection: Protection,
    last: bytes,
    chain: bytes,
    seq: int,
    created: int,
    body: bytes,
    private_digest: bytes | None,
) -> bytes:
    """The hash of a row: over the hash of the row before it and everything in it but `private` itself."""
    return protection.row_mac((last, chain, seq, created, body, private_digest))


def message_digest(message: BaseMessage) -> str:
    """SHA-256 (hexadecimal) over who speaks, the content and the tool calls of a message."""
    said = [message.type, message.content, getattr(message, "tool_calls", []), getattr(message, "tool_call_id", "")]
    return sha256(json.dumps(said, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def is_memory(value: object) -> bool:
    """Whether a channel's value is a memory as `MemoryState.to_dict` gives it."""
    return isinstance(value, Mapping) and {"shape", "data", "digest"} <= value.keys()


def _contents_of(values: Mapping[str, Any]) -> _Contents:
    memories = {name: str(value["digest"]) for name, value in values.items() if is_memory(value)}
    messages = {
        (name, message.id): hash((message.type, repr(message.content), repr(getattr(message, "tool_calls", None))))
        for name, value in values.items()
        for message in _messages(value)
    }
    return _Contents(memories, messages)


def _messages(value: object) -> Iterator[BaseMessage]:
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, BaseMessage))


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), default=str).encode()
