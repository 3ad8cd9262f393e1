"""Messages that a process stored or read before: matched by value, copied, and never shared with the caller."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    AnyMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
    messages_to_dict,
)
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from agentmem.errors import StorageError
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, get, put, read
from tests.helpers.sql_values import (
    AT,
    NUMBER,
    USAGE,
    Counting,
    messages,
    places,
    plain,
    reply,
    serialised,
    spelled,
    texts,
)

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")


@dataclass
class Reasoning:
    steps: list[str]
    score: float


def simple() -> AIMessage:
    return AIMessage("hello", id="m1")


def tool() -> ToolMessage:
    return ToolMessage("x", id="t", tool_call_id="c")


def stored(saver: SQLAlchemySaver, at: RunnableConfig) -> Any:
    """The messages of a checkpoint, as they are read now."""
    return read(saver, at)["messages"]


@pytest.fixture(scope="module")
def memory_saver() -> Iterator[SQLAlchemySaver]:
    """A saver that many examples share; each takes a thread of its own."""
    with SQLAlchemySaver.from_url("sqlite:///:memory:") as opened:
        yield opened


@pytest.fixture(scope="module")
def forgetful_saver() -> Iterator[SQLAlchemySaver]:
    """One that reads everything from the database every time."""
    with SQLAlchemySaver.from_url("sqlite:///:memory:", cache_bytes=0) as opened:
        yield opened


def thread(count: int) -> list[AnyMessage]:
    found: list[AnyMessage] = []
    for number in range(count // 2):
        found.append(HumanMessage(f"question {number}" * 10, id=f"h{number}"))
        found.append(reply(id=f"a{number}", content=f"answer {number}" * 10))
    return found


def test_only_what_is_new_in_a_long_thread_is_serialised(url: str) -> None:
    serde = Counting()
    said = thread(300)
    with SQLAlchemySaver.from_url(url, serde=serde) as saver:
        at = put(saver, config(), {"messages": said})
        serde.dumped = 0
        at = put(saver, at, {"messages": [*copy.deepcopy(said), reply(id="new")]})  # equal, whatever objects they are
        saver.put_writes(at, [("messages", copy.deepcopy(said[3:5]))], "task")
        assert serde.dumped <= 3  # the new message, the checkpoint, its metadata

        got = stored(saver, at)
        assert got == [*said, reply(id="new")]
        at = put(saver, at, {"messages": [*got, reply(id="newer")]})
        serde.loaded = 0
        assert stored(saver, at) == [*got, reply(id="newer")]
        assert serde.loaded <= 3  # the message that was never read before, the checkpoint, its metadata

    with SQLAlchemySaver.from_url(url, serde=serde) as another:
        said = stored(another, config())
        assert len(said) == 302
        serde.dumped = 0
        put(another, at, {"messages": [*said, reply(id="newest")]})
        assert serde.dumped <= 3


class Colour(StrEnum):
    HELLO = "hello"
    STOP = "stop"
    MODEL_NAME = "model_name"


class Text(str):
    pass


class Pairs(dict[str, Any]):
    pass


class Same(AIMessage):
    """A user's own class that has nothing of its own."""


class Special(AIMessage):
    """A user's own kind of message."""

    mood: str = "fine"


def change(message: BaseMessage, *path: Any) -> None:
    """Set an attribute or, further in, an item: the last of `path` is the value."""
    name, *inner, to = path
    if not inner:
        setattr(message, name, to)
        return
    holder = getattr(message, name)
    for step in inner[:-1]:
        holder = holder[step]
    holder[inner[-1]] = to


