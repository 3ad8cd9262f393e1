"""Trains keys, queries and gates to find a value among all that was written, without running the model.

What a question recalls is a sum over written tokens, each counted by its gate and by how well its key matches the
query. Whether the right token counts most can be seen from the frozen model's hidden states alone, so it is learned
from them: all layers and heads together name a written token, and the loss is that of naming the right one. An epoch
takes seconds where a training step of the whole model takes as long.

This is exact where the memory corrects only replies (`steered_tokens: reply`): hidden states of written tokens are then
those of the bare model. Otherwise it is a start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from agentmem.delta.layer import LayerMemory
from agentmem.training.config import TrainConfig
from agentmem.training.loop import rate_factor

_EPOCHS, _REFIT_EPOCHS, _BATCH = (
    5,
    2,
    12,
)  # times that each example is seen, by new and by trained weights; examples of a step
_RATE, _REFIT_RATE, _SHARE_RATE = 1e-3, 4e-4, 0.05  # of new and of trained weights, and of how much each head counts
_WARMUP = 20  # steps
_SHARPNESS = 2.5  # of what a trained memory finds, to begin with: less, and its keys would first move to be surer


@dataclass(frozen=True)
class Places:
    """Which tokens were written, and which of them each place in a reply is to find.

    Attributes:
        examples: [n] int64, ascending, the example of each written token that is kept.
        tokens: [n] int64, its token id.
        values: [n] bool, whether it is a value's.
        found: [p] int64, for each place in a reply the written token that it recalls, as an index into the n.
        first: [p] bool, whether that is its value's first token.
    """

    examples: Tensor
    tokens: Tensor
    values: Tensor
    found: Tensor
    first: Tensor

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Written tokens and places in replies of `_BATCH` examples after the other, in a random order of examples."""
        order = torch.unique(self.examples[self.found])
        order = order[torch.randperm(len(order), generator=generator)]
        for chosen in order.split(_BATCH):
            mine = torch.isin(self.examples, chosen)
            yield mine.nonzero()[:, 0], mine[self.found].nonzero()[:, 0]


def train_addressing(
    modules: Sequence[LayerMemory],
    written: Sequence[Tensor],
    asked: Sequence[Tensor],
    places: Places,
    *,
    seed: int = 0,
    effects: Tensor | None = None,
) -> Tensor:
    """Train the keys, queries and gates of all layers, in place. Gates end equal in all rows of a head.

    Args:
        modules: the memory of each layer, with weights to start from.
        written: hidden states of the written tokens, [n, D] for each layer.
        asked: hidden states of the places in replies, [p, D] for each layer.
        places: what is to be found.
        seed: draws the order of examples.
        effects: of a trained memory, how much each head of each layer does with what it finds, [L, H]. Only its keys
            and queries are trained then, as everything else has been trained to fit them.

    Returns:
        How much each head of each layer helps, [L, H] float32, with a mean of 1.
    """
    config = modules[0].config
    heads, rank = config.num_state_heads, config.rank

    def stacked(name: str) -> Tensor:
        return torch.stack([module.get_parameter(name).detach().float().cpu() for module in modules])

    def by_head(name: str) -> Tensor:
        gates = stacked(name)  # [L, H r or H, ...], equal in all rows of a head
        return gates.view(len(modules), heads, -1, *gates.shape[2:]).mean(2)

    keys, queries, gates, biases = (
        part.clone().requires_grad_()
        for part in (stacked("memory_k_proj"), stacked("memory_q_proj"), by_head("beta_proj"), by_head("beta_bias"))
    )
    shares = torch.ones(len(modules), heads, requires_grad=True)
    new, sharpness = effects is None, torch.tensor(_SHARPNESS, requires_grad=True)

    def scores(tokens: Tensor, asks: Tensor) -> Tensor:
        """How much each written token counts for each place in a reply, [asks, tokens]."""
        hidden = torch.stack([layer[tokens] for layer in written]).float()  # [L, n, D]
        questions = torch.stack([layer[asks] for layer in asked]).float()  # [L, p, D]
        k, q = ((x @ w.mT).view(*x.shape[:2], heads, rank) for x, w in ((hidden, keys), (questions, queries)))
        gate = torch.sigmoid(hidden @ gates.mT + biases[:, None])  # [L, n, H]
        counts = shares if effects is None else effects * sharpness
        return torch.einsum("lnhr,lphr,lnh,lh->pn", modules[0].unit(k), modules[0].unit(q), gate, counts)

    weights = {"params": [keys, queries, *([gates, biases] * new)], "lr": _RATE if new else _REFIT_RATE}
    optimiser = torch.optim.Adam(
        [weights, {"params": [shares if new else sharpness], "lr": _SHARE_RATE}], betas=(0.9, 0.98)
    )
    epochs = _EPOCHS if new else _REFIT_EPOCHS
    steps = epochs * math.ceil(len(torch.unique(places.examples[places.found])) / _BATCH)
    factor = partial(rate_factor, TrainConfig(max_steps=steps, warmup=_WARMUP))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            for tokens, asks in places.batches(generator):
                target = places.found[asks]
                apart = places.examples[tokens][None] != places.examples[target][:, None]  # of another example
                # A value that was told twice may be found in either place.
                wrong = places.tokens[tokens][None] != places.tokens[target][:, None]
                likelihood = F.log_softmax(scores(tokens, asks).masked_fill(apart, -torch.inf), dim=-1)
                loss = -likelihood.masked_fill(wrong | apart, -torch.inf).logsumexp(-1).mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
    with torch.no_grad():
        for layer, module in enumerate(modules):
            for name, values in (("memory_k_proj", keys), ("memory_q_proj", queries)):
                module.get_parameter(name).copy_(values[layer])
            for name, values in (("beta_proj", gates), ("beta_bias", biases)) if new else ():
                parameter = module.get_parameter(name)
                parameter.copy_(values[layer].repeat_interleave(len(parameter) // heads, 0))
        found = (shares if effects is None else effects).detach().clamp_min(0.0)
        return found / found.mean().clamp_min(1e-6)
