"""Taking checkpoints out of threads, and copying threads.

What stays means what it meant, what nothing refers to is gone at once, and a copy shares nothing with its source.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME, _DeltaSnapshot
from sqlalchemy import create_engine

from agentmem.errors import ConfigError, StorageError
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import Sql, config, get, read
from tests.helpers.sql_chains import grow, history, id_of, made, statements, unaccounted, write
from tests.sql.conftest import shared_on_sqlite

NOTHING: tuple[set[Any], set[Any]] = (set(), set())
Tuples = Mapping[tuple[str, str], CheckpointTuple]  # by namespace and id
TABLES = ("threads", "blobs", "checkpoints", "writes")


def big(number: int) -> bytes:
    """A value that has a row of content for itself."""
    return b"%d." % number * 100


def count_of(shared_ask: Sql, table: str) -> int:
    """How many rows a table has, of all threads."""
    found: int = shared_ask(f"SELECT count(*) FROM agentmem_{table}")[0][0]
    return found


def tuples(saver: SQLAlchemySaver, thread: str | None = "t") -> Tuples:
    """The checkpoints of a thread, or of all."""
    found = saver.list(None if thread is None else {"configurable": {"thread_id": thread}})
    return {(one.config["configurable"]["checkpoint_ns"], id_of(one.config)): one for one in found}


def parent_of(found: CheckpointTuple) -> str | None:
    return None if found.parent_config is None else id_of(found.parent_config)


def held(found: CheckpointTuple) -> tuple[Any, ...]:
    """All of a tuple but its parent."""
    return found.config, found.checkpoint, found.metadata, found.pending_writes


def random_thread(saver: SQLAlchemySaver, chance: random.Random, size: int, thread: str = "t") -> None:
    """Checkpoints of three runs in two namespaces: forks, roots, lists that grow, delta channels, pending writes."""
    stored: dict[str, list[RunnableConfig]] = {"": [], "sub:1": []}
    log: list[Any] = []
    for number in range(size):
        ns = chance.choice(["", "", "sub:1"])
        parent = None if not stored[ns] or chance.random() < 0.05 else chance.choice(stored[ns][-3:])
        log = [
            *log[chance.randrange(2) :],
            chance.choice([number, f"item {number} " * 9, HumanMessage("x", id=f"{number}")]),
        ]
        values: dict[str, Any] = {"log": log, "same": b"same" * 99}
        for name in "ab":
            if chance.random() < 0.2:
                values[name] = chance.choice([_DeltaSnapshot([name, number]), _DeltaSnapshot(log), [name], None])
        run = chance.choice(["run 1", "run 2", "run 3"])
        at = grow(saver, parent, values, thread=thread, ns=ns, deltas="a b log same", run_id=run)
        stored[ns].append(at)
        for task in range(chance.randrange(3)):
            path = chance.choice(["", f"~__pregel_pull, {chance.choice('xyz')}"])
            writes = [
                (chance.choice(["a", "b", "log"]), [number, task, "w" * 99]) for _ in range(chance.randrange(1, 4))
            ]
            saver.put_writes(at, writes, f"{chance.randrange(100):02}-{task}", path)


def histories(saver: SQLAlchemySaver, found: Mapping[Any, CheckpointTuple], walk: Any) -> dict[Any, Any]:
    """The histories of delta channels, of each checkpoint for those that it does not hold."""
    return {
        key: walk(
            saver, config=one.config, channels=[name for name in "ab" if name not in one.checkpoint["channel_values"]]
        )
        for key, one in found.items()
    }


def nearest(before: Tuples, key: tuple[str, str], gone: set[Any]) -> str | None:
    """The id of the nearest ancestor that is not gone."""
    parent = parent_of(before[key])
    while parent is not None and (key[0], parent) in gone:
        parent = parent_of(before[key[0], parent])
    return parent


def assert_taken_out(saver: SQLAlchemySaver, before: Tuples, gone: set[Any], left: Any) -> None:
    """Only `gone` is gone, and what is left holds what it held; `left` are the histories from before."""
    after = tuples(saver, None)
    assert after.keys() == before.keys() - gone
    for key, one in after.items():
        assert held(one) == held(before[key])
        assert parent_of(one) == nearest(before, key, gone)
    walk = SQLAlchemySaver.get_delta_channel_history
    assert histories(saver, after, walk) == {key: left[key] for key in after}


def test_runs_that_are_taken_out_leave_every_other_checkpoint_as_it_was(
    swept_saver: SQLAlchemySaver, shared_ask: Sql, shared_url: str
) -> None:
    """One run after the other, in two threads of random shape; then all but the newest checkpoints; then these."""
    for seed in range(8 if shared_url.startswith("sqlite") else 2):
        random_thread(swept_saver, random.Random(seed), 24)
        random_thread(swept_saver, random.Random(-seed), 8, thread="u")
        before = tuples(swept_saver, None)
        left = histories(swept_saver, before, BaseCheckpointSaver.get_delta_channel_history)
        gone: set[Any] = set()
        for run in ("run 2", "run 1"):
            swept_saver.delete_for_runs([run, "nobody's"])
            gone |= {key for key, one in before.items() if one.metadata["run_id"] == run}
            assert_taken_out(swept_saver, before, gone, left)
            assert unaccounted(shared_ask) == NOTHING
        swept_saver.prune(["t", "u"])
        newest = {(before[key].config["configurable"]["thread_id"], key[0]): key for key in sorted({*before} - gone)}
        assert_taken_out(swept_saver, before, before.keys() - newest.values(), left)
        assert unaccounted(shared_ask) == NOTHING
        swept_saver.delete_for_runs(["run 3"])
        assert [count_of(shared_ask, table) for table in TABLES] == [0, 0, 0, 0]


def test_a_thread_is_pruned_again_and_again(swept_saver: SQLAlchemySaver, shared_ask: Sql) -> None:
    """What was left with a checkpoint goes on to the next; once there is a new snapshot, it is freed."""
    at = grow(swept_saver, config(checkpoint_id="never stored"), {"d": _DeltaSnapshot([big(0)])})
    for number in range(1, 9):
        write(swept_saver, at, big(number))
        at = grow(swept_saver, at)
        swept_saver.prune(["t"])
        assert history(swept_saver, at) == (_DeltaSnapshot([big(0)]), [big(one) for one in range(1, number + 1)])
        assert [parent_of(one) for one in tuples(swept_saver).values()] == [None]
        assert unaccounted(shared_ask) == NOTHING
    write(swept_saver, at, big(9))
    at = grow(swept_saver, at, {"d": _DeltaSnapshot([big(10)])})
    swept_saver.prune(["t"])
    assert [count_of(shared_ask, table) for table in TABLES] == [1, 3, 1, 0]
    write(swept_saver, at, big(11))
    assert history(swept_saver, grow(swept_saver, at)) == (_DeltaSnapshot([big(10)]), [big(11)])


@shared_on_sqlite
async def test_pruning_says_what_it_cannot_do(swept_saver: SQLAlchemySaver) -> None:
    newest = grow(swept_saver, grow(swept_saver))
    before = tuples(swept_saver)
    for strategy in ("keep_first", "", "KEEP_LATEST"):
        with pytest.raises(ConfigError, match="'keep_latest' or 'delete', found"):
            swept_saver.prune(["t"], strategy=strategy)
        with pytest.raises(ConfigError, match="'keep_latest' or 'delete', found"):
            await swept_saver.aprune([], strategy=strategy)
    assert tuples(swept_saver) == before
    await swept_saver.aprune(["missing", "t", "t"])
    swept_saver.prune(["t"])
    assert [one.config for one in tuples(swept_saver).values()] == [newest]


def test_the_strategy_delete_leaves_nothing_of_the_threads_that_are_named(
    swept_saver: SQLAlchemySaver, shared_ask: Sql
) -> None:
    for thread in ("t", "u", "v", "7"):
        at = grow(swept_saver, None, {"x": big(1)}, thread=thread)
        swept_saver.put_writes(at, [("x", big(2))], "task")
        swept_saver.put_writes(config(thread, checkpoint_id="not there yet"), [("x", big(3))], "task")
    kept = tuples(swept_saver, "v")
    swept_saver.prune(["t", "u", 7], strategy="delete")  # type: ignore[list-item]
    assert [bytes(name) for (name,) in shared_ask("SELECT name FROM agentmem_threads")] == [b"v"]
    assert tuples(swept_saver, "v") == kept
    assert [count_of(shared_ask, table) for table in TABLES] == [1, 4, 1, 2]


@shared_on_sqlite
def test_writes_that_came_before_their_checkpoint_are_no_ones_to_take(swept_saver: SQLAlchemySaver) -> None:
    """A run stores checkpoints in the background, so what a task wrote may come first."""
    at = grow(swept_saver, grow(swept_saver, run_id="old"), {"x": big(1)}, run_id="old")
    coming = made({"x": big(3)})
    swept_saver.put_writes(config(checkpoint_id=coming["id"]), [("d", big(2))], "task")
    swept_saver.prune(["t"])
    swept_saver.delete_for_runs(["old"])
    assert swept_saver.get_tuple(at) is None
    arrived = swept_saver.put(at, coming, {}, coming["channel_versions"])
    assert get(swept_saver, arrived).pending_writes == [("task", "d", big(2))]
    assert history(swept_saver, grow(swept_saver, arrived)) == (None, [big(2)])


def test_content_of_replaced_special_writes_is_freed(swept_saver: SQLAlchemySaver, shared_ask: Sql) -> None:
    """An interrupt that is raised again with another value; what something else holds as well stays."""
    at = grow(swept_saver, None, {"x": big(1)})
    for value in (big(1), big(2), [big(3)] * 40, big(1), big(4)):
        swept_saver.put_writes(at, [(INTERRUPT, value), (RESUME, [value])], "task")
        found = get(swept_saver, at)
        assert sorted(write[1:] for write in found.pending_writes or ()) == [(INTERRUPT, value), (RESUME, [value])]
        assert unaccounted(shared_ask) == NOTHING
    swept_saver.put_writes(at, [(ERROR, big(4))], "another task")
    swept_saver.put_writes(at, [(INTERRUPT, big(5)), (RESUME, 5)], "task")
    found = get(swept_saver, at)
    assert found.checkpoint["channel_values"] == {"x": big(1)}
    assert ("another task", ERROR, big(4)) in (found.pending_writes or ())


@shared_on_sqlite
def test_a_resumed_task_takes_no_longer_in_a_long_thread(swept_saver: SQLAlchemySaver, shared_url: str) -> None:
    """What it replaces is freed without a look at the rest of the thread, and the cache stays good."""
    engine = create_engine(shared_url)
    answered: dict[int, list[str]] = {}
    with SQLAlchemySaver(engine) as saver:
        at = grow(saver, None, {"log": [big(0)]}, deltas="")
        for number in range(1, 31):
            at = grow(saver, at, {"log": [big(one) for one in range(number)]}, deltas="")
            saver.put_writes(at, [(INTERRUPT, [number])], "task")
            with statements(engine) as answered[number]:
                # As LangGraph does: the answer, the task's next question, and at last its results with all answers.
                saver.put_writes(at, [(RESUME, "yes")], "null")
                saver.put_writes(at, [(INTERRUPT, [-number]), (RESUME, ["yes"])], "task")
                saver.put_writes(at, [(RESUME, "no")], "null")
                for _ in range(2):  # the second changes nothing
                    saver.put_writes(at, [(RESUME, ["yes", "no"]), ("log", [big(number)])], "task")
            found = get(saver, at)
            assert sorted(found.pending_writes or (), key=repr) == [
                ("null", RESUME, "no"),
                ("task", INTERRUPT, [-number]),
                ("task", RESUME, ["yes"]),
                ("task", "log", [big(number)]),
            ]
    engine.dispose()
    assert not any("FROM agentmem_checkpoints" in statement for statement in answered[30])
    assert len(answered[30]) == len(answered[5])


@pytest.mark.parametrize("cached", [True, False])
def test_content_of_a_replaced_checkpoint_is_freed(
    swept_saver: SQLAlchemySaver, shared_url: str, shared_ask: Sql, cached: bool
) -> None:
    """Put again under its id with other values or another parent; what other checkpoints hold as well stays."""
    with SQLAlchemySaver.from_url(shared_url, cache_bytes=2**20 if cached else 0) as saver:
        first = grow(saver, None, {"x": big(1), "shared": big(9)})
        another = grow(saver, first)
        second = grow(saver, first, {"x": big(2), "shared": big(9), "log": [big(3)] * 40})
        before = tuples(saver)["", id_of(first)]
        contents = ({"x": big(4), "shared": big(9)}, {"x": big(1)}, {}, {"x": big(5), "log": [big(3)] * 41})
        for parent, values in zip((first, another, first, first), contents, strict=True):
            again = {**made(values), "id": id_of(second)}
            assert saver.put(parent, again, {"step": 9}, again["channel_versions"]) == second
            found = get(saver, second)
            assert found.checkpoint == again
            assert (found.metadata, found.parent_config) == ({"step": 9}, parent)
            assert unaccounted(shared_ask) == NOTHING
        assert tuples(saver)["", id_of(first)] == before


@pytest.mark.parametrize("middle", [True, False])
def test_a_checkpoint_that_is_put_again_keeps_what_its_ancestors_left_it(
    swept_saver: SQLAlchemySaver, middle: bool
) -> None:
    """Whoever puts it again may name the parent that was pruned."""
    root = grow(swept_saver, None, {"d": _DeltaSnapshot([0])}, run_id="root")
    if middle:
        write(swept_saver, root, 1)
    gone = grow(swept_saver, root, run_id="gone")
    if not middle:
        write(swept_saver, gone, 1)
    last = grow(swept_saver, gone, run_id="last")
    swept_saver.delete_for_runs(["gone"])
    assert history(swept_saver, last) == (_DeltaSnapshot([0]), [1])
    again = {**made({"x": 1}), "id": id_of(last)}
    swept_saver.put(gone, again, {}, again["channel_versions"])
    assert history(swept_saver, last) == (_DeltaSnapshot([0]), [1])
    swept_saver.prune(["t"])
    swept_saver.put(gone, again, {}, again["channel_versions"])
    assert history(swept_saver, last) == (_DeltaSnapshot([0]), [1])
    assert get(swept_saver, last).parent_config is None


def test_a_thread_whose_lists_are_damaged_is_not_pruned(saver: SQLAlchemySaver, sql: Sql) -> None:
    """What a damaged list refers to would be taken for dead, and freed."""
    at = grow(saver, grow(saver), {"log": [big(number) for number in range(99)]})
    before = tuples(saver)["", id_of(at)]
    for kind in (1, 2):
        digest, body = sql("SELECT digest, body FROM agentmem_blobs WHERE kind = ? LIMIT 1", kind)[0]
        for damaged in (body[:-40], body[:-1] + bytes([body[-1] ^ 1])):
            sql("UPDATE agentmem_blobs SET body = ? WHERE digest = ?", damaged, digest)
            with pytest.raises(StorageError, match="digest differs"):
                saver.prune(["t"])
        sql("UPDATE agentmem_blobs SET body = ? WHERE digest = ?", body, digest)
    saver.prune(["t"])
    assert {key: held(one) for key, one in tuples(saver).items()} == {("", id_of(at)): held(before)}


# Copies.

NAMESPACES = ("", "sub:1|deeper:2", "n" * 300)


def fill(saver: SQLAlchemySaver, thread: str = "t") -> None:
    """Namespaces with forks, lists that share their items, delta channels, pending writes of all kinds."""
    for ns in NAMESPACES:
        root = grow(saver, None, {"d": _DeltaSnapshot([b"seed" * 99])}, thread=thread, ns=ns)
        for branch in range(2):
            at, messages = root, []
            for number in range(3):
                write(saver, at, b"%d%d" % (branch, number) * 99, task=f"{branch}")
                saver.put_writes(at, [(INTERRUPT, [branch, number])], f"{branch} asks", "path")
                messages = [*messages, HumanMessage(f"{number} " * 50, id=f"{branch}{number}")] * 2
                at = grow(saver, at, {"messages": messages, "raw": b"same" * 999}, ns=ns, thread=thread)
    saver.put_writes(config(thread, checkpoint_id="not there yet"), [("x", b"early" * 99)], "task")


def all_of(saver: SQLAlchemySaver, thread: str) -> list[Any]:
    """All of a thread but its name: ids, parents, values, metadata, pending writes, histories."""

    def one(found: CheckpointTuple) -> Any:
        places = [found.config["configurable"], (found.parent_config or config())["configurable"]]
        ids = [(place["checkpoint_ns"], place.get("checkpoint_id")) for place in places]
        return ids, found.checkpoint, found.metadata, found.pending_writes, history(saver, found.config)

    return [one(found) for found in saver.list({"configurable": {"thread_id": thread}})]


@pytest.mark.parametrize("pruned", [False, True])
def test_a_copy_is_whole_and_shares_nothing(
    swept_saver: SQLAlchemySaver, shared_url: str, shared_ask: Sql, pruned: bool
) -> None:
    fill(swept_saver)
    if pruned:
        swept_saver.prune(["t"])
    source = all_of(swept_saver, "t")
    assert len(source) == len(NAMESPACES) * (1 if pruned else 7)
    swept_saver.copy_thread("t", "copy")
    assert all_of(swept_saver, "t") == all_of(swept_saver, "copy") == source
    for table in ("blobs", "checkpoints", "writes"):
        counts = shared_ask(f"SELECT count(*) FROM agentmem_{table} GROUP BY thread")
        assert len(counts) == 2
        assert counts[0] == counts[1]

    swept_saver.delete_thread("t")
    assert all_of(swept_saver, "copy") == source
    with SQLAlchemySaver.from_url(shared_url, cache_bytes=0) as other:
        assert all_of(other, "copy") == source
        other.copy_thread("copy", "t")
        other.prune(["copy"], strategy="delete")
        assert all_of(other, "t") == source
    assert all_of(swept_saver, "t") == source


def test_copies_over_a_thread_that_is_there(swept_saver: SQLAlchemySaver) -> None:
    """What it has under the same ids becomes what the source has, the rest of it stays."""
    at = grow(swept_saver, None, {"x": b"old" * 99})
    swept_saver.copy_thread("t", "copy")
    own = grow(swept_saver, {"configurable": {**at["configurable"], "thread_id": "copy"}}, {"x": b"own" * 99})
    mine = swept_saver.get_tuple(own)
    write(swept_saver, at, b"later" * 99)
    grow(swept_saver, at, {"x": b"newer" * 99})
    source = all_of(swept_saver, "t")

    swept_saver.copy_thread("t", "copy")

    assert swept_saver.get_tuple(own) == mine
    assert [one for one in all_of(swept_saver, "copy") if one[0][0][1] != id_of(own)] == source
    assert all_of(swept_saver, "t") == source
    # A copy whose checkpoint was replaced gives up the content that it had.
    swept_saver.delete_thread("t")
    again = {**made({"x": b"again" * 99}), "id": id_of(at)}
    swept_saver.put(config(), again, {}, again["channel_versions"])
    swept_saver.copy_thread("t", "copy")
    assert read(swept_saver, config("copy", checkpoint_id=id_of(at))) == {"x": b"again" * 99}


@shared_on_sqlite
async def test_copies_of_nothing_and_onto_itself(swept_saver: SQLAlchemySaver, shared_ask: Sql) -> None:
    swept_saver.copy_thread("missing", "copy")
    swept_saver.copy_thread("missing", "missing")
    assert shared_ask("SELECT count(*) FROM agentmem_threads") == [(0,)]
    fill(swept_saver)
    source = all_of(swept_saver, "t")
    swept_saver.copy_thread("t", "t")
    swept_saver.copy_thread("missing", "t")
    await swept_saver.acopy_thread("t", "t")
    assert all_of(swept_saver, "t") == source
    assert shared_ask("SELECT count(*) FROM agentmem_threads") == [(1,)]


@shared_on_sqlite
def test_whoever_knows_the_target_learns_that_it_has_changed(swept_saver: SQLAlchemySaver, shared_url: str) -> None:
    """A saver that has read and written the target goes on with it after another has copied over it."""
    value = [HumanMessage("hello " * 50, id="1")]
    with SQLAlchemySaver.from_url(shared_url) as other:
        at = grow(swept_saver, None, {"x": value})
        mine = {"configurable": {**at["configurable"], "thread_id": "copy"}}
        again = {**made({"x": value}), "id": id_of(at)}
        swept_saver.put(config("copy"), again, {}, again["channel_versions"])
        replaced = {**made({"x": b"other" * 99}), "id": id_of(at)}
        other.delete_thread("t")
        other.put(config(), replaced, {}, replaced["channel_versions"])
        other.copy_thread("t", "copy")
        grown = grow(swept_saver, mine, {"x": value})
        assert read(other, grown) == {"x": value}


def test_copies_in_both_directions_do_not_lock_each_other_out(swept_saver: SQLAlchemySaver, shared_url: str) -> None:
    names = ["a", "b", "c"]
    for name in names:
        at: RunnableConfig = config(name)
        for number in range(5):
            at = grow(swept_saver, at, {"x": b"%d" % number * 999, "same": b"same" * 999})
    sources = {name: {one[0][0] for one in all_of(swept_saver, name)} for name in names}

    def copy(number: int) -> None:
        source, target = names[number % 3], names[(number + 1 + number % 2) % 3]
        (swept_saver if number % 4 < 2 else other).copy_thread(source, target)
        if number % 5 == 0:
            other.copy_thread(source, f"new {number % 2}")

    with SQLAlchemySaver.from_url(shared_url) as other:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(copy, range(24)))
        every = set().union(*sources.values())
        for _ in range(2):
            for source, target in (("a", "b"), ("b", "c"), ("c", "a")):
                other.copy_thread(source, target)
        assert all({one[0][0] for one in all_of(swept_saver, name)} == every for name in names)
