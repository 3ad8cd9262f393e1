"""The model card: the hub reads its head, a user the rest, and `agentmem.load` the base model's name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from agentmem import MemoryConfig, Message, SteeredModel
from agentmem.delta.adapter import load_adapter
from agentmem.delta.published import base_name
from agentmem.errors import AgentMemError
from agentmem.training.card import CardFacts, write_card
from agentmem.training.contexts import Arm
from agentmem.training.conversations import SourceFile
from agentmem.training.predictions import ArmResults, Prediction
from tests.helpers.core_models import tiny

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Data:
    name: str
    licence: str = ""
    files: tuple[SourceFile, ...] = ()


def made(arm: Arm, right: int) -> list[Prediction]:
    said = Message("assistant", "x")
    return [Prediction(f"{n}", arm, n, "ask", "?", ("x",), (), said, 9, n < right, False) for n in range(10)]


def test_a_card_says_what_the_hub_and_a_user_need(tmp_path: Path) -> None:
    steered = SteeredModel.attach(tiny("llama"), config=MemoryConfig(rank=2))
    steered.save(tmp_path)
    results = ArmResults(tuple(made("memory", 9) + made("zero", 0) + made("foreign", 1)))
    file = SourceFile(path=Path("/home/me/sgd/dev.jsonl.xz"), sha256="ab" * 32, bytes=1234)
    facts = CardFacts(
        name="my-memory",
        base=BASE,
        licence="Apache-2.0",
        sources=[Data("facts"), Data("sgd", "CC-BY-SA-4.0", (file,))],
        recipe={"learning_rate": 0.003, "out": Path("runs/x")},
        steps=1700,
        seconds=7200,
        machine="two CPU cores",
        results=results,
        notes="## Limits\n\nExact facts belong into a store.",
    )
    card = ModelCard.load(write_card(tmp_path, facts))
    assert card.data.base_model == BASE
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["facts", "sgd"]
    assert "delta-mem" in card.data.tags
    assert card.data.eval_results[0].metric_value == 0.9
    assert base_name(tmp_path) == BASE
    adapter = load_adapter(tmp_path)
    for said in (
        adapter.fingerprint,
        adapter.base,
        "ab" * 32,
        "1,234 bytes",
        "CC-BY-SA-4.0",
        "1,700 steps in 2.0 hours on two CPU cores",
        '"learning_rate": 0.003',
        "| its own memory | 0.900 |",
        "| the memory of another conversation | 0.100 |",
        "above the better of the two controls: 0.800",
        "Exact facts belong into a store.",
    ):
        assert said in card.text, said
    assert "/home/me" not in card.text


def test_a_card_of_a_run_that_measured_nothing(tmp_path: Path) -> None:
    SteeredModel.attach(tiny("llama"), config=MemoryConfig(rank=2)).save(tmp_path)
    card = ModelCard.load(write_card(tmp_path, CardFacts("m", BASE)))
    assert "Not measured." in card.text
    assert card.data.eval_results is None
    with pytest.raises(AgentMemError, match=r"delta_mem_config\.json is missing"):
        write_card(tmp_path / "..", CardFacts("m", BASE))
