"""The audit trail that a saver keeps: what is noted, in which transaction, and that a put without it pays nothing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import _messages_delta_reducer
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from agentmem.errors import StorageError
from agentmem_sql import Retention, SQLAlchemySaver
from agentmem_sql.audit import message_digest
from agentmem_sql.schema import MIGRATIONS
from tests.helpers.sql_cases import BACKENDS, NewUrl, Sql, config, get, put
from tests.sql.conftest import on_sqlite

ROWS = "SELECT body, private FROM agentmem_audit ORDER BY chain, seq"
MEMORY = {"shape": [1, 1, 2, 2], "data": b"", "model_fingerprint": "m", "adapter_fingerprint": "a"}


def memory(digest: str) -> dict[str, Any]:
    return {**MEMORY, "digest": digest}


def events(rows: list[Any]) -> list[dict[str, Any]]:
    """The events of audit rows as stored without encryption (behind a zero byte)."""
    return [json.loads(bytes(body)[1:]) | json.loads(bytes(private or b"\0{}")[1:]) for body, private in rows]


def say(saver: SQLAlchemySaver, at: Any, said: list[Any], digest: str, **metadata: Any) -> Any:
    return put(saver, at, {"messages": said, "memory": memory(digest)}, **metadata)


def test_a_turn_is_noted_with_what_it_wrote_read_and_was_shown(database_url: str, ask: Sql) -> None:
    question = HumanMessage("What is the secret?", id="q")
    note = {"memory": {"digest": "d2", "written": 7, "read": 3}, "facts": [{"number": 1, "id": "f", "source": "s.md"}]}
    reply = AIMessage("Kestrel.", id="r", response_metadata=note)
    with SQLAlchemySaver.from_url(database_url, audit=True) as saver:
        first = say(saver, config("ada/1"), [question], "d1")
        second = say(saver, first, [question, reply], "d2", user_id="ada")
        say(saver, second, [question, reply], "d2")  # nothing new
    written, replied = events(ask(ROWS))
    assert (written["event"], written["messages"][0][:2], written["memory"][0]["before"]) == (
        "written",
        ["human", "q"],
        None,
    )
    assert replied["memory"] == [
        {"channel": "memory", "before": "d1", "after": "d2", "model": "m", "adapter": "a"},
    ]
    assert replied["checkpoint"] == second["configurable"]["checkpoint_id"]
    assert (replied["written"], replied["read"], replied["actor"]) == (7, 3, "ada")
    assert replied["facts"] == [{"id": "f", "source": "s.md"}]
    assert [message[:2] for message in replied["messages"]] == [["ai", "r"]]
    parts = [part for row in ask("SELECT * FROM agentmem_audit") for part in row]
    stored = b"".join(part if isinstance(part, bytes) else b"" for part in parts)
    assert b"Kestrel" not in stored
    assert b"secret" not in stored


class Delta(TypedDict):
    messages: Annotated[list[AnyMessage], DeltaChannel(_messages_delta_reducer, snapshot_frequency=3)]


@on_sqlite
@pytest.mark.parametrize("durability", ["sync", "exit"])
def test_messages_of_delta_channels_are_listed(database_url: str, ask: Sql, durability: Any) -> None:
    """Each of them once, also where a snapshot is stored, and by another process."""
    builder = StateGraph(Delta).add_node("reply", lambda state: {"messages": [AIMessage("Yes.")]})
    builder.add_edge(START, "reply").add_edge("reply", END)
    at, said = config("ada/1"), list[BaseMessage]()
    for number in range(5):
        with SQLAlchemySaver.from_url(database_url, audit=True) as saver:
            graph = builder.compile(checkpointer=saver)
            graph.invoke({"messages": [("user", f"question {number}")]}, at, durability=durability)
            said = graph.get_state(at).values["messages"]
    noted = [message for entry in events(ask(ROWS)) for message in entry["messages"]]
    assert noted == [[message.type, message.id, message_digest(message)] for message in said]
    assert len(noted) == 10


@on_sqlite
def test_another_process_tells_what_is_new_too(database_url: str, ask: Sql) -> None:
    with SQLAlchemySaver.from_url(database_url, audit=True) as saver:
        at = say(saver, config(), [HumanMessage("one", id="1")], "d1")
    with SQLAlchemySaver.from_url(database_url) as saver:  # the database keeps its trail, whoever opens it
        say(saver, at, [HumanMessage("one", id="1"), HumanMessage("two", id="2")], "d1")
    assert [message[1] for entry in events(ask(ROWS)) for message in entry["messages"]] == ["1", "2"]


def test_removals_are_noted_where_something_was_removed(database_url: str, ask: Sql) -> None:
    with SQLAlchemySaver.from_url(database_url, audit=True) as saver:
        at = config()
        for number in range(4):
            at = put(saver, at, {"x": number})
        saver.retain(Retention(max_checkpoints=2))
        saver.prune(["t"])
        saver.prune(["t"])
        saver.retain(Retention(idle=timedelta(days=1)))
        saver.delete_thread("t")
        saver.delete_thread("t")
    noted = [(entry["event"], entry.get("checkpoints")) for entry in events(ask(ROWS))]
    assert noted == [("pruned", 2), ("pruned", 1), ("deleted", None)]


def test_checkpoint_and_row_are_stored_together_or_not_at_all(database_url: str, ask: Sql) -> None:
    with SQLAlchemySaver.from_url(database_url, audit=True) as saver:
        at = say(saver, config(), [HumanMessage("one", id="1")], "d1")
        engine = saver.parts.database._transactions.engine  # type: ignore[union-attr]

        def fail(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if "INTO agentmem_audit " in statement.replace("`", "").replace('"', ""):
                raise OperationalError(statement, None, Exception("disk full"))

        event.listen(engine, "before_cursor_execute", fail)
        with pytest.raises(StorageError):
            say(saver, at, [HumanMessage("one", id="1"), HumanMessage("two", id="2")], "d2")
        event.remove(engine, "before_cursor_execute", fail)
        assert get(saver, config()).config["configurable"]["checkpoint_id"] == at["configurable"]["checkpoint_id"]
    assert len(ask(ROWS)) == 1


@on_sqlite
def test_without_it_nothing_is_noted(database_url: str, ask: Sql) -> None:
    with SQLAlchemySaver.from_url(database_url) as saver:
        say(saver, config(), [HumanMessage("one", id="1")], "d1")
        saver.delete_thread("t")
    assert ask(ROWS) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_database_of_the_version_before_gets_the_tables(new_url: NewUrl, look: Sql, backend: str) -> None:
    url = new_url(backend)
    with SQLAlchemySaver.from_url(url) as saver:
        at = put(saver, config(), {"x": 1})
    for name in ("audit", "audit_chains", "subjects", "journal"):
        look(url, f"DROP TABLE agentmem_{name}")
    look(url, "DELETE FROM agentmem_schema_versions WHERE version > 2")
    look(url, "DELETE FROM agentmem_blobs WHERE kind = 7")  # witnesses
    with SQLAlchemySaver.from_url(url, audit=True) as saver:
        assert get(saver, at).checkpoint["channel_values"] == {"x": 1}
        say(saver, at, [HumanMessage("one", id="1")], "d1")
    assert len(look(url, ROWS)) == 1
    versions = look(url, "SELECT version FROM agentmem_schema_versions")
    assert sorted(versions) == [(migration.number,) for migration in MIGRATIONS]


def test_writers_of_one_thread_make_one_chain(database_url: str, ask: Sql) -> None:
    with SQLAlchemySaver.from_url(database_url, audit=True) as saver, ThreadPoolExecutor(4) as threads:
        saver.setup()

        def write(writer: int) -> None:
            for number in range(5):
                name = f"{writer}-{number}"
                say(saver, config(), [HumanMessage("x", id=name)], name)

        list(threads.map(write, range(4)))
    assert ask("SELECT seq FROM agentmem_audit ORDER BY seq") == [(number,) for number in range(1, 21)]
