"""What LangGraph asks of a checkpointer and its suite does not test; and whatever users send is data."""

from __future__ import annotations

import random
from collections.abc import Callable
from decimal import Decimal
from enum import IntEnum
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.serde.types import INTERRUPT, RESUME
from sqlalchemy import Connection, func, select

from agentmem.errors import ConfigError, StorageError
from agentmem_sql import Retention, SQLAlchemySaver, copy_threads
from tests.helpers.sql_cases import checkpoint, config, get, memory, put, read

EXACT = ("utf-8", "surrogatepass")
# What users may send as ids, names and metadata: all of it is data.
WORDS = r"""a A á 😀𠀋 ключ " ' \ \' % _ %_ ? {} :key %(key)s $ $."x" $.source a.b a[0]"""
ODD = [
    *("", "\0", "a\0b", "a ", "\ud800"),
    *WORDS.split(),
    "' OR 1=1 --",
    "x') OR 1=1 --",
    "') UNION SELECT 1,2,3,4,5,6,7,8,9,10,11 --",
    "; DROP TABLE agentmem_blobs; --",
    "source",
]


def test_ordinary_writes_are_kept_and_special_ones_replaced(any_saver: SQLAlchemySaver) -> None:
    at = put(any_saver, config())
    any_saver.put_writes(at, [("x", 1), ("x", 2)], "task")
    any_saver.put_writes(at, [("x", 3), ("x", 4)], "task")
    any_saver.put_writes(at, [(INTERRUPT, "first"), (RESUME, "r")], "task")
    any_saver.put_writes(at, [(INTERRUPT, "second")], "task")
    any_saver.put_writes(at, [("x", 5), (INTERRUPT, "third")], "task")  # not all special: nothing is replaced

    writes = get(any_saver, at).pending_writes or ()
    assert {write[1:] for write in writes} == {("x", 1), ("x", 2), (INTERRUPT, "second"), (RESUME, "r")}


def test_what_comes_first_decides_whether_a_checkpoint_is_stored(any_saver: SQLAlchemySaver) -> None:
    """`put(first=...)` works in the same transaction: what it raises leaves nothing, and it sees what is stored."""
    seen = list[int]()
    at, tables = put(any_saver, config(), {"x": 0}), any_saver.parts.database.tables
    made = checkpoint({"x": 1}, any_saver.get_next_version("2", None))

    def refuse(connection: Connection) -> None:
        any_saver.parts.writer.open_thread(connection, "new", alone=True)
        raise LookupError

    def count(connection: Connection) -> None:
        seen.append(connection.execute(select(func.count()).select_from(tables.checkpoints)).scalar_one())

    with pytest.raises(LookupError):
        any_saver.put(at, made, {}, made["channel_versions"], first=refuse)
    assert [get(any_saver, config()).config, any_saver.get_tuple(config("new"))] == [at, None]
    any_saver.put(at, made, {}, made["channel_versions"], first=count)
    assert (set(seen), read(any_saver, config())) == ({1}, {"x": 1})


def test_a_filter_is_exact_and_counts_before_the_limit(saver: SQLAlchemySaver) -> None:
    """The injections of CVE-2025-67644 and the like: keys and values match exactly, and nothing else."""
    values: list[Any] = [1, True, "1", 1.5, None, 2**60, {"a": 1}, {"a": 1, "b": 2}, [1, 2], [1]]
    values += [name for name in ODD[:-1] if not {"\0", "\ud800"} & {*name}]  # what LangGraph takes as metadata
    for value in values:
        put(saver, config(), k=value, **{value: "yes"} if isinstance(value, str) else {})
    put(saver, config())

    for value in values:
        found = [one.metadata["k"] for one in saver.list(config(), filter={"k": value}, limit=1)]  # type: ignore[typeddict-item]
        assert [(type(one), one) for one in found] == [(type(value), value)]
        if isinstance(value, str):
            assert [one.metadata["k"] for one in saver.list(None, filter={value: "yes"})] == [value]  # type: ignore[typeddict-item]
            for wrong in (None, "", "ye", "yes' OR 1=1 --", ["yes"], True):
                assert list(saver.list(None, filter={value: wrong})) == []
    assert list(saver.list(config(), filter={"missing": None})) == []
    assert [one.metadata["k"] for one in saver.list(config(), filter={"k": (1, 2)})] == [[1, 2]]  # type: ignore[typeddict-item]
    assert len(list(saver.list(None, filter={"source": "loop"}))) == len(values) + 1


