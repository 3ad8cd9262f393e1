"""Batches on models of other makes, dtypes and attentions: each session as it is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from agentmem import Engine, Message, Sampling, Turn
from tests.helpers.core_models import attach_lively, build
from tests.helpers.numeric import assert_same_at_once

SESSIONS = 6
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Architecture, its other options, and whether sessions share passes: with sliding windows they take turns.
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "qwen3": ("qwen3", {}, True),
    "llama": ("llama", {}, True),
    "llama with scaled positions": ("llama", {"rope_parameters": LLAMA3}, True),
    "mistral": ("mistral", {"sliding_window": None}, True),
    "mistral with a window": ("mistral", {"sliding_window": 24}, False),
    "gemma3": ("gemma3", {"sliding_window": 24, "query_pre_attn_scalar": 16, "layer_types": None}, False),
}

Make = Callable[..., Engine]


@pytest.fixture(name="make")
def make_engines(tokenizer: Any) -> Iterator[Make]:
    made: list[Engine] = []

    def make(name: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0) -> Engine:
        architecture, more, _ = MODELS[name]
        model = build(
            architecture,
            seed=seed,
            attention=attention,
            vocab_size=len(tokenizer),
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=2048,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            **more,
        ).to(dtype)
        steered = attach_lively(model, seed=seed)
        made.append(Engine(model, tokenizer, steered, name=name))
        return made[-1]

    yield make
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


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in MODELS), ("qwen3", "eager"), ("gemma3", "eager")]
)
def test_each_session_is_as_it_is_alone(make: Make, monkeypatch: pytest.MonkeyPatch, name: str, attention: str) -> None:
    engine = make(name, attention=attention)
    first = [run(engine, number) for number in range(SESSIONS)]
    alone = [run(engine, number, first[number]) for number in range(SESSIONS)]
    rows = Rows(engine, monkeypatch)
    assert_same_at_once(lambda number: run(engine, number, first[number]), range(SESSIONS), alone)
    assert (max(rows.found) > 2) == MODELS[name][2]


@pytest.mark.parametrize(("name", "attention"), [("qwen3", "sdpa"), ("qwen3", "eager"), ("gemma3", "sdpa")])
def test_in_bfloat16_they_are_close(make: Make, monkeypatch: pytest.MonkeyPatch, name: str, attention: str) -> None:
    """Rounding may turn a near tie of two tokens; up to there a session is as it is alone."""
    engine = make(name, dtype=torch.bfloat16, attention=attention)
    start = [run(engine, number) for number in range(SESSIONS)]
    alone = [run(engine, number, start[number], tokens=4) for number in range(SESSIONS)]
    rows = Rows(engine, monkeypatch)
    with ThreadPoolExecutor(SESSIONS) as pool:
        found = list(pool.map(lambda number: run(engine, number, start[number], tokens=4), range(SESSIONS)))
    assert (max(rows.found) > 1) == MODELS[name][2]
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
    expected = [alone[k][number] for k, number in jobs]
    assert_same_at_once(lambda job: run(engines[job[0]], job[1], first[job[0]][job[1]]), jobs, expected)
