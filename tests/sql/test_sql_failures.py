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
from itertools import count, product
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.serde.types import INTERRUPT
from sqlalchemy import create_engine, event, make_url

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from tests.helpers.processes import Process
from tests.helpers.sql_cases import Sql, config, get, put, read
from tests.helpers.sql_chains import all_rows, unaccounted
from tests.helpers.sql_processes import grow, pending, question, values

Obstacle = Callable[[], AbstractContextManager[None]]

TABLES = ("settings", "threads", "blobs", "checkpoints", "writes")


def refuses_and_goes_on(
    saver: SQLAlchemySaver,
    ask: Sql,
    obstacle: Obstacle,
    message: str,
    *,
    only: tuple[str, ...] | None = None,
    own_engine: bool = False,
) -> None:
    """Meet an obstacle with every call that writes, or `only` some; then go on without it."""
    at = put(saver, put(saver, config(), values(0)), values(1))
    saver.put_writes(at, pending(1), "task")
    saver.put_writes(at, [(INTERRUPT, question(1, 0))], "asking")
    calls: dict[str, Callable[[], Any]] = {
        "put": lambda: put(saver, at, values(39)),
        "put in a new thread": lambda: put(saver, config("new"), values(39)),
        "put_writes": lambda: saver.put_writes(at, pending(2), "another task"),
        "replacing": lambda: saver.put_writes(at, [(INTERRUPT, question(1, 1))], "asking"),
        "prune": lambda: saver.prune(["t"]),
        "copy_thread": lambda: saver.copy_thread("t", "copy"),
        "delete_thread": lambda: saver.delete_thread("t"),
    }
    before = all_rows(ask)
    with obstacle():
        for name, call in calls.items():
            if only is None or name in only:
                with pytest.raises(StorageError, match=message) as error:
                    call()
                assert "of the thread" not in str(error.value), "what was to be stored"
                assert own_engine or "of the thread" not in str(error.value.__cause__)
        assert all_rows(ask) == before
        assert read(saver, at) == values(1)
    for call in calls.values():
        call()
    assert ask("SELECT name FROM agentmem_threads ORDER BY number") == [(b"new",), (b"copy",)]
    assert unaccounted(ask) == (set(), set())


@contextmanager
def switched(setting: dict[str, str], to: str) -> Iterator[None]:
    """What listeners set on every connection is another for a while."""
    usual, setting["now"] = setting["now"], to
    yield
    setting["now"] = usual


@pytest.mark.parametrize(
    ("journal", "pragma", "usual", "message", "only"),
    [
        ("wal", "max_page_count = 1", "max_page_count = 1073741823", "free some space", ("put", "put in a new thread")),
        ("delete", "query_only = 1", "query_only = 0", "make the file and its folder writable", None),
    ],
    ids=["full", "read-only"],
)
def test_a_file_that_is_full_or_read_only(
    path: Path, sql: Sql, journal: str, pragma: str, usual: str, message: str, only: tuple[str, ...] | None
) -> None:
    engine, setting = create_engine(f"sqlite:///{path}"), {"now": usual}
    event.listen(engine, "connect", lambda driver, _: driver.execute(f"PRAGMA journal_mode = {journal}"))
    event.listen(engine, "checkout", lambda driver, *_: driver.execute(f"PRAGMA {setting['now']}"))
    with SQLAlchemySaver(engine) as saver:
        refuses_and_goes_on(saver, sql, lambda: switched(setting, pragma), message, only=only, own_engine=True)
    engine.dispose()


def test_a_disk_that_fails(saver: SQLAlchemySaver, path: Path, sql: Sql) -> None:
    """The operating system lets no file grow: what is written to the log is cut off in the middle."""

    @contextmanager
    def obstacle() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{path}-wal").stat().st_size + 2000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    refuses_and_goes_on(saver, sql, obstacle, "disk or file system failed")