class Level(IntEnum):
    LOW = 3


def test_a_filter_finds_what_is_equal_however_it_is_spelled(any_saver: SQLAlchemySaver) -> None:
    values = [3, 3.0, Level.LOW, Decimal(3), -(2**40), 2**60, 1.5, True, "three", "x" * 300, None]
    for number, value in enumerate(values):
        any_saver.put(config(), made := checkpoint(), {"k": value, "other": number}, made["channel_versions"])  # type: ignore[typeddict-unknown-key]
    for value in values:
        found = [one.metadata["other"] for one in any_saver.list(None, filter={"k": value})]  # type: ignore[typeddict-item]
        equal = [n for n, other in enumerate(values) if other == value and isinstance(other, bool) == (value is True)]
        assert found == equal[::-1]


def test_a_limit_counts_what_has_the_value_and_not_what_only_contains_it(any_saver: SQLAlchemySaver) -> None:
    ats = [put(any_saver, config(f"{n % 2}"), user="a" if n < 3 else "b", note={"user": "a"}) for n in range(40)]
    for limit in (1, 3, 50):
        found = [one.config for one in any_saver.list(None, filter={"user": "a"}, limit=limit)]
        assert found == ats[2::-1][:limit]
    any_saver.copy_thread("0", "1")
    assert len(list(any_saver.list(None, filter={"user": "a"}))) == 5
    assert list(any_saver.list(None, filter={"user": "a", "note": {"user": "b"}})) == []


def test_many_writes_of_one_task(any_saver: SQLAlchemySaver) -> None:
    """More rows than one statement takes; repeated, they stay what they were."""
    at = put(any_saver, config())
    for word in ("first", "second"):
        any_saver.put_writes(at, [("x", f"{word} {number}") for number in range(1200)], "task")
        assert get(any_saver, at).pending_writes == [("task", "x", f"first {number}") for number in range(1200)]


def test_listing_pages_through_every_thread_newest_first(any_saver: SQLAlchemySaver) -> None:
    stored = [put(any_saver, config(f"thread {n % 3}", ns=("", "sub:1")[n % 2]), {"n": n}) for n in range(75)]

    found = list(any_saver.list(None))
    assert [one.config for one in found] == stored[::-1]
    assert [one.checkpoint["channel_values"]["n"] for one in found] == list(range(75))[::-1]
    assert [one.config for one in any_saver.list({"configurable": {"thread_id": "thread 1"}})] == stored[1::3][::-1]
    assert [one.config for one in any_saver.list(config("thread 1", "sub:1"))] == stored[1::6][::-1]
    assert [one.config for one in any_saver.list(None, before=stored[70], limit=40)] == stored[30:70][::-1]
    assert [one.config for one in any_saver.list(stored[5])] == [stored[5]]
    assert list(any_saver.list(None, limit=0)) == []


def test_checkpoint_comes_back_as_it_was(saver: SQLAlchemySaver) -> None:
    made = checkpoint({"none": None, "bytes": b"\0\xff", "memory": memory(3), "messages": [HumanMessage("hi", id="1")]})
    made |= {"v": 1, "versions_seen": {"node": {"none": 1}}, "updated_channels": ["none"]}
    at = saver.put(config(), made, {}, made["channel_versions"])
    assert get(saver, at).checkpoint == made


