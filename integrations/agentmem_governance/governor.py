"""`Governor`: lists, forgets, verifies and accounts for what belongs to a subject, over both stores.

A deletion is planned, written into the journal, and then completed in three phases: rows of the SQL database, facts,
files. A process that is killed leaves its entry in the journal; `resume` completes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, func, select

from agentmem.errors import ConfigError, StorageError
from agentmem_governance.export import Export, Exported, fact_arguments, write_export
from agentmem_governance.journal import Journal, JournalEntry, now
from agentmem_governance.purge import empty_log, overwrite, purge
from agentmem_governance.rebuild import MessageRemoval
from agentmem_governance.receipt import Receipt, Verification
from agentmem_governance.signing import receipt_key, signing_key
from agentmem_governance.subjects import EVERY, USER_ID, Subject, SubjectRules, checked
from agentmem_governance.trail import Trail, expire, read_trail, redact_messages
from agentmem_governance.verify import verify
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.audit import DATABASE, Event
from agentmem_sql.rows import check_id
from agentmem_sql.schema import decode_text, thread_key

if TYPE_CHECKING:
    from datetime import datetime

    from agentmem import Engine
    from agentmem_chroma import FactStore

_OTHER_PROCESSES = (
    "the memory of other processes: prefills and stale KV of engines that this Governor was not given, and threads "
    "that were read lately; call forget_prefills() there, or end them"
)

_SERVER_FACTS = (
    "what the Chroma server keeps of deleted facts in its directory; stop it, open the directory by its path, and "
    "delete something there"
)


class Governor:
    """Governs the threads of a saver and the facts of a store.

        governor = Governor(saver, facts=store, actor="support@example.org")
        receipt = governor.forget("ada")

    Args:
        saver: the threads.
        facts: the facts, if there are any.
        engines: engines in this process; their caches are emptied, and the first one that wrote a memory builds it
            anew.
        actor: who acts, for receipts and the audit trail.
        key: what receipts are signed with: at least 16 secret bytes, or an Ed25519 private key as PEM (extra `sign`).
            Its public key, or the same secret, checks them.

    Raises:
        ConfigError: the key cannot be used.
        MissingExtraError: the key is PEM, and `cryptography` is not installed.
    """

    def __init__(
        self,
        saver: SQLAlchemySaver,
        *,
        facts: FactStore | None = None,
        engines: Sequence[Engine] = (),
        actor: str = "",
        key: bytes | None = None,
    ) -> None:
        if key is not None:
            receipt_key(key)
        saver.setup()
        self.saver = saver
        self.facts = facts
        self.engines = tuple(engines)
        self.actor = actor
        self._key = key
        self._parts = saver.parts
        self._journal = Journal(self._parts)
        self._rules = SubjectRules(saver, facts)

    # Subjects.

    def subjects(self) -> list[Subject]:
        """All subjects that own a thread or a fact, by name. Reads the ids of all threads, and all facts."""
        return self._rules.ownership().subjects()

    def assign(
        self,
        subject: str,
        *,
        threads: Iterable[str] = (),
        user_ids: Iterable[str] = (),
        sources: Iterable[str] = (),
    ) -> None:
        """Say what belongs to a subject where names do not say it; the last word counts.

        Args:
            subject: the subject.
            threads: exact ids of threads, also in facts.
            user_ids: values of `user_id` in the metadata of checkpoints (LangGraph takes it from `config`) and facts.
            sources: sources of facts.

        Raises:
            ConfigError: a name is no text, or empty; or a single string was passed where several are meant.
        """
        for kind, values in (("thread", threads), (USER_ID, user_ids), ("source", sources)):
            self._rules.assign(subject, kind, values)

    def assign_by_user_id(self) -> None:
        """Let each `user_id` in metadata be a subject of that name, unless `assign` says otherwise."""
        self._rules.assign(EVERY, USER_ID, [EVERY])

    # Forgetting.

    def forget(
        self,
        subject: str | None = None,
        *,
        thread: str | None = None,
        message: str | None = None,
        with_reply: bool = True,
        keep_checkpoints: bool = False,
        rewrite: bool = True,
    ) -> Receipt:
        """Forget a subject, a thread, or one message of a thread, so that nothing of it is left within reach.

        Of a subject go: its threads with checkpoints, memories, pending writes and content; its facts; the rules that
        name it; and what the audit trail holds of persons. Of a thread the same goes, but for the rules.

        Of a message go: every checkpoint that holds it or comes after one that does, and the facts whose metadata
        name it (`{"message": id}`). If the thread's newest checkpoint is among them, the thread goes on from a new one:
        with the other messages, and a memory that an engine has written from the zero state without this one. With
        `keep_checkpoints` they stay, each under its id, and each is rewritten without the message, with a memory that
        never consumed it.

        In all cases the caches of the engines are emptied and the files rewritten (see `purge`).

        Args:
            subject: whose threads and facts.
            thread: the thread, or that of the message.
            message: the message's id.
            with_reply: the answers to it (all up to the next human message) go too.
            keep_checkpoints: rewrite the checkpoints that hold the message, or come after one that does. An engine
                writes the memory of each anew.
            rewrite: on a server, write the tables anew, which locks them; otherwise the receipt says what stays.

        Raises:
            ConfigError: neither a subject nor a thread was named, or both, or one that is no text; or the thread has a
                memory, and no engine was given that can build it anew; or the key is a public one.
            StateMismatchError: the engines were not the ones that wrote the memory.
            StorageError: the database reports an error; the thread has no such message; or earlier deletions are not
                complete (see `resume`).
        """
        of_message = message is not None and thread is not None
        if (subject is None) == (thread is None) or ((message is not None or keep_checkpoints) and not of_message):
            raise ConfigError("expected forget(subject), or forget(thread=...), with message=... or not, found another")
        # Before anything is noted in the journal: an entry that cannot be completed would hold up all later ones.
        subject = None if subject is None else checked(subject)
        thread = None if thread is None else check_id(thread)
        message = None if message is None else check_id(message, "message id")
        self._check_signing()
        if pending := self.pending():
            raise StorageError(
                f"expected no deletion under way, found {len(pending)} that began at {pending[0]}; if no other process "
                "is at it, call resume(), which completes them and gives their receipts"
            )
        if subject is not None:
            ownership = self._rules.ownership()
            entry = JournalEntry(operation="forget subject", subject=subject, actor=self.actor)
            entry.threads = ownership.threads_of(subject)
            entry.facts = [fact.id for fact in ownership.facts.get(subject, ())]
        elif message is None:
            assert thread is not None
            entry = JournalEntry(operation="forget thread", subject=self._owner(thread), actor=self.actor)
            entry.threads = [thread]
            if self.facts is not None:
                entry.facts = [fact.id for fact in self.facts.facts(thread=thread)]
        else:
            assert thread is not None
            entry = JournalEntry(operation="forget message", subject=self._owner(thread), actor=self.actor)
            entry.threads, entry.keep_checkpoints = [thread], keep_checkpoints
            MessageRemoval(self.saver, self.engines, thread).plan(entry, message, with_reply=with_reply)
            if self.facts is not None:
                drawn = self.facts.facts(filter={"message": {"$in": entry.messages}})
                entry.facts = [fact.id for fact in drawn]
        self._write(lambda connection: None, entry)
        return self._complete(entry, rewrite=rewrite)

    def pending(self) -> list[str]:
        """When deletions began that are not complete: another process is at it, or was killed."""
        return [entry.began for entry in self._journal.pending()]

    def resume(self, *, rewrite: bool = True) -> list[Receipt]:
        """Complete the deletions that were begun by processes that ended, and give their receipts.

        Raises:
            ConfigError: facts are to go, and this Governor has no fact store; or a thread went on after the deletion
                was planned, or its checkpoints are rewritten, and no engine was given that can build its memory anew.
        """
        self._check_signing()
        return [self._complete(entry, rewrite=rewrite) for entry in self._journal.pending()]

    def _check_signing(self) -> None:
        """Refuse before anything is deleted that no receipt could be signed for."""
        if self._key is not None:
            signing_key(self._key)

    def _owner(self, thread: str) -> str | None:
        return self._rules.ownership().threads.get(thread)

    def _write(self, work: Callable[[Connection], None], entry: JournalEntry) -> None:
        """Do work and record how far the entry is, in one transaction."""

        def both(connection: Connection) -> None:
            overwrite(connection)
            work(connection)
            self._journal.save(connection, entry)

        self._parts.database.run(both, write=True)

    def _complete(self, entry: JournalEntry, *, rewrite: bool) -> Receipt:
        if entry.facts and self.facts is None and entry.phase != "files":
            raise ConfigError(
                f"a deletion that began at {entry.began} takes {len(entry.facts)} facts along, and this Governor has "
                "no fact store; pass facts="
            )
        if entry.phase == "sql":
            self._forget_rows(entry)
        if entry.phase == "facts":
            if self.facts is not None and entry.facts:
                self.facts.delete(entry.facts)
                self.facts.rebuild_index()  # a vector tells much of its text
            entry.phase = "files"
            kept, entry = entry, entry.without_names()
            self._write(lambda connection: None, entry)
            entry.subject = kept.subject  # for the receipt; not stored any more
        return self._finish(entry, rewrite)

    def _forget_rows(self, entry: JournalEntry) -> None:
        if entry.operation == "forget message":
            removal = MessageRemoval(self.saver, self.engines, entry.threads[0])
            removal.complete(entry, partial(self._write, entry=entry))
            self._write(partial(self._note_message, entry=entry), entry)
        else:
            done = {went["thread"] for went in entry.went}
            for thread in entry.threads:
                if thread_key(thread).hex() not in done:
                    self._forget_thread(entry, thread)
        entry.phase = "facts"
        self._write(partial(self._remove_rules, entry=entry), entry)

    def _remove_rules(self, connection: Connection, entry: JournalEntry) -> None:
        if entry.operation == "forget subject" and entry.subject is not None:
            self._rules.remove(connection, entry.subject)

    def _forget_thread(self, entry: JournalEntry, thread: str) -> None:
        """Delete a thread and record what went, in one transaction."""

        def work(connection: Connection) -> None:
            locked = self._parts.writer.find(connection, thread, lock=True)
            went = _measure(connection, self._parts, thread, locked.number if locked else None)
            self._parts.writer.delete_thread(connection, thread)
            self._note(connection, thread, entry, checkpoints=went["checkpoints"])
            if self._parts.protection.audited:
                self._parts.audit.redact(connection, thread)
            # Not by `append`: the transaction may run again.
            entry.went = [*(each for each in entry.went if each["thread"] != went["thread"]), went]

        self._write(work, entry)
        self._parts.cache.drop(thread)

    def _note_message(self, connection: Connection, entry: JournalEntry) -> None:
        if self._parts.protection.audited:
            redact_messages(connection, self._parts, entry.threads[0], entry.messages)
        rewritten = sum(len(went.get("rewritten", ())) for went in entry.went)
        self._note(connection, entry.threads[0], entry, messages=len(entry.messages), rewritten=rewritten)

    def _note(self, connection: Connection, chain: str | bytes, entry: JournalEntry, **more: Any) -> None:
        public = {"receipt": entry.id, "actor": entry.actor, "operation": entry.operation, **more}
        self._parts.audit.note(connection, chain, Event("forgotten", public))

    def _finish(self, entry: JournalEntry, rewrite: bool) -> Receipt:
        for engine in self.engines:
            engine.forget_prefills()
            engine.message_cache.clear()
        purged = purge(self._parts, rewrite=rewrite)
        done, left = list(purged.done), [*entry.notes, *purged.not_reached]
        if entry.facts and self.facts is not None:
            if self.facts.is_local:
                done.append("Chroma: the files were rewritten and the index built anew")
            else:
                left.insert(0, _SERVER_FACTS)
        if self.engines:
            done.append("engines of this process: prefills, stale KV and seen messages were dropped")
        left.insert(0, _OTHER_PROCESSES)
        receipt = Receipt(
            id=entry.id,
            operation=entry.operation,
            subject=entry.subject,
            subject_digest=entry.subject_digest,
            time=now(),
            began=entry.began,
            actor=entry.actor,
            database=self._parts.database.url,
            threads=tuple(entry.went),
            messages=tuple(entry.messages),
            facts=tuple(entry.facts),
            rebuilt=tuple(entry.rebuilt),
            purged=tuple(done),
            not_reached=tuple(left),
        )

        def remove(connection: Connection) -> None:
            overwrite(connection)
            self._note(connection, DATABASE, entry, digest=receipt.digest)
            self._journal.remove(connection, entry)

        self._parts.database.run(remove, write=True)
        empty_log(self._parts)
        return receipt if self._key is None else receipt.signed(self._key)

    # Exporting.

    def export(self, subject: str, path: str | Path) -> Exported:
        """Write everything that belongs to a subject into a zip file (see `agentmem_governance.export`).

        Raises:
            StorageError: stored data is damaged, or the database reports an error.
        """
        ownership = self._rules.ownership()
        threads, facts = ownership.threads_of(checked(subject)), ownership.facts.get(subject, [])
        trails = {thread: self.audit(thread) for thread in threads}
        done = write_export(path, self.saver, subject, threads, facts, trails, self._rules.of(subject))
        self._note_all(threads, Event("exported", {"export": done.digest, "actor": self.actor}))
        return done

    def restore(self, path: str | Path) -> Exported:
        """Bring an export back, here or elsewhere. What is there already is left alone.

        Raises:
            ConfigError: it holds facts, and this Governor has no fact store.
            TransferError: a thread went on here in another way since the export.
            StorageError: the file is no export, or a part of it was changed or damaged.
        """
        export = Export(path)
        if export.facts and self.facts is None:
            raise ConfigError(f"expected a fact store for the {len(export.facts)} facts of the export, found none")
        copied = export.into(self.saver)
        if self.facts is not None and export.facts:
            from agentmem_chroma import Fact

            self.facts.add([Fact(**fact_arguments(fact)) for fact in export.facts])
        for kind, value in export.rules:
            self._rules.assign(export.subject, kind, [value])
        threads = [str(thread["thread"]) for thread in export.threads]
        self._note_all(threads, Event("imported", {"export": export.digest, "actor": self.actor}))
        return Exported(export.subject, len(threads), copied.checkpoints, len(export.facts), export.digest)

    def _note_all(self, threads: Sequence[str], event: Event) -> None:
        """Note something in the chain of each thread, and in that of the database."""
        chains: list[str | bytes] = [*threads, DATABASE]
        for chain in chains:
            self._parts.database.run(partial(self._parts.audit.note, chain=chain, event=event), write=True)

    # Accounting.

    def verify(self, receipt: Receipt) -> Verification:
        """Compare a receipt with the database and the fact store: its signature, and whether something is back."""
        return verify(self.saver, self.facts, receipt, self._key)

    def audit(self, thread: str | None = None) -> Trail:
        """The audit trail of a thread, or what concerns no single thread; says whether the chain holds."""
        return read_trail(self._parts, DATABASE if thread is None else check_id(thread))

    def note_inspection(self, thread: str) -> None:
        """Note in the audit trail that the actor looks into a thread."""
        self._note_all([check_id(thread)], Event("inspected", {"actor": self.actor}))

    def expire_audit(self, before: datetime) -> int:
        """Remove rows of the audit trail that are older; what is left of each chain still holds. Gives their number.

        Raises:
            ConfigError: `before` has no time zone.
        """
        return expire(self._parts, before, self.actor)


def _measure(connection: Connection, parts: Any, thread: str, number: int | None) -> dict[str, Any]:
    """What a thread holds, as in a receipt."""
    tables = parts.database.tables
    went: dict[str, Any] = {
        "thread": thread_key(thread).hex(),
        "checkpoints": 0,
        "writes": 0,
        "contents": 0,
        "bytes": 0,
    }
    if number is None:
        return {**went, "ids": [], "digest": ""}
    checkpoints, writes, blobs = tables.checkpoints, tables.writes, tables.blobs
    ids = connection.execute(select(checkpoints.c.id).where(checkpoints.c.thread == number)).scalars()
    went["ids"] = sorted({decode_text(bytes(each)) for each in ids})
    count = select(func.count()).select_from(checkpoints).where(checkpoints.c.thread == number)
    went["checkpoints"] = connection.execute(count).scalar_one()
    count = select(func.count()).select_from(writes).where(writes.c.thread == number)
    went["writes"] = connection.execute(count).scalar_one()
    contents = select(blobs.c.digest, func.length(blobs.c.body)).where(blobs.c.thread == number)
    rows = sorted((bytes(digest), int(size)) for digest, size in connection.execute(contents))
    went["contents"], went["bytes"] = len(rows), sum(size for _, size in rows)
    went["digest"] = sha256(b"".join(digest for digest, _ in rows)).hexdigest()
    return went
