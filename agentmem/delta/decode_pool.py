"""One token a row on a pool of states that is changed in place, as devices with kernels decode.

A layer's way to its output holds one product with the hidden state, one ``kernels.step``, and the corrections, which
are products added in place: four launches a layer for an adapter that corrects q and o.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agentmem import kernels
from agentmem.delta.layer import LayerMemory
from agentmem.delta.passes import LayerPass, Pending, need_all
from agentmem.errors import StateMismatchError, TurnError


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

    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        """The read [B, 1, H, r] in the dtype of the layer's weights."""
        module = self.memory[index]
        read = kernels.step(
            _products(module, hidden.flatten(1)),
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
        need_all(self._seen, self.memory)
        return self.state, None


def opened(memory: Sequence[LayerMemory], pool: Tensor, slots: Tensor, write: bool | Tensor) -> PoolPass:
    """A pass over a pool, where all of it fits.

    Args:
        memory, pool, slots: as of a ``PoolPass``.
        write: whether tokens write, for all or for each [B, 1] bool.

    Raises:
        StateMismatchError, TurnError: the pool, or another argument, has another shape, type or device.
    """
    config = memory[0].config
    shape = (len(memory), config.num_state_heads, config.rank, config.rank)
    at = {module.beta_bias.device for module in memory}
    if tuple(pool.shape[1:]) != shape or pool.dtype != torch.float32 or not pool.is_contiguous() or at != {pool.device}:
        raise StateMismatchError(
            f"a pool must be float32 [slots, {', '.join(map(str, shape))}], contiguous, where all of the memory lies, "
            f"on {', '.join(sorted(map(str, at)))}; found {pool.dtype} {list(pool.shape)} on {pool.device}, strides "
            f"{list(pool.stride())}"
        )
    if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64):
        raise TurnError(f"slots must be [B] int32 or int64; found {slots.dtype} {list(slots.shape)}")
    if isinstance(write, Tensor):
        if write.shape != (len(slots), 1) or write.dtype != torch.bool:
            raise TurnError(f"write must be [{len(slots)}, 1] bool; found {write.dtype} {list(write.shape)}")
        return PoolPass(memory, pool, slots, write.flatten())
    return PoolPass(memory, pool, slots, None if write else torch.zeros_like(slots, dtype=torch.bool))


def _products(module: LayerMemory, hidden: Tensor) -> Tensor:
    """Of [B, D] with the packed weight."""
    if torch.compiler.is_compiling():
        return kernels.project(hidden, module.packed_parts())
    return module.products(hidden)


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
