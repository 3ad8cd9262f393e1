"""The decode step on a pool of states that is changed in place, for devices with Triton kernels.

While a layer runs there are one product with the hidden state, one `kernels.step`, and the corrections, which are
products that add in place: four launches per layer for an adapter that corrects q and o.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agentmem import kernels
from agentmem.delta.layer import LayerMemory
from agentmem.delta.passes import ForwardContext, Pending, skipped_layers
from agentmem.errors import StateMismatchError, TurnError


class PooledDecodeStep(ForwardContext):
    """One token in every row, without gradients, on one device.

    Args:
        memory: the memory of all layers.
        pool: [slots, L, H, r, r] float32; each layer's part is changed when the layer reads.
        slots: [B], the slot of each row's state; -1 = the row is inert.
        mask: [B] bool, whether a row writes; None = all rows write.
        result: what `end` returns as the state; None = the pool.
    """

    def __init__(
        self,
        memory: Sequence[LayerMemory],
        pool: Tensor,
        slots: Tensor,
        mask: Tensor | None,
        result: Tensor | None = None,
    ) -> None:
        super().__init__(memory, pool)
        self._slots = slots
        self._mask = mask
        self._result = pool if result is None else result

    @classmethod
    def on_copy(
        cls, memory: Sequence[LayerMemory], state: Tensor, mask: Tensor | None, writing: bool
    ) -> PooledDecodeStep:
        """A step for states that are values: `state` [B, L, H, r, r] is not changed, and a copy of it is the pool.

        Where nothing is to be written, the result is `state` itself. `mask` is [B, 1] here.
        """
        slots = torch.arange(state.shape[0], device=state.device)
        if writing:
            mask = None if mask is None else mask.flatten().to(state.device)
        else:
            mask = torch.zeros_like(slots, dtype=torch.bool)
        pool = state.clone(memory_format=torch.contiguous_format)
        return cls(memory, pool, slots, mask, None if writing else state)

    @classmethod
    def in_place(
        cls, memory: Sequence[LayerMemory], pool: Tensor, slots: Tensor, write: bool | Tensor
    ) -> PooledDecodeStep:
        """A step on a caller's pool, after all arguments were checked.

        Args:
            memory, pool, slots: as for `PooledDecodeStep`.
            write: whether tokens write: one bool, or [B, 1] bool.

        Raises:
            StateMismatchError, TurnError: the pool, or another argument, has the wrong shape, dtype or device.
        """
        config = memory[0].config
        shape = (len(memory), config.num_state_heads, config.rank, config.rank)
        devices = {module.beta_bias.device for module in memory}
        fits = tuple(pool.shape[1:]) == shape and pool.dtype == torch.float32
        if not fits or not pool.is_contiguous() or devices != {pool.device}:
            raise StateMismatchError(
                f"a pool must be float32 [slots, {', '.join(map(str, shape))}], contiguous, where all of the memory "
                f"lies, on {', '.join(sorted(map(str, devices)))}; found {pool.dtype} {list(pool.shape)} on "
                f"{pool.device}, strides {list(pool.stride())}"
            )
        if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64):
            raise TurnError(f"slots must be [B] int32 or int64; found {slots.dtype} {list(slots.shape)}")
        if isinstance(write, Tensor):
            if write.shape != (len(slots), 1) or write.dtype != torch.bool:
                raise TurnError(f"write must be [{len(slots)}, 1] bool; found {write.dtype} {list(write.shape)}")
            return cls(memory, pool, slots, write.flatten())
        return cls(memory, pool, slots, None if write else torch.zeros_like(slots, dtype=torch.bool))

    def read(self, layer: int, hidden: Tensor) -> Tensor:
        """Read and write in one kernel; returns the read [B, 1, H, r] in the dtype of the layer's weights."""
        module = self.memory[layer]
        rows = hidden.flatten(1)  # [B, 1, D] -> [B, D]
        if torch.compiler.is_compiling():
            products = kernels.project(rows, module.packed_parts())
        else:
            products = module.products(rows)  # [B, 3 H r + gates]
        read = kernels.step(
            kernels.StepArgs(
                products,
                self.state,
                self._slots,
                layer,
                module.beta_bias,
                getattr(module, "lambda_bias", None),
                mask=self._mask,
                normalize=module.config.normalize_qk,
                mode=module.config.state_update_mode,
            )
        )
        return read.view(-1, 1, *self.state.shape[2:4])  # [B, H r] -> [B, 1, H, r]

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The pool, or `result` where one was given."""
        if self._layers_read != len(self.memory):
            raise skipped_layers(self._layers_read, len(self.memory))
        return self._result, None
