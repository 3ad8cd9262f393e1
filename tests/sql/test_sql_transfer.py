"""Threads of other checkpointers are copied exactly, again and again, and go on where they were."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command
from typer.testing import CliRunner

import agentmem
import agentmem_sql
from agentmem.errors import StorageError
from agentmem_cli.app import app
from agentmem_sql import SQLAlchemySaver, TransferError, TransferReport, acopy_threads, copy_threads
from tests.helpers.sql_cases import NewUrl, Sql, SyncMirror, config, finish, get, put, start_child
from tests.helpers.sql_protection import PROTECTION, aes
from tests.helpers.sql_transfer_graph import Ticket, rich_graph, say

SOURCES = ("memory", "sqlite", "postgres tasks", "ours", "other")
THREADS = ("plain", "asks", "twice", "inner")

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")


class Other(BaseCheckpointSaver[str]):
    """A checkpointer of someone else's: the interface alone, synchronous."""

    def __init__(self) -> None:
        super().__init__()
        inside = InMemorySaver()
        for name in ("put", "put_writes", "get_tuple", "list", "get_next_version"):
            setattr(self, name, getattr(inside, name))


class Side:
    """A checkpointer, used through tasks; `tasks` says that it is made for them, and copied by them."""

    def __init__(self, saver: Any, tasks: bool = False) -> None:
        self.saver, self.tasks = saver, tasks
        self.asynchronous = saver if tasks else SyncMirror(saver)

    @property
    def graph(self) -> Any:
        return rich_graph(self.asynchronous)

    async def invoke(self, given: Any, at: RunnableConfig) -> Any:
        return await self.graph.ainvoke(given, at)

    async def values(self, thread: str) -> dict[str, Any]:
        values: dict[str, Any] = (await self.graph.aget_state(config(thread))).values
        return values

    async def tuples(self, thread: str) -> dict[tuple[str, str], CheckpointTuple]:
        found = [one async for one in self.asynchronous.alist({"configurable": {"thread_id": thread}})]
        return {(at["checkpoint_ns"], at["checkpoint_id"]): one for one in found if (at := one.config["configurable"])}

    async def tuple(self, at: RunnableConfig) -> Any:
        return await self.asynchronous.aget_tuple(at)

    async def delta(self, at: RunnableConfig) -> Any:
        return await self.asynchronous.aget_delta_channel_history(config=at, channels=["log"])

    async def copy_to(self, target: SQLAlchemySaver, **options: Any) -> TransferReport:
        if self.tasks:
            return await acopy_threads(self.saver, target, **options)
        return copy_threads(self.saver, target, **options)


@contextlib.asynccontextmanager
async def opened(kind: str, tmp_path: Path, new_url: NewUrl) -> AsyncIterator[Side]:
    if kind == "memory":
        yield Side(InMemorySaver())
    elif kind == "other":
        yield Side(Other())
    elif kind == "sqlite":
        with SqliteSaver.from_conn_string(str(tmp_path / "old.db")) as saver:
            yield Side(saver)
    elif kind == "ours":
        with SQLAlchemySaver.from_url("sqlite:///:memory:") as ours:
            yield Side(ours)
    else:
        conninfo = new_url("postgresql").replace("+psycopg", "")
        async with AsyncPostgresSaver.from_conn_string(conninfo) as postgres:
            await postgres.setup()
            yield Side(postgres, tasks=True)


async def live(side: Side) -> None:
    """Threads with several turns, a fork and an update; with a question open, half answered, and in a subgraph."""
    for number in range(4):
        await side.invoke(say("hello", number), config("plain"))
    keys = sorted(await side.tuples("plain"))
    await side.invoke(None, config("plain", checkpoint_id=keys[5][1]))
    if not side.tasks:
        await side.graph.aupdate_state(config("plain"), {"log": ["updated"], "count": 9})
    await side.invoke(say("ask", 0), config("asks"))
    await side.invoke(say("ask twice", 0), config("twice"))
    await side.invoke(Command(resume="one"), config("twice"))
    await side.invoke(say("inside", 0), config("inner"))


