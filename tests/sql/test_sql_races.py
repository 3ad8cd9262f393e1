"""Runs, pruning, copying and reading of one thread at the same time, by several threads and savers.

Two savers on one database know of each other as little as two processes do: each has a cache of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import count, product
from threading import Event
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import INTERRUPT, _DeltaSnapshot
from sqlalchemy import Engine, create_engine, event

from agentmem.errors import StorageError
from agentmem_sql import Retention, SQLAlchemySaver
from tests.helpers.sql_cases import Sql, config, get
from tests.helpers.sql_chains import grow, history, id_of, ids, made, unaccounted, write


@pytest.fixture
def another(shared_url: str) -> Iterator[SQLAlchemySaver]:
    with SQLAlchemySaver.from_url(shared_url) as saver:
        yield saver


def messages(number: int) -> list[HumanMessage]:
    return [HumanMessage(f"message {one} " * 20, id=f"{one}") for one in range(number)]


def test_writers_pruners_and_readers_of_one_thread(swept_saver: SQLAlchemySaver, another: SQLAlchemySaver) -> None:
    """Eight writers, six of them in namespaces of their own; one prunes the thread all the while, one thins it out
    by a policy, one reads.

    Nothing that was written may be lost: what a delta channel is rebuilt from has no gap, at any time.
    """
    steps, writers, namespaces = 8, 8, [*(f"sub:{number}" for number in range(6)), "", ""]
    savers = (swept_saver, another)
    done = Event()

    def check(saver: SQLAlchemySaver, ns: str) -> int:
        newest = saver.get_tuple(config(ns=ns))
        if newest is None:
            return 0
        values = newest.checkpoint["channel_values"]
        assert values["messages"] == messages(values["number"])
        assert values["raw"] == b"%d" % values["number"] * 999
        own = [value for _, channel, value in newest.pending_writes or () if channel == "x"]
        assert own in ([], [[ns, values["number"]]])
        if ns and values["number"]:  # the first holds the channel itself
            found = history(saver, newest.config)
            is_gone = saver.get_tuple(newest.config) is None
            assert found == (_DeltaSnapshot([ns]), list(range(values["number"]))) or (is_gone and found == (None, []))
        number: int = values["number"]
        return number

    def write_all(number: int) -> None:
        saver, ns = savers[number % 2], namespaces[number]
        for step in range(steps):
            values = {"messages": messages(step), "number": step, "raw": b"%d" % step * 999}
            if step == 0:
                at = grow(saver, None, {**values, "d": _DeltaSnapshot([ns])}, ns=ns, deltas="")
            else:
                write(saver, at, step - 1)
                at = grow(saver, at, values, ns=ns)
            saver.put_writes(at, [("x", [ns, step]), ("y", b"%d" % step * 999)], "another")
            for asked in ("first", "second"):
                saver.put_writes(at, [(INTERRUPT, f"{asked} {ns} {step}" * 9)], "asking")

    def prune(prunes: Callable[[], object]) -> int:
        pruned = 0
        while not done.is_set():
            prunes()
            pruned += 1
        return pruned

    def read() -> int:
        chance, read_ = random.Random(1), 0
        while not done.is_set():
            check(chance.choice(savers), chance.choice(namespaces))
            for found in chance.choice(savers).list(config(ns=chance.choice(namespaces)), limit=3):
                values = found.checkpoint["channel_values"]
                assert values["messages"] == messages(values["number"])
            read_ += 1
        return read_

    with ThreadPoolExecutor(writers + 3) as pool:
        prunes = (partial(swept_saver.prune, ["t"]), partial(another.retain, Retention(max_checkpoints=2)))
        busy = [*(pool.submit(prune, one) for one in prunes), pool.submit(read)]
        try:
            list(pool.map(write_all, range(writers)))
        finally:
            done.set()
        assert min(one.result() for one in busy) >= 2
    for saver in savers:
        assert [check(saver, ns) for ns in namespaces] == [steps - 1] * writers
    swept_saver.prune(["t"])
    assert len(list(another.list({"configurable": {"thread_id": "t"}}))) == len(set(namespaces))


@pytest.mark.parametrize("kept", [True, False], ids=["pruned", "deleted"])
def test_whoever_knows_a_thread_learns_that_others_took_out_of_it(
    swept_saver: SQLAlchemySaver, another: SQLAlchemySaver, kept: bool
) -> None:
    """A saver with a warm cache stores what another has just freed: it is stored anew, not only referred to."""
    strategy = "keep_latest" if kept else "delete"
    old = {"messages": messages(40), "raw": b"old" * 999}
    first = grow(swept_saver, None, old)
    second = grow(swept_saver, first, {"raw": b"kept" * 999})
    assert swept_saver.get_tuple(first) is not None
    another.prune(["t"], strategy=strategy)
    again = made(old)
    third = swept_saver.put(second, again, {}, again["channel_versions"])
    another.prune(["t"], strategy=strategy)
    if not kept:
        third = swept_saver.put(config(), again, {}, again["channel_versions"])
        another.delete_thread("t")
        another.put(config(), again, {}, again["channel_versions"])
    swept_saver.put_writes(third, [("messages", messages(39)), ("raw", b"kept" * 999)], "task")
    swept_saver.put_writes(third, [(INTERRUPT, b"other" * 999)], "asking")
    for one in (b"old", b"new", b"old"):  # a checkpoint is stored again, as with `durability="exit"`
        again["channel_values"] = {**old, "raw": one * 999}
        again["channel_versions"] = {**dict.fromkeys(old, one.hex())}
        swept_saver.put(config(), again, {}, again["channel_versions"])
        another.prune(["t"])
    for saver in (swept_saver, another):
        read = get(saver, third)
        assert read.checkpoint == again
        assert read.pending_writes == [
            ("asking", INTERRUPT, b"other" * 999),
            ("task", "messages", messages(39)),
            ("task", "raw", b"kept" * 999),
        ]


def test_a_special_write_of_what_others_took_out(swept_saver: SQLAlchemySaver, another: SQLAlchemySaver) -> None:
    """It looks first for what it replaces, and so goes another way than the writes above."""
    first = grow(swept_saver, None, {"raw": b"old" * 999}, deltas="")
    second = grow(swept_saver, first, {"raw": b"kept" * 999}, deltas="")
    another.prune(["t"])
    swept_saver.put_writes(second, [(INTERRUPT, b"old" * 999)], "asking")
    for saver in (swept_saver, another):
        assert get(saver, second).pending_writes == [("asking", INTERRUPT, b"old" * 999)]


def test_unchanged_channels_of_a_parent_that_is_taken_out_meanwhile(
    swept_saver: SQLAlchemySaver, another: SQLAlchemySaver
) -> None:
    """A run that left an older checkpoint stores a child whose unchanged channels it knows from the parent."""
    parent = grow(swept_saver, None, {"messages": messages(40), "raw": b"raw" * 999}, deltas="")
    grow(swept_saver, parent, {"x": 1}, deltas="")
    child = made({"messages": messages(40), "raw": b"raw" * 999, "x": 2}, "")
    another.prune(["t"])
    at = swept_saver.put(parent, child, {}, {"x": "1.5"})
    for saver in (swept_saver, another):
        assert get(saver, at).checkpoint == child


def pruned_before(engine: Engine, prune: Callable[[], object], when: int, call: Callable[[], Any]) -> Any:
    """What a call gives before whose statement of that number something is done."""
    statements = count(1)

    def listen(*_: object) -> None:
        if next(statements) == when:
            prune()

    event.listen(engine, "before_cursor_execute", listen)
    try:
        return call()
    finally:
        event.remove(engine, "before_cursor_execute", listen)


def test_a_put_that_is_overtaken_by_a_prune(shared_url: str, another: SQLAlchemySaver, shared_ask: Sql) -> None:
    """At each of its statements in turn, all that it builds upon but the newest checkpoint is taken out."""
    engine = create_engine(shared_url)
    with SQLAlchemySaver(engine) as saver, ThreadPoolExecutor(1) as pool:
        for when in range(1, 5):
            parent = grow(saver, None, {"messages": messages(40)}, deltas="")
            newest = grow(saver, parent, {"x": 1}, deltas="")
            child = made({"messages": messages(41), "x": 2}, "")
            pruning: list[Future[None]] = []

            def prune(pruning: list[Future[None]] = pruning) -> None:
                pruning.append(pool.submit(another.prune, ["t"]))
                wait(pruning, timeout=0.1)  # by then it is through, or waits for the put

            at = pruned_before(engine, prune, when, partial(saver.put, newest, child, {}, child["channel_versions"]))
            for one in pruning:
                one.result()
            assert unaccounted(shared_ask) == (set(), set())
            assert get(another, at).checkpoint == child
            another.delete_thread("t")
    engine.dispose()


def test_a_listing_that_is_pruned_while_it_is_read(shared_url: str, another: SQLAlchemySaver) -> None:
    """At each of its statements in turn; what is listed all the same has its values and its pending writes."""
    engine = create_engine(shared_url)
    with SQLAlchemySaver(engine, cache_bytes=0) as saver:
        saver.setup()
        for when in range(1, 6):
            at = None
            for number in range(3):
                at = grow(another, at, {"messages": messages(3)})
                write(another, at, [number] * 99)
            before = {id_of(one.config): one for one in another.list(config())}
            prune = partial(another.prune, ["t"])
            found = pruned_before(engine, prune, when, lambda: list(saver.list(config())))
            for one in found:
                assert one.checkpoint == before[id_of(one.config)].checkpoint
                assert one.pending_writes == before[id_of(one.config)].pending_writes, when
            assert found[0].config == at
            another.delete_thread("t")
    engine.dispose()


def test_a_history_that_is_pruned_while_it_is_read_is_whole(shared_url: str, another: SQLAlchemySaver) -> None:
    """At each of its statements in turn, everything but the newest checkpoint, or the one before, is taken out."""
    engine = create_engine(shared_url)
    pruned = 0
    with SQLAlchemySaver(engine, cache_bytes=0) as saver:
        saver.setup()
        prunes = (partial(another.prune, ["t"]), partial(another.delete_for_runs, ["middle"]))
        for prune, when in product(prunes, range(1, 8)):
            root = grow(another, None, {"d": _DeltaSnapshot([[0] * 99])})
            write(another, root, [1] * 99)
            middle = grow(another, root, run_id="middle")
            write(another, middle, [2] * 99)
            at = grow(another, middle)
            expected = history(another, at)
            assert pruned_before(engine, prune, when, partial(history, saver, at)) == expected, when
            pruned += len(ids(another)) < 3
            another.delete_thread("t")
    engine.dispose()
    assert pruned >= 6


def test_clones_share_what_they_know(url: str, sql: Sql) -> None:
    """`compile` clones the saver in strict mode: the database, its connections and the cache stay one."""
    strict = JsonPlusSerializer(allowed_msgpack_modules=[("some.module", "Name")])
    with SQLAlchemySaver.from_url(url, serde=strict) as saver:
        clone = saver.with_allowlist([("another.module", "Name")])
        assert clone is not saver
        at = grow(saver, None, {"messages": messages(40)})
        saver.prune(["t"], strategy="delete")
        at = grow(clone, at, {"messages": messages(40)})
        saver.put_writes(at, [("messages", messages(40))], "task")
        assert get(clone, at).pending_writes == [("task", "messages", messages(40))]
        newest = grow(saver, at, {"messages": messages(41)})
        clone.prune(["t"])
        assert [one.config for one in saver.list(config())] == [newest]
        assert unaccounted(sql) == (set(), set())
        clone.close()
        with pytest.raises(StorageError, match="closed"):
            saver.get_tuple(at)
