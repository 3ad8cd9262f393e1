"""One token a row, as decoding runs it: the same numbers as a ``TokenPass``, with as few operations as can be.

Beside a product of 50 MB of cold weights an operation costs what it costs to fetch its code, whatever it does, so what
counts is how many there are. What a token writes is read by later tokens alone. So a layer's way to its output holds a
product with the hidden state, tanh, a product with the layer's matrices, and the corrections, which products add in
place; for one row and one head the query's length is a factor of those. The matrices have the query itself for a last
row: the product of both has the read and the query's squared length. Everything lies in buffers that were cut into
views once. The rest of the rule, a dozen small operations, is done once for all layers at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import Tensor

from agentmem.config import DeltaHead
from agentmem.errors import TurnError
from agentmem.passes import Pass, Pending, Place
from agentmem.recurrence import write_once
from agentmem.steering import NORM_EPS, LayerMemory, stamp_of

Outputs = dict[DeltaHead, tuple[Tensor, float]]


class Lane(NamedTuple):
    """What one layer's step reads, and the views that it fills. M = B H, the rows of all heads.

    Attributes:
        weight: what the hidden state is multiplied by, transposed: [D, 3 H r + gates], or [D, H r] to read only.
        products: [B, 3 H r + gates] or [B, H r], in the weights' dtype.
        query: of the products, [B, H, r].
        turned: after tanh, [B, H, r] float32: the last row of ``matrices``.
        matrices: the states with the query below them, [M, r + 1, r].
        probe: the query as a column, [M, r, 1].
        found: their product, [M, r + 1, 1].
        read: of the product, [M, r].
        square: of the product, [M, 1].
        outputs: for each head the output weight [W, H r] and the scale.

    Where M is 1 on a CPU, the views are vectors and a matrix instead, without the dimensions of 1.
    """

    weight: Tensor
    products: Tensor
    query: Tensor
    turned: Tensor
    matrices: Tensor
    probe: Tensor
    found: Tensor
    read: Tensor
    square: Tensor
    outputs: Outputs


class Room:
    """Buffers for a number of rows; what one step leaves in them is of no use to the next.

    Args:
        ready: the weights.
        batch, heads, rank: B, H, r.
        writing: whether a step is to write; else the query is all that is computed of a token.
    """

    def __init__(self, ready: Ready, batch: int, heads: int, rank: int, writing: bool) -> None:
        weights = ready.products if writing else ready.queries
        like, layers, rows = weights[0], len(weights), batch * heads
        self.single = rows == 1 and not like.is_cuda
        # Not made in inference mode: what was could not be filled outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.products = like.new_empty(layers, batch, like.shape[0])
            matrices = torch.empty(layers, rows, rank + 1, rank, device=like.device)
            found = torch.empty(layers, rows, rank + 1, 1, device=like.device)
            self.states = matrices[:, :, :rank]
            self.read = torch.empty(rows, rank, device=like.device)
            self.lanes = []
            for at, weight in enumerate(weights):
                query = self.products[at, :, : heads * rank].view(batch, heads, rank)
                turned, one, product = matrices[at, :, rank], matrices[at], found[at]
                if self.single:
                    query, probe, one, product = query.view(rank), turned[0], one[0], product.view(rank + 1)
                    turned, read, square = probe, product[:rank], product[rank]
                else:
                    probe, read, square = turned[..., None], product[:, :rank, 0], product[:, rank]
                    turned = turned.view(batch, heads, rank)
                self.lanes.append(
                    Lane(weight.t(), self.products[at], query, turned, one, probe, product, read, square,
                         ready.outputs[at])
                )  # fmt: skip


class Ready:
    """What steps need of all layers.

    Attributes:
        products: for each layer the packed weight [3 H r + gates, D].
        queries: for each layer the first H r rows of it.
        outputs: for each layer and head the output weight [W, H r], its columns together, and the scale.
        beta, lam: biases of all layers, [L, 1, 1, gates]; ``lam`` None where the config has none.
        low: the weights are no float32.
    """

    def __init__(self, memory: Sequence[LayerMemory]) -> None:
        config = memory[0].config
        self.products = [module.packed_weight().detach() for module in memory]
        self._size = config.rank * config.num_state_heads
        self.queries = [weight[: self._size] for weight in self.products]
        fused = [head for head in config.delta_heads if head != "o" or not config.delta_o_rmsnorm]
        self.outputs: list[Outputs] = [
            {head: (module.output_weight(head).detach().t().contiguous().t(), module.scale(head)) for head in fused}
            for module in memory
        ]
        self.beta = torch.stack([module.beta_bias.detach() for module in memory])[:, None, None]
        self.lam = None
        if not config.couple_lambda:
            self.lam = torch.stack([module.lambda_bias.detach() for module in memory])[:, None, None]
        self.low = self.products[0].dtype != torch.float32
        self._room: tuple[tuple[int, bool], Room] | None = None

    def room(self, state: Tensor, writing: bool) -> Room:
        """Buffers for as many rows as the state [B, L, H, r, r] has; kept for the next step of as many."""
        batch, _, heads, rank, _ = state.shape
        if self._room is None or self._room[0] != (batch, writing):
            self._room = (batch, writing), Room(self, batch, heads, rank, writing)
        return self._room[1]


class Stack:
    """The memory of all layers, made ready for steps, and again when a parameter has changed."""

    def __init__(self, memory: Sequence[LayerMemory]) -> None:
        self.memory = memory
        self._parameters: list[Tensor] = []
        self._stamp: tuple[int, ...] = ()
        self._ready: Ready | None = None

    def ready(self, device: torch.device) -> Ready | None:
        """What a step needs, without gradients; None where layers lie elsewhere than their states on ``device``.

        Nothing is kept of weights that are being trained: torch does not count every way in which an optimiser
        changes them.
        """
        parameters = [one for module in self.memory for one in module._parameters.values() if one is not None]
        if any(map(attrgetter("requires_grad"), parameters)):
            return Ready(self.memory) if {one.device for one in parameters} == {device} else None
        stamp = stamp_of(parameters)
        known = len(parameters) == len(self._parameters) and all(map(is_, parameters, self._parameters))
        if not known or stamp != self._stamp:
            together = {one.device for one in parameters} == {device}
            self._parameters, self._stamp = parameters, stamp
            self._ready = Ready(self.memory) if together else None
        made = self._ready
        return made if made is None or made.beta.device == device else None


class StepPass(Pass):
    """One token a row, without gradients, on one device.

    It writes where ``mask`` [B, 1] allows (None = everywhere), unless ``writing`` is off.
    """

    def __init__(
        self, memory: Sequence[LayerMemory], ready: Ready, state: Tensor, mask: Tensor | None, writing: bool
    ) -> None:
        super().__init__(memory, state)
        self._ready = ready
        self._low = ready.low
        self._normalize = memory[0].config.normalize_qk
        self._mask = mask
        self._writing = writing
        self._seen = 0
        self._at, self._now = -1, state  # the layer that read last, and what it read
        self._factor = 1.0
        batch, layers, heads, rank, _ = state.shape
        self._batch = batch
        self._room = ready.room(state, writing)
        self._by_layer = state.transpose(0, 1).reshape(layers, batch * heads, rank, rank)
        self._room.states.copy_(self._by_layer)

    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        """The read [B, H r] in the dtype of the output weights, to be multiplied by ``_factor``."""
        room, low = self._room, self._low
        lane = room.lanes[index]
        self._seen += 1
        rows = hidden.view(self._batch, -1)
        torch.mm(rows if rows.dtype is lane.weight.dtype else rows.to(lane.weight.dtype), lane.weight, out=lane.products)
        if self._normalize and not low:
            torch.tanh(lane.query, out=lane.turned)
        else:
            lane.turned.copy_(lane.query)
            if self._normalize:
                lane.turned.tanh_()
        if room.single:
            read = lane.read
            torch.mv(lane.matrices, lane.probe, out=lane.found)
            if self._normalize:
                self._factor = 1.0 / max(sqrt(lane.square.item()), NORM_EPS)
        else:
            read = room.read
            torch.bmm(lane.matrices, lane.probe, out=lane.found)
            if self._normalize:
                torch.div(lane.read, lane.square.sqrt_().clamp_min_(NORM_EPS), out=read)
            else:
                read.copy_(lane.read)
            read = read.view(self._batch, -1)
        return read.to(lane.weight.dtype) if low else read

    def through(self, place: Place, given: Tensor, output: Tensor) -> Tensor:
        """As ``Pass.through``; the output is changed in place where it can be."""
        index = place.index
        if index != self._at and not place.last:
            self._at, self._now = index, self._visit(index, given)
        read = self._now
        for head, start in place.heads:
            fused = self._ready.outputs[index].get(head)
            if fused is None or output.dtype is not read.dtype or not output.is_contiguous():
                heads, rank = self.state.shape[2:4]
                whole = (read.float() * self._factor).view(-1, 1, heads, rank)
                output = self.memory[index].corrected(head, whole, output, start)
                continue
            weight, scale = fused
            width = weight.shape[0]
            if self._room.single:
                row = output.view(-1)
                if row.shape[0] != width:
                    row = row[start : start + width]
                row.addmv_(weight, read, alpha=scale * self._factor)
            else:
                rows = output.view(self._batch, -1)
                if rows.shape[1] != width:
                    rows = rows[:, start : start + width]
                rows.addmm_(read, weight.t(), alpha=scale)
        return output

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The state after the token."""
        if not self._writing:
            return self.state, None
        layers, ready = len(self.memory), self._ready
        if self._seen != layers:
            raise TurnError(f"the model ran {self._seen} of its {layers} steered layers; nothing was written")
        products = self._room.products.unsqueeze(2)
        k, v, gates = self.memory[0].written_from(products, ready.beta, ready.lam, self._mask)
        rank = self.state.shape[-1]
        rows = (x.reshape(-1, rank) for x in (k, v, *gates))
        after = write_once(self._by_layer.reshape(-1, rank, rank), *rows)
        # Layers outermost in memory, as the next token wants them.
        return after.view(layers, *self.state.shape[:1], *self.state.shape[2:]).transpose(0, 1), None
