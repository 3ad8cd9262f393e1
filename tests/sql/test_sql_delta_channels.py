"""Delta channels: LangGraph's cases for the capability, what they leave out, and real graphs.

Graphs that are pruned, thinned out, forked and copied go on as if nothing had happened. The eight cases of the
conformance suite for `delta_channel_history` are in its repository but not in the package, so they are written anew.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, DeltaChannelHistory
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.types import Command
from sqlalchemy import Engine, create_engine, event, make_url

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import SyncMirror, config
from tests.helpers.sql_chains import grow, history, id_of, ids, made, unaccounted, write
from tests.helpers.sql_graphs import chat_graph, delta_graph, say

Sql = Callable[..., list[Any]]
Saver = BaseCheckpointSaver[str]


async def child(saver: Saver, parent: RunnableConfig, **values: Any) -> RunnableConfig:
    """Store a child of a checkpoint, which holds `values`; writes go to `d` and `e`."""
    one = made(values, "d e")
    return await saver.aput(parent, one, {}, one["channel_versions"])


async def seed_and_writes(saver: Saver, at: RunnableConfig, channel: str = "d") -> tuple[Any, list[Any]]:
    found = (await saver.aget_delta_channel_history(config=at, channels=[channel]))[channel]
    return found.get("seed"), [value for _, _, value in found["writes"]]


async def writes_are_oldest_first(saver: Saver, root: RunnableConfig) -> None:
    at = await child(saver, root)
    for number in range(4):
        await saver.aput_writes(at, [("d", [number, 0]), ("d", [number, 1])], "task")
        at = await child(saver, at)
    found = await saver.aget_delta_channel_history(config=at, channels=["d"])
    assert found == {"d": {"writes": [("task", "d", [number, half]) for number in range(4) for half in (0, 1)]}}


async def seed_is_the_nearest_snapshot(saver: Saver, root: RunnableConfig) -> None:
    at = await child(saver, root, d=_DeltaSnapshot(["far"]))
    await saver.aput_writes(at, [("d", "before")], "task")
    at = await child(saver, at, d=_DeltaSnapshot(["near"]))
    at = await child(saver, at)
    await saver.aput_writes(at, [("d", "after")], "task")
    at = await child(saver, at)
    assert await seed_and_writes(saver, at) == (_DeltaSnapshot(["near"]), ["after"])


async def own_pending_writes_are_excluded(saver: Saver, root: RunnableConfig) -> None:
    at = await child(saver, root, d=_DeltaSnapshot([1]))
    await saver.aput_writes(at, [("d", "counts")], "task")
    at = await child(saver, at)
    await saver.aput_writes(at, [("d", "is pending")], "task")
    assert await seed_and_writes(saver, at) == (_DeltaSnapshot([1]), ["counts"])


async def channels_end_independently(saver: Saver, root: RunnableConfig) -> None:
    at = await child(saver, root, d=_DeltaSnapshot(["d"]), e=_DeltaSnapshot(["far e"]))
    await saver.aput_writes(at, [("d", 1), ("e", 1)], "task")
    at = await child(saver, at, e=_DeltaSnapshot(["e"]))
    await saver.aput_writes(at, [("d", 2), ("e", 2)], "task")
    at = await child(saver, at)
    assert await saver.aget_delta_channel_history(config=at, channels=["d", "e"]) == {
        "d": {"seed": _DeltaSnapshot(["d"]), "writes": [("task", "d", 1), ("task", "d", 2)]},
        "e": {"seed": _DeltaSnapshot(["e"]), "writes": [("task", "e", 2)]},
    }


async def no_channels_no_answer(saver: Saver, root: RunnableConfig) -> None:
    at = await child(saver, root, d=_DeltaSnapshot([1]))
    assert await saver.aget_delta_channel_history(config=at, channels=[]) == {}


async def a_walk_to_the_root_has_no_seed(saver: Saver, root: RunnableConfig) -> None:
    at = await child(saver, root)
    await saver.aput_writes(at, [("d", "first")], "task")
    at = await child(saver, at)
    found = await saver.aget_delta_channel_history(config=at, channels=["d", "never written"])
    assert found == {"d": {"writes": [("task", "d", "first")]}, "never written": {"writes": []}}


async def a_plain_value_is_a_seed(saver: Saver, root: RunnableConfig) -> None:
    """Of a thread that was written before the channel became a delta channel."""
    at = await child(saver, root, d=["plain", "list"], e=None)
    await saver.aput_writes(at, [("d", "after")], "task")
    at = await child(saver, at)
    assert await saver.aget_delta_channel_history(config=at, channels=["d", "e"]) == {
        "d": {"seed": ["plain", "list"], "writes": [("task", "d", "after")]},
        "e": {"seed": None, "writes": []},
    }


async def writes_of_the_seeds_checkpoint_are_replayed(saver: Saver, root: RunnableConfig) -> None:
    at = await child(saver, root, d=_DeltaSnapshot([1]))
    await saver.aput_writes(at, [("d", "on the seed's own checkpoint")], "task")
    at = await child(saver, at)
    assert await seed_and_writes(saver, at) == (_DeltaSnapshot([1]), ["on the seed's own checkpoint"])


CASES = (
    writes_are_oldest_first,
    seed_is_the_nearest_snapshot,
    own_pending_writes_are_excluded,
    channels_end_independently,
    no_channels_no_answer,
    a_walk_to_the_root_has_no_seed,
    a_plain_value_is_a_seed,
    writes_of_the_seeds_checkpoint_are_replayed,
)


@pytest.fixture(params=[False, True], ids=["async", "sync"])
async def either(request: pytest.FixtureRequest, shared_url: str) -> AsyncIterator[Saver]:
    """A saver on each database, by its asynchronous methods and by its synchronous ones."""
    async with SQLAlchemySaver.from_url(shared_url) as saver:
        yield SyncMirror(saver) if request.param else saver
        for case in CASES:
            await saver.adelete_thread(case.__name__)


async def test_delta_history_conforms(either: Saver, subtests: pytest.Subtests) -> None:
    for case in CASES:
        with subtests.test(case=case.__name__):
            await case(either, config(case.__name__, ns="sub:1"))


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


def test_only_ancestors_on_the_way_count(swept_saver: SQLAlchemySaver) -> None:
    """Branches leave one checkpoint, in ids that lie between each other.

    No other namespace or thread is seen, though the same checkpoint ids are in them.
    """
    root = grow(swept_saver, None, {"d": _DeltaSnapshot(["root"])})
    write(swept_saver, root, "shared")
    left, right = grow(swept_saver, root), grow(swept_saver, root)
    for at, name in ((left, "left"), (right, "right"), (root, "late")):
        write(swept_saver, at, name, task=name)
    left, right = grow(swept_saver, left), grow(swept_saver, right)
    for thread, ns in (("u", ""), ("t", "sub:1")):
        same = {**made({"d": _DeltaSnapshot(["other"])}), "id": id_of(root)}
        elsewhere = swept_saver.put(config(thread, ns), same, {}, same["channel_versions"])
        write(swept_saver, elsewhere, f"{thread} {ns}", task="other")
        last = grow(swept_saver, elsewhere)
        assert history(swept_saver, last) == (_DeltaSnapshot(["other"]), [f"{thread} {ns}"])

    assert history(swept_saver, left) == (_DeltaSnapshot(["root"]), ["late", "shared", "left"])
    assert history(swept_saver, right) == (_DeltaSnapshot(["root"]), ["late", "shared", "right"])


def test_writes_of_a_superstep_come_in_the_order_in_which_it_applied_them(swept_saver: SQLAlchemySaver) -> None:
    at = grow(swept_saver)
    for path, task in [("~pull, b", "1"), ("~pull, a", "9"), ("", "zz"), ("~pull, c", "0"), ("~pull, a", "3")]:
        write(swept_saver, at, f"{path} {task} 0", f"{path} {task} 1", task=task, path=path)
    _, writes = history(swept_saver, grow(swept_saver, at))
    found = swept_saver.get_tuple(at)
    (listed,) = swept_saver.list(at)
    assert found is not None
    assert [value for _, _, value in found.pending_writes or ()] == writes
    assert listed.pending_writes == found.pending_writes
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


def test_the_newest_checkpoint_is_meant_where_none_is_named(swept_saver: SQLAlchemySaver) -> None:
    at = grow(swept_saver, None, {"d": _DeltaSnapshot([1])})
    write(swept_saver, at, 2)
    write(swept_saver, grow(swept_saver, at), 3)
    assert history(swept_saver, config()) == (_DeltaSnapshot([1]), [2])


def test_what_is_not_there_has_no_history(swept_saver: SQLAlchemySaver) -> None:
    nothing: Mapping[str, DeltaChannelHistory] = {"d": {"writes": []}, "e": {"writes": []}}
    grow(swept_saver, None, {"d": _DeltaSnapshot([1])}, thread="u")
    for at in (config(), config("u", "other"), config("u", checkpoint_id="missing")):
        assert swept_saver.get_delta_channel_history(config=at, channels=["d", "e"]) == nothing
    orphan = grow(swept_saver, config(checkpoint_id="a parent that was never stored"))
    write(swept_saver, config(checkpoint_id="a parent that was never stored"), "of no checkpoint")
    assert history(swept_saver, orphan) == (None, [])


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


@contextmanager
def counted(engine: Engine) -> Iterator[list[str]]:
    """The statements that the engine sends."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield statements
    event.remove(engine, "before_cursor_execute", note)


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
            with counted(engine) as statements:
                seed, writes = history(asked, at)
            assert len(statements) <= most, statements
            assert (len(seed.value), len(writes)) == (1, 60)
        saver.delete_thread("t")
    engine.dispose()


