"""Training: it learns, it resumes to the same bits, refuses foreign checkpoints; memory learns from replies."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import MemoryConfig, SteeredModel
from agentmem.errors import ConfigError, TrainingError, UnsupportedModelError
from agentmem.nano.recipe.model import tie_twins
from agentmem.training.adapter import MemoryBatch, PassBatch, Row, memory_batch, memory_loss, run_pass, train_adapter
from agentmem.training.loop import PARTS, TrainingPlan
from agentmem.training.pretrain import LMBatch, pad_batch, pretrain
from tests.helpers.core_models import TERMS, build
from tests.helpers.numeric import assert_close

VOCABULARY = 40


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def lm_batch(step: int) -> LMBatch:
    generator = torch.Generator().manual_seed(step)
    rows = []
    for _ in range(8):
        start = int(torch.randint(VOCABULARY, (1,), generator=generator))
        rows.append(([(start + i) % VOCABULARY for i in range(12)], [0.2] * 4 + [1.0] * 8))
    return pad_batch(rows, 0)


def test_pretraining_lowers_the_loss() -> None:
    log = pretrain(micro(), lm_batch, TrainingPlan(60, 5e-3, warmup=5), seed=0)
    assert len(log.losses) == 60
    assert log.recent(5) < 0.5 * sum(log.losses[:5]) / 5


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    plan = TrainingPlan(9, 5e-3, warmup=2, save_every=4)
    straight, cut = micro(), micro()
    pretrain(straight, lm_batch, plan, seed=3)

    class Stop(Exception):
        pass

    def stop(step: int, _log: object) -> None:
        if step == 6:
            raise Stop

    file = tmp_path / "base.safetensors"
    with pytest.raises(Stop):
        pretrain(cut, lm_batch, plan, seed=3, checkpoint=file, on_step=stop)
    resumed = micro(seed=99)
    log = pretrain(resumed, lm_batch, plan, seed=3, checkpoint=file)
    assert len(log.losses) == 9
    for (name, wanted), found in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(wanted, found), name
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("tied", [False, True])
def test_two_processes_train_to_the_same_bits_as_one(tied: bool) -> None:
    models = micro(), micro()
    for model, processes in zip(models, (1, 2), strict=True):
        if tied:
            tie_twins(model, [(1, 2), (3, 4)])
        log = pretrain(model, lm_batch, TrainingPlan(6, 5e-3, warmup=2), seed=3, processes=processes)
        assert len(log.losses) == 6
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    steered = [SteeredModel.attach(model, config=MemoryConfig(rank=4, couple_lambda=False)) for model in models]
    for one, processes in zip(steered, (1, 2), strict=True):
        train_adapter(one, memory_of, TrainingPlan(4, 1e-2), processes=processes)
    memories = [list(one.memory.parameters()) for one in steered]
    assert all(torch.equal(a, b) for a, b in zip(*memories, strict=True))


def test_the_parts_of_a_step_add_up_to_it() -> None:
    """Parts keep their share: their losses and gradients add up to those of the whole batch."""
    steered = SteeredModel.attach(
        micro(), config=MemoryConfig(rank=4, couple_lambda=False, output_init="base_slice_fixed")
    )
    batch = memory_of(0)
    batch = replace(batch, of=batch.of.flip(0))
    whole = memory_loss(steered, batch, write_weight=0.5)
    parts = sum(memory_loss(steered, batch, write_weight=0.5, part=part) for part in range(PARTS))
    assert_close(parts, whole, TERMS)


def test_a_worker_that_fails_says_what_happened_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    file, here = tmp_path / "base.safetensors", os.getpid()

    def broken(step: int) -> LMBatch:
        if step == 3 and os.getpid() != here:
            raise ValueError("no such batch")
        return lm_batch(step)

    with pytest.raises(TrainingError, match="no such batch"):
        pretrain(micro(), broken, TrainingPlan(6, 5e-3, save_every=2), seed=0, processes=2, checkpoint=file)
    log = pretrain(micro(), lm_batch, TrainingPlan(6, 5e-3, save_every=2), seed=0, checkpoint=file)
    assert len(log.losses) == 6
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_noticed() -> None:
    here = os.getpid()

    def fatal(step: int) -> LMBatch:
        if step == 2 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return lm_batch(step)

    with pytest.raises(TrainingError, match="exit code -9"):
        pretrain(micro(), fatal, TrainingPlan(6, 5e-3), seed=0, processes=2)


def test_processes_train_after_torch_had_threads_of_its_own() -> None:
    """A fork has none of its parent's threads, and must not wait for them."""
    torch.set_num_threads(2)
    torch.randn(512, 512) @ torch.randn(512, 512)
    pretrain(micro(), lm_batch, TrainingPlan(2, 5e-3), seed=0, processes=2)
    assert torch.get_num_threads() == 2


def test_what_is_frozen_stays_as_it_was() -> None:
    model = micro()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    before = frozen.detach().clone()
    pretrain(model, lm_batch, TrainingPlan(2, 5e-3), seed=0)
    assert torch.equal(frozen, before)


