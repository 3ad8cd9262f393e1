"""Delta channels: LangGraph's cases for the capability, what they leave out, and real graphs.

Graphs that are pruned, thinned out, forked and copied go on as if nothing had happened. The conformance suite's cases
for `delta_channel_history` are in its repository but not in the package, so they are written anew.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, DeltaChannelHistory
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.types import Command
from sqlalchemy import create_engine, make_url

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import Sql, SyncMirror, config, get
from tests.helpers.sql_chains import grow, history, id_of, ids, made, statements, unaccounted, write
from tests.helpers.sql_graphs import delta_graph, say
from tests.sql.conftest import shared_on_sqlite

Saver = BaseCheckpointSaver[str]


@pytest.fixture(params=[False, True], ids=["async", "sync"])
async def either(request: pytest.FixtureRequest, shared_url: str) -> AsyncIterator[Saver]:
    """A saver on each database, by its asynchronous methods and by its synchronous ones."""
    async with SQLAlchemySaver.from_url(shared_url) as saver:
        yield SyncMirror(saver) if request.param else saver
        await saver.adelete_thread("t")


async def test_delta_history_conforms(either: Saver) -> None:
    """LangGraph's eight cases for the capability, in one thread.

    Writes are oldest first, those of the seed's checkpoint included; the checkpoint's own value and pending writes do
    not count; the seed is the nearest snapshot, or a plain value of before the channel became a delta channel; each
    channel ends for itself, and one whose walk comes to the root has no seed.
    """
    at = config(ns="sub:1")
    steps: list[tuple[dict[str, Any], list[tuple[str, Any]]]] = [
        ({"d": _DeltaSnapshot(["far"]), "e": ["plain"], "none": None}, [("d", "before")]),
        ({"d": _DeltaSnapshot(["near"])}, [("d", [1]), ("d", 2), ("e", 3)]),
        ({}, [("d", 4), ("f", 5)]),
        ({"e": _DeltaSnapshot(["own"])}, [("d", "pending"), ("e", "pending")]),
    ]
    for values, writes in steps:
        one = made(values, "d e f none")
        at = await either.aput(at, one, {}, one["channel_versions"])
        await either.aput_writes(at, writes, "task")
    for asked in (at, config(ns="sub:1")):  # where none is named, the newest is meant
        found = await either.aget_delta_channel_history(config=asked, channels=["d", "e", "none", "f", "never written"])
        assert found == {
            "d": {"seed": _DeltaSnapshot(["near"]), "writes": [("task", "d", value) for value in ([1], 2, 4)]},
            "e": {"seed": ["plain"], "writes": [("task", "e", 3)]},
            "none": {"seed": None, "writes": []},
            "f": {"writes": [("task", "f", 5)]},
            "never written": {"writes": []},
        }
        assert await either.aget_delta_channel_history(config=asked, channels=[]) == {}


def default_walk(saver: SQLAlchemySaver, at: RunnableConfig, channels: list[str]) -> Mapping[str, DeltaChannelHistory]:
    """What LangGraph's base class answers: slowly, by `get_tuple`."""
    return BaseCheckpointSaver.get_delta_channel_history(saver, config=at, channels=channels)


def random_history(saver: SQLAlchemySaver, chance: random.Random, size: int) -> list[RunnableConfig]:
    """Checkpoints with random parents, snapshots, plain values, and writes of several tasks to several channels."""
    made_: list[RunnableConfig] = []
    for number in range(size):
        parent = None if not made_ or chance.random() < 0.05 else chance.choice(made_[-4:])
        values: dict[str, Any] = {
            name: chance.choice([_DeltaSnapshot([f"{name}{number}"]), [f"plain {name}{number}"], None])
            for name in "abc"
            if chance.random() < 0.15
        }
        at = grow(saver, parent, values, deltas="a b c")
        made_.append(at)
        for task in range(chance.randrange(3)):
            path = chance.choice(["", f"~__pregel_pull, {chance.choice('xyz')}", "~__pregel_push, 0001"])
            writes = [(chance.choice("abcx"), f"{number} {task} {index}") for index in range(chance.randrange(1, 4))]
            saver.put_writes(at, writes, f"{chance.randrange(100):02}-{task}", path)
    return made_


