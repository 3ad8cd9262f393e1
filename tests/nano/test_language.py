"""The language: deterministic, drawn afresh every time, judged by whole words; and a tokenizer and a template that fit
it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from keyword import iskeyword
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from langchain_core.tools import StructuredTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field, create_model
from transformers import AutoTokenizer

from agentmem.loading import NANO
from agentmem.messages import Message, ToolCall
from agentmem.nano.recipe import episodes, language, offers, requests, toolchat
from agentmem.nano.recipe.chatml import render
from agentmem.nano.recipe.episodes import Episode, MemoryEpisode, draw_episode, draw_memory_episode
from agentmem.nano.recipe.language import Binding
from agentmem.nano.recipe.pools import ATTRIBUTES, WORDS
from agentmem.nano.recipe.tokenizer import CONTROL, MARKUP, train_tokenizer, twins


@pytest.mark.parametrize("attribute", sorted(ATTRIBUTES))
def test_every_answer_is_correct_for_its_binding_and_for_no_other(attribute: str) -> None:
    bindings = [Binding(attribute, value) for value in ATTRIBUTES[attribute].values]
    for binding in bindings:
        said = language.answer(binding)
        assert [other for other in bindings if language.is_correct(said, other)] == [binding]


def test_is_correct_refuses_a_second_value_a_part_of_a_word_and_silence() -> None:
    teal = Binding("favorite color", "teal")
    assert language.is_correct("I think it is teal.", teal)
    assert not language.is_correct("It is teal or blue.", teal)
    assert not language.is_correct("It is tealish.", teal)
    assert not language.is_correct(language.unknown("favorite color"), teal)


def test_telling_changing_and_asking_name_the_attribute_and_the_value() -> None:
    rng = Random(3)
    for binding in language.draw_bindings(rng, 20):
        for said, reply in (language.tell(rng, binding), language.change(rng, binding)):
            assert binding.attribute in said.lower()
            assert binding.value in said
            assert language.is_correct(reply, binding)
        question = language.ask(rng, binding.attribute)
        assert binding.attribute in question
        assert not language.named_values(question.replace(binding.attribute, ""), binding.attribute)


def test_same_seed_same_conversation_other_seed_another() -> None:
    def conversations(seed: int) -> list[object]:
        rng = Random(seed)
        return [draw_episode(rng) for _ in range(10)] + [
            draw_memory_episode(rng, bindings=3, fillers=2, changes=1, asks=1) for _ in range(10)
        ]

    assert conversations(5) == conversations(5)
    assert conversations(5) != conversations(6)


def test_drawn_bindings_have_distinct_attributes_and_values_of_the_whole_pool() -> None:
    assert len({b.attribute for b in language.draw_bindings(Random(1), len(ATTRIBUTES))}) == len(ATTRIBUTES)
    with pytest.raises(ValueError, match="larger"):
        language.draw_bindings(Random(1), len(ATTRIBUTES) + 1)
    rng = Random(0)
    values = Counter(b.value for _ in range(3000) for b in language.draw_bindings(rng, 1, attributes=["pet"]))
    assert set(values) == set(ATTRIBUTES["pet"].values)
    assert max(values.values()) < 2 * 3000 / len(values)
    again = language.redraw(Random(2), Binding("port", "8080"))
    assert again.attribute == "port"
    assert again.value != "8080"


def test_a_memory_episode_is_asked_for_the_latest_value() -> None:
    rng = Random(8)
    for _ in range(50):
        episode = draw_memory_episode(rng, bindings=1, fillers=2, changes=2)
        question, answer = episode.questions[0].turn
        attribute = _asked(answer.content)
        value = answer.content.partition(f"{attribute} is ")[2]
        told = [reply.content for _, reply in episode.turns if f"{attribute} is " in reply.content]
        assert told[-1].endswith(f"{attribute} is {value}")
        assert question.role == "user"


def _asked(answer: str) -> str:
    return next(name for name in sorted(ATTRIBUTES, key=len, reverse=True) if f"{name} is" in answer)


QUESTIONS = ("ask", "unknown", "filler", "chatter", "tool", "offer", "unoffered", "remembered", "fact")
# The prompts and names of LangChain's standard suites, which nano is tested with.
WITHHELD = re.compile(
    r"magic|get_weather|weather_lookup|weather (in|at|of|for) [A-Z]|San Francisco|unicode_"
    r"|你好|こんにちは|株式会社|集团|Hello, how are you today|my_adder|1 \+ 2|joke about|Joke|setup|punchline|Pirate"
    r'|"name": "(Person|person)", "(description|arguments|parameters)'
)


def text_of(episode: Episode) -> str:
    return "".join(piece.text for piece in render(episode.messages, episode.tools))


def text_of_memory(episode: MemoryEpisode) -> str:
    told = [m for turn in episode.turns for m in turn]
    head = [episode.system] if episode.system else []
    asked = [
        "".join(piece.text for piece in render([*([q.system] if q.system else []), *q.turn], q.tools))
        for q in episode.questions
    ]
    return "".join(piece.text for piece in render([*head, *told], episode.tools)) + "".join(asked)


def calls_of(episode: Episode) -> list[tuple[str, str, dict[str, Any]]]:
    """The user text before each call, the called name and the arguments."""
    return [
        (before.content, call.name, dict(call.arguments))
        for before, message in zip(episode.messages, episode.messages[1:], strict=False)
        for call in message.tool_calls
    ]


def test_the_standard_suites_prompts_and_names_never_occur() -> None:
    rng = Random(13)
    for _ in range(3000):
        found = WITHHELD.search(text_of(draw_episode(rng, skills=0.9)))
        assert found is None, found
    for _ in range(300):
        episode = draw_memory_episode(rng, bindings=3, fillers=3, calls=2, tooled=0.5, questions=QUESTIONS)
        found = WITHHELD.search(text_of_memory(episode))
        assert found is None, found


def test_offered_tools_are_as_langchain_gives_them() -> None:
    types = {"string": str, "integer": int}
    rng = Random(6)
    for _ in range(200):
        function = offers.draw_offer(rng).tool["function"]
        fields: dict[str, Any] = {}
        if any(map(iskeyword, function["parameters"]["properties"])):  # which no Python function has
            continue
        for name, schema in function["parameters"]["properties"].items():
            bounds = {"lt": schema.get("exclusiveMaximum"), "gt": schema.get("exclusiveMinimum")}
            fields[name] = (types[schema["type"]], Field(..., description=schema.get("description"), **bounds))
        made = StructuredTool.from_function(
            lambda: None,
            name=function["name"],
            description=function["description"],
            args_schema=create_model("Arguments", **fields),
            infer_schema=False,
        )
        assert json.dumps(convert_to_openai_tool(made)) == json.dumps({"type": "function", "function": function})


def test_a_call_fits_its_tool_and_holds_what_was_said_or_told() -> None:
    rng = Random(9)
    seen: Counter[str] = Counter()
    for _ in range(600):
        episode = episodes.offer_episode(rng)
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in episode.tools}
        told = " ".join(m.content for m in episode.messages if m.role in ("system", "user"))
        for said, name, arguments in calls_of(episode):
            assert list(arguments) == tools[name].get("required", [])
            for parameter, value in arguments.items():
                assert isinstance(value, int if tools[name]["properties"][parameter]["type"] == "integer" else str)
                assert str(value) in told
                seen["said" if str(value) in said else "told"] += 1
    assert seen["said"] > 3 * seen["told"] > 150


def test_the_latest_value_is_remembered_and_what_was_never_told_is_not_called_for() -> None:
    rng = Random(10)
    tool = offers.remembered(rng, ["test command"])
    (parameter,) = tool.recalled
    asked = requests.request_of(rng, tool, {"test command": "nox"})
    assert asked.call is not None
    assert asked.call.arguments[parameter] == "nox"
    assert asked.saying in ("", f"For {tool.name} I need the test command. The test command is nox.")
    assert "nox" not in asked.said
    missing = requests.request_of(rng, tool, {"port": "8080"})
    assert missing.call is None
    assert missing.saying == f"For {tool.name} I need the test command. I do not know the test command yet."
    for _ in range(100):
        episode = draw_memory_episode(rng, bindings=2, changes=1, questions=("remembered",))
        said, reply = episode.questions[0].turn[:2]
        told = " ".join(m.content for turn in episode.turns for m in turn)
        for call in reply.tool_calls:
            assert all(str(value) in told + said.content for value in call.arguments.values())


def test_facts_are_cited_by_their_number_and_win_over_what_was_told() -> None:
    facts = [toolchat.Fact("retry limit", "300"), toolchat.Fact("port", "3000")]
    assert toolchat.cite(facts, facts[1]) == "The port is 3000. [2]"
    assert toolchat.cite(facts, facts[1], "8080") == "The port is 3000. [2] You said 8080."
    assert toolchat.cite(facts, facts[1], "3000") == "The port is 3000. [2]"


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