def test_values_are_those_of_the_named_versions(saver: SQLAlchemySaver) -> None:
    """Unchanged channels come from earlier puts, emptied ones are absent; 1, 1.0 and "1" stay apart."""
    made = checkpoint({"a": "int", "b": "kept", "gone": 1}, version=1)
    saver.put(config(), made, {}, made["channel_versions"])
    for version in ("1", 1.0):
        other = checkpoint({"a": f"{version!r}"}, version)
        saver.put(config("t", "other"), other, {}, other["channel_versions"])
        saver.put(config(), other, {}, {"a": version})
    last = checkpoint({"a": "new", "b": "kept"})
    last["channel_versions"] = {"a": 2, "b": 1, "gone": 2}
    saver.put(config(), last, {}, {"a": 2, "gone": 2})
    assert read(saver, config(checkpoint_id=made["id"])) == {"a": "int", "b": "kept", "gone": 1}
    assert read(saver, config()) == {"a": "new", "b": "kept"}


def test_versions_grow_as_text_and_never_repeat(saver: SQLAlchemySaver) -> None:
    versions = [saver.get_next_version(None, None)]
    for _ in range(1000):
        versions.append(saver.get_next_version(versions[-1], None))
    assert versions == sorted(versions)
    random.seed(1)
    left = saver.get_next_version(versions[-1], None)
    random.seed(1)
    assert saver.get_next_version(versions[-1], None) != left
    assert saver.get_next_version(41, None) == 42  # a thread that came from integer versions


def test_odd_and_long_names_are_data_and_stay_apart(any_saver: SQLAlchemySaver) -> None:
    """Thread ids, namespaces, checkpoint ids, task ids and paths, channels, runs; and what is asked with them."""
    names = [*ODD, *(name * 5000 for name in ODD[1:10]), "a" * 128, "a" * 129]
    stored = {}
    for name in names:
        values = {f"channel {name!r}": name.encode(*EXACT), "text": "x\0y😀"}
        made = {**checkpoint(values), "id": name[:25] or "empty"}
        run: Any = {"run_id": name.encode(*EXACT).decode("utf-8", "replace")}
        at = any_saver.put(config(name, ns=name), made, run, made["channel_versions"])
        any_saver.put_writes(at, [(name, "value")], name[:25], name)
        stored[name] = (at, values)
    for name, (at, values) in stored.items():
        for asked in (config(name, ns=name), at):
            found = get(any_saver, asked)
            assert found.config == at
            assert found.checkpoint["channel_values"] == values
            assert found.pending_writes == [(name[:25], name, "value")]
        assert [one.config for one in any_saver.list({"configurable": {"thread_id": name}})] == [at]
        assert any_saver.get_tuple(config(name + "'", ns=name)) is None
        assert any_saver.get_tuple(config(name, ns=name + "'")) is None
    assert len(list(any_saver.list(None))) == len(names)

    any_saver.delete_for_runs(["' OR 1=1 --"])
    any_saver.delete_thread("%")
    any_saver.prune(["_", "?"], strategy="delete")
    any_saver.copy_thread("'", "' copy")
    left = {one.config["configurable"]["thread_id"] for one in any_saver.list(None)}
    assert left == (set(names) - {"' OR 1=1 --", "%", "_", "?"}) | {"' copy"}


def test_odd_names_stay_apart_within_a_thread(any_saver: SQLAlchemySaver) -> None:
    """Namespaces, checkpoint ids, task ids and channels; ids sort as their bytes do."""
    names = sorted((name for name in ODD if name), key=lambda name: name.encode(*EXACT))
    channels = [name for name in names if name != "\ud800"]  # LangGraph's serializer takes no such key
    for number, name in enumerate(names):
        made = {**checkpoint(dict.fromkeys(channels, number)), "id": name}
        at = any_saver.put(config(), made, {}, made["channel_versions"])
        other = any_saver.put(config(ns=name), made, {}, made["channel_versions"])
        any_saver.put_writes(other, [(name, name.encode(*EXACT))], name, name)
    for task in names:
        any_saver.put_writes(at, [(task, task.encode(*EXACT))], task, task)
    assert [one.config["configurable"]["checkpoint_id"] for one in any_saver.list(config())] == names[::-1]
    for number, name in enumerate(names):
        assert read(any_saver, config(checkpoint_id=name)) == dict.fromkeys(channels, number)
        assert get(any_saver, config(ns=name)).pending_writes == [(name, name, name.encode(*EXACT))]
        earlier = [one.config for one in any_saver.list(config(), before=config(checkpoint_id=name))]
        assert [one["configurable"]["checkpoint_id"] for one in earlier] == names[:number][::-1]
    writes = get(any_saver, config()).pending_writes or ()
    assert sorted(writes) == sorted((name, name, name.encode(*EXACT)) for name in names)


