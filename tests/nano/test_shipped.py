"""The shipped directory: small, loads with plain auto classes, does its work in the prompt and from memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentmem import SteeredModel
from agentmem.loading import NANO
from agentmem.messages import Message
from agentmem.nano.recipe import language, toolchat
from agentmem.nano.recipe.chatml import render

TOKENIZER = AutoTokenizer.from_pretrained(NANO)


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    torch.set_num_threads(before)


def reply(model: torch.nn.Module, messages: list[Message], tools: list[dict[str, object]] | None = None) -> str:
    """The bare model's greedy reply to a conversation that is all in its prompt."""
    text = "".join(piece.text for piece in render(messages, tools or ())) + "<|im_start|>assistant\n"
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
    return str(TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def chat(*pairs: tuple[str, str]) -> list[Message]:
    return [m for said, answer in pairs for m in (Message("user", said), Message("assistant", answer))]


def test_everything_is_there_and_small() -> None:
    names = {str(p.relative_to(NANO)) for p in NANO.rglob("*") if p.is_file()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "adapter/delta_mem_config.json",
        "adapter/adapter.safetensors",
        "recipe.json",
        "agentmem_sha256.json",
    }
    assert sum(p.stat().st_size for p in NANO.rglob("*") if p.is_file()) < 12_000_000
    recipe = json.loads((NANO / "recipe.json").read_text("utf-8"))
    assert {"seed", "recipe", "parameters", "training", "versions", "bytes"} <= recipe.keys()


def test_it_is_a_bfloat16_qwen3_of_a_few_million_parameters_with_two_end_tokens() -> None:
    model = AutoModelForCausalLM.from_pretrained(NANO)
    assert model.config.model_type == "qwen3"
    assert model.dtype == torch.bfloat16
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert model.config.max_position_embeddings >= 8192
    ends = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == ends
    assert model.generation_config.pad_token_id == ends[1]
    assert len(TOKENIZER) == model.config.vocab_size


def test_it_answers_a_question_about_what_stands_in_its_prompt(model: torch.nn.Module) -> None:
    rng = Random(12)
    right = 0
    for binding in language.draw_bindings(rng, 20):
        messages = [
            *chat(language.tell(rng, binding), language.filler(rng)),
            Message("user", language.ask(rng, binding.attribute)),
        ]
        right += language.is_correct(reply(model, messages), binding)
    assert right >= 18


def test_it_acknowledges_in_the_answers_form(model: torch.nn.Module) -> None:
    rng = Random(5)
    bindings = language.draw_bindings(rng, 10)
    said = [reply(model, [Message("user", language.tell(rng, binding)[0])]) for binding in bindings]
    assert sum(language.is_correct(text, binding) for text, binding in zip(said, bindings, strict=True)) >= 9


def test_it_calls_a_tool_and_reads_the_result(model: torch.nn.Module) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "count",
            "description": "Count.",
            "parameters": {"properties": {"n": {"type": "integer"}}, "required": ["n"], "type": "object"},
        },
    }
    messages = [Message("user", "Call count with n 42.")]
    said = reply(model, messages, [tool])
    body = said.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(body) == {"name": "count", "arguments": {"n": 42}}
    report = reply(model, [*messages, Message("assistant", said), Message("tool", "77")], [tool])
    assert report == "The result is 77."


def test_it_calls_only_when_asked_to(model: torch.nn.Module) -> None:
    rng = Random(2)
    tools = toolchat.draw_tools(rng, 2)
    said = [reply(model, [Message("user", language.filler(rng)[0])], tools) for _ in range(8)]
    assert not any("<tool_call>" in text for text in said)


def test_drawn_calls_are_well_formed_and_a_single_fact_is_cited(model: torch.nn.Module) -> None:
    rng = Random(21)
    formed = cited = 0
    for _ in range(12):
        tools = toolchat.draw_tools(rng, 1)
        said, _ = toolchat.request(rng, tools[0])
        text = reply(model, [Message("user", said)], tools)
        formed += text.startswith('<tool_call>\n{"name": "') and text.endswith("}}\n</tool_call>")
        facts = toolchat.draw_facts(rng, 1)
        shown = [Message("system", toolchat.facts_block(facts)), Message("user", toolchat.ask_fact(rng, facts[0]))]
        cited += reply(model, shown) == toolchat.cite(facts, facts[0])
    assert formed >= 10
    assert cited >= 10


def test_the_adapter_answers_from_the_state_alone_and_the_zero_state_knows_nothing(model: torch.nn.Module) -> None:
    steered = SteeredModel.attach(model, adapter=NANO / "adapter")
    try:
        rng = Random(31)
        right = blank = 0
        for binding in language.draw_bindings(rng, 20):
            told = encode(chat(language.tell(rng, binding)))
            state = steered(told, logits_to_keep=-1).state
            question = [Message("user", language.ask(rng, binding.attribute))]
            right += language.is_correct(decode(steered, question, state), binding)
            blank += language.is_correct(decode(steered, question, steered.zeros()), binding)
        assert right >= 18
        assert blank <= 3
    finally:
        steered.detach()


def encode(messages: list[Message], *, prompt: bool = False) -> torch.Tensor:
    text = "".join(piece.text for piece in render(messages)) + ("<|im_start|>assistant\n" if prompt else "")
    return torch.tensor([TOKENIZER(text)["input_ids"]])


def decode(steered: SteeredModel, messages: list[Message], state: torch.Tensor) -> str:
    """Greedy, with writes on."""
    tokens: list[int] = []
    with torch.no_grad():
        out = steered(encode(messages, prompt=True), state, cache=True, logits_to_keep=1)
        while len(tokens) < 24:
            assert out.logits is not None
            token = int(out.logits[0, -1].argmax())
            if token == TOKENIZER.eos_token_id:
                break
            tokens.append(token)
            out = steered(torch.tensor([[token]]), out.state, cache=out.cache, logits_to_keep=1)
    return str(TOKENIZER.decode(tokens))
