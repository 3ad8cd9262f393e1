"""Taking checkpoints out of threads: what stays means what it meant, and what nothing refers to is gone at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME, _DeltaSnapshot

from agentmem.errors import ConfigError, StorageError
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config
from tests.helpers.sql_chains import grow, history, id_of, made, unaccounted, write

Sql = Callable[..., list[Any]]

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


def tuples(saver: SQLAlchemySaver, thread: str = "t") -> Tuples:
    """The checkpoints of a thread."""
    found = saver.list({"configurable": {"thread_id": thread}})
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
    after = tuples(saver)
    assert after.keys() == before.keys() - gone
    for key, one in after.items():
        assert held(one) == held(before[key])
        assert parent_of(one) == nearest(before, key, gone)
    walk = SQLAlchemySaver.get_delta_channel_history
    assert histories(saver, after, walk) == {key: left[key] for key in after}


def test_runs_that_are_taken_out_leave_every_other_checkpoint_as_it_was(
    swept_saver: SQLAlchemySaver, shared_ask: Sql, shared_url: str
) -> None:
    """One run after the other, in threads of random shape; then all but the newest checkpoints."""
    for seed in range(8 if shared_url.startswith("sqlite") else 2):
        random_thread(swept_saver, random.Random(seed), 24)
        before = tuples(swept_saver)
        left = histories(swept_saver, before, BaseCheckpointSaver.get_delta_channel_history)
        gone: set[Any] = set()
        for run in ("run 2", "run 1"):
            swept_saver.delete_for_runs([run])
            gone |= {key for key, one in before.items() if one.metadata["run_id"] == run}
            assert_taken_out(swept_saver, before, gone, left)
            assert unaccounted(shared_ask) == NOTHING
        swept_saver.prune(["t"])
        kept = {max(key for key in before.keys() - gone if key[0] == ns) for ns, _ in before.keys() - gone}
        assert_taken_out(swept_saver, before, before.keys() - kept, left)
        assert unaccounted(shared_ask) == NOTHING
        swept_saver.delete_thread("t")


def test_keep_latest_leaves_what_a_new_database_would_hold(
    swept_saver: SQLAlchemySaver, shared_ask: Sql, look: Sql, tmp_path: Path
) -> None:
    """Row for row as many as if only the newest checkpoint of each namespace had ever been stored."""
    for ns in ("", "sub:1", "n" * 300):
        at, messages = None, []
        for number in range(18):  # lists of 36 items, which take a node
            messages = [*messages, HumanMessage(f"message {number}", id=f"{number}"), [number] * 300]
            at = grow(swept_saver, at, {"messages": messages, "n": big(number), "same": b"s" * 99}, ns=ns, deltas="")
            swept_saver.put_writes(at, [("n", big(number)), ("x", big(-number))], "task", "path")
            swept_saver.put_writes(at, [(INTERRUPT, big(number % 3))], "task 2")
    before = tuples(swept_saver)
    rows = [count_of(shared_ask, table) for table in TABLES]
    swept_saver.prune(["t"])

    after = tuples(swept_saver)
    newest = {max(key for key in before if key[0] == ns) for ns, _ in before}
    assert {key: held(one) for key, one in after.items()} == {key: held(before[key]) for key in newest}
    assert all(one.parent_config is None for one in after.values())
    with SQLAlchemySaver.from_url(f"sqlite:///{tmp_path}/new.db") as other:
        for (ns, _), one in after.items():
            other.put(config(ns=ns), one.checkpoint, one.metadata, one.checkpoint["channel_versions"])
            of_task = {
                task: [write[1:] for write in one.pending_writes or () if write[0] == task]
                for task in ("task", "task 2")
            }
            for task, writes in of_task.items():
                other.put_writes(one.config, writes, task, "path")
        new = partial(look, f"sqlite:///{tmp_path}/new.db")
        assert [count_of(shared_ask, table) for table in TABLES] == [count_of(new, table) for table in TABLES]
    assert rows > [count_of(shared_ask, table) for table in TABLES]
    assert shared_ask("SELECT history FROM agentmem_checkpoints WHERE history IS NOT NULL") == []


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
    assert [count_of(shared_ask, table) for table in TABLES] == [1, 2, 1, 0]
    write(swept_saver, at, big(11))
    assert history(swept_saver, grow(swept_saver, at)) == (_DeltaSnapshot([big(10)]), [big(11)])


async def test_pruning_says_what_it_cannot_do_and_does_nothing_where_there_is_nothing(
    swept_saver: SQLAlchemySaver,
) -> None:
    grow(swept_saver, grow(swept_saver))
    before = tuples(swept_saver)
    for strategy in ("keep_first", "", "KEEP_LATEST"):
        with pytest.raises(ConfigError, match="'keep_latest' or 'delete', found"):
            swept_saver.prune(["t"], strategy=strategy)
        with pytest.raises(ConfigError, match="'keep_latest' or 'delete', found"):
            await swept_saver.aprune([], strategy=strategy)
    swept_saver.prune([])
    swept_saver.prune(["missing", "missing too"])
    swept_saver.prune(["missing"], strategy="delete")
    swept_saver.delete_for_runs([])
    swept_saver.delete_for_runs(["missing"])
    swept_saver.delete_thread("missing")
    assert tuples(swept_saver) == before
    await swept_saver.aprune(["missing", "t", "t"])
    once = tuples(swept_saver)
    assert len(once) == 1
    swept_saver.prune(["t"])
    assert tuples(swept_saver) == once


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
    assert [count_of(shared_ask, table) for table in TABLES] == [1, 3, 1, 2]


def test_writes_that_came_before_their_checkpoint_are_no_ones_to_take(swept_saver: SQLAlchemySaver) -> None:
    """A run stores checkpoints in the background, so what a task wrote may come first."""
    at = grow(swept_saver, grow(swept_saver, run_id="old"), {"x": big(1)}, run_id="old")
    coming = made({"x": big(3)})
    swept_saver.put_writes(config(checkpoint_id=coming["id"]), [("d", big(2))], "task")
    swept_saver.prune(["t"])
    swept_saver.delete_for_runs(["old"])
    assert swept_saver.get_tuple(at) is None
    arrived = swept_saver.put(at, coming, {}, coming["channel_versions"])
    found = swept_saver.get_tuple(arrived)
    assert found is not None
    assert found.pending_writes == [("task", "d", big(2))]
    assert history(swept_saver, grow(swept_saver, arrived)) == (None, [big(2)])


def test_runs_are_taken_out_of_all_threads_and_namespaces(swept_saver: SQLAlchemySaver, shared_ask: Sql) -> None:
    runs = ["one", "two", "three"]
    stored: dict[tuple[str, str], list[RunnableConfig]] = {}
    for thread, ns in product(("t", "u", "only one"), ("", "sub:1")):
        at: RunnableConfig = config(thread, ns)
        for number, run in enumerate(["one", "one"] if thread == "only one" else [*runs, *runs]):
            given: RunnableConfig = {**at, "metadata": {"run_id": run}}  # where LangGraph has it
            at = grow(swept_saver, given, {"n": big(number), "same": big(99)})
            swept_saver.put_writes(at, [("n", big(number + 1)), ("x", f"{thread} {ns} {run} " * 30)], "task")
            stored.setdefault((thread, ns), []).append(at)

    swept_saver.delete_for_runs(["one", "three", "nobody's"])

    for (thread, ns), all_ in stored.items():
        left = [swept_saver.get_tuple(at) for at in all_]
        if thread == "only one":
            assert left == [None, None]
            continue
        assert [one is not None for one in left] == [False, True, False] * 2
        first, second = left[1], left[4]
        assert first is not None
        assert second is not None
        assert (parent_of(first), parent_of(second)) == (None, id_of(first.config))
        newest = swept_saver.get_tuple(config(thread, ns))
        assert newest is not None
        assert held(newest) == held(second)
        assert {write[1] for write in second.pending_writes or ()} == {"n", "x"}
    # In each thread: two checkpoints and four writes a namespace; content: n, its writes, x of each namespace, same.
    assert [count_of(shared_ask, table) for table in TABLES] == [2, 2 * (2 + 2 + 2 + 1), 8, 16]
    swept_saver.delete_for_runs(["two"])
    assert [count_of(shared_ask, table) for table in TABLES] == [0, 0, 0, 0]


def test_content_of_replaced_special_writes_is_freed(swept_saver: SQLAlchemySaver, shared_ask: Sql) -> None:
    """An interrupt that is raised again with another value; what something else holds as well stays."""
    at = grow(swept_saver, None, {"x": big(1)})
    for value in (big(1), big(2), [big(3)] * 40, big(1), big(4)):
        swept_saver.put_writes(at, [(INTERRUPT, value), (RESUME, [value])], "task")
        found = swept_saver.get_tuple(at)
        assert found is not None
        assert sorted(write[1:] for write in found.pending_writes or ()) == [(INTERRUPT, value), (RESUME, [value])]
        assert unaccounted(shared_ask) == NOTHING
    swept_saver.put_writes(at, [(ERROR, big(4))], "another task")
    swept_saver.put_writes(at, [(INTERRUPT, big(5)), (RESUME, 5)], "task")
    found = swept_saver.get_tuple(at)
    assert found is not None
    assert found.checkpoint["channel_values"] == {"x": big(1)}
    assert ("another task", ERROR, big(4)) in (found.pending_writes or ())


@pytest.mark.parametrize("cached", [True, False])
def test_content_of_a_replaced_checkpoint_is_freed(
    swept_saver: SQLAlchemySaver, shared_url: str, shared_ask: Sql, cached: bool
) -> None:
    """Put again under its id with other values; what other checkpoints hold as well stays."""
    with SQLAlchemySaver.from_url(shared_url, cache_bytes=2**20 if cached else 0) as saver:
        first = grow(saver, None, {"x": big(1), "shared": big(9)})
        second = grow(saver, first, {"x": big(2), "shared": big(9), "log": [big(3)] * 40})
        before = tuples(saver)["", id_of(first)]
        for values in ({"x": big(4), "shared": big(9)}, {"x": big(1)}, {}, {"x": big(5), "log": [big(3)] * 41}):
            again = {**made(values), "id": id_of(second)}
            assert saver.put(first, again, {"step": 9}, again["channel_versions"]) == second
            found = saver.get_tuple(second)
            assert found is not None
            assert found.checkpoint == again
            assert (found.metadata, parent_of(found)) == ({"step": 9}, id_of(first))
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
    found = swept_saver.get_tuple(last)
    assert found is not None
    assert found.parent_config is None


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
