"""Training a base and an adapter: both learn, and what is frozen stays as it was."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from agentmem import MemoryConfig, SteeredModel
from agentmem.errors import UnsupportedModelError
from agentmem.nano.recipe.model import tie_twins
from agentmem.training.blocks import attending_apart
from agentmem.training.checkpoints import LOG_FILE, logged
from agentmem.training.config import TrainConfig
from agentmem.training.examples import Example, Pass, collate
from agentmem.training.loop import ExampleDataset, training_arguments
from agentmem.training.pretrain import LMBatch, pad_batch, pretrain
from agentmem.training.step import MemoryStep, total_weight
from agentmem.training.trainer import MemoryTrainer
from tests.helpers.core_models import build

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 40


def micro(seed: int = 0) -> Any:
    return build(
        "qwen3",
        seed=seed,
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=None,
    )


def config(out: Path, **keys: Any) -> TrainConfig:
    options = {"batch_size": 1, "learning_rate": 5e-3, "warmup": 5, "device": "cpu", "evaluate_every": 0}
    return TrainConfig(out=str(out), **{**options, **keys})


def lm_batch(step: int) -> LMBatch:
    generator = torch.Generator().manual_seed(step)
    rows = []
    for _ in range(8):
        start = int(torch.randint(VOCABULARY, (1,), generator=generator))
        rows.append(([(start + i) % VOCABULARY for i in range(12)], [0.2] * 4 + [1.0] * 8))
    return pad_batch(rows, 0)


def test_pretraining_lowers_the_loss(tmp_path: Path) -> None:
    pretrain(micro(), lm_batch, config(tmp_path, max_steps=60))
    losses, seconds = logged(tmp_path / LOG_FILE)
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert seconds > 0


def test_a_base_that_is_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight, cut, resumed = micro(), micro(), micro(seed=99)
    for model in (straight, cut, resumed):
        tie_twins(model, [(1, 2), (3, 4)])
    keys = {"max_steps": 9, "save_every": 4}

    def stop(now: Any) -> None:
        if now.step == 6:
            raise KeyboardInterrupt

    pretrain(straight, lm_batch, config(tmp_path / "straight", **keys))
    with pytest.raises(KeyboardInterrupt):
        pretrain(cut, lm_batch, config(tmp_path / "cut", **keys), on_progress=stop)
    pretrain(resumed, lm_batch, config(tmp_path / "cut", **keys))
    for (name, wanted), found in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(wanted, found), name
    assert logged(tmp_path / "cut" / LOG_FILE)[0] == logged(tmp_path / "straight" / LOG_FILE)[0]


def test_what_is_frozen_stays_as_it_was(tmp_path: Path) -> None:
    model = micro()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    before = frozen.detach().clone()
    pretrain(model, lm_batch, config(tmp_path, max_steps=2))
    assert torch.equal(frozen, before)


def binding(number: int) -> Example:
    """One of eight tokens is written after a cue; the question is the cue alone, the reply that token."""
    value = 10 + Random(number).randrange(8)
    written = Pass([1, 2, value, 3], [0] * 4, [0.0] * 4, 4)
    return Example((written,), (Pass([1, 2, value], [0] * 3, [0.0, 0.0, 1.0], 3),))


def test_the_adapter_learns_to_answer_from_the_state_and_the_base_stays_as_it_was(tmp_path: Path) -> None:
    model = micro()
    before = [p.detach().clone() for p in model.parameters()]
    steered = SteeredModel.attach(model, config=MemoryConfig(rank=8, alpha=16, couple_lambda=False))
    step = MemoryStep(steered)
    keys = config(tmp_path, max_steps=130, batch_size=16, learning_rate=2e-2, warmup=10)
    MemoryTrainer(
        step,
        steered,
        ExampleDataset(2**31, lambda number, _: binding(number), seed=0, length=130 * 16),
        lambda examples: collate(examples, 0, joined=step.joined),
        total_weight,
        keys,
        training_arguments(keys),
    ).run()
    losses, _ = logged(tmp_path / LOG_FILE)
    assert sum(losses[-10:]) / 10 < 0.5
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # The control: the same questions from the zero state know nothing.
    batch = collate([binding(number) for number in range(10_000, 10_016)], 0, joined=step.joined)
    assert step.losses(batch, "zero")[0].mean() > 1.5


def test_turns_longer_than_a_models_window_are_refused() -> None:
    model = build("mistral", vocab_size=VOCABULARY, num_hidden_layers=1, sliding_window=3)
    ids, blocks = torch.tensor([[1, 2, 3, 4]]), torch.zeros(1, 4, dtype=torch.int64)
    with attending_apart(model, blocks[:, :3]):
        model(ids[:, :3])
    with attending_apart(model, blocks), pytest.raises(UnsupportedModelError, match="window of 3 tokens"):
        model(ids)
