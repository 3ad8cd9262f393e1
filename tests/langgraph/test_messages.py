"""LangChain's messages as the engine sees them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from agentmem import Message
from agentmem.errors import TranscriptError
from agentmem_langgraph import ChatDeltaMem
from tests.helpers.fake_engine import FakeEngine


def seen(fake: FakeEngine, *messages: BaseMessage) -> list[Message]:
    ChatDeltaMem(engine=fake).invoke([*messages, HumanMessage("Hello!")])
    given: list[Message] = fake.calls[-1]["messages"]
    return given[:-1]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (HumanMessage("a", name="ann"), Message("user", "a", name="ann")),
        (SystemMessage("a"), Message("system", "a")),
        (ChatMessage(role="user", content="a"), Message("user", "a")),
        (HumanMessage([{"type": "text", "text": "a"}, "b"]), Message("user", "ab")),
        (ToolMessage("a", tool_call_id="1", name="f"), Message("tool", "a", tool_call_id="1", name="f")),
        (ToolMessage([{"type": "text", "text": "a"}], tool_call_id="1"), Message("tool", "a", tool_call_id="1")),
        (ToolMessage("a", tool_call_id="1", status="error"), Message("tool", "Error: a", tool_call_id="1")),
        (ToolMessage("Error: a", tool_call_id="1", status="error"), Message("tool", "Error: a", tool_call_id="1")),
        (
            AIMessage([{"type": "reasoning", "reasoning": "r"}, {"type": "text", "text": "a"}]),
            Message("assistant", "a"),
        ),
        (AIMessage("a", additional_kwargs={"reasoning_content": "r"}), Message("assistant", "a")),
        (HumanMessage("a", additional_kwargs={"agentmem": {"write": False}}), Message("user", "a", write=False)),
    ],
)
def test_a_message_becomes_the_engines(fake: FakeEngine, message: BaseMessage, expected: Message) -> None:
    assert seen(fake, message) == [expected]


def test_what_a_graph_adds_later_does_not_count(fake: FakeEngine) -> None:
    bare = AIMessage("a")
    dressed = AIMessage(
        "a",
        id="1",
        response_metadata={"model_name": "x"},
        additional_kwargs={"reasoning_content": "r"},
        usage_metadata={"input_tokens": 1, "output_tokens": 1, "total_tokens": 2},
    )
    assert seen(fake, bare)[0].digest() == seen(fake, dressed)[0].digest()


def test_what_is_kept_of_messages_is_the_engines_and_goes_with_it(fake: FakeEngine) -> None:
    held = weakref.ref(seen(fake, HumanMessage("word " * 100_000))[0])
    fake.calls.clear()
    gc.collect()
    assert held() is not None
    assert seen(fake, HumanMessage("word " * 100_000))[0] is held()
    fake.calls.clear()
    fake.close()
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"type": "text", "text": "a"}, "a"),
        ({"type": "output_text", "text": "a"}, "a"),
        ({"type": "refusal", "refusal": "I can not."}, "I can not."),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, ""),
        ({"type": "redacted_thinking", "data": "x"}, ""),
        ({"type": "server_tool_call", "name": "f", "args": {}}, ""),
        ({"type": "non_standard", "value": {"text": "hidden"}}, ""),
        ({"type": "input_json_delta", "partial_json": "{"}, ""),
        ({"type": "executable_code", "executable_code": "1 + 1"}, ""),
        ({"type": "reasoning", "text": "r"}, ""),
        ({"type": "image", "base64": "", "mime_type": "image/png"}, ""),
        ({"type": "audio", "base64": "", "mime_type": "audio/wav"}, ""),
        ({"type": "image_url", "image_url": {"url": "data:"}}, ""),
        ({"text": "No type."}, "No type."),
        ({"type": "text-plain", "text": "A file."}, "A file."),
    ],
)
def test_of_other_providers_blocks_the_text_counts(fake: FakeEngine, block: dict[str, Any], text: str) -> None:
    calls = [{"name": "f", "args": {"x": 1}, "id": "1"}]
    assert seen(fake, AIMessage([block])) == [Message("assistant", text)]
    (message,) = seen(fake, AIMessage([block], tool_calls=calls))
    assert (message.content, message.tool_calls[0].name) == (text, "f")


def test_no_content_is_no_text(fake: FakeEngine) -> None:
    assert seen(fake, AIMessage.model_construct(content=None)) == [Message("assistant", "")]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (HumanMessage([{"type": "image_url", "image_url": {"url": "data:"}}]), "image"),
        (HumanMessage([{"type": "audio", "base64": "", "mime_type": "audio/wav"}]), "audio"),
        (ToolMessage([{"type": "image_url", "image_url": {"url": "data:"}}], tool_call_id="1"), "image"),
        (FunctionMessage("a", name="f"), "FunctionMessage"),
        (RemoveMessage(id="1"), "RemoveMessage"),
        (ChatMessage(role="critic", content="a"), "critic"),
        (HumanMessage("a", additional_kwargs={"agentmem": {"write": "no"}}), "write"),
        (HumanMessage("a", additional_kwargs={"agentmem": False}), "write"),
    ],
)
def test_what_a_text_model_can_not_be_shown_is_refused(fake: FakeEngine, message: Any, said: str) -> None:
    with pytest.raises(TranscriptError, match=said):
        seen(fake, message)
    assert not fake.calls
