"""Batches on models of other makes, dtypes and attentions: each session as it is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agentmem import Engine, MemoryConfig, Message, Sampling, SteeredModel, Turn
from tests.helpers.numeric import assert_states_close

SESSIONS = 6
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Class, configuration, and whether sessions share passes: with sliding windows they take turns.
MODELS: dict[str, tuple[Any, Any, dict[str, Any], bool]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}, True),
    "llama": (LlamaForCausalLM, LlamaConfig, {}, True),
    "llama with scaled positions": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}, True),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}, True),
    "mistral with a window": (MistralForCausalLM, MistralConfig, {"sliding_window": 24}, False),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 24, "query_pre_attn_scalar": 16}, False),
}

Make = Callable[..., Engine]


@pytest.fixture
def make(tokenizer: Any) -> Iterator[Make]:
    made: list[Engine] = []

    def build(name: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0) -> Engine:
        kind, config, more, _ = MODELS[name]
        torch.manual_seed(seed)
        model = kind._from_config(
            config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                max_position_embeddings=2048,
                initializer_range=0.3,
                bos_token_id=None,
                pad_token_id=0,
                eos_token_id=tokenizer.eos_token_id,
                **more,
            ),
            attn_implementation=attention,
        )
        model = model.to(dtype)
        steered = SteeredModel.attach(model, config=MemoryConfig(rank=4), seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name_, parameter in steered.memory.named_parameters():
                if "delta_" in name_ or name_.endswith("beta_proj"):
                    parameter.normal_(0.0, 0.3, generator=generator)
        made.append(Engine(model, tokenizer, steered, name=name))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


class Rows:
    """How many sessions each pass over single tokens was for."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[int] = []
        decoder = engine.model.get_decoder()
        real = decoder.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is not None and ids.shape[1] == 1:
                self.found.append(ids.shape[0])
            return real(*args, **kwargs)

        monkeypatch.setattr(decoder, "forward", forward)


def run(engine: Engine, number: int, turn: Turn | None = None, tokens: int = 24) -> Turn:
    """Sessions of very different lengths, the shortest within a window of 24 and the others beyond."""
    text = f"Hello, {number}! " + "How are you today? " * (3 * (number % 3))
    state = turn.state if turn is not None else None
    return engine.turn([Message("user", text)], state, sampling=Sampling(max_tokens=tokens))


def together(engine: Engine, given: list[Turn]) -> list[Turn]:
    with ThreadPoolExecutor(SESSIONS) as pool:
        return list(pool.map(lambda number: run(engine, number, given[number]), range(SESSIONS)))


def assert_same(found: Turn, solo: Turn) -> None:
    assert found.token_ids == solo.token_ids
    assert found.state is not None
    assert solo.state is not None
    assert_states_close(found.state, solo.state)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_each_session_is_as_it_is_alone(make: Make, monkeypatch: pytest.MonkeyPatch, name: str, attention: str) -> None:
    engine = make(name, attention=attention)
    first = [run(engine, number) for number in range(SESSIONS)]
    alone = [run(engine, number, first[number]) for number in range(SESSIONS)]
    rows = Rows(engine, monkeypatch)
    for found, solo in zip(together(engine, first), alone, strict=True):
        assert_same(found, solo)
    assert (max(rows.found) > 2) == MODELS[name][3]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3"])
def test_in_bfloat16_they_are_close(make: Make, monkeypatch: pytest.MonkeyPatch, name: str, attention: str) -> None:
    """Rounding may turn a near tie of two tokens; up to there a session is as it is alone."""
    engine = make(name, dtype=torch.bfloat16, attention=attention)
    start = [run(engine, number) for number in range(SESSIONS)]
    alone = [run(engine, number, start[number], tokens=4) for number in range(SESSIONS)]
    rows = Rows(engine, monkeypatch)
    with ThreadPoolExecutor(SESSIONS) as pool:
        found = list(pool.map(lambda number: run(engine, number, start[number], tokens=4), range(SESSIONS)))
    assert (max(rows.found) > 1) == MODELS[name][3]
    same = [(one, solo) for one, solo in zip(found, alone, strict=True) if one.token_ids == solo.token_ids]
    assert len(same) >= SESSIONS // 2
    for one, solo in same:
        assert one.state is not None
        assert solo.state is not None
        scale = float(np.abs(solo.state.matrices).max())
        assert float(np.abs(one.state.matrices - solo.state.matrices).max()) < 0.05 * scale


def test_two_engines_at_once(make: Make) -> None:
    """Each with its own model, memory, worker and batches."""
    engines = [make("qwen3", seed=1), make("llama", seed=2)]
    first = [[run(engine, number) for number in range(SESSIONS)] for engine in engines]
    alone = [[run(e, number, first[k][number]) for number in range(SESSIONS)] for k, e in enumerate(engines)]
    jobs = [(k, number) for number in range(SESSIONS) for k in range(len(engines))]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: run(engines[job[0]], job[1], first[job[0]][job[1]]), jobs))
    for (k, number), turn in zip(jobs, found, strict=True):
        assert_same(turn, alone[k][number])
