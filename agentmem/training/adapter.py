"""Trains a memory adapter on a frozen model: context is written to memory, not replayed; the loss is on the replies.

A batch is a write pass and a read pass. The write pass runs over the conversations, from the zero state. The read pass
runs over questions, each from the state that its conversation ended with, and sees nothing else of the conversation.
Gradients flow through the state. In the write pass turns may see each other, or each may see only itself, as in an
engine with a short window; the data decides, by blocks.

Nothing here depends on nano: rows come from any tokenizer, and the model is any `SteeredModel` with token writes, on a
CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from agentmem.delta.layer import LayerMemory
from agentmem.delta.model import SteeredModel
from agentmem.errors import ConfigError
from agentmem.training.blocks import attending_apart
from agentmem.training.loop import PARTS, TrainingLog, TrainingPlan, fit


@dataclass
class Row:
    """Tokens of one pass.

    Attributes:
        ids: token ids.
        writes: whether each token writes to memory.
        weights: the weight of predicting each token in the loss (0 = none).
        blocks: the block of each token. Tokens attend only to earlier tokens of their own block, and positions restart
            with each block.
    """

    ids: list[int] = field(default_factory=list)
    writes: list[bool] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)

    def extend(self, ids: Sequence[int], *, write: bool, weight: float, block: int = 0) -> None:
        """Append tokens with the same write flag, weight and block."""
        self.ids += ids
        self.writes += [write] * len(ids)
        self.weights += [weight] * len(ids)
        self.blocks += [block] * len(ids)


@dataclass(frozen=True)
class PassBatch:
    """Right-padded rows: ids, positions, blocks [B, T] int64; writes [B, T] bool; weights [B, T] float32.

    Padding forms a separate block and does not write.
    """

    ids: Tensor
    positions: Tensor
    blocks: Tensor
    writes: Tensor
    weights: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], pad: int) -> PassBatch:
        """Pad rows to the length of the longest."""
        length = max(len(row.ids) for row in rows)

        def padded(values: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
            out = torch.full((len(values), length), fill, dtype=dtype)
            for i, value in enumerate(values):
                out[i, : len(value)] = torch.tensor(value, dtype=dtype)
            return out

        return cls(
            ids=padded([r.ids for r in rows], pad, torch.int64),
            positions=padded([_positions(r.blocks) for r in rows], 0, torch.int64),
            blocks=padded([r.blocks for r in rows], -1, torch.int64),
            writes=padded([r.writes for r in rows], False, torch.bool),
            weights=padded([r.weights for r in rows], 0.0, torch.float32),
        )

    def rows(self, chosen: Tensor) -> PassBatch:
        """The chosen rows [n], cut to the length of the longest."""
        length = int((self.blocks[chosen] >= 0).sum(-1).max()) if len(chosen) else 0
        return PassBatch(*(getattr(self, each.name)[chosen, :length] for each in fields(self)))

    def weight(self) -> float:
        """The total weight of all replies."""
        return float(self.weights[:, 1:].sum())


def _positions(blocks: list[int]) -> list[int]:
    positions: list[int] = []
    for i, block in enumerate(blocks):
        positions.append(positions[-1] + 1 if i and blocks[i - 1] == block else 0)
    return positions


@dataclass(frozen=True)
class MemoryBatch:
    """A write pass over B conversations and a read pass over R questions; `of[r]` is question r's conversation."""

    write: PassBatch
    read: PassBatch
    of: Tensor


def memory_batch(written: Sequence[Row], questions: Sequence[tuple[int, Row]], pad: int) -> MemoryBatch:
    """Put conversations and the questions about them (index of the conversation, row) into one batch."""
    return MemoryBatch(
        PassBatch.of(written, pad),
        PassBatch.of([row for _, row in questions], pad),
        torch.tensor([index for index, _ in questions]),
    )


