"""With an encrypting serializer nothing of a value is stored in the clear, and all else is as without."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from sqlalchemy import make_url

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from agentmem_sql.list_tree import VALUE
from agentmem_sql.protection import Protection
from tests.helpers.sql_cases import Sql, checkpoint, config, finish, get, put, start_child
from tests.helpers.sql_chains import COLUMNS
from tests.helpers.sql_protection import PROTECTION, aes, fill

MARKERS = [b"hush-%d" % number for number in range(8)]


def fill_with_secrets(saver: SQLAlchemySaver) -> RunnableConfig:
    """A thread with a marker wherever a value can be: large, inline, nested, pending, in metadata, in a history."""
    one, two, three, four, five, six, seven, eight = (marker.decode() for marker in MARKERS)
    message = HumanMessage(one * 20, id="1", additional_kwargs={"note": two})
    values = {"messages": [message] * 20, "short": [three, 1], "nested": {"a": [{"b": four}]}, "bytes": five.encode()}
    made = checkpoint({**values, "d": "seed"})
    at = saver.put(config(), made, {"source": "loop", "owner": six}, made["channel_versions"])  # type: ignore[typeddict-unknown-key]
    saver.put_writes(at, [("d", seven)], "task")
    later = checkpoint(values)
    later["channel_versions"]["d"] = 2
    at = saver.put(at, later, {"source": "loop", "owner": six}, {**later["channel_versions"]})  # type: ignore[typeddict-unknown-key]
    saver.put_writes(at, [("x", eight), ("messages", [message])], "task")
    return at


def stored_text(url: str, look: Sql) -> bytes:
    """All bytes in the rows; of a database in files all of their bytes, write-ahead log included."""
    if url.startswith("sqlite"):
        path = Path(make_url(url).database or "")
        return b"".join(one.read_bytes() for one in path.parent.glob(path.name + "*"))
    rows = (row for table in ("settings", *COLUMNS) for row in look(url, f"SELECT * FROM agentmem_{table}"))
    return b"".join(value for row in rows for value in row if isinstance(value, bytes))


@pytest.mark.parametrize("protection", ["encrypted", "both"])
def test_an_encrypting_serializer_leaves_no_plain_value(
    database_url: str, look: Sql, saver: SQLAlchemySaver, url: str, protection: str
) -> None:
    fill_with_secrets(saver)
    assert [marker for marker in MARKERS if marker not in stored_text(url, look)] == []  # or nothing would be seen
    with SQLAlchemySaver.from_url(database_url, **PROTECTION[protection]) as encrypted:
        at = fill_with_secrets(encrypted)
        found = get(encrypted, at)
        encrypted.copy_thread("t", "copy")
        encrypted.prune(["t"])
        text = stored_text(database_url, look)
        assert [marker for marker in [*MARKERS, b"additional_kwargs", b"owner"] if marker in text] == []
        assert [one.config for one in encrypted.list(None, filter={"owner": MARKERS[5].decode()}, limit=1)]
    with SQLAlchemySaver.from_url(database_url, **PROTECTION[protection]) as another:
        assert another.get_tuple(at) == found._replace(parent_config=None)
        history = another.get_delta_channel_history(config=at, channels=["d"])
        assert history == {"d": {"writes": [("task", "d", MARKERS[6].decode())], "seed": "seed"}}
    assert [marker for marker in MARKERS if marker in stored_text(database_url, look)] == []
    with SQLAlchemySaver.from_url(database_url) as plain, pytest.raises(StorageError, match="one that is encrypted"):
        plain.get_tuple(at)


def test_equal_content_shows_in_no_digest(tmp_path: Path) -> None:
    """Nobody who guesses a value finds its digest, nor sees that two databases hold the same."""
    seen = []
    for number in range(2):
        path = tmp_path / f"{number}.db"
        with SQLAlchemySaver.from_url(f"sqlite:///{path}", serde=aes()) as saver:
            put(saver, config(), {"x": "the same"})
        with closing(sqlite3.connect(path)) as connection:
            seen += connection.execute(f"SELECT digest, body FROM agentmem_blobs WHERE kind = {VALUE}").fetchall()
    guess = Protection(JsonPlusSerializer(), None).digest(
        VALUE, b"msgpack\0" + JsonPlusSerializer().dumps_typed("the same")[1]
    )
    assert len({guess, *(digest for digest, _ in seen)}) == 3
    assert len({body for _, body in seen}) == 2


def test_encryption_shares_content_as_without(tmp_path: Path) -> None:
    rows = {}
    for protection, options in PROTECTION.items():
        path = tmp_path / f"{protection}.db"
        with SQLAlchemySaver.from_url(f"sqlite:///{path}", **options) as saver:
            fill(saver)
            saver.copy_thread("t", "copy")
        with closing(sqlite3.connect(path)) as connection:
            statement = "SELECT thread, kind, count(*), sum(length(body)) FROM agentmem_blobs GROUP BY thread, kind"
            rows[protection] = connection.execute(statement).fetchall()
    counts = {protection: [row[:3] for row in found] for protection, found in rows.items()}
    assert counts["encrypted"] == counts["both"] == counts["hmac"] == counts["plain"]
    for plain, encrypted in zip(rows["plain"], rows["encrypted"], strict=True):
        assert encrypted[3] <= plain[3] + 40 * plain[2]


STRICT = """
import sys
from dataclasses import dataclass
from typing import Annotated, Any
from agentmem_sql import SQLAlchemySaver
from langchain_core.messages import AIMessage, AnyMessage
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from pydantic import BaseModel

