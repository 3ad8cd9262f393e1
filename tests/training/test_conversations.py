"""Conversations from JSONL: what a row may hold, which replies count, and what happens to lines that cannot be used."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import ConfigError, DataError
from agentmem.messages import Message, ToolCall
from agentmem.training.conversations import Conversation, read_conversations

TALK = [
    {"role": "user", "content": "My dog is Bruno."},
    {"role": "assistant", "content": "A fine name."},
    {"role": "user", "content": "What is my dog called?"},
    {"role": "assistant", "content": "Bruno."},
]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def only(path: Path, row: object) -> Conversation:
    (conversation,) = read_conversations(write(path, row)).good
    return conversation


def reason(path: Path, row: object) -> str:
    (line,) = read_conversations(write(path, {"messages": TALK}, row), max_bad=0.5).bad
    assert line.number == 2
    return line.reason


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats.jsonl"


def test_replies_after_the_first_turn_count_unless_the_row_says_otherwise(path: Path) -> None:
    conversation = only(path, {"messages": TALK})
    assert conversation.messages == tuple(Message(m["role"], m["content"]) for m in TALK)  # type: ignore[arg-type]
    assert conversation.train == (False, False, False, True)
    assert conversation.origin == "chats.jsonl:1"
    marked = [{**m, "train": n == 1} if m["role"] == "assistant" else m for n, m in enumerate(TALK)]
    assert only(path, {"messages": marked}).train == (False, True, False, False)


def test_a_message_can_be_kept_out_of_memory(path: Path) -> None:
    conversation = only(path, {"messages": [{**TALK[0], "write": False}, *TALK[1:]]})
    assert [message.write for message in conversation.messages] == [False, True, True, True]


def test_tool_calls_blocks_and_null_are_read_as_other_tools_write_them(path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Oslo"}'}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    talk: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        *TALK[:3],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "find"},
        {"role": "assistant", "content": "Done.", "refusal": None},
    ]
    conversation = only(path, {"messages": talk, "tools": [tool], "id": 7})
    assert conversation.messages[0] == Message("system", "Be brief.")
    assert conversation.messages[4] == Message("assistant", "", (ToolCall("find", {"city": "Oslo"}, "c1"),))
    assert conversation.messages[5] == Message("tool", "", tool_call_id="c1", name="find")
    assert conversation.train[4:] == (True, False, True)
    assert conversation.tools == (tool,)
    assert read_conversations(path).ignored == {"row.id": 1, "message.refusal": 1}
    talk[4]["tool_calls"] = [{"name": "find", "arguments": {"city": "Oslo"}, "id": "c1"}]
    assert only(path, {"messages": talk}).messages == conversation.messages


@pytest.mark.parametrize("key", ["Train", "training", "trian", "writes", "wirte"])
def test_a_misspelt_key_is_refused_with_the_right_one(path: Path, key: str) -> None:
    right = "train" if key.lower().startswith("t") else "write"
    assert f"message 4: unknown key {key!r}; did you mean '{right}'?" in reason(
        path, {"messages": [*TALK[:3], {**TALK[3], key: False}]}
    )


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{not json", "not JSON"),
        ([], "JSON object with `messages`; found a list"),
        ({"conversations": []}, "convert ShareGPT's"),
        ({"messages": TALK[:2]}, "no reply counts in the loss"),
        ({"messages": [{"role": "human", "content": "Hi."}]}, "message 1: `role` is one of"),
        ({"messages": [{"role": "user", "content": ""}]}, "a user message without text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "block of type 'image_url'"),
        ({"messages": [{**TALK[0], "train": True}]}, "only assistant messages count"),
        ({"messages": [{**TALK[1], "train": 1}]}, "`train` is true or false; found 1"),
        ({"messages": [{**TALK[1], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "are not JSON"),
        ({"messages": ["Hi."]}, "an object with `role` and `content`; found text"),
        ({"messages": TALK, "tools": {}}, ""),
        ({"messages": TALK, "tools": "find"}, "`tools` is a list of objects"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "valid Unicode"),
    ],
)
def test_bad_lines_are_left_out_with_number_and_reason(path: Path, row: object, why: str) -> None:
    if why:
        assert why in reason(path, row)
    else:
        assert only(path, row)


def test_too_many_bad_lines_are_refused_and_the_first_listed(path: Path) -> None:
    write(path, *[{"messages": TALK}] * 18, "", "{", "{}")
    assert [line.number for line in read_conversations(path, max_bad=0.1).bad] == [20, 21]
    with pytest.raises(
        DataError, match=r"(?s)2 of 20 lines cannot be used, of which 5% are allowed.*line 20: not JSON"
    ):
        read_conversations(path)
    with pytest.raises(DataError, match="1 of 1 lines"):
        read_conversations(write(path, "{}"), max_bad=1)
    with pytest.raises(ConfigError, match="share of lines"):
        read_conversations(path, max_bad=5)


def test_lines_that_are_no_utf8_are_bad_lines(path: Path) -> None:
    good = json.dumps({"messages": TALK}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + b'{"messages": "\xff"}\n' + good)
    conversations = read_conversations(path, max_bad=0.5)
    assert len(conversations.good) == 2
    assert "not valid UTF-8" in conversations.bad[0].reason


def test_files_that_are_no_jsonl_are_refused(path: Path) -> None:
    with pytest.raises(DataError, match="JSON array"):
        read_conversations(write(path, "[", json.dumps({"messages": TALK})))
    with pytest.raises(DataError, match="it is empty"):
        read_conversations(write(path))
    with pytest.raises(DataError, match="cannot read"):
        read_conversations(path.with_name("missing.jsonl"))


def test_compressed_files_are_read_and_digests_are_of_the_file(path: Path) -> None:
    content = json.dumps({"messages": TALK}).encode()
    for suffix, pack in ((".xz", lzma.compress), (".gz", gzip.compress)):
        packed = path.with_name(path.name + suffix)
        packed.write_bytes(pack(content))
        conversations = read_conversations(packed)
        assert len(conversations.good) == 1
        assert conversations.file.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()
        assert conversations.file.bytes == packed.stat().st_size
        packed.write_bytes(pack(content)[:-5])
        with pytest.raises(DataError, match="no whole"):
            read_conversations(packed)


def test_a_conversation_marks_each_message_and_only_replies() -> None:
    messages = (Message("user", "Hi."), Message("assistant", "Hello."))
    with pytest.raises(ConfigError, match="found 1 values"):
        Conversation(messages, (True,))
    with pytest.raises(ConfigError, match="a user message that does"):
        Conversation(messages, (True, True))
