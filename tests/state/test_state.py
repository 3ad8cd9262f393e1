"""MemoryState: a value that survives every carrier and refuses whatever was altered."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import math
import pickle  # noqa: TID251 - other people's code pickles states
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem.errors import CorruptStateError, StateMismatchError
from agentmem.messages import Message
from agentmem.record import ConsumedRecord
from agentmem.state import MemoryState

SHAPE = [3, 2, 4, 4]


def make(seed: int = 0, messages: int = 3) -> MemoryState:
    matrices = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    record = ConsumedRecord.empty().extend([Message("user", f"message {n}") for n in range(messages)])
    return MemoryState.from_matrices(matrices, record, model_fingerprint="model-é", adapter_fingerprint="adapter")


STATE = make()


def unpickled(content: bytes) -> MemoryState:
    state: MemoryState = pickle.loads(content)  # noqa: S301 - made by the test itself
    return state


states = st.builds(make, st.integers(0, 1000), st.sampled_from([0, 1, 5, 256, 300]))


def test_matrices_are_a_read_only_view_of_little_endian_float32() -> None:
    matrices = STATE.matrices
    assert matrices.shape == (3, 2, 4, 4)
    assert matrices.dtype == np.float32
    assert matrices.tobytes() == STATE.data
    with pytest.raises(ValueError, match="read-only"):
        matrices[0] = 0


def test_zeros_have_consumed_nothing() -> None:
    state = MemoryState.zeros(SHAPE, "m", "a")
    assert not state.matrices.any()
    assert state.record == ConsumedRecord.empty()


def test_equality_and_hash_follow_the_digest() -> None:
    assert make() == STATE
    assert len({make(), STATE}) == 1
    assert make(1) != STATE
    assert STATE.digest != STATE


def test_every_field_enters_the_digest() -> None:
    others = [
        dataclasses.replace(STATE, shape=[6, 1, 4, 4]),
        dataclasses.replace(STATE, data=bytes(len(STATE.data))),
        dataclasses.replace(STATE, model_fingerprint="m"),
        dataclasses.replace(STATE, adapter_fingerprint="a"),
        dataclasses.replace(STATE, chain=bytes(32)),
        dataclasses.replace(STATE, tail=bytes(24)),
        STATE.replaced(record=ConsumedRecord.empty()),
    ]
    assert len({STATE.digest, *(state.digest for state in others)}) == 8
    # Text cannot move from one field to the next.
    names = [
        {"model_fingerprint": "ab", "adapter_fingerprint": "c"},
        {"model_fingerprint": "a", "adapter_fingerprint": "bc"},
    ]
    assert len({dataclasses.replace(STATE, **each).digest for each in names}) == 2  # type: ignore[arg-type]


def test_a_state_shows_no_matrices_and_cannot_be_changed() -> None:
    assert repr(STATE) == f"MemoryState({STATE.digest[:12]}, layers=3, consumed=3)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        STATE.count = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        STATE.shape[0] = 4  # type: ignore[index]


@given(states)
def test_dict_and_bytes_are_identities(state: MemoryState) -> None:
    assert MemoryState.from_dict(state.to_dict()) == state
    assert MemoryState.from_dict(state.to_dict()).to_dict() == state.to_dict()
    for kind in (bytearray, memoryview):
        plain = {name: kind(value) if isinstance(value, bytes) else value for name, value in state.to_dict().items()}
        assert type(MemoryState.from_dict(plain).data) is bytes
        assert MemoryState.from_dict(plain) == state
    assert MemoryState.from_bytes(state.to_bytes()) == state
    assert MemoryState.from_bytes(memoryview(bytearray(state.to_bytes()))).to_bytes() == state.to_bytes()


def test_copies_are_equal_values() -> None:
    assert STATE.digest  # cached before copying
    for twin in (copy.copy(STATE), copy.deepcopy(STATE), dataclasses.replace(STATE), unpickled(pickle.dumps(STATE))):
        assert twin == STATE
        assert twin.to_dict() == STATE.to_dict()
        assert not twin.matrices.flags.writeable


def test_a_pickle_is_verified_and_carries_no_digest() -> None:
    assert STATE.digest.encode() not in pickle.dumps(STATE)
    altered = pickle.dumps(STATE).replace(b"adapter", b"another")
    assert unpickled(altered).digest == dataclasses.replace(STATE, adapter_fingerprint="another").digest
    shortened = pickle.dumps(dataclasses.replace(STATE, count=700)).replace((700).to_bytes(2, "little"), b"\1\0")
    with pytest.raises(CorruptStateError, match="tail"):
        unpickled(shortened)


def test_the_json_form_comes_back() -> None:
    plain = STATE.to_json()
    assert MemoryState.from_dict(json.loads(json.dumps(plain))) == STATE
    # Servers write dataclasses field by field, and bytes as base64 text.
    fields = {name: value for name, value in vars(make()).items() if not name.startswith("_")}
    written = json.dumps(fields, default=lambda value: base64.b64encode(value).decode())
    assert MemoryState.from_dict(json.loads(written)) == STATE
    with pytest.raises(CorruptStateError, match="data is bytes, or their base64 text"):
        MemoryState.from_dict(plain | {"data": "no base64"})
    with pytest.raises(CorruptStateError, match="altered"):
        MemoryState.from_dict(plain | {"chain": base64.b64encode(bytes(32)).decode()})


def test_a_value_that_strict_msgpack_took_apart_says_so() -> None:
    plain = STATE.to_dict()
    del plain["digest"]
    with pytest.raises(CorruptStateError, match=r"strict msgpack.*to_dict\(\)"):
        MemoryState.from_dict(plain)


def test_the_dict_is_no_handle_on_the_state() -> None:
    state = make()
    plain = state.to_dict()
    plain["shape"][0] = 99
    assert state.shape == tuple(SHAPE)
    given_shape = list(SHAPE)
    state = dataclasses.replace(STATE, shape=given_shape)
    given_shape[0] = 99
    assert state.shape == tuple(SHAPE)


def test_the_dict_survives_langgraph_in_strict_mode(needs: Callable[[object, str], None]) -> None:
    needs(find_spec("langgraph"), "the langgraph extra")
    from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

    serializer = JsonPlusSerializer(allowed_msgpack_modules=[])
    kind, content = serializer.dumps_typed({"memory": STATE.to_dict()})
    assert kind == "msgpack"
    plain = serializer.loads_typed((kind, content))["memory"]
    assert plain == STATE.to_dict()
    assert MemoryState.from_dict(plain) == STATE


def test_require_names_both_sides() -> None:
    STATE.require("model-é", "adapter", (3, 2, 4, 4))
    cases = [("other", "adapter", SHAPE), ("model-é", "other", SHAPE), ("model-é", "adapter", [3, 1, 4, 4])]
    for model, adapter, shape in cases:
        with pytest.raises(StateMismatchError) as caught:
            STATE.require(model, adapter, shape)
        wrong = "other" if "other" in (model, adapter) else str(shape)
        assert wrong in str(caught.value)
    with pytest.raises(StateMismatchError, match=r"model 'x' here, 'model-é' in the state; adapter 'y'"):
        STATE.require("x", "y", SHAPE)


def test_replaced_takes_matrices_of_the_same_shape_only() -> None:
    matrices = np.ones(SHAPE)
    state = STATE.replaced(matrices=matrices, record=STATE.record.extend([Message("user", "one more")]))
    assert (state.matrices == 1).all()
    assert state.count == 4
    assert state.model_fingerprint == STATE.model_fingerprint
    assert STATE.replaced() == STATE
    with pytest.raises(StateMismatchError, match=r"\[3, 2, 4, 4\].*\[1, 2, 4, 4\]"):
        STATE.replaced(matrices=matrices[:1])


def test_stats_of_known_matrices() -> None:
    matrices = np.zeros([3, 2, 4, 4])
    matrices[0, 0] = np.diag([3, 0, 0, 0])
    matrices[0, 1] = np.diag([3, 0, 0, 0])
    matrices[1, 0] = np.diag([4, 2, 0, 0])
    state = STATE.replaced(matrices=matrices)
    stats = state.stats()
    one, two, empty = stats["layers"]
    assert one == pytest.approx({"norm": math.sqrt(18), "stable_rank": 2, "effective_rank": 2, "top_share": 0.5})
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert two == pytest.approx(
        {"norm": math.sqrt(20), "stable_rank": 1.25, "effective_rank": math.exp(entropy), "top_share": 0.8}
    )
    assert empty == {"norm": 0, "stable_rank": 0, "effective_rank": 0, "top_share": 0}
    assert stats["norm"] == pytest.approx(math.sqrt(38))
    assert (stats["consumed"], stats["bytes"], stats["shape"]) == (3, 384, SHAPE)
    assert json.loads(json.dumps(stats)) == stats


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; upgrade agentmem"),
        ({"version": 0}, "version"),
        ({"version": "1"}, "version"),
        ({"shape": [3, 2, 4]}, "layers, heads, rank, rank"),
        ({"shape": [3, 2, 8, 2]}, "layers, heads, rank, rank"),
        ({"shape": [0, 2, 4, 4]}, "positive"),
        ({"shape": [True, 6, 4, 4]}, "positive"),
        ({"shape": "3244"}, "positive"),
        ({"data": STATE.data[:-4]}, "384 bytes of float32; found 380"),
        ({"data": STATE.data + b"\0"}, "found 385"),
        ({"data": list(STATE.data)}, "data is bytes; found list"),
        ({"data": None}, "data is bytes; found NoneType"),
        ({"data": np.full(96, np.nan, "<f4").tobytes()}, "finite"),
        ({"data": np.full(96, np.inf, "<f4").tobytes()}, "finite"),
        ({"model_fingerprint": b"model"}, "model_fingerprint is a string"),
        ({"adapter_fingerprint": None}, "adapter_fingerprint is a string"),
        ({"count": 4}, "altered"),
        ({"count": 2}, "2 consumed messages has a tail of at most 16 bytes, 8 for each message; found 24"),
        ({"tail": STATE.tail[:-1]}, "found 23"),
        ({"count": 3.0}, "count is an integer"),
        ({"chain": b""}, "chain of 32 bytes"),
        ({"digest": STATE.digest.upper()}, "altered"),
        ({"digest": None}, "altered"),
        ({"model_fingerprint": "another"}, "altered"),
        ({"extra": 1}, r"unknown: \['extra'\]"),
    ],
)
def test_a_dict_that_was_changed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptStateError, match=message):
        MemoryState.from_dict(STATE.to_dict() | change)


@pytest.mark.parametrize("key", sorted(STATE.to_dict()))
def test_a_missing_key_is_named(key: str) -> None:
    plain = STATE.to_dict()
    del plain[key]
    with pytest.raises(CorruptStateError, match=rf"missing: \['{key}'\]"):
        MemoryState.from_dict(plain)


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        *((thing, "is a dict") for thing in (None, b"bytes", ["version"], 3)),
        ({"version": 7}, "upgrade agentmem"),
    ],
)
def test_what_is_no_dict_of_this_version_is_refused(thing: Any, said: str) -> None:
    with pytest.raises(CorruptStateError, match=said):
        MemoryState.from_dict(thing)


@pytest.mark.parametrize("thing", [None, "text", STATE.to_dict(), 3])
def test_a_file_holds_bytes(thing: Any) -> None:
    with pytest.raises(CorruptStateError, match="content is bytes"):
        MemoryState.from_bytes(thing)


def corrupt(data: st.DataObject, content: bytes) -> bytes:
    """The bytes with a bit flipped, cut short, or with something added."""
    ways = ["extend"] + (["flip", "cut"] if content else [])
    way = data.draw(st.sampled_from(ways))
    if way == "extend":
        return content + data.draw(st.binary(min_size=1, max_size=9))
    if way == "cut":
        return content[: data.draw(st.integers(0, len(content) - 1))]
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


@given(st.data())
def test_corrupt_bytes_are_always_refused(data: st.DataObject) -> None:
    for content in (corrupt(data, STATE.to_bytes()), b"", b"PK\x03\x04", b"agentmem" + bytes(60)):
        with pytest.raises(CorruptStateError):
            MemoryState.from_bytes(content)


@given(st.data())
def test_a_corrupt_dict_is_always_refused(data: st.DataObject) -> None:
    plain = STATE.to_dict()
    key = data.draw(st.sampled_from(sorted(plain)))
    value = plain[key]
    if data.draw(st.booleans()):
        del plain[key]
    elif isinstance(value, bytes):
        plain[key] = corrupt(data, value)
    elif isinstance(value, str):
        plain[key] = data.draw(st.text(max_size=70).filter(lambda text: text != value))
    elif isinstance(value, int):
        plain[key] = data.draw(st.integers().filter(lambda n: n != value))
    else:
        plain[key] = data.draw(st.lists(st.integers(0, 100), max_size=5).filter(lambda n: n != value))
    with pytest.raises(CorruptStateError):
        MemoryState.from_dict(plain)