def test_a_history_that_is_pruned_while_it_is_read_is_whole(shared_url: str) -> None:
    """At each of its statements in turn, everything but the newest checkpoint, or the one before, is taken out."""
    engine = create_engine(shared_url)
    pruned = 0

    def prune(*_: Any) -> None:
        nonlocal statement, pruned
        statement += 1
        if statement == when:
            pruned += 1
            prunes()

    with SQLAlchemySaver(engine, cache_bytes=0) as saver, SQLAlchemySaver.from_url(shared_url) as other:
        saver.setup()
        for thread, latest in (("all", True), ("one", False)):
            for when in range(1, 8):
                root = grow(other, None, {"d": _DeltaSnapshot([[0] * 99])}, thread=thread)
                write(other, root, [1] * 99)
                middle = grow(other, root, run_id="middle")
                write(other, middle, [2] * 99)
                at = grow(other, middle)
                expected = history(other, at)
                statement = 0

                def prunes(latest: bool = latest, thread: str = thread) -> None:
                    if latest:
                        other.prune([thread])
                    else:
                        other.delete_for_runs(["middle"])

                event.listen(engine, "before_cursor_execute", prune)
                assert history(saver, at) == expected, (thread, when)
                event.remove(engine, "before_cursor_execute", prune)
                other.delete_thread(thread)
    engine.dispose()
    assert pruned >= 6


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


