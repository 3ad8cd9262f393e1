"""What stays by a policy, what a sweep says of itself, and what the threads of a database take."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from langgraph.types import Command
from sqlalchemy import Engine, NullPool, create_engine, event, text

from agentmem.errors import ConfigError
from agentmem_sql import Retention, SQLAlchemySaver
from tests.helpers.sql_cases import Sql, config, put
from tests.helpers.sql_chains import all_rows, grow, history, id_of, made, stored_bytes, write
from tests.helpers.sql_protection import PROTECTION
from tests.helpers.sql_transfer_graph import rich_graph
from tests.helpers.sql_transfer_graph import say as ask
from tests.sql.conftest import shared_on_sqlite

DAY = timedelta(days=1)


class Clock:
    """The time that checkpoints are stored at."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def time_ns(self) -> int:
        return int(self.now.timestamp() * 1000) * 1_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "time_ns", found.time_ns)
    return found


def chain(saver: Any, count: int, *, clock: Clock | None = None, thread: str = "t", ns: str = "") -> list[str]:
    """Store checkpoints with pending writes one after another, a day apart; gives their ids."""
    at = config(thread, ns)
    found = []
    log: list[Any] = []
    for number in range(count):
        log = [*log, f"item {number} of {thread} " * 5]
        at = grow(saver, at, {"log": log, "state": bytes([number]) * 300}, deltas="")
        saver.put_writes(at, [("state", bytes([number + 1]) * 300)], "task")
        found.append(id_of(at))
        if clock is not None:
            clock.now += DAY
    return found


def left(saver: Any, thread: str = "t", ns: str = "") -> list[str]:
    """The ids of a namespace's checkpoints, oldest first."""
    return [id_of(one.config) for one in saver.list(config(thread, ns))][::-1]


def namespaces(saver: Any) -> set[str]:
    """The namespaces of all threads."""
    return {one.config["configurable"]["checkpoint_ns"] for one in saver.list(None)}


