"""The training loop: AdamW with warm-up and cosine decay, gradient clipping, atomic checkpoints, exact resumption.

The loss of a step must depend only on the parameters and the step's number (batches are drawn from a seed and that
number). Then a run that is stopped and resumed ends with the same bits as one that was not. A step has `PARTS` parts,
which any number of processes can share without changing the bits. A checkpoint is one safetensors file, replaced
atomically; nothing in it can execute.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agentmem.errors import ConfigError
from agentmem.training.gradients import ParallelGradients, PartLoss

PARTS = 2
"""Parts of a step, whose gradients are summed; at most this many processes can share the work."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # options of mallopt, from malloc.h


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train.

    Attributes:
        steps: optimiser steps in all.
        learning_rate: the peak, reached after `warmup` steps; then it decays along a cosine to `floor` times the peak.
        weight_decay: decoupled; applied to matrices, not to vectors.
        clip: the largest global gradient norm.
        save_every: steps between checkpoints.
    """

    steps: int
    learning_rate: float
    warmup: int = 50
    floor: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    save_every: int = 200

    def __post_init__(self) -> None:
        if self.steps < 1 or self.save_every < 1 or self.learning_rate <= 0:
            raise ConfigError(f"steps and save_every must be at least 1 and learning_rate positive; found {self}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass
class TrainingLog:
    """What a run has done: the loss of every step, and the seconds of wall time over all its sessions."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def recent(self, count: int = 50) -> float:
        """Mean loss of the last `count` steps (nan before the first step)."""
        tail = self.losses[-count:]
        return sum(tail) / len(tail) if tail else math.nan


def fit(
    parameters: Iterable[tuple[str, nn.Parameter]],
    loss_of: PartLoss,
    plan: TrainingPlan,
    *,
    processes: int = 1,
    checkpoint: Path | None = None,
    on_step: Callable[[int, TrainingLog], None] | None = None,
) -> TrainingLog:
    """Train the named parameters in place.

    Args:
        parameters: the parameters to train, by unique names.
        loss_of: computes the loss of one of the `PARTS` parts of a step (counted from 0), with its graph; the losses of
            the parts add up to the loss of the step.
        plan: steps and rates.
        processes: how many processes compute the parts, at most `PARTS`, with one thread each; the bits are those of
            one process with one thread.
        checkpoint: a file to save to, and to resume from if it exists; None saves nothing.
        on_step: called after every step with the number of completed steps and the log.

    Raises:
        ConfigError: the checkpoint holds other parameters or belongs to a run with another plan; or `processes` is 0.
        FloatingPointError: the loss is not finite; the last checkpoint is intact.
        TrainingError: a process failed; the last checkpoint is intact.
    """
    named = dict(parameters)
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": plan.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=plan.learning_rate,
        betas=(0.9, 0.98),
    )
    log, done = TrainingLog(), 0
    if checkpoint is not None and checkpoint.exists():
        log, done = _load(checkpoint, named, optimizer, plan)
    began = time.perf_counter() - log.seconds
    processes = processes if done < plan.steps else 1
    with ParallelGradients(list(named.values()), loss_of, count=PARTS, processes=processes) as parts:
        for step in range(done, plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
            value = parts.run(step)
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss of step {step} is {value}; lower the learning rate")
            torch.nn.utils.clip_grad_norm_(list(named.values()), plan.clip)
            optimizer.step()
            log.losses.append(value)
            log.seconds = time.perf_counter() - began
            if checkpoint is not None and ((step + 1) % plan.save_every == 0 or step + 1 == plan.steps):
                _save(checkpoint, named, optimizer, plan, log)
            if on_step is not None:
                on_step(step + 1, log)
    return log


def _plan_text(plan: TrainingPlan) -> str:
    """The plan as text for a checkpoint's header."""
    return f"Plan({', '.join(f'{field.name}={getattr(plan, field.name)!r}' for field in fields(plan))})"


def _save(
    path: Path,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    plan: TrainingPlan,
    log: TrainingLog,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in named.items():
        tensors[f"parameter/{name}"] = parameter.detach().contiguous()
        # A parameter that has never had a gradient has no moments.
        for moment in _MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].contiguous()
                tensors[f"step/{name}"] = torch.as_tensor(optimizer.state[parameter]["step"])
    header = {"plan": _plan_text(plan), "losses": json.dumps(log.losses), "seconds": repr(log.seconds)}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".partial")
    save_file(tensors, fresh, metadata=header)
    os.replace(fresh, path)


def _load(
    path: Path, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, plan: TrainingPlan
) -> tuple[TrainingLog, int]:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        held = set(file.keys())
        if header.get("plan") != _plan_text(plan) or {f"parameter/{n}" for n in named} != {
            key for key in held if key.startswith("parameter/")
        }:
            raise ConfigError(
                f"{path} is the checkpoint of another run: expected {_plan_text(plan)}, found {header.get('plan')}; "
                "remove it to start anew"
            )
        for name, parameter in named.items():
            stored = file.get_tensor(f"parameter/{name}")
            if stored.shape != parameter.shape:
                raise ConfigError(
                    f"{path}: {name} must have shape {tuple(parameter.shape)}, found {tuple(stored.shape)}; "
                    "remove the checkpoint to start anew"
                )
            with torch.no_grad():
                parameter.copy_(stored)
            if f"step/{name}" in held:
                optimizer.state[parameter] = {
                    "step": file.get_tensor(f"step/{name}"),
                    **{moment: file.get_tensor(f"{moment}/{name}") for moment in _MOMENTS},
                }
    losses = json.loads(header["losses"])
    return TrainingLog(losses, float(header["seconds"])), len(losses)


def keep_memory() -> bool:
    """Let this process keep freed memory blocks; True where the C library has the setting (glibc).

    By default glibc maps large blocks anew and unmaps them when they are freed, so every training step pays page faults
    for activations that the previous step had freed: about half of its time for a small model. The setting affects the
    whole process.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    answers = [mallopt(name, value) for name, value in settings]
    return all(answer == 1 for answer in answers)
