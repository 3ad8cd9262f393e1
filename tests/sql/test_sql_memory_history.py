"""A thread's memories can be read without a model, and each is stored once."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import pytest
from langchain_core.messages import AIMessage, AnyMessage
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from sqlalchemy import create_engine, event

from agentmem import ConsumedRecord, MemoryState, Message
from agentmem.errors import CorruptStateError, StorageError
from agentmem_langgraph import MemoryChannel
from agentmem_sql import MemoryStep, SQLAlchemySaver
from tests.helpers.sql_cases import config, finish, put, start_child
from tests.helpers.sql_graphs import say

Sql = Callable[..., list[Any]]

SHAPE = (3, 2, 4, 4)  # layers, heads, rank, rank
LONG = "the same words again and again " * 100


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    memory: Annotated[MemoryState, MemoryChannel]
    notes: dict[str, str]


def state_after(*said: str, fill: float | None = None) -> MemoryState:
    record = ConsumedRecord.empty().extend([Message("user", text) for text in said])
    matrices = np.random.default_rng(len(said)).normal(size=SHAPE) if fill is None else np.full(SHAPE, fill)
    return MemoryState.from_matrices(matrices, record, model_fingerprint="a model", adapter_fingerprint="an adapter")


def memory_graph(saver: Any) -> Any:
    """Remembers what the user said, then notes something elsewhere; "again" leaves the memory as it was."""

    def remember(state: State) -> dict[str, Any]:
        said = [str(m.content) for m in state["messages"] if m.type == "human" and m.content != "again"]
        return {"messages": [AIMessage(LONG)], "memory": state_after(*said).to_dict()}

    def note(state: State) -> dict[str, Any]:
        return {"notes": {"last": str(state["messages"][-2].content), "filler": LONG}}

    builder = StateGraph(State).add_node(remember).add_node(note)
    return builder.add_edge(START, "remember").add_edge("remember", "note").compile(checkpointer=saver)


def talk(saver: Any, *texts: str, thread: str = "t") -> Any:
    graph = memory_graph(saver)
    for text in texts:
        graph.invoke(say(text), config(thread))
    return graph


@pytest.fixture
def aes() -> EncryptedSerializer:
    return EncryptedSerializer.from_pycryptodome_aes(key=b"0123456789abcdef")


def test_each_step_says_what_the_memory_was_and_what_it_consumed(any_saver: SQLAlchemySaver) -> None:
    graph = talk(any_saver, "one", "two", "again", "three")
    steps = list(any_saver.memory_history("t"))

    assert [step.state for step in steps] == [
        state_after("one"),
        state_after("one", "two"),
        state_after("one", "two", "three"),
    ]
    assert [step.digest for step in steps] == [step.state.digest for step in steps]
    assert [step.consumed for step in steps] == [1, 2, 3]
    assert [step.new for step in steps] == [1, 1, 1]
    assert [step.new_digests for step in steps] == [(Message("user", text).digest()[:8],) for text in said]
    assert not any(step.restarted for step in steps)
    assert {step.channel for step in steps} == {"memory"}
    assert {(step.model_fingerprint, step.adapter_fingerprint) for step in steps} == {("a model", "an adapter")}

    # The checkpoints are those that the remembering node left, as the graph's own history tells.
    made = {one.config["configurable"]["checkpoint_id"]: one for one in graph.get_state_history(config())}
    assert [step.step for step in steps] == [1, 5, 13]
    assert [step.step for step in steps] == [made[step.checkpoint_id].metadata["step"] for step in steps]
    assert [step.source for step in steps] == ["loop"] * 3
    assert [step.time for step in steps] == [datetime.fromisoformat(made[s.checkpoint_id].created_at) for s in steps]
    assert all(datetime.now(UTC) - step.time < timedelta(minutes=5) for step in steps if step.time)


said = ("one", "two", "three")


def test_norms_are_of_each_layer_and_head(saver: SQLAlchemySaver) -> None:
    talk(saver, "one")
    (step,) = saver.memory_history("t")
    expected = [[np.sqrt((head.astype(float) ** 2).sum()) for head in layer] for layer in state_after("one").matrices]
    assert step.norms.shape == SHAPE[:2]
    np.testing.assert_allclose(step.norms, expected, rtol=1e-12)


def test_the_order_can_be_turned_round(saver: SQLAlchemySaver) -> None:
    talk(saver, *map(str, range(12)))
    steps = list(saver.memory_history("t"))
    assert len(steps) == 12
    assert list(saver.memory_history("t", newest_first=True)) == steps[::-1]


async def test_tasks_read_the_same(any_saver: SQLAlchemySaver) -> None:
    """Several threads at once, from one loop."""

    async def read(thread: str, **options: Any) -> list[MemoryStep]:
        return [step async for step in any_saver.amemory_history(thread, **options)]

    for thread in "abc":
        await asyncio.to_thread(talk, any_saver, thread, thread * 2, thread=thread)
    for thread, steps in zip("abc", await asyncio.gather(*map(read, "abc")), strict=True):
        assert [step.state for step in steps] == [state_after(thread), state_after(thread, thread * 2)]
        assert await read(thread, newest_first=True) == steps[::-1]


def test_branches_are_not_mixed(saver: SQLAlchemySaver) -> None:
    graph = talk(saver, "one", "two")
    first = next(iter(saver.memory_history("t")))
    left = graph.get_state(config())
    graph.invoke(say("other"), config(checkpoint_id=first.checkpoint_id))

    assert [step.state for step in saver.memory_history("t")] == [state_after("one"), state_after("one", "other")]
    abandoned = saver.memory_history("t", checkpoint_id=left.config["configurable"]["checkpoint_id"])
    assert [step.state for step in abandoned] == [state_after("one"), state_after("one", "two")]
    up_to_first = saver.memory_history("t", checkpoint_id=first.checkpoint_id)
    assert list(up_to_first) == [first]


def test_memories_are_found_in_any_channel(saver: SQLAlchemySaver) -> None:
    at = put(saver, config(), {"b": state_after("one").to_dict(), "a": state_after("two").to_dict(), "c": {"shape": 1}})
    at = put(saver, at, {"b": state_after("one").to_dict(), "a": state_after("two", "three").to_dict(), "n": None})
    put(saver, at, {"b": None, "a": None, "raw": b"msgpack", "list": [state_after("one").to_dict()]})

    assert [(step.channel, step.consumed) for step in saver.memory_history("t")] == [("a", 1), ("b", 1), ("a", 2)]
    assert [step.consumed for step in saver.memory_history("t", channel="a")] == [1, 2]
    assert list(saver.memory_history("t", channel="nowhere")) == []
    assert list(saver.memory_history("nobody")) == []


def test_a_memory_that_was_emptied_or_replaced_counts_anew(saver: SQLAlchemySaver) -> None:
    values = [state_after("one", "two"), None, state_after("one", "two"), state_after("five", "six", "seven")]
    at = config()
    for value in values:
        at = put(saver, at, {"memory": value and value.to_dict()})
    steps = list(saver.memory_history("t"))
    assert [step.state for step in steps] == [values[0], values[2], values[3]]
    assert [step.new for step in steps] == [2, 2, 3]
    assert [step.restarted for step in steps] == [False, False, True]
    assert steps[2].new_digests == tuple(Message("user", text).digest()[:8] for text in ("five", "six", "seven"))


def test_of_many_new_messages_the_last_are_named(saver: SQLAlchemySaver) -> None:
    texts = [str(number) for number in range(400)]
    at = put(saver, config(), {"memory": state_after("0").to_dict()})
    put(saver, at, {"memory": state_after(*texts).to_dict()})
    step = list(saver.memory_history("t"))[-1]
    assert (step.new, step.consumed, step.restarted) == (399, 400, False)
    assert step.new_digests == tuple(Message("user", text).digest()[:8] for text in texts[-256:])


def test_equal_memories_that_are_spelled_otherwise_are_no_step(saver: SQLAlchemySaver) -> None:
    plain = state_after("one").to_dict()
    at = put(saver, config(), {"memory": plain})
    put(saver, at, {"memory": dict(reversed(plain.items()))})
    assert len(list(saver.memory_history("t", channel="memory"))) == 1


def test_a_subgraphs_thread_has_its_own(saver: SQLAlchemySaver) -> None:
    put(saver, config(), {"memory": state_after("one").to_dict()})
    put(saver, config(ns="sub:1"), {"memory": state_after("two").to_dict()})
    assert [step.state for step in saver.memory_history("t", checkpoint_ns="sub:1")] == [state_after("two")]


def test_a_pruned_thread_gives_what_is_left(saver: SQLAlchemySaver) -> None:
    talk(saver, "one", "two")
    saver.prune(["t"])
    (step,) = saver.memory_history("t")
    assert (step.state, step.new) == (state_after("one", "two"), 2)


def test_a_thread_that_is_pruned_meanwhile_gives_what_is_left(saver: SQLAlchemySaver) -> None:
    talk(saver, *map(str, range(12)))
    going = saver.memory_history("t")
    first = [next(going) for _ in range(3)]
    saver.prune(["t"])
    rest = list(going)
    assert [step.consumed for step in (*first, *rest)] == [1, 2, 3, 4, 12]
    assert rest[-1].new == 12


def test_a_checkpoint_that_is_not_there_is_an_error(saver: SQLAlchemySaver) -> None:
    talk(saver, "one")
    with pytest.raises(StorageError, match="expected the checkpoint 'gone'"):
        list(saver.memory_history("t", checkpoint_id="gone"))


def test_an_encrypted_database_is_read(url: str, aes: EncryptedSerializer) -> None:
    with SQLAlchemySaver.from_url(url, serde=aes) as saver:
        talk(saver, "one", "two")
    with SQLAlchemySaver.from_url(url, serde=aes) as saver:
        assert [step.state for step in saver.memory_history("t")] == [state_after("one"), state_after("one", "two")]


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE agentmem_blobs SET body = CAST(substr(body, 1, 99) || x'00' || substr(body, 101) AS BLOB)",
        "UPDATE agentmem_blobs SET body = x'00'",
        "UPDATE agentmem_blobs SET body = x''",
        "DELETE FROM agentmem_blobs",
    ],
    ids=["byte", "short", "empty", "gone"],
)
@pytest.mark.parametrize("which", [0, -1])
def test_a_damaged_memory_names_its_checkpoint(
    url: str, sql: Sql, aes: EncryptedSerializer, damage: str, which: int, encrypted: bool
) -> None:
    serde = aes if encrypted else None
    with SQLAlchemySaver.from_url(url, serde=serde) as saver:
        saver.setup()
        at = config()
        for texts in (("one",), ("one", "two")):
            at = put(saver, at, {"memory": state_after(*texts).to_dict()})
        hurt = list(saver.memory_history("t"))[which]
    (row,) = sql("SELECT rowid FROM agentmem_blobs ORDER BY rowid")[which]
    sql(f"{damage} WHERE rowid = ?", row)
    with SQLAlchemySaver.from_url(url, serde=serde) as saver:
        for channel in (None, "memory"):
            with pytest.raises(StorageError, match=hurt.checkpoint_id) as raised:
                list(saver.memory_history("t", channel=channel))
            assert "'memory'" in str(raised.value)


def test_an_unsound_memory_names_its_checkpoint(saver: SQLAlchemySaver) -> None:
    altered = {**state_after("one").to_dict(), "count": 2}
    at = put(saver, config(), {"memory": altered})
    with pytest.raises(CorruptStateError, match=f"{at['configurable']['checkpoint_id']}.*no sound memory"):
        list(saver.memory_history("t"))
    put(saver, config("other"), {"memory": "words"})
    assert list(saver.memory_history("other")) == []
    with pytest.raises(CorruptStateError, match="a state's plain form is a dict; found str"):
        list(saver.memory_history("other", channel="memory"))


def test_a_changed_row_is_refused(saver: SQLAlchemySaver, sql: Sql) -> None:
    at = put(saver, config(), {"memory": state_after("one").to_dict()})
    sql("UPDATE agentmem_checkpoints SET created = created + 1")
    with pytest.raises(StorageError, match=at["configurable"]["checkpoint_id"]):
        list(saver.memory_history("t"))


def test_no_model_is_loaded(url: str) -> None:
    with SQLAlchemySaver.from_url(url) as saver:
        talk(saver, "one", "two")
    code = """