def test_a_server_that_becomes_read_only(server_url: str, look: Sql) -> None:
    """As a primary server does that is demoted."""
    engine, setting = create_engine(server_url), {"now": "READ WRITE"}
    of_session = "SESSION TRANSACTION" if engine.dialect.name == "mysql" else "SESSION CHARACTERISTICS AS TRANSACTION"

    def set_mode(driver: Any, *_: object) -> None:
        with driver.cursor() as cursor:
            cursor.execute(f"SET {of_session} {setting['now']}")
        driver.commit()

    event.listen(engine, "checkout", set_mode)
    with SQLAlchemySaver(engine) as saver:
        obstacle, message = partial(switched, setting, "READ ONLY"), "connect to the primary server"
        refuses_and_goes_on(saver, partial(look, server_url), obstacle, message, own_engine=True)
    engine.dispose()


def test_a_right_that_is_taken_away(server_url: str, look: Sql) -> None:
    """The content is stored before the checkpoint that needs it, and goes again when that is refused."""
    url = make_url(server_url)
    with SQLAlchemySaver.from_url(url) as owner:
        owner.setup()
    is_mysql = url.get_backend_name() == "mysql"
    user = f"u{(url.database or '')[-16:]}"
    who = f"'{user}'@'%'" if is_mysql else user
    rights = "SELECT, INSERT, UPDATE, DELETE"
    with ExitStack() as after:
        look(url, f"CREATE USER {who}")
        after.callback(look, url, f"DROP USER {who}")
        if not is_mysql:
            after.callback(look, url, f"DROP OWNED BY {who}")
            look(url, f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {who}")
        for table in (*TABLES, "schema_versions"):
            look(url, f"GRANT {rights} ON agentmem_{table} TO {who}")

        @contextmanager
        def obstacle() -> Iterator[None]:
            for table in ("checkpoints", "writes", "threads"):
                look(url, f"REVOKE INSERT, DELETE ON agentmem_{table} FROM {who}")
            yield
            for table in ("checkpoints", "writes", "threads"):
                look(url, f"GRANT {rights} ON agentmem_{table} TO {who}")

        with SQLAlchemySaver.from_url(url.set(username=user)) as saver:
            refuses_and_goes_on(saver, partial(look, url), obstacle, "grant CREATE on the schema")


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


def stage(found: CheckpointTuple) -> int:
    """How many events of its step are in a checkpoint: itself, the writes of the task, one interrupt after another."""
    step, writes = found.metadata["step"], found.pending_writes or ()
    assert found.checkpoint["channel_values"] == values(step)
    ordinary = [(channel, value) for task, channel, value in writes if task == "task"]
    assert ordinary in ([], pending(step))
    asked = [value["number"] for task, _, value in writes if task == "asking"]
    assert [write for write in writes if write[0] == "asking"] == [
        ("asking", INTERRUPT, question(step, number)) for number in asked
    ]
    assert len(asked) <= 1
    return 1 + bool(ordinary) + sum(number + 1 for number in asked)


@dataclass
class Ledger:
    """What a thread must hold, going by what its writers said: the stage of each checkpoint."""

    known: dict[str, int] = field(default_factory=dict)
    pruning: str | None = None  # the checkpoint whose ancestors may be gone

    def read(self, said: list[list[Any]]) -> None:
        for what, own_id, *more in said:
            if what == "put":
                self.known[own_id] = 1
            elif what == "writes":
                self.known[own_id] = 2
            elif what == "interrupt":
                self.known[own_id] = 3 + more[0]
            elif what == "pruning":
                self.pruning = own_id
            else:
                self.known, self.pruning = {own_id: self.known[own_id]}, None

    def check(self, saver: SQLAlchemySaver) -> None:
        """Compare with what is stored, and take over the one event that was stored but not acknowledged any more."""
        found = {one.config["configurable"]["checkpoint_id"]: stage(one) for one in saver.list(config())}
        if self.pruning is not None and found.keys() == {self.pruning}:
            self.known = {self.pruning: self.known[self.pruning]}
        self.pruning = None
        assert self.known.keys() <= found.keys()
        more = [stored - self.known.get(own_id, 0) for own_id, stored in found.items()]
        assert min(more, default=0) >= 0
        assert sum(more) <= 1
        self.known = found


@pytest.mark.parametrize("more", [1, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing_that_was_acknowledged(
    database_url: str, ask: Sql, processes: Callable[..., Process], sessions: Callable[..., int], more: int
) -> None:
    """Kill writer after writer, each of which goes on where the one before it was killed; look after each."""
    in_file = database_url.startswith("sqlite")
    rounds = more * (10 if in_file else 6)
    chance, ledger = random.Random(rounds), Ledger()
    for number in range(rounds):
        if number % 3 == 2:
            writer = processes(grow, database_url, chance.randint(1, 150))
        else:
            writer = processes(grow, database_url)
            if number % 3:
                writer.until_it_says(1)
            time.sleep(chance.uniform(0, 0.1))
            writer.kill()
        assert writer.wait() == -signal.SIGKILL
        ledger.read(writer.said())
        ends = time.monotonic() + 10  # a server may finish the statement that a process sent before it was killed
        while not in_file and sessions(database_url):
            assert time.monotonic() < ends
        with SQLAlchemySaver.from_url(database_url) as saver:
            ledger.check(saver)
            newest = get(saver, config()).metadata["step"] if ledger.known else 0
        assert unaccounted(ask) == (set(), set())
        assert not in_file or ask("PRAGMA integrity_check") == [("ok",)]
    assert newest > rounds


# SQLAlchemy's pool may lose a connection when it is interrupted in the middle of giving it out.
POINTS_OF_A_SAVER = 12


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
    except KeyboardInterrupt:
        return True, passed
    except StorageError as error:
        if not isinstance(
            error.__cause__, TypeError
        ):  # that ormsgpack makes of it in LangGraph's part of the serializer
            raise
        return True, passed
    finally:
        sys.setprofile(before)
    return False, passed


def messages(number: int) -> dict[str, Any]:
    return {"messages": [HumanMessage(f"message {n}", id=str(n)) for n in (1, 2, number)]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("savers", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_an_interruption_anywhere(database_url: str, ask: Sql, savers: int) -> None:
    """Whatever it was, the next call finds the database free, from elsewhere too, and what is there whole."""
    for method, first in product(("put", "get_tuple", "prune"), range(savers)):
        with SQLAlchemySaver.from_url(database_url) as saver, SQLAlchemySaver.from_url(database_url) as other:
            put(saver, config(), messages(0))
            at, newest = put(saver, config(), messages(0)), 0
            calls: dict[str, Callable[[], Any]] = {
                "put": lambda: put(saver, config(), messages(newest + 1)),  # noqa: B023
                "get_tuple": lambda: saver.get_tuple(at),  # noqa: B023
                "prune": lambda: saver.prune(["t"]),
            }
            _, points = interrupted(calls[method])
            newest += method == "put"
            for point in range(1 + first, points, points // POINTS_OF_A_SAVER):
                came, _ = interrupted(calls[method], point)
                newest += 1
                put(other, config(), messages(newest))
                assert read(saver, config()) == messages(newest), (method, came, point)
                saver.copy_thread("t", "copy")
                saver.delete_thread("copy")
            for one in saver.list(config()):  # reads and compares every stored value
                assert len(one.checkpoint["channel_values"]["messages"]) == 3
            saver.delete_thread("t")
            assert [ask(f"SELECT count(*) FROM agentmem_{name}") for name in ("checkpoints", "blobs")] == [[(0,)]] * 2


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
        assert read(saver, config()) == messages(0)
        saver.delete_thread("t")
        assert saver.get_tuple(config()) is None
