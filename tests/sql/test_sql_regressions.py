"""What was once wrong: content freed and taken for stored, messages that change while they are stored, and others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put


def long(letter: str) -> str:
    return letter * 100


@pytest.mark.parametrize("special", [False, True])
def test_what_a_repeated_write_leaves_out_is_not_taken_for_stored(database_url: str, special: bool) -> None:
    with SQLAlchemySaver.from_url(database_url) as saver:
        at = put(saver, config())
        if special:  # the first of two writes to one special channel gives way to the second
            saver.put_writes(at, [("__resume__", long("a"))], "task")
            saver.put_writes(at, [("__resume__", long("b")), ("__resume__", long("c"))], "task")
        else:
            saver.put_writes(at, [("x", long("a"))], "task")
            saver.put_writes(at, [("x", long("b")), ("y", long("c"))], "task")
        last = put(saver, at, {"value": long("b")})
        with SQLAlchemySaver.from_url(database_url) as fresh:
            found = fresh.get_tuple(last)
    assert found is not None
    assert found.checkpoint["channel_values"] == {"value": long("b")}


def test_no_writes_make_no_thread(saver: SQLAlchemySaver) -> None:
    saver.put_writes(config("nobody", checkpoint_id="1"), [], "task")
    assert saver.storage_report().threads == ()


class Changing(JsonPlusSerializer):
    """Stands for a node that changes a message right after it was serialised."""

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        done = super().dumps_typed(obj)
        if isinstance(obj, AIMessage) and obj.content == "first":
            obj.content = "second"
        return done


def test_a_message_that_changes_while_it_is_stored_is_stored_anew_next_time(url: str) -> None:
    with SQLAlchemySaver.from_url(url, serde=Changing()) as saver:
        message = AIMessage("first", id="1", response_metadata={"model": "some model with a name"})
        first = put(saver, config(), {"messages": [message]})
        second = put(saver, first, {"messages": [message]})
        contents = [saver.get_tuple(at).checkpoint["channel_values"]["messages"][0].content for at in (first, second)]  # type: ignore[union-attr]
    assert contents == ["first", "second"]


class Unmasking(JsonPlusSerializer):
    """Changes some messages when it reads them."""

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        value = super().loads_typed(data)
        if isinstance(value, HumanMessage):
            value.content = value.content.replace("<NAME>", "Ann")  # type: ignore[union-attr]
        return value


@dataclass
class Unhashable:
    """A serializer may be any object with the two methods."""

    inner: JsonPlusSerializer = field(default_factory=JsonPlusSerializer)

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        return self.inner.dumps_typed(obj)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        return self.inner.loads_typed(data)


def test_a_serializer_of_the_callers_reads_every_message(url: str) -> None:
    texts = ["no name here, and long enough", "I am <NAME>, and long enough too"]
    messages = [HumanMessage(text, id=str(number)) for number, text in enumerate(texts)]
    with SQLAlchemySaver.from_url(url, serde=Unmasking()) as saver:
        at = put(saver, config(), {"messages": messages})
    with SQLAlchemySaver.from_url(url, serde=Unmasking()) as saver:
        found = saver.get_tuple(at)
        assert found is not None
        assert found.checkpoint["channel_values"]["messages"][1].content == "I am Ann, and long enough too"
    with SQLAlchemySaver.from_url(url, serde=Unhashable()) as saver:
        found = saver.get_tuple(at)
        assert found is not None
        assert [one.content for one in found.checkpoint["channel_values"]["messages"]] == texts