import sys
from agentmem_sql import SQLAlchemySaver
with SQLAlchemySaver.from_url(sys.argv[1]) as saver:
    print([(step.consumed, round(float(step.norms.sum()))) for step in saver.memory_history("t")])
print([name for name in ("torch", "transformers", "agentmem.engine", "langgraph.graph") if name in sys.modules])
"""
    steps, imported = finish(start_child(url, code=code)).splitlines()
    norms = [
        float(np.linalg.norm(s.matrices, axis=(2, 3)).sum()) for s in (state_after("one"), state_after("one", "2"))
    ]
    assert steps == str([(1, round(norms[0])), (2, round(norms[1]))])
    assert imported == "[]"


class Counted:
    """What a connection to the file was asked, and how many bytes it gave."""

    def __init__(self) -> None:
        self.statements = 0
        self.bytes = 0

    def count(self, row: Any) -> Any:
        self.bytes += sum(len(value) for value in row or () if isinstance(value, bytes))
        return row


@contextmanager
def counted_saver(path: Path) -> Iterator[tuple[SQLAlchemySaver, Counted]]:
    found = Counted()

    class Cursor(sqlite3.Cursor):
        def fetchone(self) -> Any:
            return found.count(super().fetchone())

        def fetchall(self) -> list[Any]:
            return [found.count(row) for row in super().fetchall()]

        def fetchmany(self, size: int | None = None) -> list[Any]:
            return [found.count(row) for row in super().fetchmany(size or 1)]

    class Connection(sqlite3.Connection):
        def cursor(self, factory: Any = Cursor) -> Any:
            return super().cursor(Cursor)

    engine = create_engine(f"sqlite:///{path}", connect_args={"factory": Connection})

    @event.listens_for(engine, "before_cursor_execute")
    def _count(*_: Any) -> None:
        found.statements += 1

    with SQLAlchemySaver(engine) as saver:
        saver.setup()
        found.statements = found.bytes = 0
        yield saver, found
    engine.dispose()


def test_only_memories_are_read(path: Path, saver: SQLAlchemySaver, sql: Sql) -> None:
    turns = 60
    talk(saver, *map(str, range(turns)))
    (checkpoints,) = sql(
        "SELECT count(*), sum(length(metadata) + length(body) + length(content)) FROM agentmem_checkpoints"
    )
    (memories,) = sql("SELECT sum(length(body)) FROM agentmem_blobs WHERE instr(body, 'model_fingerprint')")
    (everything,) = sql("SELECT sum(length(body)) FROM agentmem_blobs")
    with counted_saver(path) as (fresh, found):
        assert len(list(fresh.memory_history("t"))) == turns
        # The checkpoints' rows with their keys, each memory once, and one value of each other channel that is no list.
        assert found.bytes < checkpoints[1] + 200 * checkpoints[0] + memories[0] + 2 * len(LONG) + 1000
        assert everything[0] > 5 * memories[0]
        assert found.statements <= 2 + checkpoints[0] / 100 + 2 + turns / 20
        found.statements = found.bytes = 0
        assert next(fresh.memory_history("t", newest_first=True)).consumed == turns
        assert found.statements <= 5


def test_a_memory_is_stored_once(saver: SQLAlchemySaver, sql: Sql) -> None:
    """Though it is a channel's value, a pending write, in later checkpoints, and on two branches."""
    graph = talk(saver, "one", "two", "again", "again")
    first = next(iter(saver.memory_history("t")))
    graph.invoke(say("two"), config(checkpoint_id=first.checkpoint_id))

    names = {
        name for (name,) in sql("SELECT hex(content) FROM agentmem_checkpoints") if b"memory".hex().upper() in name
    }
    assert len(names) > 2
    assert sql("SELECT count(*), count(DISTINCT digest) FROM agentmem_writes WHERE channel = ?", b"memory") == [(5, 2)]
    assert sql("SELECT count(*) FROM agentmem_blobs WHERE instr(body, 'model_fingerprint')") == [(2,)]
    assert graph.get_state(config()).values["memory"] == state_after("one", "two")
