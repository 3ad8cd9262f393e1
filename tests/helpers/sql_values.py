"""Values for the SQL tests: what to store, how to tell that two are exactly the same, and a serializer that counts."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

SERDE = JsonPlusSerializer()


class Counting(JsonPlusSerializer):
    """Counts how often it is called."""

    dumped = 0
    loaded = 0

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        self.dumped += 1
        return super().dumps_typed(obj)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        self.loaded += 1
        return super().loads_typed(data)


def serialised(value: Any) -> Any:
    """What the serializer alone makes of a value."""
    return SERDE.loads_typed(SERDE.dumps_typed(value))


def spelled(value: Any) -> Any:
    """A form that is equal for two values only if nothing tells them apart: types, order of keys, signs of zeros."""
    kind = type(value)
    if isinstance(value, BaseMessage):
        about = (value.__pydantic_extra__, value.__pydantic_private__)
        return kind, spelled(value.__dict__), sorted(value.__pydantic_fields_set__), spelled(about)
    if isinstance(value, Mapping):
        return kind, [(spelled(key), spelled(one)) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return kind, [spelled(one) for one in value]
    if isinstance(value, set | frozenset):
        return kind, sorted(map(repr, value))
    if isinstance(value, float):
        return kind, struct.pack(">d", value)
    if hasattr(value, "tobytes"):  # an array
        return kind, str(value.dtype), value.shape, value.tobytes()
    return kind, value


texts = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates included
keys = st.text(max_size=8)  # the serializer takes no surrogates there
scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.integers(-2, 2) | st.floats() | texts
) | st.sampled_from([0.0, -0.0, 1, 1.0, True, "", "1"])


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists, tuples and dictionaries of leaves, of each other."""

    def holders(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        lists = st.lists(inner, max_size=4)
        return lists | lists.map(tuple) | st.dictionaries(keys, inner, max_size=4)

    return st.recursive(leaves, holders, max_leaves=8)


plain = nested(scalars | st.binary(max_size=8))
dictionaries = st.dictionaries(keys, plain, max_size=3)
_blocks = st.lists(texts | st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3)
_calls = st.lists(
    st.fixed_dictionaries({"name": texts, "args": dictionaries, "id": texts, "type": st.just("tool_call")}), max_size=2
)
_few = st.integers(0, 3)
_usage = st.none() | st.fixed_dictionaries({"input_tokens": _few, "output_tokens": _few, "total_tokens": _few})
_common: dict[str, st.SearchStrategy[Any]] = {
    "content": texts | _blocks,
    "id": st.none() | st.sampled_from(["a", "b"]),
    "name": st.none() | texts,
    "additional_kwargs": dictionaries,
    "response_metadata": dictionaries,
}


def _of(kind: Callable[..., BaseMessage], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[BaseMessage]:
    return st.fixed_dictionaries({**_common, **fields}).map(lambda made: kind(**made))


# Messages of every class, with and without everything that they can hold.
messages: st.SearchStrategy[BaseMessage] = st.one_of(
    _of(HumanMessage),
    _of(SystemMessage),
    _of(AIMessage, tool_calls=_calls, usage_metadata=_usage),
    _of(AIMessageChunk, usage_metadata=_usage),
    _of(ToolMessage, tool_call_id=texts, artifact=plain),
    _of(ChatMessage, role=texts),
    _of(FunctionMessage, name=texts),
    st.sampled_from("ab").map(lambda name: RemoveMessage(id=name)),
)


USAGE = {"input_tokens": 1, "output_tokens": 0, "total_tokens": 1, "input_token_details": {"cache_read": 0}}
CALL = {"name": "add", "args": {"a": 1, "b": [1.0, 0.0]}, "id": "c1", "type": "tool_call"}


AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NUMBER = UUID(int=7)


def reply(**changes: Any) -> AIMessage:
    fields: dict[str, Any] = {
        "content": "hello",
        "id": "m1",
        "tool_calls": [copy.deepcopy(CALL)],
        "usage_metadata": copy.deepcopy(USAGE),
        "additional_kwargs": {"reasoning": {"steps": ["a", "b"], "score": 0.0}, "ok": True},
        "response_metadata": {
            "model_name": "m",
            "finish_reason": "stop",
            "at": AT.isoformat(),
            "uuid": str(UUID(int=7)),
        },
    }
    return AIMessage(**{**fields, **changes})


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place within plain data: (holder, key)."""
    found: list[tuple[Any, Any]] = []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        found += [(value, key), *places(one)]
    return found
