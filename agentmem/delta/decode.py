"""One token a row, as decoding runs it: the same numbers as a ``TokenPass``, with as few operations as can be.

What is computed, and with which operations, is ``rooms``'. Here is what is around it: all layers have read before
anything is written, open sums are moved on, and weights that were replaced are noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from agentmem.delta.layer import LayerMemory, addresses
from agentmem.delta.passes import Pass, Pending, Through, ended, joined_ids, need_all
from agentmem.delta.rooms import Ready


class Stack:
    """The memory of all layers, made ready for steps, and again when a parameter was replaced or moved."""

    def __init__(self, memory: Sequence[LayerMemory]) -> None:
        self.memory = memory
        config = memory[0].config
        names = ["memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj", "beta_bias"]
        names += [] if config.couple_lambda else ["lambda_proj", "lambda_bias"]
        self._parameters = itemgetter(*names, *(f"delta_{head}_proj" for head in config.delta_heads))
        self._addresses: list[int] = []
        self._ready: Ready | None = None

    def ready(self, device: torch.device) -> Ready | None:
        """What a step needs; None where layers lie elsewhere than their states on ``device``."""
        now: list[int] = []
        for module in self.memory:
            now += addresses(self._parameters(module._parameters))
        if now != self._addresses:
            self._ready = Ready(self.memory) if len({one.device for one in self._all()}) == 1 else None
            self._addresses = addresses(self._all())  # some have become views of what is packed
        made = self._ready
        return made if made is None or made.weights[0].device == device else None

    def _all(self) -> list[Tensor]:
        return [one for module in self.memory for one in self._parameters(module._parameters)]


class StepPass(Pass):
    """One token a row, without gradients, on one device.

    It writes where ``mask`` [B, 1] allows (None = everywhere), unless ``writing`` is off.
    """

    def __init__(
        self, memory: Sequence[LayerMemory], ready: Ready, state: Tensor, mask: Tensor | None, writing: bool
    ) -> None:
        super().__init__(memory, state)
        self._mask = mask
        self._writing = writing
        self._room = ready.room(state, writing)
        self._room.begin(state)

    @property
    def through(self) -> Through:
        return self._room.through

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The state after the token."""
        need_all(self._room.seen, self.memory)
        return (self._room.after(self._mask) if self._writing else self.state), None


class GatherPass(StepPass):
    """One token a row for adapters that write by message or sentence: it reads, and joins the sums of its segment.

    Args:
        memory, ready, state: as of a ``StepPass``.
        segments: [B, 1] int64, -1 where a token is not written; None = only read.
        before: what the calls before gathered in the same pass.
    """

    def __init__(
        self,
        memory: Sequence[LayerMemory],
        ready: Ready,
        state: Tensor,
        segments: Tensor | None,
        before: Pending | None,
    ) -> None:
        self._before = before
        self._segments: list[int] = [] if segments is None else segments.flatten().tolist()
        self._gathered = {one for one in self._segments if one >= 0}
        super().__init__(memory, ready, state, None, bool(self._gathered))

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The state, and what is gathered where the pass stays open."""
        need_all(self._room.seen, self.memory)
        total = self._before
        if self._gathered:
            total = self._joined(joined_ids(sorted(self._gathered), self._before))
        return ended(self.memory, self.state, total, close)

    def _joined(self, ids: tuple[int, ...]) -> Pending:
        before, told = self._before, self._room.told()
        rows = [[float(own == one) for one in ids] for own in self._segments]
        member = torch.tensor(rows, dtype=torch.float32, device=told.device)
        counts, sums = (torch.zeros_like(member) if before is None else before.counts), None
        if before is not None:
            sums = before.sums if isinstance(before.sums, Tensor) else torch.stack(before.sums)
            if ids != before.ids:
                place = torch.tensor([ids.index(one) for one in before.ids], device=told.device)
                counts = torch.zeros_like(member).index_copy_(1, place, before.counts)
                sums = sums.new_zeros(*sums.shape[:2], len(ids), sums.shape[3]).index_copy_(2, place, sums)
        own = member[..., None]
        return Pending(ids, counts + member, own * told if sums is None else torch.addcmul(sums, own, told))
