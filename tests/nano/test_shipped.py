"""The shipped directory: small, loads with plain auto classes, does its work in the prompt and from memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from random import Random
from typing import Any

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


Tools = list[dict[str, Any]]


def padded(conversations: Iterable[list[Message]], tools: Iterable[Tools] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of the prompts that ask for a reply, padded at their beginning: [B, T] each."""
    prompts = zip_longest(conversations, tools, fillvalue=())
    texts = ["".join(piece.text for piece in render(*prompt)) + "<|im_start|>assistant\n" for prompt in prompts]
    batch = TOKENIZER(texts, padding=True, padding_side="left", return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def replies(model: Any, conversations: Iterable[list[Message]], tools: Iterable[Tools] = ()) -> list[str]:
    """The bare model's greedy replies to conversations that are all in their prompts, in one batch."""
    ids, mask = padded(conversations, tools)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=80, do_sample=False)
    return list(TOKENIZER.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))


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
    bindings = list(language.draw_bindings(rng, 20))
    prompts = [
        [
            *chat(language.tell(rng, binding), language.filler(rng)),
            Message("user", language.ask(rng, binding.attribute)),
        ]
        for binding in bindings
    ]
    said = replies(model, prompts)
    assert sum(map(language.is_correct, said, bindings)) >= 18


def test_it_acknowledges_in_the_answers_form(model: torch.nn.Module) -> None:
    rng = Random(5)
    bindings = language.draw_bindings(rng, 10)
    said = replies(model, [[Message("user", language.tell(rng, binding)[0])] for binding in bindings])
    assert sum(map(language.is_correct, said, bindings)) >= 9


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
    (said,) = replies(model, [messages], [[tool]])
    body = said.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(body) == {"name": "count", "arguments": {"n": 42}}
    (report,) = replies(model, [[*messages, Message("assistant", said), Message("tool", "77")]], [[tool]])
    assert report == "The result is 77."


def test_it_calls_only_when_asked_to(model: torch.nn.Module) -> None:
    rng = Random(2)
    tools = toolchat.draw_tools(rng, 2)
    said = replies(model, [[Message("user", language.filler(rng)[0])] for _ in range(8)], [tools] * 8)
    assert not any("<tool_call>" in text for text in said)


def test_drawn_calls_are_well_formed_and_a_single_fact_is_cited(model: torch.nn.Module) -> None:
    rng = Random(21)
    requests, offered, questions, cited = [], [], [], []
    for _ in range(12):
        tools = toolchat.draw_tools(rng, 1)
        said, _ = toolchat.request(rng, tools[0])
        requests.append([Message("user", said)])
        offered.append(tools)
        facts = toolchat.draw_facts(rng, 1)
        shown = Message("system", toolchat.facts_block(facts))
        questions.append([shown, Message("user", toolchat.ask_fact(rng, facts[0]))])
        cited.append(toolchat.cite(facts, facts[0]))
    calls = replies(model, requests, offered)
    formed = [text.startswith('<tool_call>\n{"name": "') and text.endswith("}}\n</tool_call>") for text in calls]
    assert sum(formed) >= 10
    assert sum(map(str.__eq__, replies(model, questions), cited)) >= 10


def test_the_adapter_answers_from_the_state_alone_and_the_zero_state_knows_nothing(model: torch.nn.Module) -> None:
    steered = SteeredModel.attach(model, adapter=NANO / "adapter")
    try:
        rng = Random(31)
        bindings = list(language.draw_bindings(rng, 20))
        states, questions = [], []
        for binding in bindings:
            told = "".join(piece.text for piece in render(chat(language.tell(rng, binding))))
            states.append(steered(torch.tensor([TOKENIZER(told)["input_ids"]]), logits_to_keep=-1).state)
            questions.append([Message("user", language.ask(rng, binding.attribute))])
        right = decode(steered, questions, torch.cat(states))
        blank = decode(steered, questions, steered.zeros(20))
        assert sum(map(language.is_correct, right, bindings)) >= 18
        assert sum(map(language.is_correct, blank, bindings)) <= 3
    finally:
        steered.detach()


def decode(steered: SteeredModel, conversations: list[list[Message]], state: torch.Tensor) -> list[str]:
    """Greedy, with writes on; a row that has ended goes on, and what it says then does not count."""
    ids, mask = padded(conversations)
    chosen: list[torch.Tensor] = []
    with torch.no_grad():
        out = steered(ids, state, attention_mask=mask, cache=True, logits_to_keep=1)
        while len(chosen) < 24:
            assert out.logits is not None
            chosen.append(out.logits[:, -1].argmax(dim=-1, keepdim=True))
            mask = torch.cat((mask, torch.ones_like(chosen[-1])), dim=1)
            out = steered(chosen[-1], out.state, attention_mask=mask, cache=out.cache, logits_to_keep=1)
    rows = [[*row, TOKENIZER.eos_token_id] for row in torch.cat(chosen, dim=1).tolist()]
    return [str(TOKENIZER.decode(row[: row.index(TOKENIZER.eos_token_id)])) for row in rows]
