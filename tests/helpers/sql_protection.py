"""For the SQL tests: databases with some of everything, by how they are protected, and somebody who changes them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.list_tree import VALUE, WITNESS
from agentmem_sql.protection import Protection
from agentmem_sql.rows import pack_content, seal_checkpoint, unpack_content
from tests.helpers.sql_cases import checkpoint, config, memory, put
from tests.helpers.sql_values import spelled

Change = Callable[[sqlite3.Connection], object]

HMAC_KEY = bytes(range(32))
LONG_NS = "outer:1|" * 40  # longer than a key column


def aes(key: bytes = b"0123456789abcdef", serde: JsonPlusSerializer | None = None) -> EncryptedSerializer:
    return EncryptedSerializer.from_pycryptodome_aes(serde or JsonPlusSerializer(), key=key)


PROTECTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "hmac": {"hmac_key": HMAC_KEY},
    "encrypted": {"serde": aes()},
    "both": {"serde": aes(), "hmac_key": HMAC_KEY},
}


def fill(saver: SQLAlchemySaver) -> list[RunnableConfig]:
    """Threads with everything that can be stored; gives what can be asked for."""
    messages = [HumanMessage(f"question {number} " * 4, id=f"{number}") for number in range(40)]
    made = checkpoint({"d": "seed"})
    at = saver.put(config(), made, {"source": "input", "run_id": "run 1"}, {"d": 1})  # type: ignore[typeddict-unknown-key]
    saver.put_writes(at, [("d", "first"), ("d", "second")], "task a", "path")
    later = checkpoint({"messages": messages, "x": memory(1), "short": ["a", 1, None]})
    later["channel_versions"]["d"] = 2
    at = saver.put(at, later, {"source": "loop", "run_id": "run 2"}, later["channel_versions"])  # type: ignore[typeddict-unknown-key]
    saver.prune(["t"])  # what the first left for the delta channel `d` is kept with the second
    saver.put_writes(at, [("x", memory(2)), ("messages", messages[:20])], "task b", "path")
    saver.put_writes(at, [("y", 1)], "task c")
    newest = put(saver, at, {"messages": messages[1:], "x": memory(3)}, run_id="run 2")
    long = put(saver, config(ns=LONG_NS), {"x": memory(4)})
    saver.put_writes(long, [("x", 1), ("x", memory(7))], "task d", "path")
    put(saver, config(ns="sub:1"), {"x": memory(8)})
    other = put(saver, config("other"), {"x": memory(5), "messages": messages[:3]})
    saver.put_writes(other, [("x", memory(6))], "task b")
    return [at, newest, long, other]


def observe(saver: SQLAlchemySaver, asked: list[RunnableConfig]) -> dict[str, Any]:
    """Everything that can be read, each by itself; a StorageError stands for what it was raised by."""

    def one(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except StorageError as error:
            return error

    found = {f"get {number}": one(lambda at=at: saver.get_tuple(at)) for number, at in enumerate(asked)}
    for name, at in {"newest": config(), "newest of other": config("other"), "of long": config(ns=LONG_NS)}.items():
        found[name] = one(lambda at=at: saver.get_tuple(at))
    found["list"] = one(lambda: list(saver.list(None)))
    found["list of run"] = one(lambda: list(saver.list(config(), filter={"run_id": "run 2"})))
    for number in (0, 1):
        at = asked[number]
        found[f"history {number}"] = one(lambda at=at: saver.get_delta_channel_history(config=at, channels=["d"]))
    return found


def parts(answers: dict[str, Any]) -> set[str]:
    """What answers are made of: checkpoints, pending writes each by itself, seeds and writes of histories."""
    found = set()
    for name, answer in answers.items():
        if isinstance(answer, StorageError) or answer is None:
            continue
        if name.startswith("history"):
            history = answer["d"]
            found.update(f"written {spelled(write)}" for write in history["writes"])
            found.update(f"seed {spelled(history[key])}" for key in history if key == "seed")
            continue
        for one in answer if isinstance(answer, list) else [answer]:
            found.add(f"checkpoint {spelled(one._replace(pending_writes=None))}")
            found.update(f"pending {spelled(one.config)} {spelled(write)}" for write in one.pending_writes)
    return found


@dataclass
class Filled:
    """A database in a file's bytes, how to open it, what to ask of it, and the answers."""

    data: bytes
    options: dict[str, Any]
    asked: list[RunnableConfig]
    answers: dict[str, Any]

    def rows(self, table: str, column: str) -> list[tuple[int, bytes | int]]:
        """The column by row, of content every kind once; without witnesses, which only a missing checkpoint needs."""
        where = f"AND kind <> {WITNESS} GROUP BY kind" if table == "blobs" else ""
        query = f"SELECT rowid, {column} FROM agentmem_{table} WHERE length({column}) > 0 {where} ORDER BY rowid"
        with closing(self._connect()) as connection:
            return connection.execute(query).fetchall()

    def after(self, change: Change, **options: Any) -> dict[str, Any]:
        """The answers of a fresh saver to whom the database is shown after somebody changed it."""
        connection = self._connect()
        change(connection)
        connection.commit()
        engine_options = {"creator": lambda: connection}
        with SQLAlchemySaver.from_url("sqlite://", engine_options=engine_options, **(options or self.options)) as saver:
            return observe(saver, self.asked)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        connection.deserialize(self.data)
        return connection


