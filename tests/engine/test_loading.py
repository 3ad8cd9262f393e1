"""Loading from disk: a saved model, its tokenizer and its adapter, and what is missing named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import agentmem
from agentmem import Message, Sampling
from agentmem.errors import AdapterError, ConfigError, MissingAdapterError, ModelNotFoundError

ASK = [Message("user", "How are you?")]


@pytest.fixture
def saved(make_engine: Any, tmp_path: Path) -> tuple[Any, Path]:
    engine = make_engine()
    engine.model.save_pretrained(tmp_path / "model")
    engine.tokenizer.save_pretrained(tmp_path / "model")
    engine.steered.save(tmp_path / "model" / "adapter")
    return engine, tmp_path / "model"


def test_a_saved_model_with_its_own_adapter(saved: tuple[Any, Path]) -> None:
    engine, place = saved
    with agentmem.load(place, device="cpu") as loaded:
        assert loaded.model_fingerprint == engine.model_fingerprint
        sampling = Sampling(max_tokens=6)
        expected, turn = engine.turn(ASK, sampling=sampling), loaded.turn(ASK, sampling=sampling)
        assert turn.token_ids == expected.token_ids
        # A state made on one survives on the other, whose dtype may differ.
        with agentmem.load(place, device="cpu", dtype="bfloat16", adapter=place / "adapter") as half:
            assert half.turn([*ASK, turn.message, *ASK], turn.state, sampling=sampling).state.record.count == 4


def test_an_adapter_of_its_own_or_elsewhere_or_none(saved: tuple[Any, Path]) -> None:
    _, place = saved
    (place / "adapter").rename(place.parent / "elsewhere")
    with pytest.raises(MissingAdapterError, match="adapter="):
        agentmem.load(place)
    with agentmem.load(place, adapter=place.parent / "elsewhere") as engine:
        assert engine.has_memory
    with agentmem.load(place, adapter=False) as engine:
        assert not engine.has_memory
        assert engine.turn(ASK, sampling=Sampling(max_tokens=3)).state is None


def test_what_cannot_be_found_is_named(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, place = saved
    with pytest.raises(AdapterError, match="no/such adapter"):
        agentmem.load(place, adapter="no/such adapter")
    with pytest.raises(ModelNotFoundError, match="nothing-here"):
        agentmem.load(tmp_path / "nothing-here", adapter=False)
    (place / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="chat template"):
        agentmem.load(place)