@dataclass(frozen=True)
class Note:
    text: str
    raw: bytes

class Inner(BaseModel):
    count: int

class State(BaseModel):
    messages: Annotated[list[AnyMessage], add_messages]
    notes: list[Note] = []
    inner: Inner = Inner(count=0)

def node(state):
    usage = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
    answer = AIMessage("answer", additional_kwargs={"n": 1.5}, usage_metadata=usage)
    notes = [*state.notes, Note("!" * 60, b"\\0\\xff")]
    return {"messages": [answer], "notes": notes, "inner": Inner(count=state.inner.count + 1)}

def graph(saver):
    return StateGraph(State).add_node(node).add_edge(START, "node").compile(checkpointer=saver)

at = {"configurable": {"thread_id": "t"}}
encrypted = {"serde": EncryptedSerializer.from_pycryptodome_aes(key=bytes(16))}
for name, options in (("plain", {}), ("encrypted", encrypted)):
    url = sys.argv[1] + name
    with SQLAlchemySaver.from_url(url, **options) as saver:
        compiled = graph(saver)
        assert compiled.checkpointer is not saver, "strict mode compiles with a clone"
        compiled.invoke({"messages": [("user", "one")]}, at)
        compiled.invoke({"messages": [("user", "two")]}, at)
        first = compiled.get_state(at).values
    with SQLAlchemySaver.from_url(url, **options) as saver:
        bare = saver.get_tuple(at).checkpoint["channel_values"]
        assert not isinstance(bare["notes"][0], Note), "the saver itself has no allowlist"
        assert isinstance(bare["messages"][1], AIMessage)
        values = graph(saver).get_state(at).values
        assert values == first
        assert values["notes"] == [Note("!" * 60, b"\\0\\xff")] * 2
        assert values["inner"] == Inner(count=2)
        assert [m.content for m in values["messages"]] == ["one", "answer", "two", "answer"]
        assert values["messages"][1].usage_metadata["total_tokens"] == 3
print("ok", "torch" in sys.modules)
"""


def test_strict_msgpack_with_pydantic_dataclasses_messages_and_encryption(url: str) -> None:
    child = start_child(url, code=STRICT, LANGGRAPH_STRICT_MSGPACK="true")
    assert finish(child).splitlines()[-1] == "ok False"
