"""The journal: deletions that were begun. They cover several stores, so what a crash leaves is completed from here.

A deletion is written down before anything is deleted, with the ids of all that goes. Each step is recorded in the
transaction that does it where that is possible, and may be repeated where not. What may point to a person is taken out
of the entry before files are purged, so that the purge takes its bytes along.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, delete, select

from agentmem.text import parse_json
from agentmem_sql.saver import SaverParts
from agentmem_sql.statements import add_rows


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(kw_only=True)
class JournalEntry:
    """A deletion that was begun.

    Attributes:
        operation: "forget subject", "forget thread" or "forget message".
        subject, actor: whose and by whom.
        phase: what comes next: "sql", "facts" or "files".
        threads: ids of threads that go, or of the one that a message goes from.
        facts: ids of facts that go.
        messages: ids of messages that go.
        head: the newest checkpoint when the deletion was planned.
        keep_checkpoints: whether checkpoints that hold a message are rewritten, and not removed.
        rebuilt_checkpoint: the checkpoint to go on from, serialised; None where the newest never held the message.
        went: what went from each thread, as in a receipt.
        rebuilt: as in a receipt.
        notes: what else the receipt has to say could not be reached.
    """

    operation: str
    subject: str | None
    actor: str
    subject_digest: str = ""
    id: str = field(default_factory=lambda: uuid4().hex)
    began: str = field(default_factory=now)
    phase: str = "sql"
    threads: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    head: str | None = None
    keep_checkpoints: bool = False
    rebuilt_checkpoint: bytes | None = None
    went: list[dict[str, Any]] = field(default_factory=list)
    rebuilt: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.subject is not None and not self.subject_digest:
            self.subject_digest = sha256(self.subject.encode("utf-8", "surrogatepass")).hexdigest()

    def without_names(self) -> JournalEntry:
        """The entry for the last phase: nothing in it says whose it was but the digest of the name."""
        kept = {each.name: getattr(self, each.name) for each in fields(self)}
        return JournalEntry(**{**kept, "subject": None, "threads": [], "rebuilt_checkpoint": None, "head": None})

    def to_bytes(self) -> bytes:
        """As stored, before encryption."""
        data = asdict(self)
        if self.rebuilt_checkpoint is not None:
            data["rebuilt_checkpoint"] = base64.b64encode(self.rebuilt_checkpoint).decode()
        return json.dumps(data).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> JournalEntry:
        """The inverse of `to_bytes`."""
        data = parse_json(body)
        if data["rebuilt_checkpoint"] is not None:
            data["rebuilt_checkpoint"] = base64.b64decode(data["rebuilt_checkpoint"])
        return cls(**data)


class Journal:
    """The journal of one database; every method but `pending` works in the caller's transaction."""

    def __init__(self, parts: SaverParts) -> None:
        self._database = parts.database
        self._protection = parts.protection
        self._table = parts.database.tables.journal

    def save(self, connection: Connection, entry: JournalEntry) -> None:
        """Store an entry, in place of its earlier version."""
        row = {"id": entry.id.encode(), "body": self._protection.encrypt(entry.to_bytes())}
        add_rows(connection, self._table, [row], replace=True)

    def remove(self, connection: Connection, entry: JournalEntry) -> None:
        """Remove an entry."""
        connection.execute(delete(self._table).where(self._table.c.id == entry.id.encode()))

    def pending(self) -> list[JournalEntry]:
        """The deletions that were begun and not completed, oldest first."""

        def read(connection: Connection) -> list[bytes]:
            return list(connection.execute(select(self._table.c.body)).scalars())

        bodies = self._database.run(read)
        entries = [JournalEntry.from_bytes(self._protection.decrypt(bytes(body))) for body in bodies]
        return sorted(entries, key=lambda entry: entry.began)