METADATA = reply().response_metadata
# What changes in a message, as `change` takes it.
CHANGES: dict[str, tuple[Any, ...]] = {
    "content": ("content", "hello!"),
    "content to a member": ("content", Colour.HELLO),
    "content to a subclass": ("content", Text("hello")),
    "id": ("id", "m2"),
    "name": ("name", ""),
    "extra field": ("note", "x"),
    "extra field that is nothing": ("note", None),
    "usage to none": ("usage_metadata", None),
    "usage 1 to True": ("usage_metadata", "input_tokens", True),
    "usage 1 to 1.0": ("usage_metadata", "input_tokens", 1.0),
    "usage 0 to -0.0": ("usage_metadata", "output_tokens", -0.0),
    "score 0.0 to -0.0": ("additional_kwargs", "reasoning", "score", -0.0),
    "score 0.0 to 0": ("additional_kwargs", "reasoning", "score", 0),
    "score 0.0 to nan": ("additional_kwargs", "reasoning", "score", float("nan")),
    "True to 1": ("additional_kwargs", "ok", 1),
    "list to tuple": ("additional_kwargs", "reasoning", "steps", ("a", "b")),
    "dictionary to a subclass": ("response_metadata", Pairs(METADATA)),
    "value to a member": ("response_metadata", "finish_reason", Colour.STOP),
    "text to a time": ("response_metadata", "at", AT),
    "text to a uuid": ("response_metadata", "uuid", NUMBER),
    "dictionary to a dataclass": ("additional_kwargs", "reasoning", Reasoning(["a", "b"], 0.0)),
    "value to a set": ("response_metadata", "finish_reason", {1}),
    "key": (
        "response_metadata",
        {Colour(k) if k == "model_name" else k: v for k, v in METADATA.items()},
    ),
    "order of keys": ("response_metadata", dict(reversed(METADATA.items()))),
    "call argument 1 to True": ("tool_calls", 0, "args", "a", True),
    "call id": ("tool_calls", 0, "id", "c2"),
    "calls gone": ("tool_calls", slice(None), []),
    "invalid call": ("invalid_tool_calls", [{"name": "x", "args": "{", "id": None, "error": "bad"}]),
}
# Of a message that holds nothing but text.
SIMPLE: dict[str, tuple[Any, ...]] = {
    **{name: path for name, path in CHANGES.items() if name.split()[0] in ("content", "id", "name", "extra")},
    "text in a dictionary": ("additional_kwargs", "a", "b"),
    "an empty list for an empty dictionary": ("additional_kwargs", []),
    "nothing for an empty dictionary": ("response_metadata", None),
    "usage": ("usage_metadata", dict(USAGE)),
    "calls as a tuple": ("tool_calls", ()),
    "type": ("type", "human"),
}


