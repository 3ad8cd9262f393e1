"""Messages that are handed out a second time are as good as deserialised ones, and nobody else's."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
    messages_to_dict,
)
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put
from tests.helpers.sql_values import USAGE, places, read, reply, serialised, spelled


def stored(saver: SQLAlchemySaver, at: RunnableConfig) -> Any:
    """The messages of a checkpoint, as they are read now."""
    return read(saver, at)["messages"]


EXAMPLES: list[BaseMessage] = [
    HumanMessage("hello", id="1"),
    HumanMessage([{"type": "text", "text": "x"}, {"type": "image", "data": b"\0\1"}], id="1", name="n"),
    SystemMessage("hello", id="1", additional_kwargs={"a": [1, {"b": None}]}),
    reply(),
    AIMessageChunk("part", id="1", tool_call_chunks=[{"name": "f", "args": "{}", "id": "c", "index": 0}]),
    AIMessageChunk("part", id="1", usage_metadata=USAGE, chunk_position="last"),
    ToolMessage("result", id="1", tool_call_id="c", artifact={"rows": [1, 2.5, None]}),
    ChatMessage("hello", id="1", role="judge"),
    RemoveMessage(id="1"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda one: type(one).__name__)
def test_a_recalled_message_is_as_good_as_a_deserialised_one(saver: SQLAlchemySaver, message: BaseMessage) -> None:
    at = put(saver, config(), {"messages": [message]})
    (first,), (recalled,) = stored(saver, at), stored(saver, at)
    (reference,) = serialised([message])
    for one in (first, recalled):
        assert spelled(one) == spelled(reference)
        assert one == reference
        assert repr(one) == repr(reference)
        assert one.__getstate__() == reference.__getstate__()  # what pickle and copy take
        assert one.model_fields_set == reference.model_fields_set
        assert one.model_extra == reference.model_extra
        if not (isinstance(one.content, list) and isinstance(one.content[-1], dict) and "data" in one.content[-1]):
            assert one.model_dump_json() == reference.model_dump_json()
        assert spelled(type(one)(**one.model_dump())) == spelled(reference)
        for copied in (copy.copy(one), copy.deepcopy(one), one.model_copy(deep=True)):
            assert spelled(copied) == spelled(reference)
        assert one.model_copy(update={"content": "y"}).content == "y"
        assert one.pretty_repr() == reference.pretty_repr()
        assert messages_to_dict([one]) == messages_to_dict([reference])
        if isinstance(one, AIMessageChunk):
            assert spelled(one + one) == spelled(reference + reference)
        elif not isinstance(one, RemoveMessage):
            assert isinstance(one + HumanMessage("and?"), ChatPromptTemplate)
        one.content = "assigned"
        one.note = "an extra field"  # type: ignore[attr-defined]
        assert one.model_extra == {"note": "an extra field"}
    assert spelled(stored(saver, at)) == spelled([reference])


def _spoil(value: Any) -> None:
    """Change everything that can be changed in plain data."""
    for holder, key in places(value)[::-1]:
        holder[key] = "spoiled"
    if isinstance(value, list):
        value.append("spoiled")
    elif isinstance(value, dict):
        value["spoiled"] = True


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda one: type(one).__name__)
def test_messages_that_are_handed_out_share_nothing_that_can_be_changed(
    saver: SQLAlchemySaver, message: BaseMessage
) -> None:
    at = put(saver, config(), {"messages": [message], "again": [message], "alone": message})
    expected = spelled(serialised(message))
    for _ in range(3):
        found = saver.get_tuple(at)
        assert found is not None
        values = found.checkpoint["channel_values"]
        given_out = [values["messages"][0], values["again"][0], values["alone"]]
        for one in given_out:
            assert spelled(one) == expected
            one.model_fields_set.add("spoiled")
            one.note = "spoiled"
            _spoil(one.__dict__)
    _spoil(message.__dict__)
    assert spelled(stored(saver, at)) == spelled([stored(saver, at)[0]])
    assert spelled(stored(saver, at)[0]) == expected


def test_the_cache_holds_no_object_of_the_caller(saver: SQLAlchemySaver) -> None:
    message = reply()
    held = weakref.ref(message)
    at = put(saver, config(), {"messages": [message]})
    handed_out = weakref.ref(stored(saver, at)[0])
    del message
    gc.collect()
    assert held() is None
    assert handed_out() is None
