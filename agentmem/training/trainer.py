"""Trains the memory of a model in the training loop: its checkpoints are adapters, and the best one is kept.

The best is the one whose measured score is highest: memory minus the better of its controls, not the lowest loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import TrainingArguments

from agentmem.delta.adapter import Adapter, collect, load_adapter, save_adapter
from agentmem.delta.fingerprint import model_fingerprint
from agentmem.delta.model import SteeredModel
from agentmem.errors import ConfigError
from agentmem.training.checkpoints import best_adapters, remove, written_aside
from agentmem.training.config import TrainConfig
from agentmem.training.loop import ExampleDataset, TrainingLoop, TrainProgress, full, like


@dataclass(frozen=True)
class Measurement:
    """What a memory is worth on held-out data.

    Attributes:
        score: memory minus the larger of the zero state and another conversation's memory.
        arms: the result of each arm, for the log and the display.
        save: writes what the measurement was made of (predictions) into a directory.
    """

    score: float
    arms: Mapping[str, float]
    save: Callable[[Path], None] = field(default=lambda _: None)


class MemoryTrainer(TrainingLoop):
    """Trains the memory of a `MemoryStep`.

    Args:
        step: see `TrainingLoop`; `step.memory` is trained, `step.model` is not.
        steered: the steered model of that step.
        dataset, collate, weigh, config, arguments, on_progress: see `TrainingLoop`.
        measure: measures an adapter, in the first process only; None: nothing is measured.
    """

    def __init__(
        self,
        step: nn.Module,
        steered: SteeredModel,
        dataset: ExampleDataset,
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        weigh: Callable[[dict[str, Any]], Tensor],
        config: TrainConfig,
        arguments: TrainingArguments,
        *,
        measure: Callable[[Adapter], Measurement] | None = None,
        on_progress: Callable[[TrainProgress], None] | None = None,
    ) -> None:
        self.steered, self._measure = steered, measure
        self._base = model_fingerprint(steered.model)  # now: later the weights may be spread over devices
        # What is frozen is in no checkpoint of DeepSpeed's, so it is not missing in one.
        step.register_load_state_dict_post_hook(_forgive_frozen)  # type: ignore[no-untyped-call]
        super().__init__(step, dataset, collate, weigh, config, arguments, on_progress=on_progress)
        if self.is_fsdp_enabled and measure is not None:
            raise ConfigError(
                "FSDP spreads the model over devices, and a measurement generates in the first process alone: set "
                "evaluate_every: 0, and measure the adapter afterwards"
            )

    def adapter(self) -> Adapter:
        """The memory as it is now. To be called in all processes at once where it is spread over devices."""
        now = collect(list(self.steered.memory), self.steered.layers, self.steered.config)  # type: ignore[arg-type]
        return Adapter(now.config, {name: full(tensor) for name, tensor in now.tensors.items()}, self._base)

    def save_parameters(self, directory: Path) -> None:
        """Write the adapter."""
        adapter = self.adapter()
        if self.args.should_save:
            save_adapter(directory, adapter)

    def load_parameters(self, directory: Path) -> None:
        """Read the adapter into the memory."""
        stored = load_adapter(directory).tensors
        for layer, module in zip(self.steered.layers, self.steered.memory, strict=True):
            for name, parameter in module.named_parameters():
                with torch.no_grad():
                    parameter.copy_(like(stored[f"model.layers.{layer}.self_attn.{name}"], parameter))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Only now: a run that is resumed from the checkpoint before needs the best one of that time.
        if self.args.should_save:
            for _, old in best_adapters(self.out)[:-1]:
                remove(old)

    def begin(self) -> None:
        """Forget what was best only after the checkpoint that the run goes on from."""
        super().begin()
        if self.args.should_save:
            for step, directory in best_adapters(self.out):
                if step > self.state.global_step:
                    remove(directory)

    def before_step(self) -> None:
        """Set what depends on the step: how much tokens outside of replies read, and how far gradients go."""
        done, module = self.state.global_step / self.state.max_steps, self.accelerator.unwrap_model(self.model)
        warmup = self.config.read_warmup
        module.reading = min(1.0, done / warmup) if warmup else 1.0
        if self.config.gradient == "first_order" and done >= self.config.full_gradient_from:
            module.gradient = "full"

    def after_step(self) -> None:
        """Measure the memory when it is time."""
        step = self.state.global_step
        if self._measure is not None and (step % self.config.evaluate_every == 0 or step == self.state.max_steps):
            self._measure_now(self._measure)

    def _measure_now(self, measure: Callable[[Adapter], Measurement]) -> None:
        """Measure the memory, keep it if it is the best so far, and end the run if it has not been for too long."""
        # Rounded as it will be stored, so that what is measured is what is kept.
        adapter, step = self.adapter().rounded(getattr(torch, self.config.store)), self.state.global_step
        score = [0.0]
        if self.is_world_process_zero():
            measurement = measure(adapter)
            score[0], self.arms = measurement.score, measurement.arms
            self.write_line({"score": score[0], "arms": dict(measurement.arms)})
            # For what report_to names, where they are shown as eval/memory and so on.
            pending = self.control.should_log
            self.log({f"eval_{name}": value for name, value in {"score": score[0], **measurement.arms}.items()})
            self.control.should_log = pending  # else this step's loss would not be logged
        broadcast_object_list(score)
        self.score = score[0]
        best = self.state.best_metric
        # Of equal ones the later is kept: it has seen more. Progress is only what is better.
        if self.args.should_save and (best is None or score[0] >= best):
            with written_aside(self.out / f"best-{step}") as directory:
                save_adapter(directory, adapter)
                measurement.save(directory)
        if best is None or score[0] > best:
            self.state.best_metric, self.state.best_global_step = score[0], step
        elif self.config.patience:
            since = step - (self.state.best_global_step or 0)
            if since >= self.config.patience * self.config.evaluate_every:
                self.control.should_training_stop = self.control.should_save = True


def _forgive_frozen(module: nn.Module, keys: Any) -> None:
    # Also of the memory: weights of projections that it does not correct.
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith("model.") and key not in frozen]