def test_a_question_that_waits_for_its_answer_outlives_pruning(
    swept_saver: SQLAlchemySaver, shared_url: str, expected: list[State]
) -> None:
    graph = delta_graph(swept_saver)
    for turn in range(3):
        talk(graph, turn)
    asked = graph.invoke(say("turn 3?"), config())["__interrupt__"]
    swept_saver.prune(["t"])
    waiting = graph.get_state(config())
    assert [one.value for one in waiting.interrupts] == [one.value for one in asked] == ["turn 3?"]
    assert waiting.next == ("answer",)  # the other node's work is done, and kept
    with SQLAlchemySaver.from_url(shared_url) as other:
        resumed = delta_graph(other)
        resumed.invoke(Command(resume="yes 3"), config())
        assert state(resumed) == expected[3]
    assert state(graph) == expected[3]


async def test_pruning_in_asyncio(swept_saver: SQLAlchemySaver, expected: list[State]) -> None:
    graph = delta_graph(swept_saver)
    for turn in range(3):
        await graph.ainvoke(say(f"turn {turn}"), config())
        await swept_saver.aprune(["t"])
        assert await asyncio.to_thread(state, graph) == expected[turn]


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


def test_a_thread_from_before_its_channel_was_a_delta_channel(swept_saver: SQLAlchemySaver) -> None:
    """Plain lists of messages in its checkpoints are where the history begins, pruned or not."""
    chat_graph(swept_saver).invoke(say("hello"), config())
    graph = delta_graph(swept_saver)
    graph.invoke(say("again"), config())
    contents = [content for _, content in state(graph)[0]]
    assert contents == ["hello", "answer 1", "again", "answer 2", "remark on 3"]
    swept_saver.prune(["t"])
    assert [content for _, content in state(graph)[0]] == contents


def test_copies_go_on_apart(swept_saver: SQLAlchemySaver, expected: list[State]) -> None:
    graph = delta_graph(swept_saver)
    for turn in range(3):
        talk(graph, turn)
    graph.invoke(say("turn 3?"), config())
    swept_saver.copy_thread("t", "copy")
    swept_saver.prune(["t"])
    swept_saver.copy_thread("t", "copy of what was pruned")
    swept_saver.delete_thread("t")
    for thread in ("copy", "copy of what was pruned"):
        graph.invoke(Command(resume="yes 3"), config(thread))
        assert state(graph, config(thread)) == expected[3]
    graph.invoke(say("only here"), config("copy"))
    assert state(graph, config("copy of what was pruned")) == expected[3]


def test_snapshots_share_their_items(swept_saver: SQLAlchemySaver, shared_ask: Sql) -> None:
    """A snapshot of a list that has grown by a few items stores those, a few nodes, and nothing twice."""
    messages = [HumanMessage(f"message {number} " * 20, id=f"{number}") for number in range(400)]
    at, sizes = None, []
    for length in range(300, 401, 10):
        at = grow(swept_saver, at, {"d": _DeltaSnapshot(messages[:length])})
        sizes.append(shared_ask("SELECT sum(length(body)) FROM agentmem_blobs")[0][0])
    each = sizes[0] / 300
    assert max(after - before for before, after in pairwise(sizes)) < 10 * each + 4096
    assert history(swept_saver, grow(swept_saver, at)) == (_DeltaSnapshot(messages), [])
    swept_saver.prune(["t"])
    assert shared_ask("SELECT sum(length(body)) FROM agentmem_blobs")[0][0] < sizes[-1]
