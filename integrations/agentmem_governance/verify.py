"""Comparing a receipt with the databases: nothing of what went may be back."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import Connection, func, select

from agentmem_governance.message_search import holds_any, stored_in
from agentmem_governance.receipt import Receipt, Verification
from agentmem_governance.trail import read_trail
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.audit import DATABASE
from agentmem_sql.schema import decode_text

if TYPE_CHECKING:
    from agentmem_chroma import FactStore


def verify(saver: SQLAlchemySaver, facts: FactStore | None, receipt: Receipt, key: bytes | None) -> Verification:
    """Compare a receipt with what is there; see `Governor.verify`."""
    if receipt.signature is None:
        signature = "absent"
    elif key is None:
        signature = "not checked"
    else:
        signature = "valid" if receipt.is_signed_by(key) else "invalid"
    back: list[str] = []
    gone = {checkpoint for thread in receipt.threads for checkpoint in thread["ids"]}
    keys = {bytes.fromhex(thread["thread"]) for thread in receipt.threads}
    finished = datetime.fromisoformat(receipt.time).timestamp() * 1000
    tables = saver.parts.database.tables

    def look(connection: Connection) -> tuple[set[str], dict[bytes, tuple[str, int | None]]]:
        checkpoints, threads = tables.checkpoints, tables.threads
        ids = connection.execute(select(checkpoints.c.id)).scalars()
        found = gone & {decode_text(bytes(each)) for each in ids} if gone else set()
        oldest = select(func.min(checkpoints.c.created)).where(checkpoints.c.thread == threads.c.number)
        rows = connection.execute(select(threads.c.key, threads.c.name, oldest.scalar_subquery()))
        there = {bytes(key): (decode_text(bytes(name)), created) for key, name, created in rows if bytes(key) in keys}
        return found, there

    found, there = saver.parts.database.run(look)
    if found:
        back.append(f"{len(found)} checkpoints that went are in the database, {sorted(found)[0]} among them")
    for name, created in there.values():
        if receipt.operation != "forget message" and created is not None and created < finished:
            back.append(f"the thread {name!r} has checkpoints from before the receipt")
        messages = set(receipt.messages)
        if messages and any(holds_any(saver, stored, messages) for stored in stored_in(saver, name)):
            back.append(f"a message that was forgotten is in the thread {name!r}")
    if receipt.facts and facts is not None:
        again = facts.get(receipt.facts)
        if again:
            back.append(f"{len(again)} facts that went are in the store, {again[0].id} among them")
    return Verification(signature, tuple(back), _noted(saver, receipt), wanted=key is not None)


def _noted(saver: SQLAlchemySaver, receipt: Receipt) -> str:
    """Whether the audit trail knows this receipt; it may be older than what the trail keeps."""
    noted = [
        entry.details.get("digest")
        for entry in read_trail(saver.parts, DATABASE).entries
        if entry.event == "forgotten" and entry.details.get("receipt") == receipt.id
    ]
    if not noted:
        return "absent"
    return "same" if noted[-1] == receipt.digest else "another"
