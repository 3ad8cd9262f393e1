"""Trains a memory through a logit lens: on the frozen model's hidden states, without running the model.

The memory of every layer writes and reads exactly as it does in the model, and its corrections are added up where the
last norm begins, as if the layers above a correction did nothing with it (so reads a logit lens). That is not what the
model does, but most of what a memory has to learn is the same: which tokens to write, how to find them again, and how
to name them. A step costs a fraction of one that runs the model: hidden states are computed once.

The hidden states are those of the bare model, so this suits memories that steer only replies (`steered_tokens: reply`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentmem import kernels
from agentmem.delta.layer import LayerMemory
from agentmem.delta.model import SteeredModel
from agentmem.errors import ConfigError
from agentmem.kernels import ScanArgs
from agentmem.training.config import TrainConfig
from agentmem.training.examples import Example, Pass
from agentmem.training.hidden import hidden_states, last_norm
from agentmem.training.loop import TrainProgress, rate_factor

_RATE = 0.01  # of a weight's root mean square in a step
_LEAST_RATE = 1e-3  # of weights that begin at zero
_BIAS_RATE = 0.02
_WARMUP = 10


@dataclass(frozen=True)
class _Read:
    """Tokens of a pass that are written or predict something, as the bare model sees them.

    Attributes:
        hidden: [L, t, D], the inputs of the attention of each layer with memory.
        writes: [t] bool.
        residual: [n, D], what enters the last norm at the tokens that predict something.
        places: [n] int64, these tokens among the t.
        targets, weights: [n], the token that follows each, and its weight in the loss.
    """

    hidden: Tensor
    writes: Tensor
    residual: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class FrozenExample:
    """What the bare model makes of an example: of the tokens of its passes joined, and of each question."""

    written: Tensor  # [L, T, D]
    asks: tuple[_Read, ...]


@torch.no_grad()
def freeze(steered: SteeredModel, examples: Sequence[Example], pad: int, *, rows: int = 32) -> list[FrozenExample]:
    """Run examples through the bare model once.

    Args:
        steered: the model with memory, of token writes.
        examples: what is written and asked.
        pad: the token id of padding.
        rows: how many passes run through the model together.
    """
    # Without questions there is nothing to learn here, and without passes nothing to ask for.
    examples = [example for example in examples if example.passes and example.asks]
    passes = [each for example in examples for each in (*example.passes, *example.asks)]
    states = hidden_states(steered, [each.ids for each in passes], pad, last=True, at_once=rows)
    reads = {number: _read(passes[number], found) for number, found in states}
    in_order = iter([reads[number] for number in range(len(passes))])
    frozen = list[FrozenExample]()
    for example in examples:
        written = torch.cat([read.hidden[:, read.writes] for read in islice(in_order, len(example.passes))], 1)
        frozen.append(FrozenExample(written, tuple(islice(in_order, len(example.asks)))))
    return frozen


def _read(each: Pass, states: Tensor) -> _Read:
    """A pass, from the inputs of its layers and of the last norm, [L + 1, T, D]."""
    predicts = [n for n, weight in enumerate(each.weights[1:]) if weight]
    kept = sorted({n for n, segment in enumerate(each.segments) if segment >= 0} | set(predicts))
    return _Read(
        states[:-1, kept],
        torch.tensor([each.segments[n] >= 0 for n in kept]),
        states[-1, predicts],
        torch.tensor([kept.index(n) for n in predicts], dtype=torch.int64),
        torch.tensor([each.ids[n + 1] for n in predicts], dtype=torch.int64),
        torch.tensor([each.weights[n + 1] for n in predicts]),
    )


class LensStep:
    """The loss of frozen examples.

    Args:
        steered: the model with the memory to train, which must correct o.

    Raises:
        ConfigError: the memory does not correct o.
        UnsupportedModelError: the model's decoder does not end in a norm.
    """

    def __init__(self, steered: SteeredModel) -> None:
        if "o" not in steered.config.delta_heads:
            raise ConfigError(f"a logit lens needs a memory that corrects o; found {steered.config.delta_heads}")
        self.modules = [module for module in steered.memory if isinstance(module, LayerMemory)]
        self._norm = last_norm(steered)
        self._head = steered.model.get_output_embeddings()

    def __call__(self, examples: Sequence[FrozenExample]) -> Tensor:
        """The mean loss by weight of all predicted tokens."""
        losses, weights = self.losses(examples)
        return (losses * weights).sum() / weights.sum()

    def losses(self, examples: Sequence[FrozenExample]) -> tuple[Tensor, Tensor]:
        """The loss of each predicted token, and its weight, both [n]."""
        asks = [(row, ask) for row, example in enumerate(examples) for ask in example.asks]
        rows = torch.tensor([row for row, _ in asks])
        told, told_mask = _stacked([example.written for example in examples])  # [L, B, T, D], [B, T]
        asked, asked_mask = _stacked([ask.hidden for _, ask in asks])  # [L, N, t, D], [N, t]
        writes = torch.zeros_like(asked_mask)
        for row, (_, ask) in enumerate(asks):
            writes[row, : len(ask.writes)] = ask.writes
        at = torch.cat([torch.full_like(ask.places, row) for row, (_, ask) in enumerate(asks)])
        places = torch.cat([ask.places for _, ask in asks])
        total = torch.cat([ask.residual for _, ask in asks]).float()
        for layer, module in enumerate(self.modules):
            size = module.config.num_state_heads, module.config.rank, module.config.rank
            # In the model's dtype, which is much faster where that is bfloat16, and precise enough for a start.
            weight = module.packed_weight().to(told.dtype)
            terms = module.terms_from(F.linear(told[layer], weight), told_mask)
            _, state = kernels.scan(ScanArgs(torch.zeros(len(examples), *size), *terms))
            terms = module.terms_from(F.linear(asked[layer], weight), writes)
            reads, _ = kernels.scan(ScanArgs(state[rows], *terms))
            total = total + module.correction("o", reads[at, places][None])[0].float()
        logits = self._head(self._norm(total.to(self._head.weight.dtype)))
        targets = torch.cat([ask.targets for _, ask in asks])
        weights = torch.cat([ask.weights for _, ask in asks])
        return F.cross_entropy(logits.float(), targets, reduction="none"), weights


def _stacked(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Parts [L, t, D] as [L, N, T, D], and which tokens are none of padding, [N, T] bool."""
    length = max(part.shape[1] for part in parts)
    out = parts[0].new_zeros(parts[0].shape[0], len(parts), length, parts[0].shape[2])
    mask = torch.zeros(len(parts), length, dtype=torch.bool)
    for row, part in enumerate(parts):
        out[:, row, : part.shape[1]] = part
        mask[row, : part.shape[1]] = True
    return out, mask