def test_history_is_that_of_the_default_walk(swept_saver: SQLAlchemySaver, shared_url: str) -> None:
    chance = random.Random(7)
    with SQLAlchemySaver.from_url(shared_url, cache_bytes=0) as cold:
        for size in (12, 24):
            for at in random_history(swept_saver, chance, size):
                channels = chance.sample(["a", "b", "c", "x"], chance.randrange(1, 5))
                expected = default_walk(swept_saver, at, channels)
                assert swept_saver.get_delta_channel_history(config=at, channels=channels) == expected
                assert cold.get_delta_channel_history(config=at, channels=channels) == expected
            swept_saver.delete_thread("t")


def test_writes_of_a_superstep_come_in_the_order_in_which_it_applied_them(swept_saver: SQLAlchemySaver) -> None:
    at = grow(swept_saver)
    for path, task in [("~pull, b", "1"), ("~pull, a", "9"), ("", "zz"), ("~pull, c", "0"), ("~pull, a", "3")]:
        write(swept_saver, at, f"{path} {task} 0", f"{path} {task} 1", task=task, path=path)
    _, writes = history(swept_saver, grow(swept_saver, at))
    for found in (get(swept_saver, at), *swept_saver.list(at)):
        assert [value for _, _, value in found.pending_writes or ()] == writes
    assert writes == [
        f"{path} {index}"
        for path in (" zz", "~pull, a 3", "~pull, a 9", "~pull, b 1", "~pull, c 0")
        for index in (0, 1)
    ]


def test_walks_longer_than_one_statement(swept_saver: SQLAlchemySaver, shared_url: str) -> None:
    at = grow(swept_saver, None, {"d": _DeltaSnapshot([0])})
    for number in range(1, 106):
        swept_saver.put_writes(at, [("d", number), ("e", -number)], "task")
        at = grow(swept_saver, at)
    with SQLAlchemySaver.from_url(shared_url) as other:
        assert history(other, at) == (_DeltaSnapshot([0]), list(range(1, 106)))
        assert history(other, at, "e") == (None, list(range(-1, -106, -1)))


@shared_on_sqlite
def test_what_is_not_there_has_no_history(swept_saver: SQLAlchemySaver) -> None:
    nothing: Mapping[str, DeltaChannelHistory] = {"d": {"writes": []}, "e": {"writes": []}}
    grow(swept_saver, None, {"d": _DeltaSnapshot([1])}, thread="u")
    for at in (config(), config("u", "other"), config("u", checkpoint_id="missing")):
        assert swept_saver.get_delta_channel_history(config=at, channels=["d", "e"]) == nothing
    orphan = grow(swept_saver, config(checkpoint_id="a parent that was never stored"))
    write(swept_saver, config(checkpoint_id="a parent that was never stored"), "of no checkpoint")
    assert history(swept_saver, orphan) == (None, [])


@shared_on_sqlite
def test_a_checkpoint_that_is_its_own_parent_ends_the_walk(swept_saver: SQLAlchemySaver) -> None:
    """Such are stored by whoever copies checkpoints with `put(found.config, found.checkpoint, ...)`."""
    one = made({}, "d")
    first = swept_saver.put(config(checkpoint_id=one["id"]), one, {}, {})
    write(swept_saver, first, "first")
    second = grow(swept_saver, first)
    assert history(swept_saver, second) == (None, ["first"])
    assert history(swept_saver, first) == (None, [])
    swept_saver.prune(["t"])
    assert history(swept_saver, second) == (None, ["first"])


