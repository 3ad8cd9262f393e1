"""Copies of threads: everything of the source, under the same ids, and nothing shared with it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.serde.types import INTERRUPT, _DeltaSnapshot

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config
from tests.helpers.sql_chains import grow, history, id_of, made, write

Sql = Callable[..., list[Any]]
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


def seen(saver: SQLAlchemySaver, thread: str) -> list[Any]:
    """All of a thread but its name: ids, parents, values, metadata, pending writes, histories."""

    def one(found: CheckpointTuple) -> Any:
        places = [found.config["configurable"], (found.parent_config or config())["configurable"]]
        ids = [(place["checkpoint_ns"], place.get("checkpoint_id")) for place in places]
        return ids, found.checkpoint, found.metadata, found.pending_writes, history(saver, found.config)

    return [one(found) for found in saver.list({"configurable": {"thread_id": thread}})]


def test_a_copy_is_whole_and_shares_nothing(swept_saver: SQLAlchemySaver, shared_url: str, shared_ask: Sql) -> None:
    fill(swept_saver)
    source = seen(swept_saver, "t")
    assert len(source) == len(NAMESPACES) * 7
    swept_saver.copy_thread("t", "copy")
    assert seen(swept_saver, "t") == seen(swept_saver, "copy") == source
    for table in ("blobs", "checkpoints", "writes"):
        counts = shared_ask(f"SELECT count(*) FROM agentmem_{table} GROUP BY thread")
        assert len(counts) == 2
        assert counts[0] == counts[1]

    swept_saver.delete_thread("t")
    assert seen(swept_saver, "copy") == source
    with SQLAlchemySaver.from_url(shared_url, cache_bytes=0) as other:
        assert seen(other, "copy") == source
        other.copy_thread("copy", "t")
        other.prune(["copy"], strategy="delete")
        assert seen(other, "t") == source
    assert seen(swept_saver, "t") == source


def test_a_copy_of_a_pruned_thread_means_the_same(swept_saver: SQLAlchemySaver) -> None:
    fill(swept_saver)
    swept_saver.prune(["t"])
    source = seen(swept_saver, "t")
    assert len(source) == len(NAMESPACES)
    swept_saver.copy_thread("t", "copy")
    swept_saver.delete_thread("t")
    assert seen(swept_saver, "copy") == source
    newest = swept_saver.get_tuple(config("copy"))
    assert newest is not None
    at = grow(swept_saver, newest.config, {"d": _DeltaSnapshot([1])})
    assert history(swept_saver, grow(swept_saver, at)) == (_DeltaSnapshot([1]), [])


def test_copies_over_a_thread_that_is_there(swept_saver: SQLAlchemySaver) -> None:
    """What it has under the same ids becomes what the source has, the rest of it stays."""
    at = grow(swept_saver, None, {"x": b"old" * 99})
    swept_saver.copy_thread("t", "copy")
    own = grow(swept_saver, {"configurable": {**at["configurable"], "thread_id": "copy"}}, {"x": b"own" * 99})
    mine = swept_saver.get_tuple(own)
    write(swept_saver, at, b"later" * 99)
    grow(swept_saver, at, {"x": b"newer" * 99})
    source = seen(swept_saver, "t")

    swept_saver.copy_thread("t", "copy")

    assert swept_saver.get_tuple(own) == mine
    assert [one for one in seen(swept_saver, "copy") if one[0][0][1] != id_of(own)] == source
    assert seen(swept_saver, "t") == source
    # A copy whose checkpoint was replaced gives up the content that it had.
    swept_saver.delete_thread("t")
    again = {**made({"x": b"again" * 99}), "id": id_of(at)}
    swept_saver.put(config(), again, {}, again["channel_versions"])
    swept_saver.copy_thread("t", "copy")
    found = swept_saver.get_tuple(config("copy", checkpoint_id=id_of(at)))
    assert found is not None
    assert found.checkpoint["channel_values"] == {"x": b"again" * 99}


async def test_copies_of_nothing_and_onto_itself(swept_saver: SQLAlchemySaver, shared_ask: Sql) -> None:
    swept_saver.copy_thread("missing", "copy")
    swept_saver.copy_thread("missing", "missing")
    assert shared_ask("SELECT count(*) FROM agentmem_threads") == [(0,)]
    fill(swept_saver)
    source = seen(swept_saver, "t")
    swept_saver.copy_thread("t", "t")
    swept_saver.copy_thread("missing", "t")
    await swept_saver.acopy_thread("t", "t")
    assert seen(swept_saver, "t") == source
    assert shared_ask("SELECT count(*) FROM agentmem_threads") == [(1,)]


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
        found = other.get_tuple(grown)
        assert found is not None
        assert found.checkpoint["channel_values"] == {"x": value}


def test_copies_in_both_directions_do_not_lock_each_other_out(swept_saver: SQLAlchemySaver, shared_url: str) -> None:
    names = ["a", "b", "c"]
    for name in names:
        at: RunnableConfig = config(name)
        for number in range(5):
            at = grow(swept_saver, at, {"x": b"%d" % number * 999, "same": b"same" * 999})
    sources = {name: {one[0][0] for one in seen(swept_saver, name)} for name in names}

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
        assert all({one[0][0] for one in seen(swept_saver, name)} == every for name in names)
