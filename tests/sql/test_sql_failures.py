"""Databases that take no writes for a while, damaged files, killed writers, and Ctrl-C.

There is a clear error, nothing in part, and nothing lost that was acknowledged.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from sqlalchemy import create_engine, event, make_url

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put
from tests.helpers.sql_chains import unaccounted
from tests.helpers.sql_fault_child import INTERRUPT, INTERRUPTS, Async, Sync, pending, question, values
from tests.helpers.sql_processes import Template, template

Sql = Callable[..., list[Any]]
NewUrl = Callable[[str], str]
Obstacle = Callable[[], AbstractContextManager[None]]

TABLES = ("settings", "threads", "blobs", "checkpoints", "writes")


def everything(ask: Sql) -> list[Any]:
    """All rows of all tables."""
    return [sorted(map(repr, ask(f"SELECT * FROM agentmem_{table}"))) for table in TABLES]


def refuses_and_goes_on(
    saver: Sync, ask: Sql, obstacle: Obstacle, message: str, *, only: tuple[str, ...] | None = None
) -> None:
    """Meet an obstacle with every call that writes, or ``only`` some; then go on without it."""
    at = saver.put(saver.put(config(), 0), 1)
    saver.call("put_writes", at, pending(1), "task")
    saver.call("put_writes", at, [(INTERRUPT, question(1, 0))], "asking")
    calls: dict[str, Callable[[], Any]] = {
        "put": lambda: saver.put(at, 39),
        "put in a new thread": lambda: saver.put(config("new"), 39),
        "put_writes": lambda: saver.call("put_writes", at, pending(2), "another task"),
        "replacing": lambda: saver.call("put_writes", at, [(INTERRUPT, question(1, 1))], "asking"),
        "prune": lambda: saver.call("prune", ["t"]),
        "copy_thread": lambda: saver.call("copy_thread", "t", "copy"),
        "delete_thread": lambda: saver.call("delete_thread", "t"),
    }
    before = everything(ask)
    with obstacle():
        for name, call in calls.items():
            if only is None or name in only:
                with pytest.raises(StorageError, match=message):
                    call()
        assert everything(ask) == before
        found = saver.call("get_tuple", at)
        assert found.checkpoint["channel_values"] == values(1)
    for call in calls.values():
        call()
    assert ask("SELECT name FROM agentmem_threads ORDER BY number") == [(b"new",), (b"copy",)]
    assert unaccounted(ask) == (set(), set())


# SQLite.


@pytest.mark.parametrize("journal", ["wal", "delete"])
@pytest.mark.parametrize(
    ("pragma", "usual", "message", "only"),
    [
        ("max_page_count = 1", "max_page_count = 1073741823", "free some space", ("put", "put in a new thread")),
        ("query_only = 1", "query_only = 0", "make the file and its folder writable", None),
    ],
    ids=["full", "read-only"],
)
def test_a_file_that_is_full_or_read_only(
    path: Path, sql: Sql, journal: str, pragma: str, usual: str, message: str, only: tuple[str, ...] | None
) -> None:
    engine = create_engine(f"sqlite:///{path}")
    now = usual
    event.listen(engine, "connect", lambda driver, _: driver.execute(f"PRAGMA journal_mode = {journal}"))
    event.listen(engine, "checkout", lambda driver, *_: driver.execute(f"PRAGMA {now}"))

    @contextmanager
    def obstacle() -> Iterator[None]:
        nonlocal now
        now = pragma
        yield
        now = usual

    with SQLAlchemySaver(engine) as saver:
        refuses_and_goes_on(Sync(saver), sql, obstacle, message, only=only)
    engine.dispose()


@pytest.mark.parametrize("mode", [Sync, Async])
def test_a_disk_that_fails(url: str, path: Path, sql: Sql, mode: type[Sync]) -> None:
    """The operating system lets no file grow: what is written to the log is cut off in the middle."""

    @contextmanager
    def obstacle() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{path}-wal").stat().st_size + 2000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with SQLAlchemySaver.from_url(url) as opened:
        saver = mode(opened)
        refuses_and_goes_on(saver, sql, obstacle, "disk or file system failed")
        saver.close()


# Servers.


@pytest.mark.parametrize("mode", [Sync, Async])
def test_a_postgresql_that_becomes_read_only(postgresql_url: str, look: Sql, mode: type[Sync]) -> None:
    """As a primary server does that is demoted: it ends all connections, and new ones take no writes."""
    setting = f"ALTER DATABASE {make_url(postgresql_url).database} SET default_transaction_read_only ="

    def switch(to: str) -> None:
        look(postgresql_url, f"SET transaction_read_only = off; {setting} {to}")
        look(
            postgresql_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )

    @contextmanager
    def obstacle() -> Iterator[None]:
        switch("on")
        yield
        switch("off")

    with SQLAlchemySaver.from_url(postgresql_url) as opened:
        saver = mode(opened)
        refuses_and_goes_on(saver, partial(look, postgresql_url), obstacle, "connect to the primary server")
        saver.close()


def test_a_mysql_that_becomes_read_only(mysql_url: str, look: Sql) -> None:
    engine = create_engine(mysql_url)
    now = "READ WRITE"

    def set_mode(driver: Any, *_: object) -> None:
        with driver.cursor() as cursor:
            cursor.execute(f"SET SESSION TRANSACTION {now}")

    event.listen(engine, "checkout", set_mode)

    @contextmanager
    def obstacle() -> Iterator[None]:
        nonlocal now
        now = "READ ONLY"
        yield
        now = "READ WRITE"

    with SQLAlchemySaver(engine) as saver:
        refuses_and_goes_on(Sync(saver), partial(look, mysql_url), obstacle, "connect to the primary server")
    engine.dispose()


@pytest.mark.parametrize("mode", [Sync, Async])
@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
def test_a_right_that_is_taken_away(new_url: NewUrl, look: Sql, backend: str, mode: type[Sync]) -> None:
    """The content is stored before the checkpoint that needs it, and goes again when that is refused."""
    url = make_url(new_url(backend))
    with SQLAlchemySaver.from_url(url) as owner:
        owner.setup()
    user = f"u{(url.database or '')[-16:]}"
    who = f"'{user}'@'%'" if backend == "mysql" else user
    with ExitStack() as after:
        look(url, f"CREATE USER {who}")
        after.callback(look, url, f"DROP USER {who}")
        if backend == "postgresql":
            after.callback(look, url, f"DROP OWNED BY {who}")
            look(url, f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {who}")
        rights = "SELECT, INSERT, UPDATE, DELETE"
        for table in (*TABLES, "schema_versions"):
            look(url, f"GRANT {rights} ON agentmem_{table} TO {who}")

        @contextmanager
        def obstacle() -> Iterator[None]:
            for table in ("checkpoints", "writes", "threads"):
                look(url, f"REVOKE INSERT, DELETE ON agentmem_{table} FROM {who}")
            yield
            for table in ("checkpoints", "writes", "threads"):
                look(url, f"GRANT {rights} ON agentmem_{table} TO {who}")

        with SQLAlchemySaver.from_url(url.set(username=user)) as opened:
            saver = mode(opened)
            refuses_and_goes_on(saver, partial(look, url), obstacle, "grant CREATE on the schema")
            saver.close()


# Damaged files.


def ask_for_everything(saver: SQLAlchemySaver) -> Iterator[Callable[[], Any]]:
    """Calls of every kind; they change the file."""
    yield lambda: list(saver.list(None))
    for thread in "ab":
        yield lambda thread=thread: saver.get_tuple(config(thread))  # type: ignore[misc]
    yield lambda: saver.get_delta_channel_history(config=config("a"), channels=["messages"])
    yield lambda: put(saver, config("a"), {"x": 1})
    yield lambda: saver.delete_for_runs(["run 1"])
    yield lambda: saver.copy_thread("a", "c")
    yield lambda: saver.prune(["a", "b"])
    yield lambda: saver.delete_thread("b")


def damage(file: Path, kind: str, chance: random.Random) -> None:
    """Do something to the pages of a file, the first one excepted, whose damage is noticed at once."""
    data = bytearray(file.read_bytes())
    if kind == "cut":
        del data[chance.randrange(len(data)) :]
    elif kind == "zeros":
        at = chance.randrange(4096, len(data))
        data[at : at + 4096] = bytes(4096)
    elif kind == "pages exchanged":
        one, other = (4096 * page for page in chance.sample(range(1, len(data) // 4096), 2))
        data[one : one + 4096], data[other : other + 4096] = data[other : other + 4096], data[one : one + 4096]
    else:
        for _ in range(chance.choice((3, 300))):
            data[chance.randrange(4096, len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data[: file.stat().st_size])


@pytest.mark.parametrize("kind", ["cut", "zeros", "pages exchanged", "bits"])
def test_a_damaged_file(url: str, path: Path, tmp_path: Path, kind: str) -> None:
    """Every call does what it should, or says what to do; there is no other error, and no other value."""
    with SQLAlchemySaver.from_url(url) as saver:
        for step in range(12):
            at = put(saver, config("ab"[step % 2]), values(step), step=step, run_id=f"run {step % 3}")
            saver.put_writes(at, pending(step), "task")
    copy = tmp_path / "copy.db"
    refused: list[str] = []
    for number in range(6):
        for left in tmp_path.glob("copy.db*"):
            left.unlink()
        shutil.copy(path, copy)
        damage(copy, kind, random.Random(f"{kind} {number}"))
        with SQLAlchemySaver.from_url(f"sqlite:///{copy}") as saver:
            for call in ask_for_everything(saver):
                try:
                    found = call()
                except StorageError as error:
                    refused.append(str(error))
                else:
                    for one in found if isinstance(found, list) else []:
                        assert one.checkpoint["channel_values"] == values(one.metadata["step"])
    assert len(refused) > 3
    assert all("restore" in one or "backup" in one or "damaged database" in one for one in refused)


@pytest.mark.parametrize("kind", ["cut", "bits", "garbage"])
def test_a_damaged_log_costs_no_more_than_what_follows(url: str, path: Path, tmp_path: Path, kind: str) -> None:
    """SQLite takes what comes before the damage: the first checkpoints, each of them whole."""
    saver = SQLAlchemySaver.from_url(url)
    at = config()
    for step in range(12):
        at = put(saver, at, values(step), step=step)
    copy = tmp_path / "copy.db"
    for number in range(6):
        for end in ("", "-wal"):
            shutil.copy(f"{path}{end}", f"{copy}{end}")
        log = Path(f"{copy}-wal")
        if kind == "garbage":
            log.write_bytes(os.urandom(9000))
        else:
            damage(log, kind, random.Random(f"{kind} {number}"))
        with SQLAlchemySaver.from_url(f"sqlite:///{copy}") as other:
            found = list(other.list(None))
            assert [one.metadata["step"] for one in reversed(found)] == list(range(len(found)))
            assert all(one.checkpoint["channel_values"] == values(one.metadata["step"]) for one in found)
            assert kind != "garbage" or not found
            put(other, config(), {"x": 1})
    saver.close()


SESSIONS = {
    "postgresql": """
        SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
    """,
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND id <> connection_id()",
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    with template(tmp_path_factory.mktemp("reports")) as started:
        yield started


@dataclass
class Known:
    """What must be in a checkpoint that was acknowledged."""

    step: int
    writes: bool = False
    interrupt: int = -1


@dataclass
class Ledger:
    """What a thread must hold, going by what its writers said."""

    known: dict[str, Known] = field(default_factory=dict)
    pruning: str | None = None  # the checkpoint whose ancestors may be gone

    def read(self, said: list[list[Any]]) -> None:
        for what, own_id, *more in said:
            if what == "put":
                self.known[own_id] = Known(more[0])
            elif what == "writes":
                self.known[own_id].writes = True
            elif what == "interrupt":
                self.known[own_id].interrupt = more[0]
            elif what == "pruning":
                self.pruning = own_id
            else:
                self.known, self.pruning = {own_id: self.known[own_id]}, None

    def check(self, saver: SQLAlchemySaver) -> None:
        """Compare with what is stored, and take over what was stored but not acknowledged any more."""
        found = {one.config["configurable"]["checkpoint_id"]: one for one in saver.list(config())}
        if self.pruning is not None and found.keys() == {self.pruning}:
            self.known = {self.pruning: self.known[self.pruning]}
        self.pruning = None
        assert self.known.keys() <= found.keys()
        assert len(found.keys() - self.known.keys()) <= 1
        for own_id, one in found.items():
            known = self.known.setdefault(own_id, Known(one.metadata["step"]))
            assert one.metadata["step"] == known.step
            assert one.checkpoint["channel_values"] == values(known.step)
            ordinary = [(channel, value) for task, channel, value in one.pending_writes or () if task == "task"]
            asked = [
                value for task, channel, value in one.pending_writes or () if (task, channel) == ("asking", INTERRUPT)
            ]
            assert ordinary == pending(known.step) or (not known.writes and not ordinary)
            known.writes = bool(ordinary)
            possible = {known.interrupt, min(known.interrupt + 1, INTERRUPTS - 1)}
            assert asked in [[] if number < 0 else [question(known.step, number)] for number in possible]
            known.interrupt = asked[0]["number"] if asked else -1


def wait_for_sessions_to_end(look: Sql, url: str) -> None:
    """A server may finish the statement that a process sent before it was killed."""
    backend = make_url(url).get_backend_name()
    ends = time.monotonic() + 10
    while backend in SESSIONS and look(url, SESSIONS[backend]) != [(0,)]:
        assert time.monotonic() < ends
        time.sleep(0.002)


def kill_writers(url: str, look: Sql, processes: Template, rounds: int) -> None:
    """Kill writer after writer, each of which goes on where the one before it was killed; look after each."""
    chance = random.Random(rounds)
    ledger = Ledger()
    for number in range(rounds):
        mode = "async" if chance.random() < 0.5 else "sync"
        if number % 3 == 2:
            writer = processes.start("grow", url, mode, chance.randint(1, 150))
        else:
            writer = processes.start("grow", url, mode)
            if number % 3:
                writer.until_it_says(1)
            time.sleep(chance.uniform(0, 0.1))
            writer.kill()
        assert writer.wait() == -signal.SIGKILL
        ledger.read(writer.said())
        wait_for_sessions_to_end(look, url)
        with SQLAlchemySaver.from_url(url) as saver:
            ledger.check(saver)
        assert unaccounted(partial(look, url)) == (set(), set())
        if url.startswith("sqlite"):
            assert look(url, "PRAGMA integrity_check") == [("ok",)]
    assert max(one.step for one in ledger.known.values()) > rounds


def test_killed_writers_lose_nothing_that_was_acknowledged(database_url: str, look: Sql, processes: Template) -> None:
    kill_writers(database_url, look, processes, 10 if database_url.startswith("sqlite") else 6)


@pytest.mark.slow
def test_writers_killed_two_hundred_times(database_url: str, look: Sql, processes: Template) -> None:
    kill_writers(database_url, look, processes, 200 if database_url.startswith("sqlite") else 60)


POINTS = 45
# SQLAlchemy's pool may lose a connection when it is interrupted in the middle of giving it out.
POINTS_OF_A_SAVER = 15


def interrupted(call: Callable[[], Any], at: int = -1) -> tuple[bool, int]:
    """Call, with an interruption at a point; gives whether it came, and the number of points that were passed."""
    points = count(1)
    passed = 0

    def profile(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal passed
        if event in ("call", "c_return"):
            passed = next(points)
            if passed == at:
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    except (KeyboardInterrupt, TypeError):  # ormsgpack makes a TypeError of it in LangGraph's part of the serializer
        return True, passed
    finally:
        sys.setprofile(before)
    return False, passed


def messages(number: int) -> dict[str, Any]:
    return {"messages": [HumanMessage(f"message {n}", id=str(n)) for n in (1, 2, number)]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("method", ["put", "get_tuple", "prune"])
def test_an_interruption_anywhere(database_url: str, ask: Callable[..., list[Any]], method: str) -> None:
    fresh, newest = 0, 0
    while fresh * POINTS_OF_A_SAVER < POINTS:
        with SQLAlchemySaver.from_url(database_url) as saver, SQLAlchemySaver.from_url(database_url) as other:
            put(saver, config(), messages(0))
            at = put(saver, config(), messages(0))
            calls: dict[str, Callable[[], Any]] = {
                "put": lambda: put(saver, config(), messages(newest + 1)),  # noqa: B023
                "get_tuple": lambda: saver.get_tuple(at),  # noqa: B023
                "prune": lambda: saver.prune(["t"]),
            }
            _, points = interrupted(calls[method])
            newest = 1 if method == "put" else 0
            for point in range(1 + fresh, points, points // POINTS_OF_A_SAVER):
                came, _ = interrupted(calls[method], point)
                # Whatever it was, the next call finds the database free, from elsewhere too, and what is there whole.
                number = newest + 1
                put(other, config(), messages(number))
                newest = number
                found = saver.get_tuple(config())
                assert found is not None
                assert found.checkpoint["channel_values"] == messages(number), (came, point)
                saver.copy_thread("t", "copy")
                saver.delete_thread("copy")
            for one in saver.list(config()):  # reads and compares every stored value
                assert len(one.checkpoint["channel_values"]["messages"]) == 3
            saver.delete_thread("t")
            assert [ask(f"SELECT count(*) FROM agentmem_{name}")[0][0] for name in ("checkpoints", "blobs")] == [0, 0]
        fresh += 1


def test_an_interrupted_commit_is_an_interruption(database_url: str) -> None:
    def profile(frame: FrameType, event: str, _arg: object) -> None:
        commits = frame.f_code.co_name == "_do_commit" or frame.f_locals.get("statement") == "COMMIT"
        if event == "call" and commits:
            raise KeyboardInterrupt

    with SQLAlchemySaver.from_url(database_url) as saver:
        put(saver, config(), messages(0))
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            with pytest.raises(KeyboardInterrupt):
                saver.delete_thread("t")
        finally:
            sys.setprofile(before)
        found = saver.get_tuple(config())
        assert found is not None
        assert found.checkpoint["channel_values"] == messages(0)
        saver.delete_thread("t")
        assert saver.get_tuple(config()) is None