@pytest.fixture
async def source(request: pytest.FixtureRequest, tmp_path: Path, new_url: NewUrl) -> AsyncIterator[Side]:
    async with opened(request.param, tmp_path, new_url) as side:
        await live(side)
        yield side


@pytest.fixture
def old(tmp_path: Path) -> Iterator[SqliteSaver]:
    """A SqliteSaver on a file."""
    with SqliteSaver.from_conn_string(str(tmp_path / "old.db")) as saver:
        yield saver


def tuples(saver: Any, thread: str = "t") -> dict[tuple[str, str], CheckpointTuple]:
    return asyncio.run(Side(saver).tuples(thread))


@pytest.mark.parametrize("source", SOURCES, indirect=True)
async def test_everything_is_as_it_was_and_goes_on(source: Side, saver: SQLAlchemySaver, url: str) -> None:
    seen: list[str] = []
    report = await source.copy_to(saver, on_thread=seen.append)
    target = Side(saver)
    before = {thread: await source.tuples(thread) for thread in THREADS}

    for thread, those in before.items():
        copied = await target.tuples(thread)
        assert copied == those
        assert [type(v) for one in copied.values() for v in one.checkpoint["channel_versions"].values()] == [
            type(v) for one in those.values() for v in one.checkpoint["channel_versions"].values()
        ]
        for ns, checkpoint_id in those:
            at = config(thread, ns, checkpoint_id)
            assert await target.tuple(at) == await source.tuple(at)
            assert await target.delta(at) == await source.delta(at)
        assert await target.values(thread) == await source.values(thread)

    checkpoints = sum(map(len, before.values()))
    writes = sum(len(one.pending_writes or ()) for those in before.values() for one in those.values())
    assert (report.threads, report.checkpoints, report.writes, report.skipped) == (4, checkpoints, writes, 0)
    assert sorted(seen) == sorted(THREADS)
    assert any(one.checkpoint["channel_values"].get("ticket") == Ticket(1, "left") for one in before["plain"].values())
    assert len({ns for ns, _ in before["inner"]}) == 2

    ended = {}
    for side in (source, target):
        await side.invoke(say("and now?", 99), config("plain"))
        await side.invoke(Command(resume="yes"), config("asks"))
        await side.invoke(Command(resume="two"), config("twice"))
        await side.invoke(Command(resume="in"), config("inner"))
        first = sorted(await side.tuples("plain"))[4]
        await side.invoke(say("a branch", 77), config("plain", checkpoint_id=first[1]))
        ended[side is target] = {thread: await side.values(thread) for thread in THREADS}
    # LangGraph's interface does not tell the paths of tasks: what is written later to a half-finished step comes last.
    for values in (*ended[True].values(), *ended[False].values()):
        values["log"].sort()
    assert ended[True] == ended[False]
    parts = ["part 0", "part 1", "part 2"]
    assert ended[True]["asks"]["log"] == ["left 1", "middle 1 ['yes']", *parts, "right 1"]
    assert "middle 1 ['one', 'two']" in ended[True]["twice"]["log"]
    assert "inside" in ended[True]["inner"]["log"]
    assert ended[True]["plain"]["messages"][-2].content == "a branch"
    with SQLAlchemySaver.from_url(url) as fresh:  # replays what was written to delta channels
        for thread in THREADS:
            values = await Side(fresh).values(thread)
            assert {**values, "log": sorted(values["log"])} == ended[True][thread]