@pytest.mark.parametrize("prefix", ['odd "name"; -- %s :x `tïck` ? ', "%(x)s_", "list_agentmem_list"])
def test_any_name_of_the_tables(database_url: str, prefix: str) -> None:
    for count in (41, 42):  # in a saver that knows nothing
        with SQLAlchemySaver.from_url(database_url, table_prefix=prefix) as saver:
            at = put(saver, config(), {"x": ["long " * 99] * count}, run_id="r")
            saver.put_writes(at, [("x", 1)], "task")
            saver.prune(["t"])
            saver.copy_thread("t", "copy")
            assert [one.checkpoint["channel_values"] for one in saver.list(None)] == [{"x": ["long " * 99] * count}] * 2
            assert saver.storage_report().checkpoints == 2
            with SQLAlchemySaver.from_url(database_url) as other:
                assert other.get_tuple(config()) is None
            saver.delete_for_runs(["r"])
            assert list(saver.list(None)) == []


@pytest.mark.parametrize("prefix", ["x" * 60, "a\0b", None])
def test_table_prefixes_that_no_name_has_are_refused(url: str, prefix: Any) -> None:
    with pytest.raises(ConfigError, match="table_prefix"):
        SQLAlchemySaver.from_url(url, table_prefix=prefix)


def test_ids_too_long_to_sort_by_are_refused(saver: SQLAlchemySaver) -> None:
    at = put(saver, config())
    for bad in ("x" * 129, "á" * 65):
        size = len(bad.encode())
        with pytest.raises(StorageError, match=f"checkpoint id of at most 128 bytes, found {size}"):
            saver.put(config(), {**checkpoint(), "id": bad}, {}, {})
        with pytest.raises(StorageError, match="checkpoint id of at most 128 bytes"):
            saver.put(config(checkpoint_id=bad), checkpoint(), {}, {})
        with pytest.raises(StorageError, match="checkpoint id of at most 128 bytes"):
            saver.get_tuple(config(checkpoint_id=bad))
        with pytest.raises(StorageError, match="checkpoint id of at most 128 bytes"):
            list(saver.list(config(checkpoint_id=bad)))
        with pytest.raises(StorageError, match="task id of at most 128 bytes"):
            saver.put_writes(at, [("x", 1)], bad)
    assert [one.config for one in saver.list(None)] == [at]
    long = {**checkpoint(), "id": "x" * 128}
    assert saver.get_tuple(saver.put(config(), long, {}, {})) is not None


def test_a_config_must_name_its_thread_and_writes_their_checkpoint(saver: SQLAlchemySaver) -> None:
    with pytest.raises(StorageError, match="thread_id"):
        saver.get_tuple({"configurable": {}})
    with pytest.raises(StorageError, match="checkpoint id"):
        saver.put_writes(config(), [("x", 1)], "task")