def train_by_lens(
    steered: SteeredModel,
    examples: Sequence[FrozenExample],
    *,
    steps: int,
    batch: int = 12,
    seed: int = 0,
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> None:
    """Train a memory on frozen examples, in place.

    Args:
        steered: the model with the memory.
        examples: what `freeze` made of examples.
        steps: how many steps.
        batch: examples of a step.
        seed: draws them.
        on_progress: called after every step.
    """
    step = LensStep(steered)
    groups: list[dict[str, Any]] = []
    for module in step.modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad or name in ("delta_q_proj", "delta_k_proj", "delta_v_proj"):
                continue
            size = float(parameter.detach().square().mean().sqrt())
            rate = _BIAS_RATE if parameter.dim() == 1 else max(_LEAST_RATE, _RATE * size)
            groups.append({"params": [parameter], "lr": rate})
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98))
    factor = partial(rate_factor, TrainConfig(max_steps=steps, warmup=_WARMUP))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses: deque[float] = deque(maxlen=50)
    began = time.monotonic()
    parameters = [group["params"][0] for group in groups]
    with torch.enable_grad():
        for number in range(steps):
            while len(order) < batch:
                order += torch.randperm(len(examples), generator=generator).tolist()
            chosen, order = [examples[n] for n in order[:batch]], order[batch:]
            loss = step(chosen)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if on_progress is not None:
                took = time.monotonic() - began
                left = took / (number + 1) * (steps - number - 1)
                on_progress(TrainProgress(number + 1, steps, sum(losses) / len(losses), took, left, stage="logit lens"))