def test_a_history_takes_few_statements(shared_url: str) -> None:
    engine = create_engine(shared_url)
    with SQLAlchemySaver(engine) as saver, SQLAlchemySaver(engine) as other:
        saver.delete_thread("t")
        at = grow(saver, None, {"d": _DeltaSnapshot([HumanMessage("hello", id="1")])})
        for number in range(60):
            write(saver, at, [HumanMessage(f"message {number}", id=f"m{number}")])
            at = grow(saver, at)
        other.setup()
        for asked, most in ((other, 6), (saver, 3)):  # nothing is known yet; all content is known
            with statements(engine) as sent:
                seed, writes = history(asked, at)
            assert len(sent) <= most, sent
            assert (len(seed.value), len(writes)) == (1, 60)
        saver.delete_thread("t")
    engine.dispose()


def test_a_damaged_history_is_refused(saver: SQLAlchemySaver, sql: Sql) -> None:
    at = grow(saver, None, {"d": _DeltaSnapshot([b"a" * 99])})
    write(saver, at, b"b" * 99)
    at = grow(saver, grow(saver, at))
    saver.prune(["t"])
    expected = history(saver, at)
    ((digest, left),) = sql("SELECT digest, body FROM agentmem_blobs WHERE kind = 5")
    seed, written = (bytes(one[0]).hex() for one in sql("SELECT digest FROM agentmem_blobs WHERE kind <> 5 LIMIT 2"))
    changed = left.replace(seed.encode(), b"x").replace(written.encode(), seed.encode()).replace(b"x", written.encode())
    for body in (changed, b"\0{}"):
        assert body != left
        sql("UPDATE agentmem_blobs SET body = ? WHERE digest = ?", body, digest)
        with pytest.raises(StorageError, match="ancestor"):
            saver.get_delta_channel_history(config=at, channels=["d"])
        with pytest.raises(StorageError, match="ancestor"):
            asyncio.run(saver.aget_delta_channel_history(config=at, channels=["d"]))
        next_ = grow(saver, at)
        with pytest.raises(StorageError):
            saver.prune(["t"])
        assert id_of(next_) != id_of(at)
    sql("UPDATE agentmem_blobs SET body = ? WHERE digest = ?", left, digest)
    assert history(saver, at) == expected
    sql("DELETE FROM agentmem_blobs WHERE digest = ?", digest)
    with pytest.raises(StorageError, match="missing"):
        saver.get_delta_channel_history(config=at, channels=["d"])


# Real graphs.

State = tuple[list[tuple[str, str]], list[str], int, bytes]


def of_run(run: str, thread: str = "t") -> RunnableConfig:
    return {**config(thread), "metadata": {"run_id": run}}


def state(graph: Any, at: RunnableConfig | None = None) -> State:
    """What a user sees, but for the ids of messages, which are made by chance."""
    values = graph.get_state(at or config()).values
    messages = [(message.type, str(message.content)) for message in values["messages"]]
    return messages, values["log"], values["total"], values["memory"]["matrices"][:1]


def talk(graph: Any, turn: int, **options: Any) -> None:
    """One turn; every fifth asks back, and is answered."""
    graph.invoke(say(f"turn {turn}{'?' if turn % 5 == 3 else ''}"), config(), **options)
    if turn % 5 == 3:
        graph.invoke(Command(resume=f"yes {turn}"), config(), **options)


def ends(graph: Any) -> dict[str, State]:
    """The states at the ends of all runs, newest first."""
    return {id_of(one.config): state(graph, one.config) for one in graph.get_state_history(config()) if not one.next}


@pytest.fixture(scope="module")
def expected() -> list[State]:
    """The states after each turn on LangGraph's own saver, which nobody prunes."""
    graph = delta_graph(InMemorySaver())
    states = []
    for turn in range(14):
        talk(graph, turn)
        states.append(state(graph))
    return states