def test_turns_longer_than_a_models_window_are_refused() -> None:
    model = build("mistral", vocab_size=VOCABULARY, num_hidden_layers=1, sliding_window=3)
    steered = SteeredModel.attach(model, config=MemoryConfig(rank=4))
    row = Row()
    row.extend([1, 2, 3], write=True, weight=1.0)
    run_pass(steered, PassBatch.of([row], 0), None)
    row.extend([4], write=True, weight=1.0)
    with pytest.raises(UnsupportedModelError, match="window of 3 tokens"):
        run_pass(steered, PassBatch.of([row], 0), None)


def test_a_finished_run_is_only_loaded(tmp_path: Path) -> None:
    plan, file, model = TrainingPlan(3, 5e-3), tmp_path / "base.safetensors", micro()
    pretrain(model, lm_batch, plan, seed=0, checkpoint=file)
    again = micro(seed=5)

    def refuse(_step: int) -> LMBatch:
        raise AssertionError("no batch is needed")

    pretrain(again, refuse, plan, seed=0, checkpoint=file)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_of_another_plan_or_model_is_refused(tmp_path: Path) -> None:
    plan, file = TrainingPlan(2, 5e-3), tmp_path / "base.safetensors"
    pretrain(micro(), lm_batch, plan, seed=0, checkpoint=file)
    with pytest.raises(ConfigError, match="another run"):
        pretrain(micro(), lm_batch, replace(plan, steps=4), seed=0, checkpoint=file)
    steered = SteeredModel.attach(micro(), config=MemoryConfig(rank=4))
    with pytest.raises(ConfigError, match="another run"):
        train_adapter(steered, memory_of, plan, checkpoint=file)


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps"):
        TrainingPlan(0, 1e-3)
    with pytest.raises(ConfigError, match="at least 1 process"):
        pretrain(micro(), lm_batch, TrainingPlan(1, 1e-3), seed=0, processes=0)


def memory_of(step: int) -> MemoryBatch:
    """One of eight tokens is written after a cue; the question is the cue alone, the reply that token."""
    generator = torch.Generator().manual_seed(step)
    written, questions = [], []
    for i in range(16):
        value = 10 + int(torch.randint(8, (1,), generator=generator))
        row = Row()
        row.extend([1, 2, value, 3], write=True, weight=0.0)
        written.append(row)
        ask = Row()
        ask.extend([1, 2], write=True, weight=0.0)
        ask.extend([value], write=True, weight=1.0)
        questions.append((i, ask))
    return memory_batch(written, questions, 0)


def test_the_adapter_learns_to_answer_from_the_state_and_the_base_stays_as_it_was() -> None:
    model = micro()
    before = [p.detach().clone() for p in model.parameters()]
    steered = SteeredModel.attach(model, config=MemoryConfig(rank=8, alpha=16, couple_lambda=False))
    log = train_adapter(steered, memory_of, TrainingPlan(130, 2e-2, warmup=10, weight_decay=0.0))
    assert log.recent(10) < 0.5
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    # The control: the same questions from the zero state know nothing.
    batch = memory_of(1000)
    loss, _ = run_pass(steered, batch.read, None)
    assert loss.item() > 1.5


def test_a_message_adapter_is_refused() -> None:
    steered = SteeredModel.attach(micro(), config=MemoryConfig(rank=4, write_strategy="message"))
    with pytest.raises(ConfigError, match="token writes"):
        train_adapter(steered, memory_of, TrainingPlan(1, 1e-3))


def test_blocks_see_only_themselves_and_a_turn_apart_equals_a_turn_alone() -> None:
    """Two turns in one pass with blocks give the state of two calls with positions from 0."""
    torch.manual_seed(1)
    steered = SteeredModel.attach(
        micro(), config=MemoryConfig(rank=4, couple_lambda=False, output_init="base_slice_fixed")
    )
    row = Row()
    row.extend([5, 6, 7], write=True, weight=0.0, block=0)
    row.extend([9], write=False, weight=0.0, block=1)
    row.extend([8, 5], write=True, weight=0.0, block=1)
    longer = Row()
    longer.extend([4] * 40, write=True, weight=0.0)
    batch = PassBatch.of([row, longer], 0)
    assert batch.positions[0].tolist()[:6] == [0, 1, 2, 0, 1, 2]
    with torch.no_grad():
        _, state = run_pass(steered, batch, None)
        first = steered(torch.tensor([[5, 6, 7]]))
        second = steered(torch.tensor([[9, 8, 5]]), first.state, write=torch.tensor([[False, True, True]]))
    assert_close(state[:1], second.state, TERMS)


def test_only_weighted_replies_count() -> None:
    steered = SteeredModel.attach(micro(), config=MemoryConfig(rank=4))
    batch = memory_of(0)
    silent = replace(batch, read=replace(batch.read, weights=torch.zeros_like(batch.read.weights)))
    assert memory_loss(steered, silent, write_weight=1.0).item() == 0.0
    assert memory_loss(steered, batch, write_weight=1.0).item() > 0.0
