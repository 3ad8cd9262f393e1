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
from typing import NamedTuple

import torch
from torch import Tensor

from agentmem.errors import TurnError
from agentmem.passes import Pass, Pending, Place, ended, joined_ids
from agentmem.recurrence import write_once
from agentmem.steering import NORM_EPS, LayerMemory, Parts, addresses, joined


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


class Room:
    """Buffers for a number of rows; what one step leaves in them is of no use to the next.

    Args:
        ready: the weights.
        batch, heads, rank: B, H, r.
        writing: whether a step is to write; else the query is all that is computed of a token.
    """

    def __init__(self, ready: Ready, batch: int, heads: int, rank: int, writing: bool) -> None:
        size, rows, layers = heads * rank, batch * heads, len(ready.weights)
        weights = ready.weights if writing else [weight[:size] for weight in ready.weights]
        like = weights[0]
        self.single = rows == 1 and not like.is_cuda
        # Not made in inference mode: what was could not be filled outside of it.
        with torch.inference_mode(False), torch.no_grad():
            products = like.new_empty(layers, batch, 1, like.shape[0])
            matrices = torch.empty(layers, rows, rank + 1, rank, device=like.device)
            found = torch.empty(layers, rows, rank + 1, 1, device=like.device)
            self.read = torch.empty(rows, rank, device=like.device)
            self.states = matrices[:, :, :rank]
            self.lanes = []
            for at, weight in enumerate(weights):
                query = products[at, :, 0, :size].view(batch, heads, rank)
                turned, one, product = matrices[at, :, rank], matrices[at], found[at]
                if self.single:
                    query, one, product = query.view(rank), one[0], product.view(rank + 1)
                    turned = probe = turned[0]
                    read, square = product[:rank], product[rank]
                else:
                    probe, read, square = turned[..., None], product[:, :rank, 0], product[:, rank]
                    turned = turned.view(batch, heads, rank)
                self.lanes.append(
                    Lane(weight.t(), products[at, :, 0], query, turned, one, probe, product, read, square)
                )
            self._products = products
            self._exact = (
                products if products.dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
            )
            self._parts = ready.memory[0].split(self._exact) if writing else None

    def parts(self) -> Parts:
        """The products of all layers in float32, [L, B, 1, ...]."""
        if self._exact is not self._products:
            self._exact.copy_(self._products)
        assert self._parts is not None
        return self._parts


