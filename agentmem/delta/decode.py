"""One decode step: a single token in every row, with the results of a pass but as few operations as possible.

A `DecodeStep` keeps its buffers, for a fixed number of rows, and is used again for the next token. There are three
implementations with the same results: `TorchDecodeStep` with torch's operations, `decode_numba.NumbaDecodeStep` with
two compiled calls per layer, and `decode_pool.PooledDecodeStep` with one kernel per layer on a pool of states;
`SteeredModel` chooses between them. While a layer runs, only its read and its corrections are computed. What the token
writes is first read by the next token, so the writes of all layers are done together at the end of the step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import sqrt
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agentmem import kernels
from agentmem.delta.attach import ProjectionSite
from agentmem.delta.layer import LayerMemory, pack
from agentmem.delta.passes import Forward, ForwardContext, Pending, closed, joined_ids, skipped_layers
from agentmem.kernels.recurrence import NORM_EPS, write_once


class PackedWeights:
    """The weights of all layers as decode steps need them, without gradients.

    The parameters become views of the packed weights, so that whatever is written into a parameter is seen here too. A
    parameter that is replaced or moved afterwards shows by its address, which then differs from the one noted when the
    weights were packed.

    Attributes:
        memory: the memory of all layers.
        parameters_of: picks the parameters that steps need out of a layer's `_parameters`.
        addresses: the addresses of these parameters, for all layers, after packing.
        device: the device of all weights; None where they are on several devices, in which case nothing is packed.
        packed: for each layer the packed weight [3 H r + gates, D].
        outputs: for each layer the output weights [W, H r] of the heads that are corrected, in the config's order.
        beta_bias, lambda_bias: the biases of all layers, [L, 1, 1, H, r or 1]; `lambda_bias` is None where the config
            has none.
        uses_triton: whether steps run as Triton kernels on this device.
    """

    def __init__(self, memory: Sequence[LayerMemory]) -> None:
        self.memory = memory
        config = memory[0].config
        names = ["memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj", "beta_bias"]
        names += [] if config.couple_lambda else ["lambda_proj", "lambda_bias"]
        self.parameters_of = itemgetter(*names, *(f"delta_{head}_proj" for head in config.delta_heads))
        devices = {parameter.device for module in memory for parameter in self.parameters_of(module._parameters)}
        self.device = devices.pop() if len(devices) == 1 else None
        self.uses_triton = self.device is not None and kernels.runs_triton(self.device)
        self.lambda_bias: Tensor | None = None
        if self.device is not None:
            shape = len(memory), 1, 1, config.num_state_heads, -1
            self.packed = [module.packed_weight().detach() for module in memory]
            self.beta_bias = pack([module.beta_bias for module in memory]).view(shape)
            if not config.couple_lambda:
                self.lambda_bias = pack([module.lambda_bias for module in memory]).view(shape)
            # A reference is kept so that nothing else can be allocated at an address that was noted.
            self.outputs = [[m.output_weight(head).detach() for head in config.delta_heads] for m in memory]
        # Noted last: packing has just turned the parameters into views, at other addresses.
        self.addresses: list[int] = []
        for module in memory:
            self.addresses += map(Tensor.data_ptr, self.parameters_of(module._parameters))

    def suit_numba(self) -> bool:
        """Whether steps can run compiled by numba."""
        tensors = *self.packed, *(weight for layer in self.outputs for weight in layer), self.beta_bias
        if self.lambda_bias is not None:
            tensors = *tensors, self.lambda_bias
        return all(map(Tensor.is_contiguous, tensors)) and kernels.runs_numba(*tensors)


class DecodeStep(ForwardContext):
    """One token of every row, without gradients, on one device.

    Args:
        weights: the weights of all layers.
        state: [B, L, H, r, r], of the shape that all states of this step have.
        writing: whether tokens are written, or gathered into segments; otherwise only their query is computed.

    Attributes:
        state, mask, segments, pending: the inputs of the next token, set before `begin`. `state` [B, L, H, r, r] is not
            changed. `mask` says where the token is written, [B, 1] bool (None = everywhere). For adapters that write by
            message or sentence, `segments` holds each row's segment (-1 = not written) and `pending` the sums of
            earlier calls of the same pass.
    """

    def __init__(self, weights: PackedWeights, state: Tensor, writing: bool) -> None:
        super().__init__(weights.memory, state)
        self.weights = weights
        self.batch, _, self.heads, self.rank, _ = state.shape
        self.writing = writing
        self.mask: Tensor | None = None
        self.segments: list[int] | None = None
        self.pending: Pending | None = None
        self._layer = -1  # the layer that read last

    @abstractmethod
    def write(self) -> Tensor:
        """The states [B, L, H, r, r] after the token."""

    @abstractmethod
    def write_features(self) -> Tensor:
        """`LayerMemory.write_features` of all layers, [L, B, 1, 2 H r + gates] float32; valid until the next token."""

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        """The state after the token and, where the pass stays open, the sums so far."""
        if self._layers_read != len(self.memory):
            raise skipped_layers(self._layers_read, len(self.memory))
        if self.segments is None:
            return (self.write() if self.writing else self.state), None
        pending = self._gathered(self.segments) if self.writing else self.pending
        return closed(self.memory, self.state, pending, close)

    def _gathered(self, segments: list[int]) -> Pending:
        """The sums of earlier calls, with each row's token added to its segment."""
        pending, features = self.pending, self.write_features()
        ids = joined_ids(sorted({segment for segment in segments if segment >= 0}), pending)
        rows = [[float(segment == own) for segment in ids] for own in segments]
        members = torch.tensor(rows, dtype=torch.float32, device=features.device)  # [B, S]
        counts, sums = (torch.zeros_like(members) if pending is None else pending.counts), None
        if pending is not None:
            sums = pending.sums if isinstance(pending.sums, Tensor) else torch.stack(pending.sums)
            if ids != pending.ids:
                columns = torch.tensor([ids.index(segment) for segment in pending.ids], device=features.device)
                counts = torch.zeros_like(members).index_copy_(1, columns, pending.counts)
                sums = sums.new_zeros(*sums.shape[:2], len(ids), sums.shape[3]).index_copy_(2, columns, sums)
        own = members[..., None]  # [B, S, 1]
        sums = own * features if sums is None else torch.addcmul(sums, own, features)  # [L, B, S, 2 H r + gates]
        return Pending(ids, counts + members, sums)