@pytest.mark.parametrize("source", ["sqlite", "postgres tasks", "ours"], indirect=True)
async def test_a_second_copy_brings_what_is_new_and_nothing_else(
    source: Side, saver: SQLAlchemySaver, sql: Sql
) -> None:
    def rows() -> list[Any]:
        return [sorted(sql(f"SELECT * FROM agentmem_{name}"), key=repr) for name in ("checkpoints", "writes", "blobs")]

    await source.copy_to(saver)
    before = rows()
    again = await source.copy_to(saver)
    assert (again.threads, again.checkpoints, again.writes, again.skipped) == (4, 0, 0, 4)
    assert rows() == before

    await source.invoke(say("and now?", 99), config("plain"))
    await source.invoke(Command(resume="yes"), config("asks"))
    await source.invoke(Command(resume="in"), config("inner"))
    third = await source.copy_to(saver)
    assert third.skipped == 1
    for thread in THREADS:
        assert await Side(saver).tuples(thread) == await source.tuples(thread)
    assert [set(now) >= set(then) for now, then in zip(rows(), before, strict=True)] == [True] * 3


def test_any_database_is_a_target(any_saver: SQLAlchemySaver) -> None:
    made = InMemorySaver()
    rich_graph(made).invoke(say("ask", 0), config("été \U0001f600"))
    put(made, config("été \U0001f600", "a namespace of any length " * 20), {"n": 1})
    for expected in (3, 0):
        assert copy_threads(made, any_saver).checkpoints == expected
        assert tuples(any_saver, "été \U0001f600") == tuples(made, "été \U0001f600")


def test_a_question_that_was_asked_anew_is_copied_anew(old: SqliteSaver, saver: SQLAlchemySaver) -> None:
    graph = rich_graph(old)
    graph.invoke(say("ask twice", 0), config())
    copy_threads(old, saver)
    for answer in ("one", "two"):  # answered, the same task asks again under the same index
        graph.invoke(Command(resume=answer), config())
        copy_threads(old, saver)
        assert tuples(saver) == tuples(old)
    assert "middle 1 ['one', 'two']" in rich_graph(saver).get_state(config()).values["log"]


@pytest.mark.parametrize("after", [1, 13])
def test_an_interrupted_copy_is_an_earlier_state_and_goes_on(saver: SQLAlchemySaver, after: int) -> None:
    class Dying(InMemorySaver):
        left = after

        def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
            if not Dying.left:
                raise KeyboardInterrupt
            Dying.left -= 1
            return super().get_tuple(config)

    made = Dying()
    Dying.left = 10**6
    for number in range(4):
        rich_graph(made).invoke(say("hello", number), config())
    Dying.left = after
    with pytest.raises(KeyboardInterrupt):
        copy_threads(made, saver)
    Dying.left = 10**6
    whole, part = tuples(made), tuples(saver)
    assert len(part) == after
    assert part == {key: whole[key] for key in sorted(whole)[:after]}

    assert copy_threads(made, saver).checkpoints == len(whole) - after
    assert tuples(saver) == whole


def test_threads_may_be_chosen(old: SqliteSaver, saver: SQLAlchemySaver) -> None:
    for thread in "abc":
        put(old, config(thread), {"n": thread})
    report = copy_threads(old, saver, thread_ids=["c", "a", "c"])
    assert report.threads == 2
    assert [tuples(saver, thread) == tuples(old, thread) for thread in "abc"] == [True, False, True]
    with pytest.raises(TransferError, match=r"1 of 2 threads.*thread 'nobody'.*expected the thread in the source"):
        copy_threads(old, saver, thread_ids=["nobody", "b"])
    assert tuples(saver, "b") == tuples(old, "b")


# What is not destroyed.


def everything(saver: SQLAlchemySaver) -> list[CheckpointTuple]:
    return list(saver.list(None))


def test_another_thread_of_the_same_name_stays(old: SqliteSaver, saver: SQLAlchemySaver) -> None:
    put(old, config(), {"n": "theirs"})
    put(old, config("fine"), {"n": "theirs"})
    put(saver, config(), {"n": "ours"})
    before = tuples(saver)
    with pytest.raises(TransferError, match="thread 't': expected a thread that went on in the source alone") as raised:
        copy_threads(old, saver)
    assert tuples(saver) == before
    assert tuples(saver, "fine") == tuples(old, "fine")
    assert list(raised.value.report.failures) == ["t"]
    assert isinstance(raised.value.report.failures["t"], StorageError)


