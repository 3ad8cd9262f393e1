"""Trains a base model on conversations: replies have full weight in the loss, the rest of the text a small one.

The rest has some weight so that the hidden states of the user's messages become meaningful: memory is written from
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from agentmem.training.loop import PARTS, TrainingLog, TrainingPlan, fit

REST_WEIGHT = 0.2
_REST_SHARE = 0.2


@dataclass(frozen=True)
class LMBatch:
    """Right-padded conversations: ids [B, T] int64, mask [B, T] bool, weight [B, T] float32.

    `weight[b, t]` is the weight of predicting token t; 0 for padding.
    """

    ids: Tensor
    mask: Tensor
    weight: Tensor


def pad_batch(rows: Sequence[tuple[Sequence[int], Sequence[float]]], pad: int) -> LMBatch:
    """Put rows of (ids, weights) into one right-padded batch."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    weight = torch.zeros(len(rows), length)
    for i, (row, weights) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
        weight[i, : len(row)] = torch.tensor(weights)
    return LMBatch(ids, mask, weight)


def lm_loss(model: PreTrainedModel, batch: LMBatch, generator: torch.Generator, rows: slice = slice(None)) -> Tensor:
    """Weighted next-token cross-entropy, in nats per unit of weight; of `rows` only, as a share of the batch's.

    The vocabulary product is the most expensive part of a small model. So of the tokens outside of replies only a
    random share is used, with its weight raised to match: the expected loss is the same.
    """
    weight = batch.weight[:, 1:]
    taken = (weight >= 1) | ((weight > 0) & (torch.rand(weight.shape, generator=generator) < _REST_SHARE))
    weight = torch.where(weight >= 1, weight, weight / _REST_SHARE)
    total_weight = weight[taken].sum()
    ids, weight, taken = batch.ids[rows], weight[rows], taken[rows]
    if not bool(taken.any()):
        return torch.zeros(())
    # Padding is on the right, where causal attention never looks, so no mask is needed; without one attention is
    # faster.
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    assert head is not None
    losses = F.cross_entropy(head(hidden[:, :-1][taken]).float(), ids[:, 1:][taken], reduction="none")
    return (losses * weight[taken]).sum() / total_weight


def pretrain(
    model: PreTrainedModel,
    batch_of: Callable[[int], LMBatch],
    plan: TrainingPlan,
    *,
    seed: int,
    processes: int = 1,
    checkpoint: Path | None = None,
    on_step: Callable[[int, TrainingLog], None] | None = None,
) -> TrainingLog:
    """Train the unfrozen parameters of `model` in place, on the batches from `batch_of`; raises what `fit` raises."""
    model.train()
    drawn = lru_cache(maxsize=1)(batch_of)  # a process that computes several parts of a step draws its batch once

    def loss_of(step: int, part: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return lm_loss(model, drawn(step), generator, slice(part, None, PARTS))

    try:
        return fit(
            [(name, p) for name, p in model.named_parameters() if p.requires_grad],
            loss_of,
            plan,
            processes=processes,
            checkpoint=checkpoint,
            on_step=on_step,
        )
    finally:
        model.eval()
