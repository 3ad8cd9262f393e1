"""One token a row on a CPU by compiled calls, where numba is there: ``rooms.PlainRoom`` in two calls a layer.

What the calls of ``kernels.numba_step`` are given lies in tables of addresses that are made once. All they point to is
held here or by the weights' modules, and a weight that is replaced or moved makes new rooms (``stepping.Stack``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agentmem.delta.passes import Place
from agentmem.delta.rooms import Ready, Room
from agentmem.errors import TurnError
from agentmem.kernels.numba_step import STEER, WRITE, steer, write
from agentmem.kernels.ops import MODES

_EXACT = torch.float32


class Call(NamedTuple):
    """A call of ``numba_step.steer``: where its table lies, the width of an output's row, the correction's factor."""

    table: int
    stride: int
    scale: float


class CompiledRoom(Room):
    """Buffers and tables for a number of rows; all weights are float32, contiguous, on a CPU.

    Args:
        ready: the weights.
        batch, heads, rank: B, H, r.
        writing: whether a step is to write; else the query is all that is computed of a token.
    """

    def __init__(self, ready: Ready, batch: int, heads: int, rank: int, writing: bool) -> None:
        self._ready = ready
        config, first = ready.memory[0].config, ready.weights[0]
        layers, rows = len(ready.weights), first.shape[0] if writing else heads * rank
        with torch.inference_mode(False):
            # Types and devices are said: the process may have set others for what says none.
            self._products = torch.empty(layers, batch, rows, dtype=_EXACT, device="cpu")
            self._reads = torch.empty(batch, 1, heads, rank, dtype=_EXACT, device="cpu")
        self._given = batch * first.shape[1]  # numbers in a layer's hidden states
        self._batch = batch
        self._steer: dict[str, int] = {
            "rows": rows, "hidden": first.shape[1], "batch": batch, "heads": heads, "rank": rank,
            "normalize": config.normalize_qk, "layers": layers, "reads": self._reads.data_ptr(),
        }  # fmt: skip
        self._tables: list[Tensor] = []
        # By the numbers of their places; none where the output has to be corrected otherwise.
        self._calls: dict[int, tuple[Call, ...]] = {}
        self._reading = [self._table(index) for index in range(layers)]
        self._write = self._kept(
            WRITE, products=self._products.data_ptr(), rows=rows, batch=batch, heads=heads, rank=rank,
            normalize=config.normalize_qk, layers=layers, beta=ready.beta.data_ptr(),
            lam=0 if ready.lam is None else ready.lam.data_ptr(), gates=ready.beta[0].numel(),
            mode=MODES[config.state_update_mode],
        )  # fmt: skip
        self._learned: list[Place] = []  # where factors may change from step to step
        self._at = -1  # the layer that read last
        self._state, self._address = first, 0

    def begin(self, state: Tensor) -> None:
        self._state = state.contiguous()
        self._address = self._state.data_ptr()
        self.seen, self._at = 0, -1
        for place in self._learned:
            module = self._ready.memory[place.layer]
            calls = zip(self._calls[place.number], place.heads, strict=True)
            self._calls[place.number] = tuple(call._replace(scale=module.scale(head)) for call, (head, _) in calls)

    def through(self, place: Place, given: Tensor, output: Tensor) -> Tensor:
        # A layer's weights have just gone through the caches, so what is touched here has to be fetched, code too: each
        # look at a tensor costs microseconds.
        number, layer, heads, last = place
        hidden = 0
        if layer != self._at and not last:
            if self.seen == 0:
                self._need(given)
            self._at = layer
            self.seen += 1
            if given.dtype is not _EXACT or not given.is_contiguous():
                given = given.float().contiguous()
            hidden = given.data_ptr()
        # Looked at every time: a model may have been moved to another type, and memory is what is written to.
        if output.dtype is _EXACT and output.is_contiguous():
            if number not in self._calls:
                self._calls[number] = self._prepared(place, output)
            calls = self._calls[number]
            for table, stride, scale in calls:
                steer(table, self._address, hidden, output.data_ptr(), stride, scale)
                hidden = 0
            if calls:
                return output
        if hidden:
            steer(self._reading[layer], self._address, hidden, 0, 0, 0.0)
        for head, start in heads:
            output = self._ready.memory[layer].corrected(head, self._reads, output, start)
        return output

    def after(self, mask: Tensor | None) -> Tensor:
        state, after = self._state, torch.empty_like(self._state)
        writes = None if mask is None else mask.contiguous()
        write(self._write, state.data_ptr(), after.data_ptr(), 0 if writes is None else writes.data_ptr())
        return after

    def told(self) -> Tensor:
        return self._ready.memory[0].told(self._products)[:, :, None]

    def _need(self, hidden: Tensor) -> None:
        """Refuse hidden states that are elsewhere, or of more tokens: once a step, for all layers have the same."""
        if hidden.device.type != "cpu" or hidden.numel() != self._given:
            raise TurnError(
                f"the memory lies on a CPU and a step is of {self._batch} rows, one token each; the model gave it "
                f"hidden states {list(hidden.shape)} on {hidden.device}. Move a model before memory is attached to it"
            )

    def _prepared(self, place: Place, output: Tensor) -> tuple[Call, ...]:
        """The calls for a place; none where a correction is more than a product."""
        module = self._ready.memory[place.layer]
        if (place.last and module.config.delta_o_rmsnorm) or output.numel() != self._batch * output.shape[-1]:
            return ()
        stride = output.shape[-1]
        calls = []
        for head, start in place.heads:
            weight = module.output_weight(head)
            table = self._table(place.layer, output_weight=weight.data_ptr(), width=weight.shape[0], start=start)
            calls.append(Call(table, stride, module.scale(head)))
        if module.config.trainable_delta_scale:
            self._learned.append(place)
        return tuple(calls)

    def _table(self, index: int, **more: int) -> int:
        mine = {"weight": self._ready.weights[index].data_ptr(), "products": self._products[index].data_ptr()}
        return self._kept(STEER, **self._steer, **mine, layer=index, **more)

    def _kept(self, names: tuple[str, ...], **numbers: int) -> int:
        """Where a table lies that says these numbers, 0 where none is given."""
        table = torch.tensor([int(numbers.get(name, 0)) for name in names], dtype=torch.int64, device="cpu")
        self._tables.append(table)
        return table.data_ptr()