@pytest.mark.parametrize("by", ["a run", "a write"])
def test_a_thread_that_went_on_in_the_target_stays(old: SqliteSaver, saver: SQLAlchemySaver, by: str) -> None:
    rich_graph(old).invoke(say("ask", 0), config())
    copy_threads(old, saver)
    if by == "a run":
        rich_graph(saver).invoke(Command(resume="here"), config())
    else:
        saver.put_writes(get(saver, config()).config, [("count", 5)], "a task of ours")
    before = tuples(saver)
    assert copy_threads(old, saver).skipped == 1
    assert tuples(saver) == before

    rich_graph(old).invoke(Command(resume="there"), config())
    with pytest.raises(TransferError, match="went on in the source alone"):
        copy_threads(old, saver)
    assert tuples(saver) == before


# What else there may be in the source.


def test_whole_numbers_as_versions(old: SqliteSaver, saver: SQLAlchemySaver) -> None:
    class Numbers(SqliteSaver):
        def get_next_version(self, current: Any, channel: None) -> Any:
            return (current or 0) + 1

    rich_graph(Numbers(old.conn)).invoke(say("ask", 0), config())
    copy_threads(old, saver)
    assert tuples(saver) == tuples(old)
    versions = [v for one in tuples(saver).values() for v in one.checkpoint["channel_versions"].values()]
    assert {type(version) for version in versions} == {int}


def test_the_order_of_writes_is_kept_whatever_their_paths(saver: SQLAlchemySaver) -> None:
    """With special channels among them, and those of a task that come later."""
    made = InMemorySaver()
    at = put(made, config(), {"n": 1})
    for task, path, writes in [
        ("b", "~1", [("x", 1), ("y", 2)]),
        ("a", "~2", [("x", 3), (INTERRUPT, "?"), ("z", 4)]),
        ("c", "", [(RESUME, "null")]),
        ("d", "~3", [(ERROR, "broken")]),
    ]:
        made.put_writes(at, writes, task, path)
    copy_threads(made, saver)
    (found,) = tuples(saver).values()
    assert [value for _, _, value in found.pending_writes or ()] == ["null", 1, 2, "?", 3, 4, "broken"]
    assert copy_threads(made, saver).skipped == 1

    put(made, at, {"n": 2})
    copy_threads(made, saver)
    made.put_writes(at, [(ERROR, "late")], "b", "~1")  # under a checkpoint that has a child, as a branch does
    assert copy_threads(made, saver).writes == 1
    assert tuples(saver) == tuples(made)


def test_a_damaged_thread_does_not_stop_the_others(old: SqliteSaver, saver: SQLAlchemySaver) -> None:
    for thread in "abc":
        at = put(old, config(thread), {"n": 1})
        put(old, at, {"n": 2})
    at = sorted(tuples(old, "b"))[-1][1]
    old.conn.execute("UPDATE checkpoints SET checkpoint = x'c1' WHERE checkpoint_id = ?", (at,))
    old.conn.commit()
    with pytest.raises(TransferError, match=r"1 of 3 threads were not copied.*thread 'b'"):
        copy_threads(old, saver, thread_ids=["a", "b", "c"])
    assert [len(tuples(saver, thread)) for thread in "abc"] == [2, 0, 2]


def test_a_pruned_thread_with_delta_channels_is_refused(saver: SQLAlchemySaver) -> None:
    """What its ancestors left to a delta channel is no part of LangGraph's interface."""
    with SQLAlchemySaver.from_url("sqlite:///:memory:") as ours:
        rich_graph(ours).invoke(say("hello", 0), config())
        ours.prune(["t"])
        with pytest.raises(TransferError, match=r"delta channels \['log'\].*pruned"):
            copy_threads(ours, saver)
        assert everything(saver) == []