def test_a_thread_that_is_pruned_goes_on(
    swept_saver: SQLAlchemySaver, shared_url: str, shared_ask: Sql, expected: list[State]
) -> None:
    """Between snapshots (every seven updates) and across them; by the process that ran it and by others.

    On each database with another durability, since they have nothing to do with each other.
    """
    durability = {"sqlite": "exit", "postgresql": "async", "mysql": "sync"}[make_url(shared_url).get_backend_name()]
    graph = delta_graph(swept_saver)
    sizes, snapshots = [], 0
    for turn in range(14):
        talk(graph, turn, durability=durability)
        assert state(graph) == expected[turn]
        if turn % 3 == 2:
            rows = shared_ask("SELECT count(*), sum(length(body)) FROM agentmem_blobs")[0]
            snapshots += sum("messages" in one.checkpoint["channel_values"] for one in swept_saver.list(config()))
            swept_saver.prune(["t"])
            sizes.append((rows, shared_ask("SELECT count(*), sum(length(body)) FROM agentmem_blobs")[0]))
            assert len(ids(swept_saver)) == 1
            assert unaccounted(shared_ask) == (set(), set())
            assert state(graph) == expected[turn]
            with SQLAlchemySaver.from_url(shared_url) as other:
                assert state(delta_graph(other)) == expected[turn]
    assert snapshots >= 2
    for before, after in sizes:
        assert before[0] > after[0]
        assert before[1] > after[1] + 9216  # at least one turn's memory


@shared_on_sqlite
def test_a_run_in_the_middle_is_taken_out(swept_saver: SQLAlchemySaver, expected: list[State]) -> None:
    """Its checkpoints are gone, and every other state is what it was: later ones hold what the run did."""
    graph = delta_graph(swept_saver)
    for turn in range(7):
        asked = turn == 3
        graph.invoke(say(f"turn {turn}{'?' * asked}"), of_run(f"run {turn}"))
        if asked:
            graph.invoke(Command(resume="yes 3"), of_run("run 3"))
    before = ends(graph)
    assert list(before.values()) == expected[6::-1]
    for gone in (4, 1, 0, 6, 3):
        swept_saver.delete_for_runs([f"run {gone}"])
        left = ends(graph)
        assert left == {key: value for key, value in before.items() if value != expected[gone]}
        before = left
    assert state(graph) == expected[5]
    graph.invoke(say("turn 6"), config())
    assert state(graph) == expected[6]


@shared_on_sqlite
def test_a_fork_is_pruned(swept_saver: SQLAlchemySaver) -> None:
    """The newest branch stays, with what it has from before the fork and nothing of the other branch."""
    graph = delta_graph(swept_saver)
    for turn in range(3):
        graph.invoke(say(f"turn {turn}"), config())
    second = [one.config for one in graph.get_state_history(config()) if not one.next][1]
    graph.invoke(say("left"), second)
    edited = graph.update_state(second, {"messages": [HumanMessage("edited")], "total": 100}, "remark")
    graph.invoke(say("right"), edited)
    right = state(graph)
    assert [content for _, content in right[0]][-5:] == ["remark on 4", "edited", "right", "answer 4", "remark on 8"]
    swept_saver.prune(["t"])
    assert state(graph) == right
    graph.invoke(say("on"), config())
    assert [content for _, content in state(graph)[0]][:-3] == [content for _, content in right[0]]
    assert state(graph)[2] == right[2] + 11


def test_copies_go_on_apart(swept_saver: SQLAlchemySaver, expected: list[State]) -> None:
    """Also in the middle of a step, in which a question waits for its answer."""
    graph = delta_graph(swept_saver)
    for turn in range(3):
        talk(graph, turn)
    asked = graph.invoke(say("turn 3?"), config())["__interrupt__"]
    swept_saver.copy_thread("t", "copy")
    swept_saver.prune(["t"])
    swept_saver.copy_thread("t", "copy of what was pruned")
    swept_saver.delete_thread("t")
    for thread in ("copy", "copy of what was pruned"):
        waiting = graph.get_state(config(thread))
        assert [one.value for one in waiting.interrupts] == [one.value for one in asked] == ["turn 3?"]
        assert waiting.next == ("answer",)  # the other node's work is done, and kept
        graph.invoke(Command(resume="yes 3"), config(thread))
        assert state(graph, config(thread)) == expected[3]
    graph.invoke(say("only here"), config("copy"))
    assert state(graph, config("copy of what was pruned")) == expected[3]
