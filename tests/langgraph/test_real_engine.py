"""The chat model on the real engine, with a model that babbles: random weights, every token possible.

What such a model says (stray tags, cut-off calls, white space at either end) is what conversions must survive: a
reply that comes back in the history has to be the message that the memory recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from langchain.agents import create_agent
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph

from agentmem import Engine, MemoryConfig, SteeredModel
from agentmem.errors import AgentMemError
from agentmem_langgraph import (
    ChatDeltaMem,
    MemoryMessagesState,
    MemoryMiddleware,
    MemoryNode,
    MemoryTurn,
    MemoryWarning,
)
from tests.helpers.bpe import REASONING_AND_CALLS, byte_bpe
from tests.helpers.core_models import build
from tests.helpers.talks import gathered

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Whole texts as tokens, so that a babbling model says something a parser has work with.
PIECES = ('{"name": "f", "arguments": {}}', '{"name": "f", "arg', "  ", "\n", "\n\n", " word", "word.", "é")


@pytest.fixture(scope="module")
def babbler() -> Iterator[Engine]:
    # Trained on nothing: every byte is a token, and the tags and pieces are.
    tokenizer = byte_bpe([], TEMPLATE, tags=(*REASONING_AND_CALLS, *PIECES))
    model = build(
        "qwen3",
        seed=0,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.no_grad():  # tags, pieces and the end come often; single bytes and other control tokens hardly ever
        model.lm_head.bias = torch.nn.Parameter(torch.full((len(tokenizer),), -6.0))
        for text in (*REASONING_AND_CALLS, *PIECES, "<|im_end|>"):
            model.lm_head.bias[tokenizer.convert_tokens_to_ids(text)] = 2.0
    steered = SteeredModel.attach(model, config=MemoryConfig(rank=4), seed=0)
    with torch.no_grad():
        for parameter in steered.memory.parameters():
            parameter.normal_(0.0, 0.3)
    with Engine(model, tokenizer, steered, name="babbler") as engine:
        yield engine


WAYS = ("invoke", "stream", "ainvoke", "astream")


def call(llm: Any, way: str, messages: Any, config: Any = None, **options: Any) -> Any:
    """One of the four ways to call; a streamed reply as one message."""

    async def awaited() -> Any:
        if way == "ainvoke":
            return await llm.ainvoke(messages, config, **options)
        return gathered([chunk async for chunk in llm.astream(messages, config, **options)])

    if way == "invoke":
        return llm.invoke(messages, config, **options)
    return gathered(list(llm.stream(messages, config, **options))) if way == "stream" else asyncio.run(awaited())


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_model_says_is_recognised_when_it_comes_back(babbler: Engine, seed: int) -> None:
    llm = ChatDeltaMem(engine=babbler, temperature=1.0, max_tokens=12)
    history: list[BaseMessage] = []
    state = None
    for turn_number in range(8):
        history.append(HumanMessage(f"question {turn_number}"))
        turn = MemoryTurn(state)
        way = WAYS[(turn_number + seed) % 4]
        reply = call(llm.bind(seed=seed * 100 + turn_number), way, history, memory=turn)
        assert "edits" not in reply.response_metadata
        history.append(reply)
        history += [ToolMessage("done", tool_call_id=asked["id"]) for asked in reply.tool_calls]
        assert turn.state is not None
        assert turn.state.count == len(history) - len(reply.tool_calls)
        state = turn.state


@pytest.mark.parametrize("seed", range(6))
def test_all_ways_to_call_say_the_same(babbler: Engine, seed: int) -> None:
    llm = ChatDeltaMem(engine=babbler, temperature=1.0, max_tokens=12, seed=seed)
    turns = [MemoryTurn() for _ in range(4)]
    replies = [call(llm, way, "Hello!", memory=turn) for way, turn in zip(WAYS, turns, strict=True)]
    assert len({turn.state for turn in turns}) == 1
    for reply in replies[1:]:
        assert reply.text == replies[0].text
        assert reply.tool_calls == replies[0].tool_calls
        assert [c["args"] for c in reply.invalid_tool_calls] == [c["args"] for c in replies[0].invalid_tool_calls]
        assert reply.additional_kwargs == replies[0].additional_kwargs
        assert reply.response_metadata == replies[0].response_metadata | {"memory": reply.response_metadata["memory"]}


async def test_a_cancelled_call_changes_nothing_and_can_be_repeated(babbler: Engine) -> None:
    llm = ChatDeltaMem(engine=babbler, temperature=1.0, seed=1, max_tokens=400, stop=["never"])
    turn, undisturbed = MemoryTurn(), MemoryTurn()
    task = asyncio.create_task(llm.ainvoke("Hello!", memory=turn))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, AgentMemError)):
        await task
    assert not turn.used
    assert turn.state is None
    await llm.ainvoke("Hello!", memory=turn)
    await llm.ainvoke("Hello!", memory=undisturbed)
    assert turn.state == undisturbed.state


async def test_the_loop_runs_on_while_a_reply_is_made(babbler: Engine) -> None:
    llm = ChatDeltaMem(engine=babbler, temperature=1.0, seed=1, max_tokens=40)
    running = asyncio.create_task(llm.ainvoke("Hello!"))
    ticks = 0
    while not running.done():
        ticks += 1
        await asyncio.sleep(0)
    assert running.result().response_metadata["model_name"] == "babbler"
    assert ticks > 2


async def test_no_torch_mode_leaks_out_of_a_stream(babbler: Engine) -> None:
    llm = ChatDeltaMem(engine=babbler, max_tokens=5)
    async for _ in llm.astream("Hello!"):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    for _ in llm.stream("Hello!"):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_carried_kv_is_named_in_the_replys_metadata(babbler: Engine) -> None:
    llm, turn = ChatDeltaMem(engine=babbler, kv="carry", cache_salt="mine", max_tokens=4), MemoryTurn()
    history: list[BaseMessage] = [HumanMessage("hello there")]
    first = llm.invoke(history, memory=turn)
    assert "carried" not in first.response_metadata
    history += [first, HumanMessage("go on")]
    second = llm.invoke(history, memory=MemoryTurn(turn.state))
    carried = second.response_metadata["carried"]
    assert carried >= first.usage_metadata["input_tokens"]
    assert second.usage_metadata["input_token_details"]["cache_read"] == carried
    exact = llm.invoke(history, memory=MemoryTurn(turn.state), kv="exact")
    assert "carried" not in exact.response_metadata
    with pytest.raises(AgentMemError, match="kv must be one of"):
        llm.invoke(history, kv="some")


def test_a_message_that_is_changed_in_place_is_an_edit(babbler: Engine) -> None:
    llm, turn = ChatDeltaMem(engine=babbler, max_tokens=4), MemoryTurn()
    told = HumanMessage("hello there")
    history: list[BaseMessage] = [told]
    history += [llm.invoke(history, memory=turn), HumanMessage("go on")]
    assert "edits" not in llm.invoke(history, memory=MemoryTurn(turn.state)).response_metadata
    told.content = "something else"
    assert llm.invoke(history, memory=MemoryTurn(turn.state)).response_metadata["edits"] == [0]


def _thread(name: str) -> Any:
    return {"configurable": {"thread_id": name}}


def _cache_read(reply: Any) -> int:
    return int(reply.usage_metadata["input_token_details"]["cache_read"])


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_what_one_thread_reads_says_nothing_to_another(babbler: Engine, way: str, memory: bool) -> None:
    llm = ChatDeltaMem(engine=babbler, max_tokens=4)
    babbler.forget_prefills()

    def ask(config: Any = None, **options: Any) -> int:
        secret: list[BaseMessage] = [SystemMessage("Be kind."), HumanMessage(f"my secret: {way} {memory}")]
        if memory:
            options["memory"] = MemoryTurn()
        return _cache_read(call(llm, way, secret, config, **options))

    assert ask(_thread("ada")) == 0
    for other in (_thread("grace"), None, None):
        assert ask(other) == 0
    assert ask(_thread("ada")) > 0
    assert ask(cache_salt="thread:ada") == 0  # a salt that comes from a user
    # A system prompt that is no secret is shared by those who say so.
    assert ask(_thread("ada"), cache_salt="everybody") == 0
    assert ask(None, cache_salt="everybody") > 0


def test_what_is_carried_stays_in_its_thread(babbler: Engine) -> None:
    llm, turn = ChatDeltaMem(engine=babbler, kv="carry", max_tokens=4), MemoryTurn()
    history: list[BaseMessage] = [HumanMessage("hello there")]
    history += [llm.invoke(history, _thread("ada"), memory=turn), HumanMessage("go on")]
    for other in ("ada", "grace", "ada"):
        reply = llm.invoke(history, _thread(other), memory=MemoryTurn(turn.state))
        assert ("carried" in reply.response_metadata) is (other == "ada")
    babbler.message_cache.clear()
    with pytest.warns(MemoryWarning, match="thread_id"):
        reply = llm.invoke(history, memory=MemoryTurn(turn.state))
    assert "carried" not in reply.response_metadata


@pytest.mark.parametrize("kind", ["node", "agent"])
def test_a_graph_reads_the_kv_of_its_thread_alone(babbler: Engine, kind: str) -> None:
    llm = ChatDeltaMem(engine=babbler, max_tokens=4)
    saver = InMemorySaver()
    if kind == "node":
        builder = StateGraph(MemoryMessagesState)
        builder.add_node("agent", MemoryNode(llm))
        builder.add_edge(START, "agent")
        graph: Any = builder.compile(checkpointer=saver)
    else:
        graph = create_agent(llm, middleware=[MemoryMiddleware()], checkpointer=saver)

    def ask(name: str) -> int:
        saver.delete_thread(name)  # each time the thread's first turn: what a retry does
        out = graph.invoke({"messages": [("user", f"hello from a {kind}")]}, _thread(name))
        return _cache_read(out["messages"][-1])

    assert [ask(name) > 0 for name in ("ada", "grace", "ada")] == [False, False, True]