def test_a_value_that_is_not_stored_here_is_named(saver: SQLAlchemySaver) -> None:
    made = InMemorySaver(serde=JsonPlusSerializer(pickle_fallback=True))
    put(made, config(), {"n": 2**80})
    with pytest.raises(TransferError, match="thread 't' at checkpoint"):
        copy_threads(made, saver)
    assert tuples(saver) == {}


@pytest.mark.parametrize("message", ["closed", "no such table"])
def test_a_target_that_fails_ends_it(old: SqliteSaver, saver: SQLAlchemySaver, sql: Sql, message: str) -> None:
    """From the start, or on the way."""
    for thread in "abc":
        put(old, config(thread), {"n": 1})
    if message == "closed":
        saver.close()
    with pytest.raises(StorageError, match=message) as raised:
        copy_threads(old, saver, on_thread=lambda _: sql("DROP TABLE agentmem_checkpoints"))
    assert not isinstance(raised.value, TransferError)


# How they are read.


@pytest.mark.parametrize("direction", ["to", "from"])
def test_protection_may_change(saver: SQLAlchemySaver, tmp_path: Path, direction: str) -> None:
    with SQLAlchemySaver.from_url(f"sqlite:///{tmp_path / 'safe.db'}", **PROTECTION["both"]) as safe:
        source, target = (saver, safe) if direction == "to" else (safe, saver)
        for number in range(3):
            rich_graph(source).invoke(say("a confidential question", number), config())
        copy_threads(source, target)
        assert tuples(target) == tuples(source)
    content = b"".join(one.read_bytes() for one in tmp_path.glob("safe.db*"))
    assert b"confidential" not in content


class Shouting(JsonPlusSerializer):
    """A serializer of someone else's."""

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        kind, data = super().dumps_typed(obj)
        return f"{kind}!", data[::-1]

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        return super().loads_typed((data[0].rstrip("!"), data[1][::-1]))


@pytest.mark.parametrize("which", ["source", "target", "both", "encrypted source"])
def test_serializers_may_differ(old: SqliteSaver, url: str, which: str) -> None:
    if which != "target":
        old.serde = aes() if "encrypted" in which else Shouting()
    with SQLAlchemySaver.from_url(url, serde=None if "source" in which else Shouting()) as target:
        rich_graph(old).invoke(say("ask", 0), config())
        copy_threads(old, target)
        assert tuples(target) == tuples(old)


async def test_a_checkpointer_without_tasks_is_read_by_tasks(old: SqliteSaver, saver: SQLAlchemySaver) -> None:
    for thread, source in (("old", old), ("other", Other())):
        put(source, config(thread), {"n": 1})
        assert (await acopy_threads(source, saver)).checkpoints == 1


async def test_a_cancelled_copy_ends(old: SqliteSaver, saver: SQLAlchemySaver) -> None:
    for thread in "abcd":
        put(old, config(thread), {"n": 1})
    going, reached = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(_thread: str) -> None:
        loop.call_soon_threadsafe(reached.set)
        going.wait()

    copying = asyncio.create_task(acopy_threads(old, saver, on_thread=hold))
    await reached.wait()
    copying.cancel()
    await asyncio.sleep(0)
    going.set()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert len(everything(saver)) == 1


def test_threads_named_by_numbers(saver: SQLAlchemySaver) -> None:
    made = InMemorySaver()
    put(made, {"configurable": {"thread_id": 7, "checkpoint_ns": ""}}, {"n": 1})
    copy_threads(made, saver)
    assert [one.checkpoint["channel_values"] for one in everything(saver)] == [{"n": 1}]


CLI = "from agentmem_cli.app import app\napp()"


def run_import(*arguments: str) -> Any:
    """`agentmem storage import`."""
    return CliRunner().invoke(app, ["storage", "import", *arguments])


