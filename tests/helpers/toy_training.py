"""A memory that is trained on tokens without meaning, in seconds: for tests of the loop itself."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentmem import MemoryConfig, SteeredModel
from agentmem.delta.adapter import Adapter
from agentmem.training.checkpoints import LOG_FILE
from agentmem.training.config import TrainConfig
from agentmem.training.loop import ExampleDataset, training_arguments
from agentmem.training.trainer import Measurement, MemoryTrainer
from tests.helpers.core_models import build

CONVERSATIONS = 40


class ToyStep(nn.Module):
    """Writes a cue and a value, and learns to say the value after the cue."""

    def __init__(self, steered: SteeredModel) -> None:
        super().__init__()
        self.steered, self.model, self.memory = steered, steered.model, steered.memory

    def train(self, mode: bool = True) -> ToyStep:
        self.memory.train(mode)
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        state = self.steered(batch["written"]["ids"], logits_to_keep=-1).state
        logits = self.steered(batch["read"]["ids"], state, write=False).logits
        assert logits is not None
        losses = F.cross_entropy(logits[:, -2].float(), batch["read"]["ids"][:, -1], reduction="none")
        weight = weigh(batch)
        loss = (losses * batch["read"]["weight"]).sum() / weight
        return {"loss": loss, "weight": weight, "mean_state": state.detach().mean()}


def make_example(number: int, rng: Random) -> tuple[list[int], list[int], float]:
    """What is written, what is read, and the weight of its last token, which differs from example to example."""
    value = 10 + (number * 7 + rng.randrange(3)) % 11
    return [5, 6 + number % 3, value, 4], [5, 6 + number % 3, value], 1.0 + number % 4


def collate(examples: Sequence[Any]) -> dict[str, Any]:
    """A nested batch, as the real ones are."""
    weights = torch.tensor([weight for _, _, weight in examples])
    return {
        "written": {"ids": torch.tensor([written for written, _, _ in examples])},
        "read": {"ids": torch.tensor([read for _, read, _ in examples]), "weight": weights},
    }


def weigh(batch: dict[str, Any]) -> Tensor:
    """The weight of all tokens of a batch."""
    weight: Tensor = batch["read"]["weight"].sum()
    return weight


def toy_trainer(
    out: Path,
    *,
    measure: Callable[[Adapter], Measurement] | None = None,
    on_progress: Callable[[Any], None] | None = None,
    make: Callable[[int, Random], Any] = make_example,
    **keys: Any,
) -> MemoryTrainer:
    """A trainer over a tiny random Llama; `keys` are those of the config."""
    keys = {
        "max_steps": 6,
        "batch_size": 4,
        "learning_rate": 2e-2,
        "warmup": 2,
        "save_every": 2,
        "device": "cpu",
    } | keys
    config = TrainConfig(model="toy", data=("toy",), out=str(out), **keys)
    model = build("llama", num_hidden_layers=2).requires_grad_(False)
    steered = SteeredModel.attach(model, config=MemoryConfig(rank=4, output_init="base_slice_fixed"), seed=config.seed)
    arguments = training_arguments(config)
    conversations = config.max_steps * config.batch_size * config.accumulate * arguments.world_size
    dataset = ExampleDataset(CONVERSATIONS, make, seed=config.seed, length=conversations)
    step = ToyStep(steered)
    more: Any = {"measure": measure, "on_progress": on_progress}
    return MemoryTrainer(step, steered, dataset, collate, weigh, config, arguments, **more)


def run(out: Path, **keys: Any) -> dict[str, Tensor]:
    """Train, from the last checkpoint if there is one; the memory at the end."""
    trainer = toy_trainer(out, **keys)
    trainer.run()
    return dict(trainer.adapter().tensors)


def losses(out: Path) -> list[float]:
    """The logged loss of every step; all are there, once."""
    lines = [json.loads(line) for line in (out / LOG_FILE).read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 1 + len(lines)))
    return [line["loss"] for line in lines if "loss" in line]


def forked(work: Callable[[], object]) -> Any:
    """A fork of this process, which takes no time to start.

    A fork of a process with threads may hang where it needs one of them; the loop needs none.
    """
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Compare two memories by name."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
