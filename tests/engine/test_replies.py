"""Text and tool calls out of tokens, wherever tokens break."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentmem.generation.output_parser import Detokenizer, OutputParser, StopFinder, Tags

CALL = '<tool_call>\n{"name": "run", "arguments": {"cmd": "pytest -q", "n": 3}}\n</tool_call>'

TEXT_TAGS = Tags({}, ("<think>", "</think>", "<tool_call>", "</tool_call>"))


def parse(tokenizer: Any, text: str, start: Any = "text") -> Any:
    parser, decoder = OutputParser(Tags.of(tokenizer), b"seed", start), Detokenizer(tokenizer)
    deltas = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        deltas += parser.push(token, decoder.push(token))
    deltas += parser.finish()
    return parser.parsed(), deltas


class TextTagged:
    """The same tokenizer, but tool-call delimiters are ordinary text to it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def get_vocab(self) -> dict[str, int]:
        return {k: v for k, v in self._tokenizer.get_vocab().items() if not k.startswith(("<tool", "</tool"))}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.fixture(params=["by token", "by text"])
def tagged(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return tokenizer if request.param == "by token" else TextTagged(tokenizer)


def test_text_and_calls_come_apart(tagged: Any) -> None:
    reply, deltas = parse(tagged, f"I will.\n{CALL}\n{CALL}")
    assert reply.content == "I will."
    assert [(c.name, c.arguments) for c in reply.tool_calls] == [("run", {"cmd": "pytest -q", "n": 3})] * 2
    assert reply.tool_calls[0].id != reply.tool_calls[1].id
    assert all(c.id.startswith("call_") for c in reply.tool_calls)
    assert "".join(d.text for d in deltas if d.kind == "text").strip() == "I will."
    for call in reply.tool_calls:
        assert json.loads("".join(d.text for d in deltas if d.call == call.id))["name"] == call.name
    assert not any(d.call for d in deltas if d.kind != "tool_call")
    assert parse(tagged, f"I will.\n{CALL}\n{CALL}")[0] == reply, "ids of calls follow from the seed"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("{", "JSON"),
        ("[" * 3000, "JSON"),
        ("[1]", "name"),
        ('{"name": 3}', "name"),
        ('{"name": "f", "arguments": [1]}', "arguments"),
        ('{"name": "f", "arguments": {"x": NaN}}', "NaN"),
    ],
)
def test_unreadable_calls_are_kept_as_invalid(tagged: Any, body: str, error: str) -> None:
    reply, _ = parse(tagged, f"Well. <tool_call>{body}</tool_call>")
    assert reply.tool_calls == ()
    assert reply.invalid_tool_calls[0].text == body
    assert error in reply.invalid_tool_calls[0].error


def test_an_unfinished_call_is_invalid_not_lost(tagged: Any) -> None:
    reply, _ = parse(tagged, '<tool_call>\n{"name": "run", "argum')
    assert '"argum' in reply.invalid_tool_calls[0].text


def test_reasoning_is_its_own(tokenizer: Any) -> None:
    reply, _ = parse(tokenizer, "<think>\nhm\n</think>\n\nYes.")
    assert (reply.reasoning, reply.content) == ("hm", "Yes.")
    opened, _ = parse(tokenizer, "hm\n</think>\n\nYes.", "reasoning")
    assert (opened.reasoning, opened.content) == ("hm", "Yes.")


def test_plain_text_is_untouched(tagged: Any) -> None:
    text = "  a < b, <tool_ is no tag </think> nor that \n"
    assert parse(tagged, text)[0].content == text


@pytest.mark.parametrize("text", ["héllo — 你好 😀 fin", "plain", "ends in 😀"])
def test_a_detokenizer_gives_whole_characters(tokenizer: Any, text: str) -> None:
    decoder = Detokenizer(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == decoder.text == text
    assert "\ufffd" not in decoder.text
    assert decoder.tokens_within(len(text)) == len(decoder.ids)


def test_half_a_character_is_not_kept(tokenizer: Any) -> None:
    ids = tokenizer.encode("ok 😀", add_special_tokens=False)[:-1]
    decoder = Detokenizer(tokenizer)
    for token in ids:
        decoder.push(token)
    assert decoder.text == "ok "
    assert tokenizer.decode(ids[: decoder.tokens_within(len(decoder.text))]) == "ok "


def test_bytes_that_never_make_a_character_are_shown_in_the_end(tokenizer: Any) -> None:
    byte = tokenizer.encode("é", add_special_tokens=False)[0]
    decoder = Detokenizer(tokenizer)
    for _ in range(30):
        decoder.push(byte)
    assert "\ufffd" in decoder.text


def test_stops_are_found_across_pieces_and_held_back_until_then() -> None:
    finder = StopFinder(("STOP", "\n\n"))
    text = ""
    for piece in ("abc S", "TO"):
        text += piece
        assert finder.find(text) is None
    assert text[: finder.safe(text)] == "abc "
    assert finder.safe("abc STx") == 7
    assert finder.find(text + "P and more\n\n") == 4
    assert StopFinder(()).safe("abc") == 3


@pytest.mark.parametrize(
    "spelled",
    ["</tool_call>", 'a "quoted" </tool_call>', "\\</tool_call>", "\n</tool_call>\n<tool_call>", "<tool_call>"],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_argument_may_spell_a_delimiter(spelled: str, ascii_only: bool) -> None:
    """Also where delimiters are text: within a string they are none, wherever tokens break."""
    body = json.dumps({"name": "run", "arguments": {"a": spelled, spelled: [spelled, 1]}}, ensure_ascii=ascii_only)
    text = f"Look:\n<tool_call>\n{body}\n</tool_call>\n<tool_call>\n{body}\n</tool_call>"
    for size in (1, 3, 1000):
        parser = OutputParser(TEXT_TAGS, b"seed")
        deltas = [
            delta for at in range(0, len(text), size) for delta in parser.push(0, text[at : at + size])
        ] + parser.finish()
        reply = parser.parsed()
        assert reply.content == "Look:"
        assert reply.invalid_tool_calls == ()
        assert [call.arguments for call in reply.tool_calls] == [{"a": spelled, spelled: [spelled, 1]}] * 2
        for call in reply.tool_calls:
            assert json.loads("".join(d.text for d in deltas if d.call == call.id))["arguments"] == call.arguments


def test_a_quote_that_is_never_closed_does_not_hide_the_next_call(tagged: Any) -> None:
    reply, _ = parse(tagged, f'<tool_call>\n{{"name": "run\n</tool_call>\n{CALL}\nDone.')
    assert [call.text for call in reply.invalid_tool_calls] == ['{"name": "run']
    assert [call.name for call in reply.tool_calls] == ["run"]
    assert reply.content == "Done."


@pytest.mark.parametrize("spelled", ["<tool_call>", "<think>", "a </tool_call> b"])
def test_json_text_may_spell_a_delimiter(spelled: str) -> None:
    text = json.dumps({"a": spelled})
    for size in (1, 4, 1000):
        parser = OutputParser(TEXT_TAGS, b"seed", json_text=True)
        deltas = [delta for at in range(0, len(text), size) for delta in parser.push(0, text[at : at + size])]
        deltas += parser.finish()
        assert parser.parsed().content == text == "".join(delta.text for delta in deltas)
