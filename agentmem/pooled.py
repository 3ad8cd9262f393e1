"""One token a row on a pool of states that is changed in place, as devices with kernels decode.

A layer's way to its output holds one product with the hidden state, one ``kernels.step``, and the corrections, which
are products added in place: four launches a layer for an adapter that corrects q and o.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from agentmem import kernels
from agentmem.errors import TurnError
from agentmem.passes import LayerPass, Pending
from agentmem.steering import LayerMemory


class PoolPass(LayerPass):
    """One token a row, without gradients, on one device.

    Args:
        memory: of all layers.
        pool: [slots, L, H, r, r] float32, changed layer by layer as they are visited.
        slots: [B], the state of each row; -1 = the row is inert.
        mask: [B] bool, where a row writes; None = everywhere.
    """

    def __init__(self, memory: Sequence[LayerMemory], pool: Tensor, slots: Tensor, mask: Tensor | None) -> None:
        super().__init__(memory, pool)
        self._slots = slots
        self._mask = mask
        self._seen = 0

    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        """The read [B, 1, H, r] in the dtype of the layer's weights."""
        module = self.memory[index]
        weight = module.packed_weight()
        self._seen += 1
        read = kernels.step(
            F.linear(hidden.to(weight.dtype), weight).flatten(1),
            self.state,
            self._slots,
            index,
            module.beta_bias,
            getattr(module, "lambda_bias", None),
            mask=self._mask,
            normalize=module.config.normalize_qk,
            mode=module.config.state_update_mode,
        )
        return read.view(-1, 1, *self.state.shape[2:4])

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The pool."""
        if self._seen != len(self.memory):
            raise TurnError(f"the model ran {self._seen} of its {len(self.memory)} steered layers")
        return self.state, None


class BatchPass(PoolPass):
    """The same for states that are values: ``state`` [B, L, H, r, r] stays as it is, a copy is the pool."""

    def __init__(self, memory: Sequence[LayerMemory], state: Tensor, mask: Tensor | None, writing: bool) -> None:
        rows = torch.arange(state.shape[0], device=state.device)
        if writing:
            mask = None if mask is None else mask.flatten().to(state.device)
        else:
            mask = torch.zeros_like(rows, dtype=torch.bool)
        super().__init__(memory, state.clone(memory_format=torch.contiguous_format), rows, mask)
        self._given = None if writing else state

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The state after the token: the very one that was given where nothing was to be written."""
        after, _ = super().end(close)
        return after if self._given is None else self._given, None
