"""One training step as a module: write passes, then the questions, with gradients through the state.

`MemoryStep.forward` takes a batch from `examples.collate` and returns the loss, so that DDP and FSDP can wrap it. Only
the memory's parameters are trained; the model is frozen.

Where gradients flow:

    full          through everything: what a token reads changes the hidden states that later tokens write
    first_order   in passes without a target only through what is written (`SteeredModel(first_order=True)`): the
                  model runs them without a graph, in a third of the time and almost no memory
    truncate=n    not from a pass to the writes of more than n passes before
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from agentmem.delta.model import SteeredModel
from agentmem.training.blocks import attending_apart
from agentmem.training.frozen import FrozenFeatures

Gradient = Literal["full", "first_order"]
Start = Literal["memory", "zero", "foreign"]

_BY_ROW = ("ids", "segments", "weights", "positions", "steered", "mask", "features")  # of a layout
_TINY = 1e-6
_SHORT = 256  # tokens of a row


@dataclass(frozen=True)
class _Result:
    """What one call gives.

    Attributes:
        state: the state after it.
        losses: [N] float32, each row's weighted sum of cross-entropies.
        quiet: [N, L] float32, per row and layer the sum of the squared reads of tokens that predict no target.
        loud: [N, L] float32, the same of tokens that predict one.
    """

    state: Tensor
    losses: Tensor
    quiet: Tensor
    loud: Tensor


class MemoryStep(nn.Module):
    """The loss of a batch of examples.

    Args:
        steered: the model with the memory to train.
        gradient: "full" or "first_order"; may be changed between steps.
        truncate: through how many passes gradients flow back; None = all.
        read_penalty: how much of the ratio of mean squared reads, of tokens that predict no target to those that do,
            is added to the loss. It keeps the memory out of what it has nothing to say about.
        gradient_checkpointing: keep only the state between passes, and run each pass again when gradients need it.
        features: the features of texts that come back; None = every layer is run for every text.

    Attributes:
        memory: the trained parameters.
        model: the frozen model, which is never saved.
        gradient: see above; may be changed between steps.
        reading: how much of its read a token that predicts no target is corrected by, from 0 to 1; may be changed
            between steps. A new memory reads at random, and what it reads would spoil what is written later; it learns
            what to recall before everything is corrected.
    """

    def __init__(
        self,
        steered: SteeredModel,
        *,
        gradient: Gradient = "full",
        truncate: int | None = None,
        read_penalty: float = 0.0,
        gradient_checkpointing: bool = False,
        features: FrozenFeatures | None = None,
    ) -> None:
        super().__init__()
        self.model: nn.Module = steered.model.requires_grad_(False)
        self.memory = steered.memory
        self.gradient: Gradient = gradient
        self.reading = 1.0
        self._steered = steered
        self._truncate, self._read_penalty = truncate, read_penalty
        self._checkpointing, self._features = gradient_checkpointing, features
        self.train()

    def train(self, mode: bool = True) -> MemoryStep:
        """As every module's, but the frozen model stays as an engine runs it, without dropout."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def joined(self) -> bool:
        """Whether batches must have all passes of an example in one row (see `examples.collate`)."""
        by_token = self._steered.config.write_strategy == "token"
        return by_token and self._truncate is None and not self._checkpointing and _plainly_causal(self.model)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch.

        Returns:
            `loss`, the mean cross-entropy by weight plus the penalty, and what it is made of: `sum` and `weight` (the
            weighted sum of cross-entropies and the total weight) and `penalty`.
        """
        state, results = self._write(batch)
        if batch["asks"] is not None:
            results.append(self._run(batch["asks"], state[batch["asks"]["rows"]]))
        weight = total_weight(batch)
        total = torch.stack([result.losses.sum() for result in results]).sum()
        penalty = total.new_zeros(())
        if self._read_penalty:
            penalty = self._read_penalty * self._quietness(batch, results)
        return {"loss": total / weight.clamp_min(_TINY) + penalty, "sum": total, "weight": weight, "penalty": penalty}

    @torch.no_grad()
    def states(self, batch: Mapping[str, Any]) -> Tensor:
        """The memory [B, L, H, r, r] after all passes of a batch, without gradients."""
        return self._write(batch)[0]

    @torch.no_grad()
    def losses(
        self, batch: Mapping[str, Any], start: Start = "memory", states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Each question's loss with a memory, without gradients.

        Args:
            batch: examples with questions.
            start: the state that questions start from: their own, zeros, or that of the next example in the batch.
            states: what `states` gave for this batch; None: it is computed.

        Returns:
            The sum of cross-entropies of every question and its weight, both [questions].
        """
        asks = batch["asks"]
        state = self.states(batch) if states is None else states
        if start == "zero":
            state = torch.zeros_like(state)
        elif start == "foreign":
            state = state.roll(1, 0)
        return self._run(asks, state[asks["rows"]]).losses, asks["weights"].sum(-1)

    def _write(self, batch: Mapping[str, Any]) -> tuple[Tensor, list[_Result]]:
        """Run all passes; the state [B, L, H, r, r] after them, and their results."""
        state = self._steered.zeros(batch["count"])
        results: list[_Result] = []
        for number, layout in enumerate(batch["passes"]):
            if self._truncate is not None and number >= self._truncate and number % self._truncate == 0:
                state = state.detach()
            rows = layout["rows"]
            results.append(self._run(layout, state[rows]))
            # Not in place: the state before is part of the graph.
            state = state.index_copy(0, rows, results[-1].state)
        return state, results

    def _run(self, layout: Mapping[str, Any], state: Tensor) -> _Result:
        """One layout from the states [N, L, H, r, r] of its rows."""
        if not self._checkpointing or not torch.is_grad_enabled():
            return self._compute(layout, state)
        run: Callable[..., tuple[Tensor, ...]] = lambda x: _values(self._compute(layout, x))  # noqa: E731
        # The parameters are reached through the closure, which the form that re-enters autograd would not see.
        return _Result(*checkpoint(run, state, use_reentrant=False))

    def _compute(self, layout: Mapping[str, Any], state: Tensor) -> _Result:
        if self._features is not None:
            layout = {**layout, "features": self._features.rows(layout)}
        if "blocks" in layout:
            with attending_apart(self._steered.model, layout["blocks"]):
                return self._call(layout, slice(0, *layout["cuts"]), state, None)
        shared: tuple[_Result, Any] | None = None
        if "of" in layout:
            rows, cache = layout["first"], _new_cache()
            beginnings = {name: value[rows] for name, value in layout.items() if name in _BY_ROW}
            shared = self._call(beginnings, slice(0, layout["cuts"][0]), state[rows], cache), cache
        parts = [
            self._group(layout, slice(start, stop), state, shared)
            for start, stop in pairwise((0, *layout.get("groups", (len(state),))))
        ]
        return _Result(*(torch.cat(values) for values in zip(*map(_values, parts), strict=True)))

    def _group(
        self, layout: Mapping[str, Any], rows: slice, state: Tensor, shared: tuple[_Result, Any] | None
    ) -> _Result:
        """Run some rows of a layout; `shared` is what came of the columns before the first cut, and its cache."""
        needed = layout["mask"][rows].bool().any(0)
        results: list[_Result] = []
        state = state[rows]
        cache = _new_cache() if len(layout["cuts"]) > 1 else None
        if shared is not None:
            of = layout["of"][rows]
            needed[: layout["cuts"][0]] = True  # as in the cache
            cache = _of_rows(shared[1], of)
            results.append(_Result(*(value[of] for value in _values(shared[0]))))
            state = results[-1].state
        # Columns that are padding in all of these rows are left out.
        group = {name: value[rows][:, needed] for name, value in layout.items() if name in _BY_ROW}
        cuts = [int(needed[:cut].sum()) for cut in layout["cuts"]]
        for start, stop in pairwise((0, *cuts)):
            if start < stop and (start or shared is None):
                results.append(self._call(group, slice(start, stop), state, cache))
                state = results[-1].state
        losses, quiet, loud = (
            sum(parts[1:], parts[0]) for parts in zip(*(_values(r)[1:] for r in results), strict=True)
        )
        return _Result(state, losses, quiet, loud)

    def _call(self, layout: Mapping[str, Any], columns: slice, state: Tensor, cache: Any) -> _Result:
        """Run some columns of a layout; the cache, if any, is extended."""
        ids, segments = layout["ids"][:, columns], layout["segments"][:, columns]
        weights = F.pad(layout["weights"], (0, 1))[:, columns.start + 1 : columns.stop + 1]  # of the token that follows
        if columns.stop < layout["ids"].shape[1]:
            weights = torch.cat([weights[:, :-1], torch.zeros_like(weights[:, -1:])], 1)  # a second part is no target
        counts = weights > 0
        targeted = bool(counts.any())
        steered = layout["steered"][:, columns]
        # Without corrections nothing here depends on the memory but what is written. Otherwise a later part may read on
        # in these keys and values, and counts.
        apart = not bool(steered.any())
        apart = apart or (self.gradient == "first_order" and not bool((layout["weights"] > 0).any()))
        mask = layout["mask"][:, : columns.stop] if "mask" in layout else None
        hidden: list[Tensor] = []
        decoder = self._steered.model.get_decoder()
        # Logits are computed only for tokens with weight, so the hidden state is taken before the vocabulary product.
        handle = decoder.register_forward_hook(lambda _module, _inputs, output: hidden.append(output.last_hidden_state))
        skipping: AbstractContextManager[None] = nullcontext()
        if self._features is not None:
            skipping = self._features.in_place_of_layers(layout["features"][:, columns])
        try:
            with _quick_attention(ids), skipping:
                out = self._steered(
                    ids,
                    state,
                    attention_mask=mask,
                    position_ids=layout["positions"][:, columns],
                    segments=segments,
                    logits_to_keep=-1,
                    cache=cache,
                    first_order=apart,
                    keep_reads=self._read_penalty > 0,
                    steer=self._steer(steered, counts),
                )
        finally:
            handle.remove()
        losses = state.new_zeros(len(ids))
        if targeted:
            head = self._steered.model.get_output_embeddings()
            targets = F.pad(layout["ids"], (0, 1))[:, columns.start + 1 : columns.stop + 1]
            entropy = F.cross_entropy(head(hidden[0][counts]).float(), targets[counts], reduction="none")
            rows = counts.nonzero()[:, 0]
            losses = losses.index_add(0, rows, entropy * weights[counts])
        quiet, loud = self._reads(out.reads, counts, _real(layout, columns), state)
        return _Result(out.state, losses, quiet, loud)

    def _steer(self, steered: Tensor, counts: Tensor) -> bool | Tensor:
        """How much each token is corrected by what it reads: [N, T], or one bool where all are alike."""
        if not bool(steered.any()):
            return False
        if self.reading < 1:
            share: Tensor = steered * (counts + self.reading * ~counts)
            return share
        return True if bool(steered.all()) else steered

    def _reads(
        self, reads: tuple[Tensor, ...] | None, counts: Tensor, real: Tensor, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of squared reads, of tokens that predict no target and of those that do, each [N, L]."""
        if reads is None:
            nothing = like.new_zeros(len(like), len(self.memory))
            return nothing, nothing
        sizes = torch.stack([read.square().sum((-1, -2)) for read in reads], 1)  # [N, L, T]
        return (sizes * (real & ~counts)[:, None]).sum(-1), (sizes * counts[:, None]).sum(-1)

    def _quietness(self, batch: Mapping[str, Any], results: list[_Result]) -> Tensor:
        """Mean over layers of the ratio of mean squared reads, outside of targets to at targets."""
        layouts = _layouts(batch)
        targets = sum(int((layout["weights"] > 0).sum()) for layout in layouts)
        others = sum(int(_real(layout, slice(None)).sum()) for layout in layouts) - targets
        quiet = torch.cat([result.quiet for result in results]).sum(0) / max(1, others)
        loud = torch.cat([result.loud for result in results]).sum(0) / max(1, targets)
        # The denominator is a scale only: otherwise reading more at targets would be rewarded too.
        return (quiet / (loud.detach() + _TINY)).mean()


def _quick_attention(ids: Tensor) -> AbstractContextManager[None]:
    """The fastest way to differentiate attention: for short rows on a CPU plain products, in half of the time."""
    if ids.device.type == "cpu" and ids.shape[1] <= _SHORT and torch.is_grad_enabled():
        quick: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return quick
    return nullcontext()


def _values(result: _Result) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return result.state, result.losses, result.quiet, result.loud


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _of_rows(cache: Any, rows: Tensor) -> Any:
    """A cache with these rows [N] of another one, which stays as it is."""
    new = _new_cache()
    for number, layer in enumerate(cache.layers):
        if layer.is_initialized:  # layers that are not run have nothing
            new.update(layer.keys[rows], layer.values[rows], number)
    return new


def _real(layout: Mapping[str, Any], columns: slice) -> Tensor:
    """Which tokens are steered and no padding, [N, T] bool."""
    real: Tensor = layout["blocks"] >= 0 if "blocks" in layout else layout["mask"].bool()
    steered: Tensor = layout["steered"]
    return (real & steered)[:, columns]


def total_weight(batch: Mapping[str, Any]) -> Tensor:
    """The sum of the weights of all tokens of a batch."""
    return torch.stack([layout["weights"].sum() for layout in _layouts(batch)]).sum()


def _layouts(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All layouts of a batch, the questions' last."""
    return [*batch["passes"], *([] if batch["asks"] is None else [batch["asks"]])]


def _plainly_causal(model: nn.Module) -> bool:
    """Whether the model's attention is plainly causal, which `attending_apart` needs."""
    config: Any = model.config
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return kinds == {"full_attention"} and not capped and config.model_type not in ("gpt_oss",)