@contextmanager
def held(url: str) -> Iterator[None]:
    """Another process holds every thread's row, or SQLite's write lock."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        sqlite = engine.dialect.name == "sqlite"
        if sqlite:
            connection.connection.dbapi_connection.isolation_level = None  # type: ignore[union-attr]
        connection.execute(text("BEGIN IMMEDIATE" if sqlite else "SELECT number FROM agentmem_threads FOR UPDATE"))
        yield
        connection.rollback()


# What stays.


def test_the_newest_of_each_namespace_stay(swept_saver: SQLAlchemySaver) -> None:
    main, sub = chain(swept_saver, 5), chain(swept_saver, 4, ns="sub")
    other = chain(swept_saver, 3, thread="other")
    before = {id_of(one.config): one for one in swept_saver.list(config())}
    report = swept_saver.retain(Retention(max_checkpoints=3))
    assert left(swept_saver) == main[-3:]
    assert left(swept_saver, ns="sub") == sub[-3:]
    assert left(swept_saver, "other") == other
    for one in swept_saver.list(config()):
        was = before[id_of(one.config)]
        assert (one.checkpoint, one.metadata, one.pending_writes) == (was.checkpoint, was.metadata, was.pending_writes)
    [thread] = report.threads
    assert (thread.thread_id, thread.removed, thread.kept, thread.deleted) == ("t", 3, 6, False)
    assert (report.removed, report.kept, report.threads_kept, report.threads_deleted) == (3, 9, 2, 0)
    assert not report.dry_run


def test_what_was_stored_longer_ago_goes(swept_saver: SQLAlchemySaver, clock: Clock) -> None:
    stored = chain(swept_saver, 6, clock=clock)
    old = chain(swept_saver, 2, thread="old", ns="sub", clock=clock)
    report = swept_saver.retain(Retention(max_age=4 * DAY), now=clock.now)
    assert left(swept_saver) == stored[-2:]
    assert left(swept_saver, "old", "sub") == old
    clock.now += 100 * DAY
    report = swept_saver.retain(Retention(max_age=4 * DAY), now=clock.now)
    assert left(swept_saver) == stored[-1:], "the newest stays, however old"
    assert left(swept_saver, "old", "sub") == old[-1:]
    assert (report.kept, report.threads_deleted) == (2, 0)
    # To the millisecond.
    exactly = clock.now
    chain(swept_saver, 2, thread="exact", clock=clock)
    assert swept_saver.retain(Retention(max_age=DAY), now=exactly + DAY).removed == 0
    assert swept_saver.retain(Retention(max_age=DAY), now=exactly + DAY + timedelta(milliseconds=1)).removed == 1


def test_idle_threads_are_deleted_whole(swept_saver: SQLAlchemySaver, clock: Clock, shared_ask: Sql) -> None:
    chain(swept_saver, 3, thread="idle", clock=clock)
    chain(swept_saver, 1, thread="idle", ns="sub", clock=clock)
    # Its checkpoint never came.
    swept_saver.put_writes(config("idle", checkpoint_id="lost"), [("state", b"early" * 99)], "task")
    stored = chain(swept_saver, 3, thread="busy", clock=clock)
    report = swept_saver.retain(Retention(idle=3.5 * DAY), now=clock.now)
    [thread] = report.threads
    assert (thread.thread_id, thread.removed, thread.kept, thread.deleted) == ("idle", 4, 0, True)
    assert (report.threads_deleted, report.threads_kept, report.kept) == (1, 1, 3)
    assert [bytes(name) for (name,) in shared_ask("SELECT name FROM agentmem_threads")] == [b"busy"]
    assert left(swept_saver, "busy") == stored
    chain(swept_saver, 1, thread="idle")  # a new one of that name
    assert len(left(swept_saver, "idle")) == 1


@shared_on_sqlite
def test_late_writes_keep_no_thread_alive(swept_saver: SQLAlchemySaver, shared_ask: Sql) -> None:
    """Of a run that goes on after its thread was deleted: no checkpoint comes after them any more."""
    now = datetime.now(UTC)
    at = grow(swept_saver, thread="late")
    swept_saver.delete_thread("late")
    swept_saver.put_writes(at, [("d", "late" * 50)], "task")
    swept_saver.put_writes(config("unknown", checkpoint_id="no id of LangGraph's"), [("d", 1)], "task")
    chain(swept_saver, 1, thread="alive")
    policy = Retention(idle=DAY)
    young = swept_saver.retain(policy, thread_ids=["late", "alive"], now=now)
    assert (young.threads, young.threads_kept) == ((), 2), "its checkpoint may be on its way"
    size = stored_bytes(shared_ask)
    planned = swept_saver.retain(policy, thread_ids=["late"], dry_run=True, now=now + 2 * DAY)
    done = swept_saver.retain(policy, thread_ids=["late"], now=now + 2 * DAY)
    assert planned.threads == done.threads
    [thread] = done.threads
    assert (thread.thread_id, thread.removed, thread.deleted) == ("late", 0, True)
    assert thread.bytes_freed == size - stored_bytes(shared_ask)
    assert swept_saver.retain(policy, now=now).threads[0].thread_id == "unknown", "an id that tells no time"
    assert [bytes(name) for (name,) in shared_ask("SELECT name FROM agentmem_threads")] == [b"alive"]


def test_every_rule_has_to_let_a_checkpoint_stay(saver: SQLAlchemySaver, clock: Clock) -> None:
    first = chain(saver, 4, thread="old", clock=clock)
    second = chain(saver, 6, thread="new", clock=clock)
    policy = Retention(max_checkpoints=4, max_age=3 * DAY, idle=8 * DAY)
    saver.retain(policy, now=clock.now)
    assert left(saver, "old") == first[-1:]
    assert left(saver, "new") == second[-3:], "age says less than count"
    saver.retain(Retention(max_checkpoints=2, max_age=3 * DAY), now=clock.now)
    assert left(saver, "new") == second[-2:], "count says less than age"
    assert saver.retain(policy, now=clock.now + 3 * DAY).threads_deleted == 1
    assert left(saver, "old") == []


@shared_on_sqlite
async def test_only_the_threads_that_are_named(swept_saver: SQLAlchemySaver) -> None:
    """Asked for by a task."""
    for name in ("a", "b", "c"):
        chain(swept_saver, 3, thread=name)
    before = await swept_saver.astorage_report()
    policy, names = Retention(max_checkpoints=1), ["c", "none of ours", "a", "a"]
    planned = await swept_saver.aretain(policy, thread_ids=names, dry_run=True)
    report = await swept_saver.aretain(policy, thread_ids=names)
    assert [one.thread_id for one in report.threads] == ["a", "c"]
    assert (report.removed, report.kept, report.threads_kept) == (4, 2, 2)
    assert planned.threads == report.threads
    assert [len(left(swept_saver, name)) for name in "abc"] == [1, 3, 1]
    after = await swept_saver.astorage_report(limit=1)
    assert [one.thread_id for one in after.threads] == ["b"]
    assert before.bytes - after.bytes == report.bytes_freed > 0
    assert (await swept_saver.aretain(policy, thread_ids=[])).threads == ()


def test_calls_of_subgraphs_go_with_their_caller(saver: SQLAlchemySaver) -> None:
    """And so do those of a caller that went earlier, but not those of one that has yet to be stored."""
    roots = [grow(saver, deltas="")]
    for _ in range(4):
        roots.append(grow(saver, roots[-1], deltas=""))
    long = "deep|" * 40
    for number, root in enumerate(roots):
        for ns in (f"sub:{number}", f"sub:{number}|inner:{number}", f"{long}sub:{number}", f"kept:{number}|plain"):
            at = grow(saver, ns=ns, values={"n": number}, deltas="", parents={"": id_of(root)})
            grow(saver, at, {"n": number}, deltas="", parents={"": id_of(root)})
    grow(saver, ns="sub:early", deltas="", parents={"": id_of(grow(saver, thread="other", deltas=""))})
    saver.retain(Retention(max_checkpoints=3))
    calls = {
        ns for number in (2, 3, 4) for ns in (f"sub:{number}", f"sub:{number}|inner:{number}", f"{long}sub:{number}")
    }
    threads_of_their_own = {f"kept:{number}|plain" for number in range(5)}
    assert namespaces(saver) == {"", "sub:early"} | calls | threads_of_their_own
    saver.prune(["t"])  # keeps the newest of every namespace, so here the callers go first
    grow(saver, roots[-1], deltas="")
    saver.retain(Retention(max_checkpoints=1))
    assert namespaces(saver) == {""} | threads_of_their_own


def test_calls_go_with_a_caller_that_is_not_the_oldest(saver: SQLAlchemySaver, clock: Clock) -> None:
    """Checkpoints are not always stored in the order of their ids."""
    early, late, newest = (made({}, "") for _ in range(3))
    for one in (late, early, newest):
        saver.put(config(), one, {}, one["channel_versions"])
        clock.now += DAY
    for name, caller in (("early", early), ("late", late)):
        grow(saver, ns=f"sub:{name}", deltas="", parents={"": caller["id"]})
    assert saver.retain(Retention(max_age=2.5 * DAY), now=clock.now).removed == 2
    assert left(saver) == [early["id"], newest["id"]]
    assert namespaces(saver) == {"", "sub:early"}


@shared_on_sqlite
def test_a_pending_interrupt_survives(swept_saver: SQLAlchemySaver, shared_url: str) -> None:
    """Of a subgraph, answered by another process."""
    graph = rich_graph(swept_saver)
    for number in range(3):
        graph.invoke(ask("inside", number), config())
        if number < 2:
            graph.invoke(Command(resume=number), config())
    before = graph.get_state(config(), subgraphs=True)
    swept_saver.retain(Retention(max_checkpoints=1))
    left_over = sorted(ns.partition(":")[0] for ns in namespaces(swept_saver))
    assert left_over == ["", "inner"], "one call, the one that waits"
    with SQLAlchemySaver.from_url(shared_url) as other:
        resumed = rich_graph(other)
        after = resumed.get_state(config(), subgraphs=True)
        assert after.values == before.values
        assert [(one.id, one.interrupts, one.state.values) for one in after.tasks] == [
            (one.id, one.interrupts, one.state.values) for one in before.tasks
        ]
        state = resumed.invoke(Command(resume=2), config())
    assert state["log"] == [*before.values["log"], *before.tasks[0].state.values["log"], "inside"]


# What a sweep says, and when it does nothing.


def mixed(saver: Any, clock: Clock, seed: int) -> None:
    """Threads of every kind: forks, shared content, delta channels, subgraph calls, early writes."""
    chance = random.Random(seed)
    for name in ("one", "two", "three", "\x00\U0001f600"):
        stored = [grow(saver, values={"d": ["first"]}, thread=name)]
        log: list[Any] = []
        for number in range(chance.randrange(6, 14)):
            log = [*log, chance.choice([number, f"item {number} " * 9])]
            parent = chance.choice(stored[-2:])
            stored.append(grow(saver, parent, {"log": log, "same": b"same" * 99}, deltas="d log same", thread=name))
            for task in range(chance.randrange(3)):
                write(saver, stored[-1], [number, task, "w" * 60], task=f"task {task}")
            if chance.random() < 0.5:
                grow(saver, ns=f"call:{number}", thread=name, values={"n": log}, parents={"": id_of(stored[-1])})
            clock.now += DAY
        saver.put_writes(config(name, checkpoint_id="lost"), [("d", b"early" * 50)], "task")


ALL_RULES = Retention(max_checkpoints=3, max_age=20 * DAY, idle=25 * DAY)


def test_a_dry_run_changes_nothing_and_says_what_a_real_one_does(
    swept_saver: SQLAlchemySaver, clock: Clock, shared_ask: Sql
) -> None:
    mixed(swept_saver, clock, seed=3)
    rows, size, sizes = all_rows(shared_ask), stored_bytes(shared_ask), swept_saver.storage_report()
    assert sizes.bytes == size
    planned = swept_saver.retain(ALL_RULES, dry_run=True, now=clock.now)
    assert all_rows(shared_ask) == rows
    done = swept_saver.retain(ALL_RULES, now=clock.now)
    assert planned.dry_run
    assert {**planned.to_dict(), "dry_run": False} == done.to_dict()
    assert done.removed > 0
    assert done.bytes_freed == size - stored_bytes(shared_ask) == size - swept_saver.storage_report().bytes
    after = {one.thread_id: one for one in swept_saver.storage_report().threads}
    for thread in done.threads:
        was = next(one for one in sizes.threads if one.thread_id == thread.thread_id)
        assert thread.deleted == (thread.thread_id not in after)
        assert thread.bytes_freed == was.bytes - (0 if thread.deleted else after[thread.thread_id].bytes)
        assert thread.removed == was.checkpoints - (0 if thread.deleted else after[thread.thread_id].checkpoints)
    assert done.kept == swept_saver.storage_report().checkpoints
    again = swept_saver.retain(ALL_RULES, now=clock.now)
    assert (again.threads, again.bytes_freed, again.kept) == ((), 0, done.kept)


@shared_on_sqlite
def test_what_a_history_adds_is_counted(swept_saver: SQLAlchemySaver, shared_ask: Sql) -> None:
    """Taking out one small checkpoint of a delta channel may cost more than it frees."""
    at = grow(swept_saver, values={"d": ["seed"]})
    write(swept_saver, at, "a", "b")
    at = grow(swept_saver, at)
    write(swept_saver, at, "c")
    at = grow(swept_saver, grow(swept_saver, at))
    size = stored_bytes(shared_ask)
    planned = swept_saver.retain(Retention(max_checkpoints=1), dry_run=True)
    done = swept_saver.retain(Retention(max_checkpoints=1))
    assert planned.threads == done.threads
    assert done.bytes_freed == size - stored_bytes(shared_ask)
    assert history(swept_saver, at) == (["seed"], ["a", "b", "c"])


def test_what_has_nothing_to_do_is_not_locked(swept_saver: SQLAlchemySaver, shared_url: str, clock: Clock) -> None:
    for name in ("a", "b"):
        chain(swept_saver, 3, thread=name, clock=clock)
        chain(swept_saver, 2, thread=name, ns="sub", clock=clock)
    policy = Retention(max_checkpoints=3, max_age=20 * DAY, idle=30 * DAY)
    with held(shared_url):
        assert swept_saver.retain(policy, now=clock.now).threads == ()
        report = swept_saver.retain(Retention(max_checkpoints=1), dry_run=True)
        assert report.removed == 6, "a dry run waits for nobody"
    clock.now += 25 * DAY
    policy = Retention(max_age=DAY)
    assert swept_saver.retain(policy, now=clock.now).removed == 6
    with held(shared_url):
        assert swept_saver.retain(policy, now=clock.now).threads == (), "what is left is too old, and stays"


@shared_on_sqlite
def test_a_sweep_that_is_broken_off_has_done_whole_threads(swept_saver: SQLAlchemySaver) -> None:
    stored = {name: chain(swept_saver, 4, thread=name) for name in ("a", "b", "c", "d")}
    deletes = 0

    def interrupt(_connection: Any, _cursor: Any, statement: str, *_others: Any) -> None:
        nonlocal deletes
        deletes += "DELETE FROM agentmem_checkpoints" in statement
        if deletes == 3:
            raise KeyboardInterrupt

    event.listen(Engine, "after_cursor_execute", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            swept_saver.retain(Retention(max_checkpoints=1))
    finally:
        event.remove(Engine, "after_cursor_execute", interrupt)
    assert {name: left(swept_saver, name) for name in stored} == {
        name: stored[name][-1:] if name in "ab" else stored[name] for name in stored
    }
    report = swept_saver.retain(Retention(max_checkpoints=1))
    assert [one.thread_id for one in report.threads] == ["c", "d"]


def test_many_threads() -> None:
    """More than are looked at in one go."""
    with SQLAlchemySaver.from_url("sqlite:///:memory:") as saver:
        for number in range(520):
            at = put(saver, config(f"{number}"), {"n": number})
            if number % 260:
                put(saver, at, {"n": number})
        report = saver.retain(Retention(max_checkpoints=1))
        assert [one.thread_id for one in report.threads] == [str(number) for number in range(520) if number % 260]
        assert (report.kept, report.threads_kept) == (520, 520)
        assert len(saver.storage_report(limit=3).threads) == 3
        named = saver.retain(Retention(max_checkpoints=1), thread_ids=[str(number) for number in range(1200)])
        assert (named.threads, named.threads_kept) == ((), 520)


def test_a_damaged_thread_stays_and_the_others_go_on(
    swept_saver: SQLAlchemySaver, clock: Clock, shared_ask: Sql
) -> None:
    for name in ("a", "b", "c"):
        chain(swept_saver, 3, thread=name, clock=clock)
    [(number,)] = shared_ask("SELECT number FROM agentmem_threads WHERE name = :name", name=b"b")
    shared_ask("UPDATE agentmem_checkpoints SET created = created + 1 WHERE thread = :number", number=number)
    for policy in (Retention(max_checkpoints=1), Retention(idle=DAY)):
        planned = swept_saver.retain(policy, dry_run=True, now=clock.now + 9 * DAY)
        done = swept_saver.retain(policy, now=clock.now + 9 * DAY)
        assert [one.thread_id for one in done.threads] == ["a", "c"]
        assert list(done.failed) == ["b"]
        assert "digest differs" in done.failed["b"]
        assert planned.failed == done.failed
    assert shared_ask("SELECT count(*) FROM agentmem_checkpoints") == [(3,)]
    shared_ask("UPDATE agentmem_checkpoints SET created = created - 1 WHERE thread = :number", number=number)
    assert swept_saver.retain(Retention(idle=DAY), now=clock.now + 9 * DAY).threads_deleted == 1


def test_a_protected_database(url: str, sql: Sql, clock: Clock) -> None:
    with SQLAlchemySaver.from_url(url, **PROTECTION["both"]) as saver:
        mixed(saver, clock, seed=4)
        before, size = len(namespaces(saver)), stored_bytes(sql)
        planned = saver.retain(Retention(max_checkpoints=2), dry_run=True, now=clock.now)
        done = saver.retain(Retention(max_checkpoints=2), now=clock.now)
        assert planned.threads == done.threads
        assert done.bytes_freed == size - stored_bytes(sql) > 0
        assert 1 < len(namespaces(saver)) < before, (
            "calls went with their callers, whose names are in encrypted metadata"
        )


def test_what_cannot_be_meant_is_refused(saver: SQLAlchemySaver) -> None:
    of_a_policy: list[dict[str, Any]] = [{}, *({"max_checkpoints": wrong} for wrong in (0, True, "3"))]
    for arguments in (*of_a_policy, {"max_age": timedelta(0)}, {"max_age": 30}, {"idle": -DAY}):
        with pytest.raises(ConfigError):
            Retention(**arguments)
    with pytest.raises(ConfigError, match="time zone"):
        saver.retain(Retention(max_checkpoints=1), now=datetime(2026, 1, 1))
    with pytest.raises(ConfigError, match="limit"):
        saver.storage_report(limit=0)
    assert saver.retain(Retention(max_age=timedelta.max, idle=timedelta.max)).removed == 0


# What threads take.


def test_report_tells_what_threads_take(swept_saver: SQLAlchemySaver, clock: Clock, shared_ask: Sql) -> None:
    empty = swept_saver.storage_report()
    assert (empty.threads, empty.thread_count, empty.bytes) == ((), 0, 0)
    start = clock.now
    chain(swept_saver, 5, thread="long", clock=clock)
    chain(swept_saver, 2, thread="long", ns="sub", clock=clock)
    put(swept_saver, config("large \U0001f600"), {"blob": b"x" * 100_000})
    swept_saver.put_writes(config("lost", checkpoint_id="never"), [("a", 1)], "task")
    report = swept_saver.storage_report()
    assert [one.thread_id for one in report.threads] == ["large \U0001f600", "long", "lost"]
    large, long, lost = report.threads
    assert (long.checkpoints, long.pending_writes, long.newest) == (7, 7, start + 6 * DAY)
    assert 100_000 < large.content_bytes < 100_100
    assert (lost.checkpoints, lost.pending_writes, lost.blobs, lost.newest) == (0, 1, 1, None)
    assert (report.thread_count, report.checkpoints, report.pending_writes) == (3, 8, 8)
    assert report.blobs == shared_ask("SELECT count(*) FROM agentmem_blobs")[0][0]
    assert report.content_bytes == int(shared_ask("SELECT SUM(LENGTH(body)) FROM agentmem_blobs")[0][0])
    assert report.bytes == stored_bytes(shared_ask) == sum(one.bytes for one in report.threads)
    first = swept_saver.storage_report(limit=1)
    assert first.threads == (large,)
    assert (first.thread_count, first.bytes) == (3, report.bytes)
    plain = report.to_dict()
    assert plain["threads"][1]["newest"] == "2026-01-07T00:00:00+00:00"
    assert plain["bytes"] == report.bytes