def among(count: int, message: Any) -> list[Any]:
    """A message in the middle of so many others, which are equal but other objects every time."""
    said = thread(count)
    return [*said[: count // 2], message, *said[count // 2 :]]


@pytest.mark.parametrize("others", [0, 40])
@pytest.mark.parametrize(
    ("make", "path"),
    [
        *(pytest.param(reply, path, id=name) for name, path in CHANGES.items()),
        *(pytest.param(simple, path, id=f"simple {name}") for name, path in SIMPLE.items()),
        pytest.param(tool, ("artifact", np.arange(3)), id="what cannot be compared"),
    ],
)
def test_a_message_changed_in_place_is_stored_anew(
    memory_saver: SQLAlchemySaver, make: Callable[[], BaseMessage], path: tuple[Any, ...], others: int
) -> None:
    """The object that was stored, the one that was read, and either after a change that is taken back."""
    memory_saver.delete_thread("changed")
    at = put(memory_saver, config("changed"), {"messages": among(others, make())})
    own, before = make(), spelled(stored(memory_saver, at))
    at = put(memory_saver, at, {"messages": among(others, own)})
    got = stored(memory_saver, at)[others // 2]
    for message in (own, got):
        change(message, *copy.deepcopy(path))
        said = among(others, message)
        changed = put(memory_saver, at, {"messages": said})
        assert spelled(stored(memory_saver, changed)) == spelled(serialised(said))
        assert spelled(stored(memory_saver, changed)) == spelled(serialised(said))
        assert spelled(stored(memory_saver, at)) == before
        back = put(memory_saver, changed, {"messages": among(others, make())})
        assert spelled(stored(memory_saver, back)) == before


@pytest.mark.parametrize("kept", [slice(0, 30), slice(0, 17), slice(5, 60), slice(0, 1), slice(None, None, -1)])
def test_a_list_that_loses_messages_and_gains_others_is_what_comes_back(
    memory_saver: SQLAlchemySaver, kept: slice
) -> None:
    at = put(memory_saver, config(f"lists {kept}"), {"messages": thread(60)})
    for said in (thread(60)[kept], [*thread(60)[kept], simple()], [*thread(80), "x", *thread(20)], among(60, b"y")):
        for _ in range(2):
            at = put(memory_saver, at, {"messages": said})
            assert spelled(stored(memory_saver, at)) == spelled(serialised(said))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (AIMessage("x", id="1"), AIMessageChunk("x", id="1")),
        (HumanMessage("x", id="1"), SystemMessage("x", id="1")),
        (AIMessage("x", id="1"), Same("x", id="1")),
        (ChatMessage("x", id="1", role="a"), ChatMessage("x", id="1", role="b")),
        (ToolMessage("x", id="1", tool_call_id="a"), ToolMessage("x", id="1", tool_call_id="a", status="error")),
        (ToolMessage("x", id="1", tool_call_id="a"), ToolMessage("x", id="1", tool_call_id="a", artifact=[])),
        (HumanMessage("x", id="1"), {"content": "x", "id": "1", "type": "human"}),
        (HumanMessage("x", id="1"), "x"),
        (HumanMessage("", id="1"), RemoveMessage(id="1")),
        (HumanMessage("x", id="1", name="n"), HumanMessage("x", id="1", additional_kwargs={"name": "n"})),
    ],
)
def test_what_only_looks_like_a_stored_message_is_stored_anew(
    memory_saver: SQLAlchemySaver, left: Any, right: Any
) -> None:
    at = put(memory_saver, config("alike"), {"messages": [left]})
    for one in (right, left, right):
        at = put(memory_saver, at, {"messages": [one]})
        assert spelled(stored(memory_saver, at)) == spelled(serialised([one]))


def _alike(value: Any) -> list[Any]:
    """Values that Python may hold for the same, or that are nearly so."""
    if isinstance(value, bool | int | float):
        number = 0 if value != value or abs(value) > 2**53 else value
        return [bool(number), int(number), float(number), -float(number), str(value), None]
    if isinstance(value, str):
        return [value + " ", value.encode("utf-8", "surrogatepass"), Text(value), Colour.STOP, None]
    if isinstance(value, dict):
        return [dict(reversed(value.items())), Pairs(value), [], list(value)]
    if isinstance(value, list | tuple):
        return [list(value), tuple(value), [*value, None], value[::-1], {}]
    return [False, 0, "", b"", bytearray(b"x"), [], None]


@settings(max_examples=80)
@given(message=messages, other=messages, data=st.data())
def test_whatever_changes_in_a_message_is_what_comes_back(
    memory_saver: SQLAlchemySaver, message: BaseMessage, other: BaseMessage, data: st.DataObject
) -> None:
    memory_saver.delete_thread("any")
    at = put(memory_saver, config("any"), {"messages": [other, message]})
    first = spelled(serialised([other, message]))
    assert spelled(stored(memory_saver, at)) == first
    if data.draw(st.booleans(), "the one that was read"):
        message = stored(memory_saver, at)[1]

    holder, key = data.draw(st.sampled_from(places(message.__dict__)), "place")
    holder[key] = data.draw(st.sampled_from(_alike(holder[key])) | plain, "value")

    try:
        expected = spelled(serialised([message, other]))
    except TypeError:
        with pytest.raises(StorageError):
            put(memory_saver, at, {"messages": [message, other]})
        assert spelled(stored(memory_saver, at)) == first
        return
    changed = put(memory_saver, at, {"messages": [message, other]})
    assert spelled(stored(memory_saver, changed)) == expected
    assert spelled(stored(memory_saver, changed)) == expected
    assert spelled(stored(memory_saver, at)) == first


FLAT: list[Callable[[], BaseMessage]] = [
    lambda: HumanMessage("x", id="1"),
    lambda: SystemMessage("x", id="1", name="n"),
    lambda: AIMessage("x", id="1"),
    lambda: AIMessageChunk("x", id="1", chunk_position="last"),
    lambda: ToolMessage("x", id="1", tool_call_id="c", artifact="y"),
    lambda: ChatMessage("x", id="1", role="r"),
    lambda: RemoveMessage(id="1"),
]
few = st.none() | texts | st.sampled_from(["ai", "human", "last", "error", "", "v1"]) | st.sampled_from([[], {}, (), 0])


@settings(max_examples=80)
@given(st.lists(st.tuples(st.sampled_from(FLAT), st.integers(0, 9), few), min_size=1, max_size=8))
def test_messages_of_text_alone_come_back_as_the_serializer_gives_them(
    forgetful_saver: SQLAlchemySaver, changes: list[tuple[Callable[[], BaseMessage], int, Any]]
) -> None:
    """Whatever was read before that looked like them, and whether their class would take them or not."""
    made = []
    for make, position, value in changes:
        message = make()
        message.__dict__[list(message.__dict__)[position % len(message.__dict__)]] = value
        made.append(message)
    expected = spelled(serialised(made))
    at = put(forgetful_saver, config("any"), {"messages": made})
    assert spelled(stored(forgetful_saver, at)) == expected
    assert spelled(stored(forgetful_saver, at)) == expected


@pytest.mark.parametrize(
    "message",
    [Special("x", id="1", mood="low"), HumanMessage("x"), AIMessage("x", id="1", additional_kwargs={"at": {1, 2}})],
    ids=["subclass", "no id", "a set in it"],
)
def test_messages_that_are_not_recalled_are_stored_all_the_same(url: str, message: Any) -> None:
    serde = Counting()
    with SQLAlchemySaver.from_url(url, serde=serde) as saver:
        at = config()
        for _ in range(3):
            serde.dumped = 0
            at = put(saver, at, {"messages": [message]})
            assert serde.dumped == 3
            assert spelled(stored(saver, at)) == spelled(stored(saver, at)) == spelled(serialised([message]))
            message.content += "!"
            message.additional_kwargs["n"] = len(message.content)


def test_messages_of_one_id_and_one_that_lost_its_own(saver: SQLAlchemySaver) -> None:
    said = [HumanMessage("left", id="1"), HumanMessage("right", id="1"), AIMessage("left", id="1")]
    at = put(saver, config(), {"messages": said})
    assert stored(saver, at) == said
    at = put(saver, at, {"messages": said[::-1]})
    assert stored(saver, at) == said[::-1]
    odd = HumanMessage.model_construct(content="x", id="1")
    del odd.__dict__["id"]
    at = put(saver, config(), {"messages": [odd, HumanMessage("y", id="2")]})
    assert [one.content for one in stored(saver, at)] == ["x", "y"]


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
        assert messages_to_dict([one]) == messages_to_dict([reference])
        assert spelled(type(one)(**one.model_dump())) == spelled(reference)
        for copied in (copy.copy(one), copy.deepcopy(one), one.model_copy(deep=True)):
            assert spelled(copied) == spelled(reference)
        if isinstance(one, AIMessageChunk):
            assert spelled(one + one) == spelled(reference + reference)
        one.content = "assigned"
        one.note = "an extra field"  # type: ignore[attr-defined]
        assert one.model_extra == {"note": "an extra field"}
    assert spelled(stored(saver, at)) == spelled([reference])


def _spoil(value: Any) -> None:
    """Change everything that can be changed in plain data, what is empty included."""
    if isinstance(value, dict | list):
        for inner in [*(value.values() if isinstance(value, dict) else value)]:
            _spoil(inner)
    if isinstance(value, list):
        value[:] = ["spoiled"] * (len(value) + 1)
    elif isinstance(value, dict):
        value.update({**dict.fromkeys(value, "spoiled"), "spoiled": True})


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda one: type(one).__name__)
def test_messages_that_are_handed_out_share_nothing_that_can_be_changed(
    saver: SQLAlchemySaver, message: BaseMessage
) -> None:
    at = put(saver, config(), {"messages": [message], "again": [message], "alone": message})
    expected = spelled(serialised(message))
    for _ in range(3):
        found = get(saver, at)
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


# What the serializer does meanwhile.


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
        assert [stored(saver, at)[0].content for at in (first, second)] == ["first", "second"]


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
    contents = ["no name here, and long enough", "I am <NAME>, and long enough too"]
    said = [HumanMessage(text, id=str(number)) for number, text in enumerate(contents)]
    with SQLAlchemySaver.from_url(url, serde=Unmasking()) as saver:
        at = put(saver, config(), {"messages": said})
    for serde, second in ((Unmasking(), "I am Ann, and long enough too"), (Unhashable(), contents[1])):
        with SQLAlchemySaver.from_url(url, serde=serde) as saver:
            assert [one.content for one in stored(saver, at)] == [contents[0], second]