def make_filled(path: Path, protection: str) -> Filled:
    """A database with some of everything."""
    options = PROTECTION[protection]
    with (
        patch("agentmem_sql.list_tree.PART_BYTES", 8000),  # of a value in several rows, too
        SQLAlchemySaver.from_url(f"sqlite:///{path}", **options) as saver,
    ):
        asked = fill(saver)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    found = Filled(path.read_bytes(), options, asked, {})
    found.answers = found.after(lambda connection: None)
    assert not [one for one in found.answers.values() if isinstance(one, StorageError) or not one]
    return found


def update(table: str, where: str, **columns: object) -> Change:
    """Somebody writes to rows of a table."""
    named = ", ".join(f"{name} = ?" for name in columns)
    statement = f"UPDATE agentmem_{table} SET {named} WHERE {where}"

    def change(connection: sqlite3.Connection) -> None:
        assert connection.execute(statement, tuple(columns.values())).rowcount > 0

    return change


def exchange(table: str, columns: str, one: str, other: str) -> Change:
    """Two rows get each other's columns."""

    def change(connection: sqlite3.Connection) -> None:
        connection.row_factory = sqlite3.Row
        both = [
            connection.execute(f"SELECT * FROM agentmem_{table} WHERE {where}").fetchone() for where in (one, other)
        ]
        connection.row_factory = None
        names = columns.split(", ")
        assert [both[0][name] for name in names] != [both[1][name] for name in names]
        for row in both:
            connection.execute(f"DELETE FROM agentmem_{table} WHERE {where_is(row)}", tuple(row))
        for row, source in zip(both, both[::-1], strict=True):
            new = {**dict(row), **{name: source[name] for name in names}}
            marks = ", ".join("?" * len(new))
            connection.execute(f"INSERT INTO agentmem_{table} ({', '.join(new)}) VALUES ({marks})", tuple(new.values()))

    return change


def where_is(row: sqlite3.Row) -> str:
    return " AND ".join(f"{name} IS ?" for name in dict(row))


def of(thread: str) -> str:
    return f"thread = (SELECT number FROM agentmem_threads WHERE name = CAST('{thread}' AS BLOB))"


NEWEST = f"{of('t')} AND length(ns) = 0 AND history IS NULL"
OLDER = f"{of('t')} AND length(ns) = 0 AND history IS NOT NULL"
LONG = f"{of('t')} AND length(ns) > 0"
WRITE = f"{of('t')} AND task = CAST('task b' AS BLOB)"


def forge(
    connection: sqlite3.Connection,
    protection: Protection,
    *,
    body: bytes = b"bytes\0forged",
    alone: bool = False,
) -> None:
    """Put another value in place of `x` in the newest checkpoint of thread `t`, all digests and seals made anew.

    `alone`: and take out all other values.
    """
    connection.row_factory = sqlite3.Row
    row = dict(connection.execute(f"SELECT * FROM agentmem_checkpoints WHERE {NEWEST}").fetchone())
    connection.row_factory = None
    digest = protection.digest(VALUE, body)
    blob = (row["thread"], digest, VALUE, protection.encrypt(body))
    connection.execute("INSERT INTO agentmem_blobs (thread, digest, kind, body) VALUES (?, ?, ?, ?)", blob)
    others = {} if alone else unpack_content(row["content"])
    row["content"] = pack_content({**others, "x": digest})
    seal = seal_checkpoint(protection, "t", row)
    update("checkpoints", NEWEST, content=row["content"], seal=seal)(connection)
