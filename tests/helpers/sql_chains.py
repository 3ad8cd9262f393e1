"""Threads made by hand: checkpoints with chosen parents and delta channels; and what is left of them, by plain SQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint
from sqlalchemy import event

from agentmem_sql.list_tree import LEAVES, parse
from agentmem_sql.rows import unpack_content, witness
from tests.helpers.sql_cases import Sql, checkpoint, config


def made(values: Mapping[str, Any], deltas: str = "d") -> Checkpoint:
    """A checkpoint that holds `values`, and to which the channels named in `deltas` were written."""
    found = checkpoint(dict(values), "1.5")
    found["channel_versions"] |= dict.fromkeys(deltas.split(), "1.5")
    return found


def grow(
    saver: Any,
    parent: RunnableConfig | None = None,
    values: Mapping[str, Any] | None = None,
    *,
    thread: str = "t",
    ns: str = "",
    deltas: str = "d",
    **metadata: Any,
) -> RunnableConfig:
    """Store the child of a checkpoint (of the root, if none is given); gives its config."""
    one = made(values or {}, deltas)
    to = parent or config(thread, ns)
    found: RunnableConfig = saver.put(to, one, {"source": "loop", "step": 0, **metadata}, one["channel_versions"])
    return found


def write(saver: Any, at: RunnableConfig, *values: Any, channel: str = "d", task: str = "task", path: str = "") -> None:
    """What one task wrote to a channel, under a checkpoint."""
    saver.put_writes(at, [(channel, value) for value in values], task, path)


def id_of(at: RunnableConfig) -> str:
    found: str = at["configurable"]["checkpoint_id"]
    return found


def ids(saver: Any, thread: str = "t") -> set[str]:
    """The checkpoints of a thread, in all namespaces."""
    return {id_of(one.config) for one in saver.list({"configurable": {"thread_id": thread}})}


def history(saver: Any, at: RunnableConfig, channel: str = "d") -> tuple[Any, list[Any]]:
    """Seed (None if there is none) and written values of a channel."""
    found = saver.get_delta_channel_history(config=at, channels=[channel])[channel]
    return found.get("seed"), [value for _, _, value in found["writes"]]


@contextmanager
def statements(engine: Any) -> Iterator[list[str]]:
    """What an engine sends, `Engine` itself being all."""
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        found.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", note)


# The columns of every table that a thread's bytes are counted in.
COLUMNS = {
    "threads": ("key", "name"),
    "blobs": ("body",),
    "checkpoints": ("ns", "id", "ns_name", "parent", "run", "metadata", "body", "content", "history", "seal"),
    "writes": ("ns", "checkpoint", "task", "path", "channel", "digest", "seal"),
}


def all_rows(ask: Sql) -> dict[str, list[str]]:
    """Every row of every table."""
    return {name: sorted(map(repr, ask(f"SELECT * FROM agentmem_{name}"))) for name in (*COLUMNS, "settings")}


def stored_bytes(ask: Sql) -> int:
    """The bytes in the columns of every table."""
    found = 0
    for name, columns in COLUMNS.items():
        length = " + ".join(f"COALESCE(LENGTH(t.{column}), 0)" for column in columns)
        found += int(ask(f"SELECT COALESCE(SUM({length}), 0) FROM agentmem_{name} t")[0][0])
    return found


def unaccounted(ask: Sql) -> tuple[set[Any], set[Any]]:
    """Content that nothing refers to, and references to content that is not there, of all threads.

    Found with plain SQL and by following every reference: nothing of what sweeps or reads is asked.
    """
    bodies = {
        (thread, bytes(digest)): (kind, bytes(body))
        for thread, digest, kind, body in ask("SELECT thread, digest, kind, body FROM agentmem_blobs")
    }
    wanted = {(thread, bytes(digest)) for thread, digest in ask("SELECT thread, digest FROM agentmem_writes")}
    for thread, *key, content, left in ask("SELECT thread, ns, id, content, history FROM agentmem_checkpoints"):
        wanted |= {(thread, digest) for digest in unpack_content(bytes(content)).values()}
        wanted.add((thread, witness(*map(bytes, key))))
        if left is not None:
            wanted.add((thread, bytes(left)))
    reached: set[Any] = set()
    while wanted:
        reached |= wanted
        inner = [(at[0], bodies[at]) for at in wanted if at in bodies and bodies[at][0] not in LEAVES]
        wanted = {(thread, link) for thread, (kind, body) in inner for link in parse(kind, body[1:]).links} - reached
    return bodies.keys() - reached, reached - bodies.keys()
