"""The loop: what is learned does not depend on how a step is divided, nor on where a run is cut."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from agentmem.delta.adapter import load_adapter
from agentmem.errors import ConfigError, TrainingError
from agentmem.training.checkpoints import LOG_FILE, best_adapters, checkpoints, last_checkpoint
from agentmem.training.loop import ExampleDataset
from agentmem.training.trainer import Measurement
from tests.helpers.toy_training import assert_same, forked, losses, run, toy_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_parameters_with_a_rate_of_their_own_learn_at_it_also_when_resumed(tmp_path: Path) -> None:
    rates = {"memory_k_proj": 0.0, "memory_v_proj": 0.1}
    before, plain = dict(toy_trainer(tmp_path / "start").adapter().tensors), run(tmp_path / "plain")
    found = run(tmp_path / "rates", rates=rates)
    for name, tensor in before.items():
        if name.endswith("memory_k_proj"):
            assert torch.equal(found[name], tensor)
        elif name.endswith("memory_v_proj"):
            assert 0 < (found[name] - tensor).abs().max() < 0.2 * (plain[name] - tensor).abs().max()

    def stop(now: Any) -> None:
        if now.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", rates=rates, on_progress=stop)
    assert_same(run(tmp_path / "cut", rates=rates), found)
    with pytest.raises(ConfigError, match="nothing that is trained is called 'memory_kproj'"):
        run(tmp_path / "wrong", rates={"memory_kproj": 0.5})


def test_a_step_is_the_same_however_it_is_divided_into_batches(tmp_path: Path) -> None:
    """Weights differ from example to example, so a mean of the batches' means would be another loss."""
    whole = run(tmp_path / "whole", batch_size=4)
    parts = run(tmp_path / "parts", batch_size=1, accumulate=4)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert_same(parts, whole, 1e-5)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    wanted = run(tmp_path / "straight", max_steps=12)
    slowly = partial(run, tmp_path / "cut", max_steps=12, on_progress=lambda _: time.sleep(0.2))
    process = forked(slowly)
    while len(checkpoints(tmp_path / "cut")) < 2 and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    assert 4 <= checkpoints(tmp_path / "cut")[-1][0] < 12
    # As if it had been killed while it wrote a checkpoint, and a line of the log.
    half = tmp_path / "cut/.checkpoint-99.partial"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    with (tmp_path / "cut" / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write('{"step": 12, "los')
    assert_same(run(tmp_path / "cut", max_steps=12), wanted)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")


def test_a_checkpoint_is_an_adapter_without_the_model(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert_same(dict(load_adapter(tmp_path / "checkpoint-6").tensors), found)
    assert sorted(path.name for path in (tmp_path / "checkpoint-6").iterdir()) == [
        "adapter.safetensors",
        "delta_mem_config.json",
        "optimizer.safetensors",
        "trainer_state.json",
    ]


def test_a_state_without_what_is_frozen_can_be_loaded(tmp_path: Path) -> None:
    """As DeepSpeed stores it. What is frozen is the model, and weights of projections that are not corrected."""
    trainer = toy_trainer(tmp_path)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(not p.requires_grad for p in trainer.steered.memory.parameters())
    trainer.model.load_state_dict(trained)
    del trained["memory.0.delta_o_proj"]
    with pytest.raises(RuntimeError, match=r"memory\.0\.delta_o_proj"):
        trainer.model.load_state_dict(trained)


def test_only_so_many_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6]
    assert not list(tmp_path.glob(".*"))


def test_a_finished_run_is_only_loaded(tmp_path: Path) -> None:
    wanted = run(tmp_path)

    def refuse(number: int, rng: Random) -> Any:
        raise AssertionError("no example is needed")

    assert_same(run(tmp_path, make=refuse), wanted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop_at_3(now: Any) -> None:
        if now.step == 3:
            os.kill(os.getpid(), number)

    trainer = toy_trainer(tmp_path, on_progress=stop_at_3)
    handler = signal.getsignal(number)
    trainer.run()
    assert trainer.stopped
    assert "a second Ctrl-C stops at once" in capfd.readouterr().err
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert signal.getsignal(number) is handler


def test_the_best_memory_is_kept_and_no_progress_ends_the_run(tmp_path: Path) -> None:
    scores, measured = iter([0.2, 0.5, 0.4, 0.5, 0.9]), []

    def measure(adapter: Any) -> Measurement:
        measured.append(adapter)
        return Measurement(next(scores), {"memory": 0.0}, lambda path: (path / "note").write_text("x"))

    toy_trainer(tmp_path, measure=measure, max_steps=20, evaluate_every=2, patience=2).train()
    assert len(measured) == 4  # of equal ones the later is kept, but it is no progress
    assert [step for step, _ in best_adapters(tmp_path)] == [8]
    assert_same(dict(load_adapter(tmp_path / "best-8").tensors), dict(measured[3].tensors))
    assert (tmp_path / "best-8/note").exists()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    arms = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text("utf-8").splitlines()]
    assert [line["score"] for line in arms if "score" in line] == [0.2, 0.5, 0.4, 0.5]


def test_a_resumed_run_knows_the_best_of_before(tmp_path: Path) -> None:
    scores = {2: 0.9, 4: 0.1, 6: 0.2}

    def trainer(*, dies: bool) -> Any:
        made: Any = None

        def measure(_: Any) -> Measurement:
            step = made.state.global_step
            if dies and step == 6:
                raise KeyboardInterrupt
            return Measurement(scores[step], {})

        made = toy_trainer(tmp_path, measure=measure, evaluate_every=2)
        return made

    with pytest.raises(KeyboardInterrupt):
        trainer(dies=True).train()
    again = trainer(dies=False)
    again.train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))
    assert again.state.best_global_step == 2
    assert [step for step, _ in best_adapters(tmp_path)] == [2]


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    def broken(number: int, rng: Random) -> Any:
        return [5, 6, 7, 4], [5, 6, 7], float("nan") if number == 33 else 1.0

    with pytest.raises(TrainingError, match="learning_rate"):
        run(tmp_path, make=broken, max_steps=20, save_every=1)
    last = last_checkpoint(tmp_path)
    assert last is not None
    assert all(tensor.isfinite().all() for tensor in load_adapter(last).tensors.values())


def test_each_round_takes_every_conversation_once_in_an_order_of_its_own() -> None:
    dataset = ExampleDataset(7, lambda number, rng: (number, rng.random()), seed=1, length=21)
    rounds = [[dataset[i][0] for i in range(start, start + 7)] for start in (0, 7, 14)]
    assert [sorted(numbers) for numbers in rounds] == [list(range(7))] * 3
    assert len({tuple(numbers) for numbers in rounds}) == 3
    assert dataset[3] == dataset[3]
    endless = ExampleDataset(2**31, lambda number, rng: number, seed=1, length=10)
    assert [endless[i] for i in range(3)] == [0, 1, 2]
