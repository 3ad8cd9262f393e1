"""The training loop: `transformers.Trainer` for any module whose forward pass returns its loss.

What differs from the Trainer as it is:

- A step's loss is the weighted mean over all its batches, on all devices. So examples may be divided among devices,
  batches and accumulated batches in any way without changing what is learned.
- An example follows from its number, and the numbers of a step from the step's. So a run that is resumed continues with
  the examples that would have come next, and nothing is computed to get there.
- A checkpoint holds the trained parameters and the optimiser's moments in safetensors, nothing that can execute, and no
  frozen parameter. It is whole or it is not there (`checkpoints`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from agentmem.errors import ConfigError, TrainingError
from agentmem.training.checkpoints import LOG_FILE, checkpoints, cut_log, last_checkpoint, remove
from agentmem.training.config import TrainConfig, suggestion

_PARAMETERS_FILE = "parameters.safetensors"
_MOMENTS_FILE = "optimizer.safetensors"
_STATE_FILE = "trainer_state.json"  # the Trainer's own, by this name
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_WAIT = 6 * 3600  # seconds that other processes wait while the first one measures
_RECENT = 50  # steps whose mean loss is shown


class ExampleDataset(torch.utils.data.Dataset[Any]):
    """Examples by number: those of step s are numbers s * n to (s + 1) * n - 1, for n conversations a step.

    Args:
        count: the number of conversations; they are taken in an order drawn anew each time all have been taken.
        make: makes the example of a conversation's number, with a source of random choices.
        seed: determines orders and choices.
        length: examples of the whole run.
    """

    _SHUFFLED = 1 << 22  # sources larger than this are endless generators, whose own order is as good as any

    def __init__(self, count: int, make: Callable[[int, Random], Any], *, seed: int, length: int) -> None:
        self._count, self._make, self._seed, self._length = count, make, seed, length
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._make(self._conversation(index), Random(f"{self._seed}/{index}"))

    def _conversation(self, index: int) -> int:
        if self._count > self._SHUFFLED:
            return index % self._count
        round_, place = divmod(index, self._count)
        if self._order[0] != round_:
            order = list(range(self._count))
            Random(f"{self._seed}/order/{round_}").shuffle(order)
            self._order = round_, order
        return self._order[1][place]


@dataclass(frozen=True)
class TrainProgress:
    """How far a run is: loss is the mean of the last 50 steps, arms and score those of the last measurement.

    `stage` is "logit lens" in steps before the first of the model itself, else "training".
    """

    step: int
    max_steps: int
    loss: float
    seconds: float
    seconds_left: float
    arms: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    stage: str = "training"


class TrainingLoop(Trainer):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Trains the parameters of a module that are not frozen.

    Args:
        step: `step(batch)` returns a dict with `loss`, the mean by weight over the batch's tokens, `weight`, the sum of
            these weights, and other numbers for the log.
        dataset: the examples, `batch_size * accumulate * processes` for each step.
        collate: makes a batch of a list of examples.
        weigh: the `weight` of a batch before it is computed.
        config: the run; only its steps, rates and directory matter here.
        arguments: see `training_arguments`.
        on_progress: called after every step, in the first process only.
    """

    # Each batch's loss is already its share of the step's: the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        step: nn.Module,
        dataset: ExampleDataset,
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        weigh: Callable[[dict[str, Any]], Tensor],
        config: TrainConfig,
        arguments: TrainingArguments,
        *,
        on_progress: Callable[[TrainProgress], None] | None = None,
    ) -> None:
        self.config, self._weigh, self._on_progress = config, weigh, on_progress
        self.out = Path(config.out)
        super().__init__(step, arguments, collate, dataset, callbacks=[_Hooks(self)])
        self.remove_callback(PrinterCallback)
        self.stop = StopRequest()
        self.stopped = False  # whether the run was stopped from outside
        self.arms: Mapping[str, float] = {}
        self.score: float | None = None
        self._total_weight = torch.zeros(())
        self._scalars: dict[str, Tensor] = {}
        self._losses: list[float] = []
        self._seconds_before = 0.0
        self._began = time.perf_counter()
        self._first_step = 0
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if getattr(plugin, "fsdp_version", 1) != 2:
                raise ConfigError("FSDP is supported in its second version: set fsdp_version: 2 in accelerate's config")
            # What is written leaves a layer in its middle, so gradients come back where nothing gathers its weights:
            # the process would die of it.
            if plugin.auto_wrap_policy is not None:
                raise ConfigError(
                    "FSDP must gather model and memory as one unit: set fsdp_auto_wrap_policy: NO_WRAP in accelerate's "
                    "config (`agentmem train --accelerate-config fsdp` prints the path of one)"
                )

    def run(self) -> None:
        """Train to the end, or until the process is told to stop, from the last checkpoint if there is one.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        last = last_checkpoint(self.out)
        with self.stop.listen():
            self.train(resume_from_checkpoint=None if last is None else str(last))

    # What a step is.

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # The dataset has the order; a random sampler would also hold a permutation of an endless source.
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The batches of a step; their weights are added over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weight = sum(
            (self._weigh(batch).to(device, torch.float32) for batch in batches), torch.zeros((), device=device)
        )
        if self.accelerator.num_processes > 1:
            # One exchange for both: all processes have to stop after the same step.
            both = torch.stack([weight, torch.full_like(weight, float(self.stop.requested))])
            weight, stops = self.accelerator.gather(both[None]).sum(0)
            self.stopped = bool(stops > 0)
        self._total_weight = weight
        return batches, None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's share of the step's weighted mean.

        Times the number of processes, since the gradients of processes are averaged and not added.
        """
        outputs = model(inputs)
        for name, value in outputs.items():
            if name not in ("loss", "sum", "weight"):
                self._scalars[name] = torch.as_tensor(value).detach()
        share = outputs["weight"].detach() / self._total_weight.clamp_min(1e-9)
        loss = outputs["loss"] * share * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW, with a group for each rate that the config names.

        Raises:
            ConfigError: it names a parameter that is not trained.
        """
        created = self.optimizer is None
        super().create_optimizer(model)
        if created and self.config.rates:
            names = {parameter: name.rsplit(".", 1)[-1] for name, parameter in self._trained()}
            for name in self.config.rates.keys() - set(names.values()):
                known = sorted(set(names.values()))
                raise ConfigError(f"rates: nothing that is trained is called {name!r}{suggestion(name, known)}; "
                                  f"there are {', '.join(known)}")  # fmt: skip
            shares = {parameter: self.config.rates.get(name, 1.0) for parameter, name in names.items()}
            self.optimizer.param_groups[:] = [
                {**group, "params": [p for p in group["params"] if shares[p] == share], "lr": group["lr"] * share}
                for group in self.optimizer.param_groups
                for share in sorted({shares[p] for p in group["params"]})
            ]
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm-up, then a cosine down to `floor` times the rate."""
        if self.lr_scheduler is None:
            self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer, partial(rate_factor, self.config)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights decay in matrices, not in biases and scales."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    # Checkpoints.

    def save_parameters(self, directory: Path) -> None:
        """Write the trained parameters. Called in all processes at once; the first one writes."""
        tensors = {name: full(parameter.detach()).cpu().contiguous() for name, parameter in self._trained()}
        if self.args.should_save:
            save_file(tensors, directory / _PARAMETERS_FILE)

    def load_parameters(self, directory: Path) -> None:
        """Read them back, in place."""
        stored = load_file(directory / _PARAMETERS_FILE)
        for name, parameter in self._trained():
            with torch.no_grad():
                parameter.copy_(like(stored[name], parameter))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        aside = self.out / f".{name}.partial"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.save_parameters(aside)
        if self.is_deepspeed_enabled:  # each process writes its own part of the moments
            self.model_wrapped.save_checkpoint(str(aside), exclude_frozen_parameters=True)
        else:
            moments = self._moments()
            if self.args.should_save:
                save_file(moments, aside / _MOMENTS_FILE)
        if self.args.should_save:
            self.state.save_to_json(str(aside / _STATE_FILE))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            remove(self.out / name)
            os.replace(aside, self.out / name)
            for _, old in checkpoints(self.out)[: -self.config.keep]:
                remove(old)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_parameters(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not self.is_deepspeed_enabled:  # which loads its own
            stored = load_file(Path(checkpoint) / _MOMENTS_FILE)
            for name, parameter in self._trained():
                held = {moment: stored[key] for moment in _MOMENTS if (key := f"{moment}/{name}") in stored}
                if held:
                    placed = {m: t if m == "step" else like(t, parameter) for m, t in held.items()}
                    self.optimizer.state[parameter] = placed
        # All that a schedule depends on is the number of the step.
        state = self.lr_scheduler.state_dict()
        rates = [rate * rate_factor(self.config, self.state.global_step) for rate in state["base_lrs"]]
        state |= {"last_epoch": self.state.global_step, "_step_count": self.state.global_step + 1, "_last_lr": rates}
        self.lr_scheduler.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: what is drawn in a step follows from its number."""

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {
            f"{moment}/{name}": full(torch.as_tensor(state[parameter][moment])).cpu().contiguous().clone()
            for name, parameter in self._trained()
            for moment in _MOMENTS
            if moment in state.get(parameter, {})
        }

    # What is seen of a run.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line to `log.jsonl`, and to what `report_to` names.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        step = self.state.global_step
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                last = last_checkpoint(self.out)
                raise TrainingError(
                    f"the {name} of step {step} is {logs[name]}; lower learning_rate (it is "
                    f"{self.config.learning_rate}) or raise warmup. Checkpoints are whole; the last one: {last}"
                )
        if "loss" in logs:
            logs |= {name: float(value) for name, value in self._scalars.items()}
            self._losses = [*self._losses[1 - _RECENT :], logs["loss"]]
        super().log(logs, start_time)
        self.state.log_history.clear()  # it would go into every checkpoint
        if "loss" in logs:
            self.write_line({key: value for key, value in logs.items() if key != "epoch"})
            self._show()

    def write_line(self, values: Mapping[str, Any]) -> None:
        """Append a line to the log, in the first process."""
        if self.args.should_save:
            line = {"step": self.state.global_step, "seconds": round(self.seconds(), 2), **values}
            with (self.out / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def seconds(self) -> float:
        """Seconds of this run in all its sittings."""
        return self._seconds_before + time.perf_counter() - self._began

    def _show(self) -> None:
        if self._on_progress is None or not self.is_world_process_zero():
            return
        step = self.state.global_step
        done = step - self._first_step
        each = (time.perf_counter() - self._began) / max(1, done)
        self._on_progress(
            TrainProgress(
                step=step,
                max_steps=self.state.max_steps,
                loss=sum(self._losses) / max(1, len(self._losses)),
                seconds=self.seconds(),
                seconds_left=each * (self.state.max_steps - step),
                arms=self.arms,
                score=self.score,
            )
        )

    # Where subclasses join in.

    def begin(self) -> None:
        """Take up the log where the run is resumed; what was logged after the checkpoint comes again."""
        self._first_step, self._began = self.state.global_step, time.perf_counter()
        if self.args.should_save:
            self._seconds_before = cut_log(self.out / LOG_FILE, self.state.global_step)

    def before_step(self) -> None:
        """Called before each step."""

    def after_step(self) -> None:
        """Called after each step, unless the run ends because it was stopped."""


class _Hooks(TrainerCallback):  # type: ignore[misc]
    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._loop.begin()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._loop.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loop = self._loop
        if loop.accelerator.num_processes == 1:
            loop.stopped = loop.stop.requested
        if loop.stopped:
            control.should_training_stop = control.should_save = True
        else:
            loop.after_step()


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The Trainer's own options for a run. Finds the device, and joins the other processes if there are any."""
    arguments = TrainingArguments(
        output_dir=config.out,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.clip,
        optim="adamw_torch",
        seed=config.seed,
        use_cpu=config.device == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        report_to=list(config.report_to) or "none",
        project="agentmem",
        run_name=config.out,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=config.workers,
        dataloader_persistent_workers=config.workers > 0,
        dataloader_pin_memory=config.device not in ("cpu", "mps") and torch.cuda.is_available(),
        # A batch in which nothing is written reaches no write parameter.
        ddp_find_unused_parameters=True,
        ddp_timeout=_WAIT,
    )
    # Several visible GPUs and one process: the Trainer would replicate the step by threads, which share one model here.
    arguments.device  # noqa: B018 - finds the devices
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def rate_factor(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0, as a share of the highest."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.max_steps - config.warmup)
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class StopRequest:
    """Whether the process was told to end (SIGTERM or Ctrl-C); the loop then saves a checkpoint and returns."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Catch the signals while training; a second Ctrl-C interrupts at once. Only in a process's main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, _frame: Any) -> None:
            self.requested = True
            signal.signal(number, before[number])
            if os.environ.get("RANK", "0") == "0":
                # Not by print: a handler may run in the middle of one.
                os.write(2, b"stopping after this step, with a checkpoint; a second Ctrl-C stops at once\n")

        try:
            for number in before:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over devices, in one piece."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor in one piece, where and in what parts a parameter is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device).reshape(parameter.shape)