def test_what_is_no_config_filter_or_limit_is_refused(saver: SQLAlchemySaver) -> None:
    at: Any = put(saver, config(), {"x": 1})
    for wrong in ("t", 5, [at], {"configurable": None}, {"configurable": "t"}):
        for call in (
            lambda config: saver.get_tuple(config),
            lambda config: list(saver.list(config)),
            lambda config: list(saver.list(None, before=config)),
            lambda config: saver.put_writes(config, [("x", 1)], "task"),
            lambda config: saver.get_delta_channel_history(config=config, channels=["x"]),
        ):
            with pytest.raises(ConfigError, match="expected a config"):
                call(wrong)
    for options in (
        *({"filter": wrong} for wrong in ("x", "", [], ["user_id"], 0, (("user_id", 1),))),
        *({"limit": wrong} for wrong in ("5", -1, 1.5, True, [1])),
        {"before": {"configurable": {"checkpoint_id": b"1"}}},
    ):
        with pytest.raises(ConfigError, match="expected"):
            list(saver.list(None, **options))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="checkpoint id"):
        list(saver.memory_history("t", checkpoint_id=["x"]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a policy"):
        saver.retain({"max_checkpoints": 1})  # type: ignore[arg-type]
    assert len(list(saver.list(None, filter={}, before=None, limit=None))) == 1


NO_CHECKPOINTS: dict[str, Any] = {
    "`checkpoint`": None,
    "checkpoint id": {**checkpoint(), "id": ""},
    r"checkpoint\['channel_values'\]": {**checkpoint(), "channel_values": [1]},
    r"checkpoint\['channel_versions'\]": {**checkpoint(), "channel_versions": {1: 2}},
}


def test_arguments_that_cannot_be_meant_are_named(saver: SQLAlchemySaver) -> None:
    """A list is no dictionary, a string no list of channels; and what is wrong is not left out in silence."""
    at = put(saver, config(), {"x": 1})
    before = list(saver.list(None))
    for what, bad in NO_CHECKPOINTS.items():
        with pytest.raises(ConfigError, match=f"expected (a )?{what}"):
            saver.put(config(), bad, {}, {})
    for name, wrong in ({"metadata": "x", "new_versions": ["x"]}).items():
        arguments: Any = {"checkpoint": checkpoint({"x": 2}), "metadata": {}, "new_versions": {}, name: wrong}
        with pytest.raises(ConfigError, match=f"expected `{name}` to be a dict"):
            saver.put(config(), **arguments)
    odd: tuple[Any, ...] = (None, {"configurable": {"thread_id": "t", 5: "x"}}, {**config(), "metadata": ["x"]})
    for bad in odd:
        with pytest.raises(ConfigError, match=r"expected (a )?config"):
            saver.put(bad, checkpoint(), {}, {})
    for bad in (5, "xy", ["ab"], {"ab": 1}, [("x",)], [("x", 1, 2)], [(1, 2)], [None]):
        with pytest.raises(ConfigError, match="expected `writes` of pairs"):
            saver.put_writes(at, bad, "task")
    for bad in (None, 5, b"x", ("x",)):
        with pytest.raises(ConfigError, match="`task_path`"):
            saver.put_writes(at, [("x", 1)], "task", bad)
    for bad in ("x", 5, [None], {"x": 1}):
        with pytest.raises(ConfigError, match="channel"):
            saver.get_delta_channel_history(config=at, channels=bad)
    for bad in (["x"], b"x", True, 1.5):
        with pytest.raises(ConfigError, match="channel"):
            list(saver.memory_history("t", channel=bad))
        with pytest.raises(ConfigError, match="checkpoint namespace"):
            saver.get_tuple(config(ns=bad))
        with pytest.raises(ConfigError, match="checkpoint id"):
            saver.get_tuple(config(checkpoint_id=bad))
        with pytest.raises(ConfigError, match="`now`"):
            saver.retain(Retention(max_checkpoints=1), now=bad)
        with pytest.raises(ConfigError, match="expected a checkpointer"):
            copy_threads(bad, saver)
        with pytest.raises(ConfigError, match=r"`cache_bytes`|`schema`"):
            SQLAlchemySaver.from_url("sqlite://", cache_bytes=-1, schema=None if bad is True else bad)
    assert list(saver.list(None)) == before
    saver.put_writes(at, iter([("y", 1), ("z", 2)]), "task")  # type: ignore[arg-type]
    assert get(saver, at).pending_writes == [("task", "y", 1), ("task", "z", 2)]
    assert len(list(saver.list(config(ns=None)))) == 1  # type: ignore[arg-type]


def test_tuples_share_no_value(saver: SQLAlchemySaver) -> None:
    at = put(saver, config(), {"x": [1], "y": [1]})
    saver.put_writes(at, [("x", [1])], "task")
    found = get(saver, at)
    found.checkpoint["channel_values"]["x"].append(2)
    assert found.checkpoint["channel_values"]["y"] == [1]
    assert found.pending_writes == [("task", "x", [1])]


# Ids that cannot be meant.


async def test_what_is_no_sequence_of_ids_touches_no_thread(saver: SQLAlchemySaver) -> None:
    """A string is a sequence of strings: `prune("42")` would take out the threads 4 and 2; `str(None)` is an id."""
    for thread in ("4", "2", "42", "None"):
        put(saver, config(thread), run_id=thread)
    every: tuple[Callable[[Any], object], ...] = (
        saver.prune,
        partial(saver.prune, strategy="delete"),
        saver.delete_for_runs,
        lambda ids: saver.retain(Retention(max_checkpoints=1), thread_ids=ids),
        lambda ids: copy_threads(saver, saver, thread_ids=ids),
    )
    for wrong in ("42", b"42", 42, {"42": 1}, [None], ["4", ["2"]], [True], [4.0], [b"4"], None):
        for call in every[: 3 if wrong is None else None]:  # `None` is every thread for the others
            with pytest.raises(ConfigError, match=r"expected a (sequence of )?(thread|run) id"):
                call(wrong)
        with pytest.raises(ConfigError):
            await saver.aprune(wrong, strategy="delete")  # type: ignore[arg-type]
    assert len(list(saver.list(None))) == 4


@pytest.mark.parametrize("bad", [None, True, 1.5, b"t", ["t"]], ids=repr)
async def test_what_is_no_thread_id_is_refused(saver: SQLAlchemySaver, bad: Any) -> None:
    for call in (
        lambda: put(saver, config(bad)),
        lambda: saver.get_tuple(config(bad)),
        lambda: list(saver.list(config(bad))),
        lambda: saver.put_writes(config(bad, checkpoint_id="1"), [("x", 1)], "task"),
        lambda: saver.get_delta_channel_history(config=config(bad), channels=["x"]),
        lambda: saver.delete_thread(bad),
        lambda: saver.copy_thread(bad, "t"),
        lambda: saver.copy_thread("t", bad),
        lambda: list(saver.memory_history(bad)),
        lambda: saver.put_writes(config(checkpoint_id="1"), [("x", 1)], bad),
    ):
        with pytest.raises(ConfigError, match=r"expected a (thread|task) id"):
            call()
    with pytest.raises(ConfigError, match="expected a thread id"):
        await saver.adelete_thread(bad)
    assert list(saver.list(None)) == []


def test_numbers_and_uuids_are_ids(saver: SQLAlchemySaver) -> None:
    name = uuid4()
    for thread in (7, name):
        put(saver, config(thread), {"x": 1})  # type: ignore[arg-type]
        assert saver.get_tuple(config(str(thread))) is not None
    saver.prune((id_ for id_ in (7, name)), strategy="delete")  # type: ignore[arg-type]
    assert list(saver.list(None)) == []


# Writes that are there already.


@pytest.mark.parametrize("special", [False, True])
def test_what_a_repeated_write_leaves_out_is_not_taken_for_stored(url: str, special: bool) -> None:
    with SQLAlchemySaver.from_url(url) as saver:
        at = put(saver, config())
        if special:  # the first of two writes to one special channel gives way to the second
            saver.put_writes(at, [("__resume__", "a" * 100)], "task")
            saver.put_writes(at, [("__resume__", "b" * 100), ("__resume__", "c" * 100)], "task")
        else:
            saver.put_writes(at, [("x", "a" * 100)], "task")
            saver.put_writes(at, [("x", "b" * 100), ("y", "c" * 100)], "task")
        last = put(saver, at, {"value": "b" * 100})
        with SQLAlchemySaver.from_url(url) as fresh:
            assert read(fresh, last) == {"value": "b" * 100}


def test_no_writes_make_no_thread(saver: SQLAlchemySaver) -> None:
    saver.put_writes(config("nobody", checkpoint_id="1"), [], "task")
    assert saver.storage_report().threads == ()
