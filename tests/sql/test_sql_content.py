"""Whatever is stored comes back as the serializer gives it, or nothing is."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import ip_address
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.types import Command, Interrupt, Send
from pydantic import BaseModel

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import Sql, checkpoint, config, get, memory, put, read
from tests.helpers.sql_chains import COLUMNS, all_rows
from tests.helpers.sql_values import messages, nested, scalars, serialised, spelled

CACHE = 2**24
PART = 4 * 2**20  # bytes of a row that a larger value is cut into


@pytest.fixture(scope="module")
def savers() -> Iterator[list[SQLAlchemySaver]]:
    """Savers that many examples share: one that remembers what it stored and read, and one that does not."""
    with ExitStack() as opened:
        yield [
            opened.enter_context(SQLAlchemySaver.from_url("sqlite:///:memory:", cache_bytes=size))
            for size in (CACHE, 0)
        ]


class Level(Enum):
    LOW = "low"


@dataclass(frozen=True)
class Note:
    text: str
    raw: bytes
    tags: tuple[str, ...] = ()


class Model(BaseModel):
    name: str
    inner: list[Note] = []


Pair = namedtuple("Pair", "left right")


class Listing(list[Any]):
    """A list of a class of its own."""


class Numbers(int):
    """A number of a class of its own."""


odd = st.sampled_from(
    [
        datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        date(2026, 1, 2),
        time(1, 2, 3),
        timedelta(days=1, microseconds=1),
        UUID(int=7),
        Decimal("1.50"),
        {"a"},
        frozenset({1, 2}),
        Level.LOW,
        Note("x", b"\0", ("a", "b")),
        Model(name="m", inner=[Note("y", b"")]),
        Pair(1, [2]),
        Path("/a/b"),
        ip_address("::1"),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        Document("text", metadata={"page": 1}),
        Send("node", {"x": 1}),
        Command(goto="node", update={"x": 1}),
        Interrupt(value="?", id="i"),
        ValueError("no"),
        Listing([1, 2]),
        Numbers(3),
        bytearray(b"ab"),
        memoryview(b"ab"),
        _DeltaSnapshot([1, "two", HumanMessage("three", id="3")]),
        _DeltaSnapshot({"a": [1]}),
    ]
)
anything = nested(scalars | st.binary(max_size=8) | st.binary(min_size=40, max_size=60) | odd | messages)


@settings(max_examples=40)
@given(value=anything, before=anything)
def test_everything_comes_back_as_the_serializer_gives_it(
    savers: list[SQLAlchemySaver], value: Any, before: Any
) -> None:
    """As the value of a channel, in a list, in a snapshot of a delta channel, and as a pending write."""
    values = {"x": value, "list": [before, value], "snapshot": _DeltaSnapshot([value, before])}
    expected = {name: spelled(serialised(one)) for name, one in values.items()}
    for saver in savers:
        saver.delete_thread("any")
        at = put(saver, config("any"), {"x": before, "list": [before], "snapshot": before})
        at = put(saver, at, values)
        saver.put_writes(at, list(values.items()), "task")
        for _ in range(2):
            found = get(saver, at)
            assert found.pending_writes is not None
            assert {name: spelled(one) for name, one in found.checkpoint["channel_values"].items()} == expected
            assert {channel: spelled(one) for _, channel, one in found.pending_writes} == expected


words = [f"item {number} of a list that is longer than what a leaf holds itself" for number in range(1100)]
LISTS: dict[str, Any] = {
    "empty": [],
    "of nothing": [None] * 40,
    "of what is equal": [b"a", bytearray(b"a"), "a", None, b"", [], True, 1, 1.0, [1], [True], [b"a"]],
    "of bytes": [b"", b"a", bytearray(b"b"), memoryview(b"c"), b"d" * 100, bytearray(b"e" * 100)],
    "of short text": [str(number) for number in range(1100)],
    "of long text": words,
    "of one text often": ["the same text, longer than what a leaf holds itself"] * 100,
    "of tuples": [(number, "x") for number in range(100)],
    "of arrays": [np.full(20, number) for number in range(3)],
    "of what is mixed": [1, "a", None, 2.5, b"x", [1], {"a": 1}, HumanMessage("x", id="1"), 1],
    "of snapshots": [_DeltaSnapshot([1]), _DeltaSnapshot("x")],
    "a tuple": ("x", 1),
    "a list of its own class": Listing([1, 2]),
    "48 bytes and about": [b"x" * size for size in range(30, 60)],
    **{f"of {size} numbers": list(range(size)) for size in (1, 256, 257, 8193, 20_000)},
    **{f"of {size} items": words[:size] for size in (32, 33, 1024, 1025)},
    "of numbers of all kinds": [0, -0.0, 0.0, True, 1, 1.0, None, 2**64 - 1, -(2**63), float("inf")] * 60,
    "of numbers and one that is not": [*range(600), "x"],
    "of numbers of its own class": [Numbers(number) for number in range(600)],
    "of all kinds of text": ["", "ä\ud800", "x" * 39, "x" * 40, "x" * 5000, *(f"number {n}" for n in range(300))],
    "of small things": [{"a": number} if number % 2 else (number, b"x", None) for number in range(300)],
    "of small things and a message": [*range(100), *["x"] * 100, HumanMessage("x", id="1")],
    "of small things, then large ones": ["x", bytearray(b"y")] * 50 + [b"z" * 9000] * 20 + ["x"] * 100,
    "of a large thing, then small ones": [b"z" * 40_000, *["x"] * 200],
    "of what may be cut anywhere": ["x" * (PART + 1), *map(str, range(200)), "y" * (PART + 1), "z"],
}


SNAPSHOTS = ("of short text", "of 257 numbers", "of 33 items", "a tuple", "of what is mixed", "empty")
VALUES = {**LISTS, **{f"snapshot {name}": _DeltaSnapshot(LISTS[name]) for name in SNAPSHOTS}}


@pytest.mark.parametrize("name", VALUES)
def test_lists_come_back_as_the_serializer_gives_them(savers: list[SQLAlchemySaver], name: str) -> None:
    expected = spelled(serialised(VALUES[name]))
    for saver in savers:
        at = put(saver, config(), {"x": VALUES[name]})
        assert spelled(read(saver, at)["x"]) == expected
        assert spelled(read(saver, at)["x"]) == expected


@pytest.mark.parametrize("size", [PART - 20, PART, PART + 1, 2 * PART + 1])
def test_values_about_as_large_as_a_row_may_be(savers: list[SQLAlchemySaver], size: int) -> None:
    large = Random(size).randbytes(size)
    values = {"bytes": large, "list": [large, "small", large[::-1]], "snapshot": _DeltaSnapshot([large])}
    for saver in savers:
        at = put(saver, config(), values)
        for _ in range(2):
            assert read(saver, at) == values
        saver.delete_thread("t")


def test_twenty_megabytes_go_through_every_database(any_saver: SQLAlchemySaver, database_url: str, ask: Sql) -> None:
    """MySQL takes no packet above 16 MB."""
    large = Random(1).randbytes(20 * 2**20)
    message = AIMessage("x" * (5 * 2**20), id="1")
    at = put(any_saver, config(), {"x": large, "messages": [message]})
    any_saver.put_writes(at, [("x", large)], "task")
    assert ask("SELECT max(length(body)) <= 4194304 + 1 FROM agentmem_blobs")[0][0] == 1
    found = get(any_saver, at)
    assert found.checkpoint["channel_values"] == {"x": large, "messages": [message]}
    assert found.pending_writes == [("task", "x", large)]
    with SQLAlchemySaver.from_url(database_url) as cold:
        assert read(cold, at) == {"x": large, "messages": [message]}


class Meddling(JsonPlusSerializer):
    """Does to a list, while one of its items is serialised, what a node may do that runs meanwhile."""

    def __init__(self, to: list[Any]) -> None:
        super().__init__()
        self.to = to

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        if obj is self.to[0]:
            self.to.append(HumanMessage("more", id="more"))
        return super().dumps_typed(obj)


@pytest.mark.parametrize("wrap", [lambda value: value, _DeltaSnapshot], ids=["value", "snapshot"])
def test_a_list_that_grows_while_it_is_stored_does_no_harm(url: str, wrap: Callable[[Any], Any]) -> None:
    said: list[Any] = [HumanMessage("x", id="1"), HumanMessage("y", id="2")]
    with SQLAlchemySaver.from_url(url, serde=Meddling(said)) as saver:
        at = put(saver, config(), {"x": wrap(said)})
        assert read(saver, at)["x"] == wrap(said[:2])
    assert len(said) == 3


class Raising(BaseModel):
    """Has code of its own that runs when it is serialised."""

    def model_dump(self, **_options: Any) -> dict[str, Any]:
        raise LookupError("no such field")


def test_nothing_is_stored_where_one_value_cannot_be(saver: SQLAlchemySaver, sql: Sql) -> None:
    at = put(saver, config(), {"x": 1})
    before = all_rows(sql)
    itself: list[Any] = []
    itself.append(itself)
    for value in (object(), [1, object()], ["x" * 100, object()], 2**64, [2**64], {"a": [object()]}, itself, Raising()):
        with pytest.raises(StorageError, match=r"the value of channel 'bad' cannot be stored.*store plain data"):
            put(saver, at, {"good": "y" * 1000, "bad": value})
        with pytest.raises(StorageError, match="the value of channel 'bad' cannot be stored"):
            saver.put_writes(at, [("good", "y" * 1000), ("bad", value)], "task")
    with pytest.raises(StorageError, match="the metadata cannot be stored"):
        put(saver, at, {"good": "y" * 1000}, note=object())
    assert all_rows(sql) == before
    assert read(saver, put(saver, at, {"x": "y" * 1000})) == {"x": "y" * 1000}


def test_repeating_a_put_adds_no_row(saver: SQLAlchemySaver, sql: Sql) -> None:
    stored = checkpoint({"x": memory(1)})
    for _ in range(2):
        at = saver.put(config(), stored, {}, stored["channel_versions"])
        saver.put_writes(at, [("x", memory(1))], "task")
    # Two of content: the value, and the checkpoint's witness.
    assert {table: len(all_rows(sql)[table]) for table in COLUMNS} == {**dict.fromkeys(COLUMNS, 1), "blobs": 2}
