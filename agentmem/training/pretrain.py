"""Trains a base model on conversations: replies have full weight in the loss, the rest of the text a small one.

The rest has some weight so that the hidden states of the user's messages become meaningful: memory is written from
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from agentmem.training.config import TrainConfig
from agentmem.training.loop import ExampleDataset, TrainingLoop, TrainProgress, training_arguments
from agentmem.training.sources import ENDLESS

REST_WEIGHT = 0.2
_REST_SHARE = 0.2

LMBatch = dict[str, Any]
"""Right-padded conversations: `ids` [B, T] int64, and `weights` [B, T] float32 of predicting each, 0 for padding."""


def pad_batch(rows: Sequence[tuple[Sequence[int], Sequence[float]]], pad: int) -> LMBatch:
    """Put rows of (ids, weights) into one right-padded batch."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad)
    weights = torch.zeros(len(rows), length)
    for i, (row, own) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, : len(row)] = torch.tensor(own)
    return {"ids": ids, "weights": weights}


def thinned(batch: LMBatch, generator: torch.Generator) -> LMBatch:
    """The batch with only a random share of the tokens outside of replies, their weight raised to match.

    The vocabulary product is the most expensive part of a small model, and the expected loss is the same.
    """
    weights = batch["weights"]
    kept = (weights >= 1) | (torch.rand(weights.shape, generator=generator) < _REST_SHARE)
    raised = torch.where(weights >= 1, weights, weights / _REST_SHARE)
    return {**batch, "weights": torch.where(kept, raised, 0.0)}


class LMStep(nn.Module):
    """Weighted next-token cross-entropy of a model, in nats per unit of weight."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss` and `weight`, the sum of the weights."""
        weights = batch["weights"][:, 1:]
        counts = weights > 0
        # Padding is on the right, where causal attention never looks, so no mask is needed; without one attention is
        # faster.
        hidden = self.model.get_decoder()(input_ids=batch["ids"], use_cache=False).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[:, :-1][counts]).float()
        losses = F.cross_entropy(logits, batch["ids"][:, 1:][counts], reduction="none")
        weight = weights.sum()
        return {"loss": (losses * weights[counts]).sum() / weight.clamp_min(1e-6), "weight": weight}


def pretrain(
    model: PreTrainedModel,
    batch_of: Callable[[int], LMBatch],
    config: TrainConfig,
    *,
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> None:
    """Train the unfrozen parameters of `model` in place; a run that is in `config.out` goes on.

    Args:
        model: the model.
        batch_of: the batch of a step, counted from 0.
        config: steps, rates and directory.
        on_progress: called after every step.

    Raises:
        TrainingError: the loss is not finite; the last checkpoint is whole.
    """

    def make(number: int, _: Random) -> LMBatch:
        return thinned(batch_of(number), torch.Generator().manual_seed(config.seed * 1_000_003 + number))

    dataset = ExampleDataset(ENDLESS, make, seed=config.seed, length=config.max_steps)
    loop = TrainingLoop(
        LMStep(model),
        dataset,
        lambda batches: batches[0],  # a batch is an example of its own: its rows were chosen to be equally long
        lambda batch: batch["weights"][:, 1:].sum(),
        config,
        training_arguments(config),
        on_progress=on_progress,
    )
    loop.run()
    model.eval()
