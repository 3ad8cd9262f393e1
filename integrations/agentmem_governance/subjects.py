"""Which threads and facts belong to whom.

By default the subject of a thread is the part of its id before the first `/`, or the whole id where there is none; a
fact belongs to the subject of its thread. Rules in the database say otherwise, for an exact thread id, for a value of
`user_id` in the metadata of checkpoints and facts, or for the source of facts. An exact id comes first, then `user_id`,
then the default.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, delete, select

from agentmem.errors import ConfigError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.rows import check_ids, decode_metadata
from agentmem_sql.saver import plain_serde
from agentmem_sql.schema import decode_text, encode_text
from agentmem_sql.statements import add_rows

if TYPE_CHECKING:
    from agentmem_chroma import Fact, FactStore

USER_ID = "user_id"
"""The key of metadata that a rule may go by."""

EVERY = "*"
"""In a rule for `user_id`: each value is a subject of its own name."""

_KINDS = ("thread", USER_ID, "source")


@dataclass(frozen=True)
class Subject:
    """A subject, with what belongs to it now.

    Attributes:
        name: its name.
        threads: the ids of its threads, sorted.
        facts: how many facts it has.
    """

    name: str
    threads: tuple[str, ...]
    facts: int


@dataclass(frozen=True)
class Ownership:
    """Who owns what at one moment: subjects by the ids of threads, and facts by their subjects."""

    threads: Mapping[str, str]
    facts: Mapping[str, list[Fact]]

    def subjects(self) -> list[Subject]:
        """All subjects, by name."""
        owned: defaultdict[str, list[str]] = defaultdict(list)
        for thread, subject in self.threads.items():
            owned[subject].append(thread)
        names = sorted({*owned, *self.facts})
        return [Subject(name, tuple(sorted(owned[name])), len(self.facts.get(name, ()))) for name in names]

    def threads_of(self, subject: str) -> list[str]:
        """The ids of a subject's threads, sorted."""
        return sorted(thread for thread, owner in self.threads.items() if owner == subject)


class SubjectRules:
    """The rules of one database, and what follows from them."""

    def __init__(self, saver: SQLAlchemySaver, facts: FactStore | None) -> None:
        self._saver = saver
        self._facts = facts
        self._tables = saver.parts.database.tables

    def assign(self, subject: str, kind: str, values: Iterable[str]) -> None:
        """Store rules of one kind; a rule for the same value is replaced.

        Raises:
            ConfigError: the subject or a value is no text, or empty; or `values` is a single one.
        """
        rows = [
            {
                "kind": kind.encode(),
                "key": sha256(encode_text(value)).digest(),
                "value": encode_text(value),
                "subject": encode_text(subject),
            }
            for value in map(checked, check_ids(values, kind.replace("_", " ")))
        ]
        checked(subject)

        def store(connection: Connection) -> None:
            add_rows(connection, self._tables.subjects, rows, replace=True)

        self._saver.parts.database.run(store, write=True)

    def remove(self, connection: Connection, subject: str) -> None:
        """Remove the rules of a subject, in the caller's transaction."""
        rules = self._tables.subjects
        connection.execute(delete(rules).where(rules.c.subject == encode_text(subject)))

    def of(self, subject: str) -> list[tuple[str, str]]:
        """The rules of a subject: kinds and values."""
        rules = self._saver.parts.database.run(self._read_rules)
        return sorted((kind, value) for kind in rules for value, owner in rules[kind].items() if owner == subject)

    def ownership(self) -> Ownership:
        """Who owns what now. Reads the ids of all threads, and all facts."""
        run = self._saver.parts.database.run
        rules = run(self._read_rules)
        threads = dict.fromkeys(run(self._read_threads), "")
        by_user = run(self._read_users) if rules[USER_ID] else {}
        for thread in threads:
            threads[thread] = self._owner(rules, thread, by_user.get(thread))
        facts: defaultdict[str, list[Fact]] = defaultdict(list)
        for fact in () if self._facts is None else self._facts.facts():
            owner = rules["source"].get(fact.source) or (
                threads[fact.thread]
                if fact.thread in threads and USER_ID not in fact.metadata
                else self._owner(rules, fact.thread, fact.metadata.get(USER_ID))
            )
            if owner:
                facts[owner].append(fact)
        return Ownership(threads, facts)

    @staticmethod
    def _owner(rules: Mapping[str, Mapping[str, str]], thread: str, user: Any) -> str:
        """The subject of a thread's id and a `user_id`; "" for a fact that has neither."""
        if thread in rules["thread"]:
            return rules["thread"][thread]
        if user is not None:
            by_user = rules[USER_ID].get(str(user)) or (str(user) if EVERY in rules[USER_ID] else "")
            if by_user:
                return by_user
        return thread.partition("/")[0]

    def _read_rules(self, connection: Connection) -> dict[str, dict[str, str]]:
        rules: dict[str, dict[str, str]] = {kind: {} for kind in _KINDS}
        table = self._tables.subjects
        for kind, value, subject in connection.execute(select(table.c.kind, table.c.value, table.c.subject)):
            rules.setdefault(bytes(kind).decode(), {})[decode_text(value)] = decode_text(subject)
        return rules

    def _read_threads(self, connection: Connection) -> list[str]:
        return [decode_text(name) for name in connection.execute(select(self._tables.threads.c.name)).scalars()]

    def _read_users(self, connection: Connection) -> dict[str, Any]:
        """The `user_id` in the metadata of each thread's newest checkpoint, for threads that have one."""
        threads, checkpoints = self._tables.threads, self._tables.checkpoints
        others = checkpoints.alias()
        newest = (
            select(others.c.id)
            .where(others.c.thread == threads.c.number, others.c.ns == b"")
            .order_by(others.c.id.desc())
            .limit(1)
            .correlate(threads)
            .scalar_subquery()
        )
        rows = connection.execute(
            select(threads.c.name, *checkpoints.c)
            .join_from(threads, checkpoints, checkpoints.c.thread == threads.c.number)
            .where(checkpoints.c.ns == b"", checkpoints.c.id == newest)
        ).mappings()
        protection, users = self._saver.parts.protection, dict[str, Any]()
        for row in rows:
            thread = decode_text(row["name"])
            metadata: Mapping[str, Any] = decode_metadata(protection, plain_serde(self._saver.serde), thread, row)
            if metadata.get(USER_ID) is not None:
                users[thread] = metadata[USER_ID]
        return users


def checked(name: str) -> str:
    """A name that is text and not empty.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"expected a subject, thread id, user id or source as text, found {name!r}")
    return name
