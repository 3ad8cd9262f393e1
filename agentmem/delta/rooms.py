"""What one token a row is computed with: buffers for a number of rows, and the operations between them.

A layer's way to its output holds what it reads and what is corrected with it; what a token writes is read by later
tokens alone, so that is done once for all layers at the end. ``PlainRoom`` does it with torch's operations,
``compiled.CompiledRoom`` with two calls a layer; the numbers are the same. Their order is of ``stepping``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from agentmem import kernels
from agentmem.delta.layer import NORM_EPS, LayerMemory, joined
from agentmem.delta.passes import Place
from agentmem.kernels.recurrence import write_once


class Room(ABC):
    """Buffers for a number of rows; what one step leaves in them is of no use to the next.

    Attributes:
        seen: layers that have read since the step began.
    """

    seen = 0

    @abstractmethod
    def begin(self, state: Tensor) -> None:
        """Take the states [B, L, H, r, r] that a step reads."""

    @abstractmethod
    def through(self, place: Place, given: Tensor, output: Tensor) -> Tensor:
        """As ``passes.Through``, for one token a row; the output is changed in place where it can be."""

    @abstractmethod
    def after(self, mask: Tensor | None) -> Tensor:
        """The states after the token, which writes where ``mask`` [B, 1] allows. All layers must have read."""

    @abstractmethod
    def told(self) -> Tensor:
        """What the token would write is made of this: ``LayerMemory.told`` of all layers, [L, B, 1, ...] float32.

        Good until the next step begins.
        """


class Ready:
    """What steps need of all layers, without gradients.

    The parameters become views of what is kept here, so that it has whatever is written into them.

    Attributes:
        memory: of all layers.
        weights: for each layer the packed weight [3 H r + gates, D].
        outputs: the output weights of all layers.
        beta, lam: biases of all layers, [L, 1, 1, H, r or 1]; ``lam`` None where the config has none.
    """

    def __init__(self, memory: Sequence[LayerMemory]) -> None:
        self.memory = memory
        self.weights = [module.packed_weight().detach() for module in memory]
        shape = len(memory), 1, 1, memory[0].config.num_state_heads, -1
        self.beta = joined([module.beta_bias for module in memory]).view(shape)
        self.lam: Tensor | None = None
        if not memory[0].config.couple_lambda:
            self.lam = joined([module.lambda_bias for module in memory]).view(shape)
        # Held, so that nothing else comes to lie at an address that somebody noted.
        self.outputs = [module.output_weight(head).detach() for module in memory for head in module.config.delta_heads]
        of_all = *self.weights, *self.outputs, self.beta, *([] if self.lam is None else [self.lam])
        self._compiled = all(map(Tensor.is_contiguous, of_all)) and kernels.runs_numba(*of_all)
        # With the number of their rows; of steps that write, and of those that do not.
        self._rooms: dict[bool, tuple[int, Room]] = {}

    def room(self, state: Tensor, writing: bool) -> Room:
        """Buffers for as many rows as the state [B, L, H, r, r] has; kept for the next step of as many."""
        batch, _, heads, rank, _ = state.shape
        found = self._rooms.get(writing)
        if found is None or found[0] != batch:
            found = self._rooms[writing] = batch, self._made(batch, heads, rank, writing)
        return found[1]

    def _made(self, batch: int, heads: int, rank: int, writing: bool) -> Room:
        if not self._compiled:
            return PlainRoom(self, batch, heads, rank, writing)
        from agentmem.delta.decode_numba import CompiledRoom

        return CompiledRoom(self, batch, heads, rank, writing)


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


class PlainRoom(Room):
    """With torch's operations, as few as can be.

    Beside a product of 50 MB of cold weights an operation costs what it costs to fetch its code, whatever it does. So a
    layer has a product with the hidden state, tanh, a product with its matrices, and the corrections, which products
    add in place; for one row and one head the query's length is a factor of those. The matrices have the query itself
    for a last row: the product of both has the read and the query's squared length. Everything lies in buffers that
    were cut into views once.

    Args:
        ready: the weights.
        batch, heads, rank: B, H, r.
        writing: whether a step is to write; else the query is all that is computed of a token.
    """

    def __init__(self, ready: Ready, batch: int, heads: int, rank: int, writing: bool) -> None:
        self._ready, self._batch, self._heads, self._rank = ready, batch, heads, rank
        config = ready.memory[0].config
        self._scale = None if config.trainable_delta_scale else config.scale
        self._normalize = config.normalize_qk
        self._at = -1  # the layer that read last
        self._now = ready.weights[0]  # what it read, to be multiplied by ``_factor``
        self._factor = 1.0
        size, rows, layers = heads * rank, batch * heads, len(ready.weights)
        weights = ready.weights if writing else [weight[:size] for weight in ready.weights]
        like = weights[0]
        self._single = rows == 1 and not like.is_cuda
        # Not made in inference mode: what was could not be filled outside of it.
        with torch.inference_mode(False), torch.no_grad():
            products = like.new_empty(layers, batch, 1, like.shape[0])
            exact = torch.float32
            matrices = like.new_empty(layers, rows, rank + 1, rank, dtype=exact)
            found = like.new_empty(layers, rows, rank + 1, 1, dtype=exact)
            self._read = like.new_empty(rows, rank, dtype=exact)
            self._states = matrices[:, :, :rank]
            self._by_layer = self._states
            self._lanes = []
            for at, weight in enumerate(weights):
                query = products[at, :, 0, :size].view(batch, heads, rank)
                turned, one, product = matrices[at, :, rank], matrices[at], found[at]
                if self._single:
                    query, one, product = query.view(rank), one[0], product.view(rank + 1)
                    turned = probe = turned[0]
                    read, square = product[:rank], product[rank]
                else:
                    probe, read, square = turned[..., None], product[:, :rank, 0], product[:, rank]
                    turned = turned.view(batch, heads, rank)
                self._lanes.append(
                    Lane(weight.t(), products[at, :, 0], query, turned, one, probe, product, read, square)
                )
            self._products = products
            self._exact = (
                products if products.dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
            )
            self._parts = ready.memory[0].split(self._exact) if writing else None

    def begin(self, state: Tensor) -> None:
        layers, rows, _, rank = self._states.shape
        self._by_layer = state.transpose(0, 1).reshape(layers, rows, rank, rank)
        self._states.copy_(self._by_layer)
        self.seen, self._at = 0, -1

    def _visit(self, index: int, hidden: Tensor) -> None:
        """The read [B, H r] in the dtype of the output weights."""
        lane = self._lanes[index]
        dtype = lane.weight.dtype
        low = dtype is not torch.float32
        rows = hidden.view(self._batch, -1)
        torch.mm(rows if rows.dtype is dtype else rows.to(dtype), lane.weight, out=lane.products)
        if self._normalize and not low:
            torch.tanh(lane.query, out=lane.turned)
        else:
            lane.turned.copy_(lane.query)
            if self._normalize:
                lane.turned.tanh_()
        if self._single:
            read = lane.read
            torch.mv(lane.matrices, lane.probe, out=lane.found)
            if self._normalize:
                self._factor = 1.0 / max(sqrt(lane.square.item()), NORM_EPS)
                if low:
                    # Rounded where several rows round it, so that a session is close to itself in company.
                    read, self._factor = read * self._factor, 1.0
        else:
            read = self._read
            torch.bmm(lane.matrices, lane.probe, out=lane.found)
            if self._normalize:
                torch.div(lane.read, lane.square.sqrt_().clamp_min_(NORM_EPS), out=read)
            else:
                read.copy_(lane.read)
            read = read.view(self._batch, -1)
        self._now = read.to(dtype) if low else read

    def through(self, place: Place, given: Tensor, output: Tensor) -> Tensor:
        if place.layer != self._at and not place.last:
            self._at = place.layer
            self.seen += 1
            self._visit(place.layer, given)
        read, module = self._now, self._ready.memory[place.layer]
        for head, start in place.heads:
            weight = module.output_weight(head)
            fits = output.dtype is weight.dtype and output.is_contiguous()
            if not fits or (head == "o" and module.config.delta_o_rmsnorm):
                whole = (read.float() * self._factor).view(-1, 1, self._heads, self._rank)
                output = module.corrected(head, whole, output, start)
                continue
            width, scale = weight.shape[0], self._scale or module.scale(head)
            if self._single:
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

    def told(self) -> Tensor:
        if self._exact is not self._products:
            self._exact.copy_(self._products)
        return self._ready.memory[0].told(self._exact)

    def after(self, mask: Tensor | None) -> Tensor:
        if self._exact is not self._products:
            self._exact.copy_(self._products)
        assert self._parts is not None
        ready, batch, heads, rank = self._ready, self._batch, self._heads, self._rank
        lam = None if ready.lam is None else ready.lam.float()
        k, v, gates = ready.memory[0].written(self._parts, ready.beta.float(), lam, mask)
        rows = (x.reshape(-1, rank) for x in (k, v, *gates))
        after = write_once(self._by_layer.reshape(-1, rank, rank), *rows)
        # Layers outermost in memory, as the next token wants them.
        return after.view(-1, batch, heads, rank, rank).transpose(0, 1)
