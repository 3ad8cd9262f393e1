"""Reading the audit trail, and checking that its chains hold.

A chain holds if the numbers of its rows have no gap, the hash of each covers the row before it, and the last row is the
one that `audit_chains` names. Its beginning may be missing where a later row says so, with the hash that was there; and
what was private may be missing where a later row says that it was forgotten.

Without an hmac_key whoever can write to the database can also make a new chain that holds. What shows that is a copy of
the last hashes, kept elsewhere: `Trail.head`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Connection, delete, select, update

from agentmem.errors import ConfigError, StorageError
from agentmem.text import parse_json
from agentmem_sql.audit import START, Event, row_hash
from agentmem_sql.protection import Protection
from agentmem_sql.saver import SaverParts
from agentmem_sql.schema import thread_key

_EXPIRED = "expired"


@dataclass(frozen=True)
class AuditEntry:
    """A row of the audit trail.

    Attributes:
        seq: its number in the chain, from 1 on.
        time: when it was written.
        event: what was done.
        details: the rest, what is private included.
        redacted: whether what was private has been forgotten.
    """

    seq: int
    time: datetime
    event: str
    details: Mapping[str, Any]
    redacted: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"seq": self.seq, "time": self.time.isoformat(), "event": self.event, **self.details} | (
            {"redacted": True} if self.redacted else {}
        )


@dataclass(frozen=True)
class Trail:
    """A chain of the audit trail.

    Attributes:
        entries: its rows, oldest first.
        head: the number and the hash of the last row, hexadecimal, to be kept elsewhere; "" for an empty chain.
        problems: what is wrong with the chain, each in a sentence.
    """

    entries: tuple[AuditEntry, ...]
    head: str
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing was changed or removed."""
        return not self.problems


def read_trail(parts: SaverParts, chain: str | bytes) -> Trail:
    """Read and check a chain; `chain` is a thread's id or `DATABASE`."""
    return parts.database.run(partial(_read, parts=parts, chain=_key(chain)))


def redact_messages(connection: Connection, parts: SaverParts, thread: str, messages: Collection[str]) -> None:
    """Empty the column `private` of a thread's rows that name one of these messages, in the caller's transaction."""
    audit, wanted = parts.database.tables.audit, set(messages)
    of_chain = audit.c.chain == thread_key(thread)
    rows = connection.execute(select(audit.c.seq, audit.c.private).where(of_chain, audit.c.private.is_not(None))).all()
    for seq, private in rows:
        noted = parse_json(parts.protection.decrypt(bytes(private)))
        if wanted & {message[1] for message in noted.get("messages", ())}:
            connection.execute(update(audit).where(of_chain, audit.c.seq == seq).values(private=None))


def expire(parts: SaverParts, before: datetime, actor: str) -> int:
    """Remove older rows from every chain; see `Governor.expire_audit`."""
    if before.tzinfo is None:
        raise ConfigError(f"expected `before` with a time zone, found {before!r}; use datetime.now(UTC)")
    tables, limit = parts.database.tables, int(before.timestamp() * 1000)

    def chains(connection: Connection) -> list[bytes]:
        return [bytes(key) for key in connection.execute(select(tables.audit_chains.c.chain)).scalars()]

    def cut(connection: Connection, chain: bytes) -> int:
        of_chain = tables.audit.c.chain == chain
        rows = connection.execute(
            select(tables.audit.c.seq, tables.audit.c.hash, tables.audit.c.created)
            .where(of_chain)
            .order_by(tables.audit.c.seq)
        ).all()
        old = 0
        while old < len(rows) and rows[old].created < limit:
            old += 1
        if not old:
            return 0
        last = rows[old - 1]
        connection.execute(delete(tables.audit).where(of_chain, tables.audit.c.seq <= last.seq))
        public = {"through": last.seq, "hash": bytes(last.hash).hex(), "actor": actor}
        parts.audit.append(connection, chain, Event(_EXPIRED, public))
        return old

    keys = parts.database.run(chains)
    return sum(parts.database.run(partial(cut, chain=key), write=True) for key in keys)


def _key(chain: str | bytes) -> bytes:
    return thread_key(chain) if isinstance(chain, str) else chain


def _read(connection: Connection, parts: SaverParts, chain: bytes) -> Trail:
    tables, protection = parts.database.tables, parts.protection
    audit, chains = tables.audit, tables.audit_chains
    # First, so that a row written meanwhile is not taken for one too many.
    head = connection.execute(select(chains.c.seq, chains.c.hash).where(chains.c.chain == chain)).one_or_none()
    rows = connection.execute(select(audit).where(audit.c.chain == chain).order_by(audit.c.seq)).mappings().all()
    rows = [row for row in rows if head is None or row["seq"] <= head.seq]
    entries: list[AuditEntry] = []
    problems: list[str] = []
    last: bytes | None = None
    for row in rows:
        seq = row["seq"]
        expected = entries[-1].seq + 1 if entries else seq
        if seq != expected:
            problems.append(f"rows {expected} to {seq - 1} are missing")
            last = None
        try:
            body = protection.decrypt(bytes(row["body"]))
            private = None if row["private"] is None else protection.decrypt(bytes(row["private"]))
            details = {**parse_json(body), **({} if private is None else parse_json(private))}
        except (StorageError, ValueError, TypeError) as error:
            problems.append(f"row {seq} cannot be read: {error}")
            body, private, details = b"", None, {}
        digest = None if row["private_digest"] is None else bytes(row["private_digest"])
        if private is not None and protection.row_mac([private]) != digest:
            problems.append(f"what is private in row {seq} was changed")
        previous = START if seq == 1 else last
        if previous is not None and row_hash(protection, previous, row, body) != row["hash"]:
            problems.append(f"row {seq} was changed, or the one before it")
        last = bytes(row["hash"])
        details.pop("nonce", None)
        time = datetime.fromtimestamp(row["created"] / 1000, UTC)
        name = str(details.pop("event", ""))
        entries.append(AuditEntry(seq, time, name, details, digest is not None and private is None))
    problems += _beginning(entries, rows, protection) + _redactions(entries)
    if head is None and rows:
        problems.append("the chain's head is missing")
    if head is not None and head.seq and (not rows or (rows[-1]["seq"], bytes(rows[-1]["hash"])) != tuple(head)):
        problems.append(f"the last row should be number {head.seq}; rows at the end are missing or were changed")
    return Trail(tuple(entries), "" if last is None else f"{entries[-1].seq}:{last.hex()}", tuple(problems))


def _beginning(entries: list[AuditEntry], rows: Any, protection: Protection) -> list[str]:
    """What is wrong with a chain whose first rows are missing."""
    if not entries or entries[0].seq == 1:
        return []
    through, first = entries[0].seq - 1, rows[0]
    said = [entry.details for entry in entries if entry.event == _EXPIRED and entry.details.get("through") == through]
    if not said:
        return [f"rows 1 to {through} are missing, and no later row says that they expired"]
    last, body = bytes.fromhex(str(said[0].get("hash", ""))), protection.decrypt(bytes(first["body"]))
    if row_hash(protection, last, first, body) != first["hash"]:
        return [f"row {first['seq']} was changed, or does not follow the rows that expired"]
    return []


def _redactions(entries: list[AuditEntry]) -> list[str]:
    forgotten = max((entry.seq for entry in entries if entry.event == "forgotten"), default=0)
    return [
        f"what was private in row {entry.seq} is missing, and no later row says that it was forgotten"
        for entry in entries
        if entry.redacted and entry.seq > forgotten
    ]