class Ready:
    """What steps need of all layers, without gradients.

    The parameters become views of what is kept here, so that it has whatever is written into them.

    Attributes:
        weights: for each layer the packed weight [3 H r + gates, D].
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
        # With the number of their rows; of steps that write, and of those that do not.
        self._rooms: dict[bool, tuple[int, Room]] = {}

    def room(self, state: Tensor, writing: bool) -> Room:
        """Buffers for as many rows as the state [B, L, H, r, r] has; kept for the next step of as many."""
        batch, _, heads, rank, _ = state.shape
        found = self._rooms.get(writing)
        if found is None or found[0] != batch:
            found = self._rooms[writing] = batch, Room(self, batch, heads, rank, writing)
        return found[1]


class Stack:
    """The memory of all layers, made ready for steps, and again when a parameter was replaced or moved."""

    def __init__(self, memory: Sequence[LayerMemory]) -> None:
        self.memory = memory
        names = ["memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj", "beta_bias"]
        self._names = names if memory[0].config.couple_lambda else [*names, "lambda_proj", "lambda_bias"]
        self._addresses: list[int] = []
        self._ready: Ready | None = None

    def ready(self, device: torch.device) -> Ready | None:
        """What a step needs; None where layers lie elsewhere than their states on ``device``."""
        kept = [module._parameters for module in self.memory]
        parameters = [one for each in kept for name in self._names if (one := each[name]) is not None]
        if addresses(parameters) != self._addresses:
            together = len({one.device for one in parameters}) == 1
            self._ready = Ready(self.memory) if together else None
            self._addresses = addresses(parameters)
        made = self._ready
        return made if made is None or made.weights[0].device == device else None


class StepPass(Pass):
    """One token a row, without gradients, on one device.

    It writes where ``mask`` [B, 1] allows (None = everywhere), unless ``writing`` is off.
    """

    def __init__(
        self, memory: Sequence[LayerMemory], ready: Ready, state: Tensor, mask: Tensor | None, writing: bool
    ) -> None:
        super().__init__(memory, state)
        self._ready = ready
        self._scale = None if memory[0].config.trainable_delta_scale else memory[0].config.scale
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
        room, lane = self._room, self._room.lanes[index]
        self._seen += 1
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
        if room.single:
            read = lane.read
            torch.mv(lane.matrices, lane.probe, out=lane.found)
            if self._normalize:
                self._factor = 1.0 / max(sqrt(lane.square.item()), NORM_EPS)
                if low:
                    # Rounded where several rows round it, so that a session is close to itself in company.
                    read, self._factor = read * self._factor, 1.0
        else:
            read = room.read
            torch.bmm(lane.matrices, lane.probe, out=lane.found)
            if self._normalize:
                torch.div(lane.read, lane.square.sqrt_().clamp_min_(NORM_EPS), out=read)
            else:
                read.copy_(lane.read)
            read = read.view(self._batch, -1)
        return read.to(dtype) if low else read

    def through(self, place: Place, given: Tensor, output: Tensor) -> Tensor:
        """As ``Pass.through``; the output is changed in place where it can be."""
        index = place.layer
        if index != self._at and not place.last:
            self._at, self._now = index, self._visit(index, given)
        read, module = self._now, self.memory[index]
        for head, start in place.heads:
            weight = module.output_weight(head)
            fits = output.dtype is weight.dtype and output.is_contiguous()
            if not fits or (head == "o" and module.config.delta_o_rmsnorm):
                heads, rank = self.state.shape[2:4]
                whole = (read.float() * self._factor).view(-1, 1, heads, rank)
                output = module.corrected(head, whole, output, start)
                continue
            width, scale = weight.shape[0], self._scale or module.scale(head)
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
        self._need_all()
        layers, ready = len(self.memory), self._ready
        lam = None if ready.lam is None else ready.lam.float()
        k, v, gates = self.memory[0].written(self._room.parts(), ready.beta.float(), lam, self._mask)
        rank = self.state.shape[-1]
        rows = (x.reshape(-1, rank) for x in (k, v, *gates))
        after = write_once(self._by_layer.reshape(-1, rank, rank), *rows)
        # Layers outermost in memory, as the next token wants them.
        return after.view(layers, *self.state.shape[:1], *self.state.shape[2:]).transpose(0, 1), None

    def _need_all(self) -> None:
        if self._seen != len(self.memory):
            raise TurnError(f"the model ran {self._seen} of its {len(self.memory)} steered layers; nothing was written")


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
        super().__init__(memory, ready, state, None, False)
        self._before = before
        self._segments: list[int] = [] if segments is None else segments.flatten().tolist()
        self._hidden: list[Tensor] = []

    def _visit(self, index: int, hidden: Tensor) -> Tensor:
        self._hidden.append(hidden)
        return super()._visit(index, hidden)

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The state, and what is gathered where the pass stays open."""
        total = self._before
        if seen := {one for one in self._segments if one >= 0}:
            self._need_all()
            total = self._joined(joined_ids(sorted(seen), self._before))
        return ended(self.memory, self.state, total, close)

    def _joined(self, ids: tuple[int, ...]) -> Pending:
        before, batch = self._before, self._batch
        hidden = torch.stack(self._hidden).view(len(self.memory), batch, 1, -1).float()
        rows = [[float(own == one) for one in ids] for own in self._segments]
        member = torch.tensor(rows, dtype=torch.float32, device=hidden.device)
        counts, sums = (torch.zeros_like(member) if before is None else before.counts), None
        if before is not None:
            sums = before.sums if isinstance(before.sums, Tensor) else torch.stack(before.sums)
            if ids != before.ids:
                place = torch.tensor([ids.index(one) for one in before.ids], device=hidden.device)
                counts = torch.zeros_like(member).index_copy_(1, place, before.counts)
                sums = sums.new_zeros(*sums.shape[:2], len(ids), sums.shape[3]).index_copy_(2, place, sums)
        own = member[..., None]
        return Pending(ids, counts + member, own * hidden if sums is None else torch.addcmul(sums, own, hidden))