class LayerBuffers(NamedTuple):
    """The operands of one layer's step, and the views that it fills. M = B H, the rows of all heads.

    Where M is 1 on a CPU, `query` to `square` are vectors and one matrix, without the dimensions of size 1.
    """

    weight: Tensor  # multiplies the hidden state: [D, 3 H r + gates], or [D, H r] where nothing is written
    products: Tensor  # [B, 3 H r + gates] or [B, H r], in the weights' dtype
    query: Tensor  # a view of the products, [B, H, r]
    unit: Tensor  # the query after tanh, [B, H, r] float32: the last row of `matrices`
    matrices: Tensor  # the states with the query below them, [M, r + 1, r]
    probe: Tensor  # the query as a column, [M, r, 1]
    result: Tensor  # matrices times probe, [M, r + 1, 1]
    read: Tensor  # a view of the result, [M, r]
    square: Tensor  # a view of the result, [M, 1]: the query's squared length


class TorchDecodeStep(DecodeStep):
    """The step in torch's operations, as few as possible.

    Next to a product with 50 MB of weights that are not in the caches, an operation costs about as much as fetching its
    code, whatever it computes. So a layer runs only a product with the hidden state, tanh, a product with its matrices,
    and the corrections, which are products that add in place. For one row and one head the query's length goes into
    those as a factor. The query is also the last row of the matrices, so that one product gives both the read and the
    query's squared length. All of it is in buffers whose views are made once.
    """

    def __init__(self, weights: PackedWeights, state: Tensor, writing: bool) -> None:
        super().__init__(weights, state, writing)
        batch, heads, rank = self.batch, self.heads, self.rank
        config = self.memory[0].config
        self._scale = None if config.trainable_delta_scale else config.scale
        self._normalize = config.normalize_qk
        size, rows, layers = heads * rank, batch * heads, len(weights.packed)
        used = weights.packed if writing else [weight[:size] for weight in weights.packed]
        like = used[0]
        self._single = rows == 1 and not like.is_cuda
        self._read = like  # the last layer's read, still to be multiplied by `_factor`
        self._factor = 1.0
        self._by_layer = state
        # Outside inference mode: tensors made in inference mode could not be filled outside of it.
        with torch.inference_mode(False), torch.no_grad():
            products = like.new_empty(layers, batch, 1, like.shape[0])
            matrices = like.new_empty(layers, rows, rank + 1, rank, dtype=torch.float32)
            results = like.new_empty(layers, rows, rank + 1, 1, dtype=torch.float32)
            self._row_reads = like.new_empty(rows, rank, dtype=torch.float32)
            self._states = matrices[:, :, :rank]  # [L, M, r, r]
            self._buffers = []
            for layer, weight in enumerate(used):
                query = products[layer, :, 0, :size].view(batch, heads, rank)
                unit, own, result = matrices[layer, :, rank], matrices[layer], results[layer]
                if self._single:
                    query, own, result = query.view(rank), own[0], result.view(rank + 1)
                    unit = probe = unit[0]
                    read, square = result[:rank], result[rank]
                else:
                    probe, read, square = unit[..., None], result[:, :rank, 0], result[:, rank]
                    unit = unit.view(batch, heads, rank)
                buffers = LayerBuffers(weight.t(), products[layer, :, 0], query, unit, own, probe, result, read, square)
                self._buffers.append(buffers)
            self._products = products  # [L, B, 1, 3 H r + gates], or only H r columns where nothing is written
            exact = products.dtype == torch.float32
            self._exact = products if exact else torch.empty_like(products, dtype=torch.float32)
            self._parts = self.memory[0].split(self._exact) if writing else None

    def begin(self) -> None:
        layers, rows, _, rank = self._states.shape
        self._by_layer = self.state.transpose(0, 1).reshape(layers, rows, rank, rank)  # [B, L, H, r, r] -> [L, M, r, r]
        self._states.copy_(self._by_layer)
        self._layers_read, self._layer = 0, -1

    def forward(
        self, site: ProjectionSite, projection: Forward, hidden: Tensor, *inputs: Any, **options: Any
    ) -> Tensor:
        output = projection(hidden, *inputs, **options)
        if site.layer != self._layer and not site.is_output:
            self._layer = site.layer
            self._layers_read += 1
            self._read = self.read(site.layer, hidden)
        read, module = self._read, self.memory[site.layer]
        for head, start in site.heads:
            weight = module._parameters[f"delta_{head}_proj"]
            assert weight is not None
            fits = output.dtype is weight.dtype and output.is_contiguous()
            if not fits or (head == "o" and module.config.delta_o_rmsnorm):
                exact = (read.float() * self._factor).view(-1, 1, self.heads, self.rank)  # [B, 1, H, r]
                output = module.correct(head, exact, output, start)
                continue
            width, scale = weight.shape[0], self._scale or module.scale(head)
            if self._single:
                row = output.view(-1)  # [columns]
                if row.shape[0] != width:
                    row = row[start : start + width]
                row.addmv_(weight, read, alpha=scale * self._factor)
            else:
                rows = output.view(self.batch, -1)  # [B, columns]
                if rows.shape[1] != width:
                    rows = rows[:, start : start + width]
                rows.addmm_(read, weight.t(), alpha=scale)
        return output

    def read(self, layer: int, hidden: Tensor) -> Tensor:
        """The read [B, H r] in the dtype of the output weights, to be multiplied by `_factor`."""
        buffers = self._buffers[layer]
        dtype = buffers.weight.dtype
        low = dtype is not torch.float32
        rows = hidden.view(self.batch, -1)  # [B, D]
        torch.mm(rows if rows.dtype is dtype else rows.to(dtype), buffers.weight, out=buffers.products)
        if self._normalize and not low:
            torch.tanh(buffers.query, out=buffers.unit)
        else:
            buffers.unit.copy_(buffers.query)
            if self._normalize:
                buffers.unit.tanh_()
        if self._single:
            read = buffers.read
            torch.mv(buffers.matrices, buffers.probe, out=buffers.result)
            if self._normalize:
                self._factor = 1.0 / max(sqrt(buffers.square.item()), NORM_EPS)
                if low:
                    # Rounded where a batch of several rows rounds it, so that a sequence alone stays close to itself in
                    # a batch.
                    read, self._factor = read * self._factor, 1.0
        else:
            read = self._row_reads
            torch.bmm(buffers.matrices, buffers.probe, out=buffers.result)
            if self._normalize:
                torch.div(buffers.read, buffers.square.sqrt_().clamp_min_(NORM_EPS), out=read)
            else:
                read.copy_(buffers.read)
            read = read.view(self.batch, -1)  # [M, r] -> [B, H r]
        return read.to(dtype) if low else read

    def write_features(self) -> Tensor:
        if self._exact is not self._products:
            self._exact.copy_(self._products)
        return self.memory[0].write_features(self._exact)

    def write(self) -> Tensor:
        if self._exact is not self._products:
            self._exact.copy_(self._products)
        assert self._parts is not None
        weights, rank = self.weights, self.rank
        lambda_bias = None if weights.lambda_bias is None else weights.lambda_bias.float()
        # Each [L, B, 1, H, r].
        k, v, gates = self.memory[0].write_terms(self._parts, weights.beta_bias.float(), lambda_bias, self.mask)
        keep, erase, write = gates
        after = write_once(
            self._by_layer.reshape(-1, rank, rank),  # [L M, r, r]
            k.reshape(-1, rank),  # [L M, r], as are all that follow
            v.reshape(-1, rank),
            keep.reshape(-1, rank),
            erase.reshape(-1, rank),
            write.reshape(-1, rank),
        )
        # Layers outermost in memory: the layout that the next token reads.
        return after.view(-1, self.batch, self.heads, rank, rank).transpose(0, 1)
