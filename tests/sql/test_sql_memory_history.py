"""A thread's memories can be read without a model, and each is stored once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypedDict

import numpy as np
import pytest
from langchain_core.messages import AIMessage, AnyMessage
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from sqlalchemy import Engine

from agentmem import ConsumedRecord, MemoryState, Message
from agentmem.errors import CorruptStateError, StorageError
from agentmem_langgraph import MemoryChannel
from agentmem_sql import MemoryStep, SQLAlchemySaver
from agentmem_sql.list_tree import WITNESS
from tests.helpers.sql_cases import Sql, config, put
from tests.helpers.sql_chains import statements
from tests.helpers.sql_graphs import say
from tests.helpers.sql_protection import aes

SHAPE = (3, 2, 4, 4)  # layers, heads, rank, rank
LONG = "the same words again and again " * 100


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    memory: Annotated[MemoryState, MemoryChannel]
    notes: dict[str, str]


def state_after(*said: str) -> MemoryState:
    record = ConsumedRecord.empty().extend([Message("user", text) for text in said])
    matrices = np.random.default_rng(len(said)).normal(size=SHAPE)
    return MemoryState.from_matrices(matrices, record, model_fingerprint="a model", adapter_fingerprint="an adapter")


def digests(*texts: str) -> tuple[bytes, ...]:
    """What new messages of the user are named by."""
    return tuple(Message("user", text).digest()[:8] for text in texts)


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


def test_each_step_says_what_the_memory_was_and_what_it_consumed(any_saver: SQLAlchemySaver) -> None:
    graph = talk(any_saver, "one", "two", "again", "three")
    steps = list(any_saver.memory_history("t"))

    assert [step.state for step in steps] == [
        state_after("one"),
        state_after("one", "two"),
        state_after("one", "two", "three"),
    ]
    assert [step.consumed for step in steps] == [1, 2, 3]
    assert [step.new for step in steps] == [1, 1, 1]
    assert [step.new_digests for step in steps] == [digests(text) for text in ("one", "two", "three")]
    assert not any(step.restarted for step in steps)
    assert {step.channel for step in steps} == {"memory"}
    assert {(step.state.model_fingerprint, step.state.adapter_fingerprint) for step in steps} == {
        ("a model", "an adapter")
    }

    # The checkpoints are those that the remembering node left, as the graph's own history tells.
    made = {one.config["configurable"]["checkpoint_id"]: one for one in graph.get_state_history(config())}
    assert [step.step for step in steps] == [1, 5, 13]
    assert [step.step for step in steps] == [made[step.checkpoint_id].metadata["step"] for step in steps]
    assert [step.source for step in steps] == ["loop"] * 3
    assert [step.time for step in steps] == [datetime.fromisoformat(made[s.checkpoint_id].created_at) for s in steps]
    assert all(datetime.now(UTC) - step.time < timedelta(minutes=5) for step in steps if step.time)


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
    assert steps[2].new_digests == digests("five", "six", "seven")


def test_of_many_new_messages_the_last_are_named(saver: SQLAlchemySaver) -> None:
    texts = [str(number) for number in range(400)]
    at = put(saver, config(), {"memory": state_after("0").to_dict()})
    put(saver, at, {"memory": state_after(*texts).to_dict()})
    step = list(saver.memory_history("t"))[-1]
    assert (step.new, step.consumed, step.restarted) == (399, 400, False)
    assert step.new_digests == digests(*texts[-256:])


def test_equal_memories_that_are_spelled_otherwise_are_no_step(saver: SQLAlchemySaver) -> None:
    plain = state_after("one").to_dict()
    at = put(saver, config(), {"memory": plain})
    put(saver, at, {"memory": dict(reversed(plain.items()))})
    assert len(list(saver.memory_history("t", channel="memory"))) == 1


def test_a_subgraphs_thread_has_its_own(saver: SQLAlchemySaver) -> None:
    put(saver, config(), {"memory": state_after("one").to_dict()})
    put(saver, config(ns="sub:1"), {"memory": state_after("two").to_dict()})
    assert [step.state for step in saver.memory_history("t", checkpoint_ns="sub:1")] == [state_after("two")]


def test_a_thread_that_is_pruned_meanwhile_gives_what_is_left(saver: SQLAlchemySaver) -> None:
    talk(saver, *map(str, range(12)))
    going = saver.memory_history("t")
    first = [next(going) for _ in range(3)]
    saver.prune(["t"])
    rest = list(going)
    assert [step.consumed for step in (*first, *rest)] == [1, 2, 3, 4, 12]
    assert rest[-1].new == 12
    assert [(step.consumed, step.new) for step in saver.memory_history("t")] == [(12, 12)]


def test_a_checkpoint_that_is_not_there_is_an_error(saver: SQLAlchemySaver) -> None:
    talk(saver, "one")
    with pytest.raises(StorageError, match="expected the checkpoint 'gone'"):
        list(saver.memory_history("t", checkpoint_id="gone"))


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
def test_a_damaged_memory_names_its_checkpoint(url: str, sql: Sql, damage: str, which: int, encrypted: bool) -> None:
    serde = aes() if encrypted else None
    with SQLAlchemySaver.from_url(url, serde=serde) as saver:
        saver.setup()
        at = config()
        for texts in (("one",), ("one", "two")):
            at = put(saver, at, {"memory": state_after(*texts).to_dict()})
        steps = list(saver.memory_history("t"))
        assert [step.state for step in steps] == [state_after("one"), state_after("one", "two")]
    (row,) = sql("SELECT rowid FROM agentmem_blobs WHERE kind <> ? ORDER BY rowid", WITNESS)[which]
    sql(f"{damage} WHERE rowid = ?", row)
    with SQLAlchemySaver.from_url(url, serde=serde) as saver:
        for channel in (None, "memory"):
            with pytest.raises(StorageError, match=steps[which].checkpoint_id) as raised:
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


def test_only_memories_are_read(saver: SQLAlchemySaver, url: str, sql: Sql) -> None:
    """And few statements: other content may be damaged, and nobody notices.

    Where no channel is named, one value of each other channel that is no list is looked at.
    """
    turns = 60
    talk(saver, *map(str, range(turns)))
    ((checkpoints,),) = sql("SELECT count(*) FROM agentmem_checkpoints")
    for channel, looked_at in ((None, "filler"), ("memory", "model_fingerprint")):
        sql(
            "UPDATE agentmem_blobs SET body = x'00' WHERE NOT instr(body, 'model_fingerprint') AND NOT instr(body, ?)",
            looked_at,
        )
        with SQLAlchemySaver.from_url(url) as fresh, statements(Engine) as sent:
            fresh.setup()
            sent.clear()
            steps = list(fresh.memory_history("t", channel=channel))
            assert [step.consumed for step in steps] == list(range(1, turns + 1))
            assert len(sent) <= 4 + checkpoints / 100 + turns / 20
            sent.clear()
            assert next(fresh.memory_history("t", channel=channel, newest_first=True)) == steps[-1]
            assert len(sent) <= 5
            assert list(fresh.memory_history("t", channel=channel, newest_first=True)) == steps[::-1]


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
