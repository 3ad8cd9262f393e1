"""One token a row, as decoding runs it: the same numbers as a ``TokenPass``, with as few operations as can be.

What a token writes is read by later tokens alone. So a layer's way to its output holds four things: one product with
the hidden state, its query, one product with its state, and the corrections, which the products of a read with the
output weights add in place. The rest of the rule, a dozen small operations, is done once for all layers at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agentmem.config import DeltaHead
from agentmem.errors import TurnError
from agentmem.passes import Pass, Pending
from agentmem.recurrence import write_once
from agentmem.steering import NORM_EPS, LayerMemory, stamp_of


class Ready(NamedTuple):
    """What a step needs of all layers.

    Attributes:
        products: for each layer the packed weight [3 H r + gates, D].
        queries: for each layer the first H r rows of it.
        outputs: for each layer and head the transposed output weight [H r, W] and the scale.
        beta, lam: biases of all layers, [L, 1, 1, gates]; ``lam`` None where the config has none.
        low: the weights are no float32.
    """

    products: list[Tensor]
    queries: list[Tensor]
    outputs: list[dict[DeltaHead, tuple[Tensor, float]]]
    beta: Tensor
    lam: Tensor | None
    low: bool


class Stack:
    """The memory of all layers, made ready for steps, and again when a parameter has changed."""

    def __init__(self, memory: Sequence[LayerMemory]) -> None:
        self.memory = memory
        self._ready: tuple[tuple[int, ...], Ready | None] | None = None

    def ready(self, device: torch.device) -> Ready | None:
        """What a step needs, without gradients; None where layers lie elsewhere than their states on ``device``.

        Nothing is kept of weights that are being trained: torch does not count every way in which an optimiser
        changes them.
        """
        parameters = [one for module in self.memory for one in module._parameters.values() if one is not None]
        training = any(one.requires_grad for one in parameters)
        stamp = () if training else stamp_of(parameters)
        if training or self._ready is None or self._ready[0] != stamp:
            together = {one.device for one in parameters} == {device}
            self._ready = stamp, self._made() if together else None
        made = self._ready[1]
        return made if made is None or made.beta.device == device else None

    def _made(self) -> Ready:
        memory, config = self.memory, self.memory[0].config
        products = [module.packed_weight().detach() for module in memory]
        size = config.rank * config.num_state_heads
        fused = [head for head in config.delta_heads if head != "o" or not config.delta_o_rmsnorm]
        return Ready(
            products,
            [weight[:size] for weight in products],
            [
                {head: (module.output_weight(head).detach().t().contiguous(), module.scale(head)) for head in fused}
                for module in memory
            ],
            torch.stack([module.beta_bias.detach() for module in memory])[:, None, None],
            None
            if config.couple_lambda
            else torch.stack([module.lambda_bias.detach() for module in memory])[:, None, None],
            products[0].dtype != torch.float32,
        )


class StepPass(Pass):
    """One token a row, without gradients, on one device.

    It writes where ``mask`` [B, 1] allows (None = everywhere), unless ``writing`` is off.
    """

    def __init__(
        self, memory: Sequence[LayerMemory], ready: Ready, state: Tensor, mask: Tensor | None, writing: bool
    ) -> None:
        super().__init__(memory, state)
        self._ready = ready
        self._normalize = memory[0].config.normalize_qk
        self._weights = ready.products if writing else ready.queries
        self._mask = mask
        self._writing = writing
        self._made: list[Tensor] = []
        batch, layers, heads, rank, _ = state.shape
        self._batch, self._size, self._rows = batch, heads * rank, batch * heads
        self._by_layer = state.transpose(0, 1).reshape(layers, self._rows, rank, rank)
        self._states = self._by_layer.unbind(0)

    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        """The read [B, H r] in the dtype of the output weights."""
        weight = self._weights[index]
        products = F.linear(hidden if hidden.dtype is weight.dtype else hidden.to(weight.dtype), weight)
        if self._writing:
            self._made.append(products)
            products = products[..., : self._size]
        if self._ready.low:
            products = products.float()
        if self._normalize:
            q = torch.tanh(products).view(self._rows, -1, 1)
            q.div_(torch.linalg.vector_norm(q, dim=1, keepdim=True).clamp_min_(NORM_EPS))
        else:
            q = products.reshape(self._rows, -1, 1)
        read = torch.bmm(self._states[index], q).view(self._batch, -1)
        return read.to(weight.dtype) if self._ready.low else read

    def correct(self, index: int, head: DeltaHead, output: Tensor, start: int) -> Tensor:
        """As ``Pass.correct``; the output is changed in place where it can be."""
        read, fused = self._reads[index], self._ready.outputs[index].get(head)
        if fused is None or output.dtype is not read.dtype or not output.is_contiguous():
            heads, rank = self.state.shape[2:4]
            return self.memory[index].corrected(head, read.float().view(-1, 1, heads, rank), output, start)
        weight, scale = fused
        rows = output.view(self._batch, -1)
        if rows.shape[1] != weight.shape[1]:
            rows = rows[:, start : start + weight.shape[1]]
        rows.addmm_(read, weight, alpha=scale)
        return output

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The state after the token."""
        if not self._writing:
            return self.state, None
        layers, ready = len(self.memory), self._ready
        if len(self._made) != layers:
            raise TurnError(f"the model ran {len(self._made)} of its {layers} steered layers; nothing was written")
        products = torch.stack(self._made)
        _, k, v, gates = self.memory[0].project_from(products, ready.beta, ready.lam, self._mask)
        rank = self.state.shape[-1]
        rows = (x.reshape(-1, rank) for x in (k, v, *gates))
        after = write_once(self._by_layer.reshape(-1, rank, rank), *rows)
        # Layers outermost in memory, as the next token wants them.
        return after.view(layers, *self.state.shape[:1], *self.state.shape[2:]).transpose(0, 1), None