def run_pass(
    steered: SteeredModel, batch: PassBatch, state: Tensor | None, total_weight: float | None = None
) -> tuple[Tensor, Tensor]:
    """One pass: its weighted cross-entropy divided by its weight, and the state after it.

    `total_weight` is the divisor where the pass is part of a larger one; None = the pass's own weight, which gives the
    mean (0 where no token has weight).
    """
    kept: list[Tensor] = []
    decoder = steered.model.get_decoder()
    # Logits are computed only for tokens with weight, so the hidden state is taken before the vocabulary product.
    handle = decoder.register_forward_hook(lambda _module, _inputs, output: kept.append(output.last_hidden_state))
    try:
        with attending_apart(steered.model, batch.blocks):
            out = steered(batch.ids, state, position_ids=batch.positions, write=batch.writes, logits_to_keep=-1)
    finally:
        handle.remove()
    weights = batch.weights[:, 1:]
    counts = weights > 0
    if not bool(counts.any()):
        return torch.zeros(()), out.state
    logits = steered.model.get_output_embeddings()(kept[0][:, :-1][counts]).float()
    losses = F.cross_entropy(logits, batch.ids[:, 1:][counts], reduction="none")
    return (losses * weights[counts]).sum() / (total_weight or weights[counts].sum()), out.state


def memory_loss(steered: SteeredModel, batch: MemoryBatch, *, write_weight: float, part: int | None = None) -> Tensor:
    """Loss of the read pass plus `write_weight` times that of the replies in the write pass.

    `part`: only one of the `PARTS` parts of the conversations and their questions, as its share of the batch's loss.
    """
    written, read, of = batch.write, batch.read, batch.of
    if part is not None:
        rows = torch.arange(part, len(written.ids), PARTS)
        questions = (of % PARTS == part).nonzero().squeeze(-1)
        written, read, of = written.rows(rows), read.rows(questions), of[questions] // PARTS
        if not len(rows):
            return torch.zeros(())
    write_loss, state = run_pass(steered, written, None, batch.write.weight())
    if not len(of):
        return write_weight * write_loss
    read_loss, _ = run_pass(steered, read, state[of], batch.read.weight())
    return read_loss + write_weight * write_loss


def start_as_copier(steered: SteeredModel, gain: float = 0.3) -> None:
    """Initialise a new adapter so that reading a token gives back what was written for it, in place.

    Memory keys start equal to memory queries, and the correction of o as `gain` times the transpose of the memory
    value: a read then favours the very token that was written, and training only has to learn which tokens should
    match. From outputs at zero it has to learn both at once.
    """
    with torch.no_grad():
        for module in steered.memory:
            assert isinstance(module, LayerMemory)
            module.get_parameter("memory_k_proj").copy_(module.get_parameter("memory_q_proj"))
            module.get_parameter("delta_o_proj").copy_(gain * module.get_parameter("memory_v_proj").T)


def train_adapter(
    steered: SteeredModel,
    batch_of: Callable[[int], MemoryBatch],
    plan: TrainingPlan,
    *,
    write_weight: float = 0.5,
    processes: int = 1,
    checkpoint: Path | None = None,
    on_step: Callable[[int, TrainingLog], None] | None = None,
) -> TrainingLog:
    """Train the memory parameters of `steered` in place; the model itself is frozen during training.

    Raises:
        ConfigError: the adapter does not write token by token.
        FloatingPointError, TrainingError: see `fit`.
    """
    strategy = steered.config.write_strategy
    if strategy != "token":
        raise ConfigError(f"training supports token writes; this adapter writes by {strategy}")
    frozen = [p for p in steered.model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    drawn = lru_cache(maxsize=1)(batch_of)  # a process that computes several parts of a step draws its batch once
    trained = [(name, p) for name, p in steered.memory.named_parameters() if p.requires_grad]
    try:
        return fit(
            trained,
            lambda step, part: memory_loss(steered, drawn(step), write_weight=write_weight, part=part),
            plan,
            processes=processes,
            checkpoint=checkpoint,
            on_step=on_step,
        )
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
