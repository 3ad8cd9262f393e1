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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from secrets import token_hex
from typing import Any, TypeVar

from langchain_core.messages import BaseMessage, RemoveMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, Checkpoint
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from sqlalchemy import Connection, bindparam, insert, select, update

from agentmem.telemetry import audited
from agentmem_sql.database import Work
from agentmem_sql.protection import Protection
from agentmem_sql.rows import Address, Row
from agentmem_sql.schema import DIGEST_BYTES, Tables, by, thread_key
from agentmem_sql.statements import add_rows

T = TypeVar("T")

DATABASE = bytes(DIGEST_BYTES)  # the chain of what concerns no single thread
START = bytes(DIGEST_BYTES)  # what the first row of a chain follows


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


class Audit:
    """Appends to the audit trail of one database."""

    def __init__(self, tables: Tables, protection: Protection) -> None:
        self._tables = tables
        self._protection = protection
        chains = tables.audit_chains
        self._head = select(chains.c.seq, chains.c.hash).where(by(chains, "chain")).with_for_update()
        advance = update(chains).where(chains.c.chain == bindparam("of"))
        self._advance = advance.values(seq=bindparam("to_seq"), hash=bindparam("to_hash"))

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
            encrypt = self._protection.encrypt
            row = {
                "chain": key,
                "seq": seq,
                "created": time.time_ns() // 1_000_000,
                "body": encrypt(body),
                "private": None if private is None else encrypt(private),
                "private_digest": None if private is None else self._protection.row_mac([private]),
            }
            last = row_hash(self._protection, last, row, body)
            rows.append({**row, "hash": last})
        connection.execute(insert(self._tables.audit), rows)
        connection.execute(self._advance, {"of": key, "to_seq": seq, "to_hash": last})
        for event in events:
            audited(event.name, event.public)

    def note(self, connection: Connection, chain: str | bytes, event: Event) -> None:
        """`append` an event, if the database has an audit trail."""
        if self._protection.audited:
            self.append(connection, chain, event)

    def noting(self, work: Work[T], thread_id: str, event: Event | None, first: Work[object] | None = None) -> Work[T]:
        """Work that also notes an event, unless it returns False; and what comes first in the same transaction."""

        def noted(connection: Connection) -> T:
            if first is not None:
                first(connection)
            result = work(connection)
            if event is not None and result is not False:
                self.note(connection, thread_id, event)
            return result

        return noted

    def redact(self, connection: Connection, thread_id: str) -> None:
        """Empty the column `private` of a thread's rows, in the caller's transaction."""
        audit = self._tables.audit
        connection.execute(update(audit).where(audit.c.chain == thread_key(thread_id)).values(private=None))

    def written(
        self, saver: BaseCheckpointSaver[str], config: RunnableConfig, checkpoint: Checkpoint, metadata: Row
    ) -> Event | None:
        """The event of a checkpoint that is about to be stored; None if it has no new message and no new memory.

        Checkpoints do not hold the values of delta channels: new there are the messages that were written under the
        parent (named by `config`), all of which LangGraph has stored before. `actor`, or else `user_id`, in the
        metadata says who acts.
        """
        address, values = Address.of(config), checkpoint["channel_values"]
        parent = None if address.id is None else saver.get_tuple(config)
        before = {} if parent is None else parent.checkpoint["channel_values"]
        known = {name: value["digest"] for name, value in before.items() if is_memory(value)}
        memories = {name: value["digest"] for name, value in values.items() if is_memory(value)}
        memories = {name: digest for name, digest in memories.items() if known.get(name) != digest}
        messages: list[BaseMessage] = []
        for name, value in values.items():
            if held := list(_messages(value)):
                earlier = before.get(name)
                if parent is not None and earlier is None and isinstance(value, _DeltaSnapshot):
                    history = saver.get_delta_channel_history(config=config, channels=[name])[name]
                    earlier = [history.get("seed"), *(written for _, _, written in history["writes"])]
                said = {message.id: _said(message) for message in _messages(earlier)}
                messages += [message for message in held if said.get(message.id) != _said(message)]
        if parent is not None:
            deltas = set(metadata.get("counters_since_delta_snapshot") or ()) - values.keys()
            pending = [value for _, name, value in parent.pending_writes or () if name in deltas]
            messages += _messages(pending)
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
                    "before": known.get(name),
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


def row_hash(protection: Protection, last: bytes, row: Row, body: bytes) -> bytes:
    """The hash of a row with this body: over the hash of the row before it, and all that is in it but `private`."""
    return protection.row_mac((last, row["chain"], row["seq"], row["created"], body, row["private_digest"]))


def message_digest(message: BaseMessage) -> str:
    """SHA-256 (hexadecimal) over who speaks, the content and the tool calls of a message."""
    said = [message.type, message.content, getattr(message, "tool_calls", []), getattr(message, "tool_call_id", "")]
    return sha256(json.dumps(said, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def is_memory(value: object) -> bool:
    """Whether a channel's value is a memory as `MemoryState.to_dict` gives it."""
    return isinstance(value, Mapping) and {"shape", "data", "digest"} <= value.keys()


def _messages(value: object) -> Iterator[BaseMessage]:
    """The messages in a value of a channel, or in what was written to it."""
    if isinstance(value, BaseMessage):
        if not isinstance(value, RemoveMessage):
            yield value
    elif isinstance(value, list | _DeltaSnapshot):
        for item in value.value if isinstance(value, _DeltaSnapshot) else value:
            yield from _messages(item)


def _said(message: BaseMessage) -> tuple[Any, ...]:
    said = vars(message)  # this runs for the whole history, and asking pydantic for what is not there is slow
    return said.get("type"), said.get("content"), said.get("tool_calls")


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), default=str).encode()
