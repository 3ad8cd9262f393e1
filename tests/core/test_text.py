"""Text that comes from elsewhere."""

import hashlib

import pytest

from agentmem import MemoryState
from agentmem.errors import CorruptStateError
from agentmem.text import parse_json, printable


def test_json_that_is_nested_too_deep_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="too many arrays or objects"):
        parse_json("[" * 100_000 + "]" * 100_000)
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}


def test_a_state_file_with_a_deep_header_is_refused() -> None:
    header = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    body = b"agentmem" + len(header).to_bytes(4, "little") + header
    with pytest.raises(CorruptStateError, match="JSON header"):
        MemoryState.from_bytes(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(
    ("text", "shown", "as_name"),
    [
        ("a\x1b[31mb\x07", r"a\x1b[31mb\x07", r"a\x1b[31mb\x07"),
        ("one\ntwo\tthree", "one\ntwo\tthree", r"one\ntwo\tthree"),
        ("left\u202eright\u200f", r"left\u202eright\u200f", r"left\u202eright\u200f"),
        ("no\u200bthing", "no\u200bthing", r"no\u200bthing"),
        ("half \ud83d pair", r"half \ud83d pair", r"half \ud83d pair"),
        ("Grüße, 世界 🙂", "Grüße, 世界 🙂", "Grüße, 世界 🙂"),
    ],
)
def test_a_terminal_gets_no_control_characters(text: str, shown: str, as_name: str) -> None:
    assert printable(text) == shown
    assert printable(text, lines=False) == as_name
