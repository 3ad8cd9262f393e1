"""Tokenizer and chat template: lossless, whole words for values, one rendering in two places."""

from __future__ import annotations

import json
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from agentmem.loading import NANO
from agentmem.messages import Message, ToolCall
from agentmem.nano.recipe.chatml import render
from agentmem.nano.recipe.episodes import draw_episode
from agentmem.nano.recipe.pools import ATTRIBUTES, WORDS
from agentmem.nano.recipe.tokenizer import CONTROL, MARKUP, train_tokenizer, twins

TOKENIZER = AutoTokenizer.from_pretrained(NANO)


@given(st.text(max_size=200))
@example("")
@example("\n\n a\t")
@example("naïve 東京 🦀🏳️‍🌈 \u200b")
@example("<|im_end|> <tool_call>{}</tool_call>")
@settings(max_examples=100, deadline=None)
def test_any_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_markup_is_one_token_each_and_only_control_tokens_are_special() -> None:
    for token in (*CONTROL, *MARKUP):
        assert len(TOKENIZER(token)["input_ids"]) == 1
    ids = TOKENIZER("<|im_start|>a<tool_call>b</tool_call><|im_end|>")["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "a<tool_call>b</tool_call>"
    assert TOKENIZER.eos_token == "<|im_end|>"
    assert TOKENIZER.pad_token == "<|endoftext|>"
    assert TOKENIZER.model_max_length >= 8192


def test_a_plain_word_value_is_one_token() -> None:
    for attribute in ATTRIBUTES.values():
        for value in attribute.values:
            if value.isalpha():
                assert len(TOKENIZER(f" {value}")["input_ids"]) == 1, value


def test_training_is_deterministic() -> None:
    first, second = (train_tokenizer(3, episodes=40, learned=400) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_values_and_nouns_have_twins_and_numbers_are_the_same_everywhere() -> None:
    tokenizer = train_tokenizer(0, episodes=300)
    assert len(tokenizer) < 7000
    pairs = twins(tokenizer)
    assert len(pairs) == len(set(pairs)) == len({bare for bare, _ in pairs})
    for bare, spaced in pairs:
        assert tokenizer.decode([spaced]) == f" {tokenizer.decode([bare])}"
    of = dict(pairs)
    for word in (*WORDS, *(v for a in ATTRIBUTES.values() for v in a.values if v.isascii() and v.isalpha())):
        (bare,), (spaced,) = tokenizer(word)["input_ids"], tokenizer(f" {word}")["input_ids"]
        assert of[bare] == spaced
    vocabulary = set(tokenizer.get_vocab())
    runs = [token for token in vocabulary if token.startswith("Ġ") and token[1:].isascii() and token[1:].isalpha()]
    assert all(token[1:] in vocabulary for token in runs if len(token) > 3)
    for number in ("3", "42", "1234", "99999"):
        tokens = tokenizer.tokenize(number)
        for text in (f"f({number})?", f'{{"x": {number}}}', f"f(1, {number}, 2)", f'"{number}"', f"-{number}"):
            found = tokenizer.tokenize(text)
            assert any(found[i : i + len(tokens)] == tokens for i in range(len(found))), text


def as_dicts(messages: tuple[Message, ...]) -> list[dict[str, object]]:
    """Messages as a chat template takes them."""
    out: list[dict[str, object]] = []
    for m in messages:
        calls = [
            {"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}} for c in m.tool_calls
        ]
        out.append({"role": m.role, "content": m.content, **({"tool_calls": calls} if calls else {})})
    return out


def test_the_template_and_the_training_text_are_the_same() -> None:
    rng = Random(4)
    for _ in range(60):
        episode = draw_episode(rng)
        tools = list(episode.tools) or None
        wanted = "".join(piece.text for piece in render(episode.messages, episode.tools))
        assert TOKENIZER.apply_chat_template(as_dicts(episode.messages), tools=tools, tokenize=False) == wanted


def test_consecutive_tool_results_share_a_turn_and_calls_follow_text() -> None:
    messages = (
        Message("user", "Go."),
        Message("assistant", "Sure.", tool_calls=(ToolCall("a", {"x": 1}), ToolCall("b", {"y": "é"}))),
        Message("tool", "1"),
        Message("tool", "2"),
    )
    text = TOKENIZER.apply_chat_template(as_dicts(messages), tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\nSure.\n"
        '<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "b", "arguments": {"y": "é"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert text == "".join(p.text for p in render(messages)) + "<|im_start|>assistant\n"


def test_a_system_message_after_the_first_keeps_its_place_and_text_parts_are_joined() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "two."}]},
        {"role": "system", "content": "Mind this."},
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nOne two.<|im_end|>\n<|im_start|>system\nMind this.<|im_end|>\n"


def test_tools_stand_in_the_system_turn_one_a_line() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for system in ([{"role": "system", "content": "Hi."}], []):
        text = TOKENIZER.apply_chat_template(
            [*system, {"role": "user", "content": "x"}], tools=[tool, tool], tokenize=False
        )
        assert isinstance(text, str)
        head, _, rest = text.partition("<tools>\n")
        assert ("Hi.\n\n" in head) == bool(system)
        assert [json.loads(line) for line in rest.partition("\n</tools>")[0].splitlines()] == [tool, tool]
        assert text.count("<|im_start|>system") == 1