def test_the_command_needs_no_class_of_the_application(tmp_path: Path, old: SqliteSaver, url: str) -> None:
    """Values pass as they were serialised: neither missing classes nor the strict mode lose anything."""
    rich_graph(old).invoke(say("ask", 0), config())
    rich_graph(old).invoke(say("hello", 0), config("other"))
    file = str(tmp_path / "old.db")
    packages = {str(Path(str(module.__file__)).parents[1]) for module in (agentmem, agentmem_sql)}
    elsewhere = {"PYTHONPATH": os.pathsep.join(packages), "LANGGRAPH_STRICT_MSGPACK": "true"}
    said = finish(start_child("storage", "import", file, url, "--thread", "t", code=CLI, **elsewhere))
    copied = f"copied {len(tuples(old))} checkpoints and 11 pending writes"
    assert said == f"1 threads, of which 0 had nothing new and 0 failed; {copied}"
    with SQLAlchemySaver.from_url(url) as saver:
        assert tuples(saver) == tuples(old)
        assert tuples(saver, "other") == {}
        found = [one.checkpoint["channel_values"].get("ticket") for one in everything(saver)]
        pending = [
            value for one in everything(saver) for _, channel, value in one.pending_writes or () if channel == "ticket"
        ]
    assert [*filter(None, found), *pending] == [Ticket(1, "left")]


def test_the_command_has_the_options_that_its_errors_name(
    url: str, new_url: NewUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table prefixes, schemas and keys of both sides."""
    monkeypatch.setenv("LANGGRAPH_AES_KEY", "k" * 32)
    keys = {name: tmp_path / name for name in ("theirs", "ours")}
    for name, file in keys.items():
        file.write_bytes(name.encode() * 8)
    with SQLAlchemySaver.from_url(url, table_prefix="mine_", hmac_key=keys["theirs"].read_bytes()) as old:
        put(old, config(), {"n": 1})
        expected = tuples(old)
    target = new_url("postgresql")
    with PostgresSaver.from_conn_string(target.replace("+psycopg", "")) as server:
        server.conn.execute("CREATE SCHEMA apart")
    options = ["--prefix", "new_", "--schema", "apart", "--encrypted", "--hmac-key-file", str(keys["ours"])]
    for gone in (":memory:", "sqlite://"):
        lost = run_import(url, gone, "--source-prefix", "mine_", "--source-hmac-key-file", str(keys["theirs"]))
        assert isinstance(lost.exception, StorageError)
        assert "TARGET that stays" in str(lost.exception)
    refused = run_import(url, target, *options)
    assert isinstance(refused.exception, StorageError)
    assert "another table prefix" in str(refused.exception)
    options += ["--source-prefix", "mine_", "--source-hmac-key-file", str(keys["theirs"])]
    assert run_import(url, target, *options).exit_code == 0
    protection: dict[str, Any] = {"serde": EncryptedSerializer.from_pycryptodome_aes(), "hmac_key": b"ours" * 8}
    with SQLAlchemySaver.from_url(target, table_prefix="new_", schema="apart", **protection) as saver:
        assert tuples(saver) == expected


def test_the_command_moves_from_postgresql(postgresql_url: str, url: str) -> None:
    with PostgresSaver.from_conn_string(postgresql_url.replace("+psycopg", "")) as old:
        old.setup()
        rich_graph(old).invoke(say("ask", 0), config())
        put(old, config("clash"), {"n": 1})
        with SQLAlchemySaver.from_url(url) as saver:
            put(saver, config("clash"), {"n": 2})
        said = run_import(postgresql_url, url)
        assert said.exit_code == 1
        assert "thread 'clash': expected a thread that went on in the source alone" in said.output
        assert "2 threads, of which 0 had nothing new and 1 failed" in said.output
        with SQLAlchemySaver.from_url(url) as saver:
            assert tuples(saver) == tuples(old)
