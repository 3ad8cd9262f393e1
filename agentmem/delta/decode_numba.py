"""The decode step on a CPU with numba: a `DecodeStep` that makes two compiled calls per layer.

The functions of `kernels.numba_step` get their arguments from tables of addresses that are made once. Everything the
tables point to is kept alive here or by the modules of the weights; when a weight is replaced or moved, a new step is
made (`PackedWeights`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from agentmem.delta.attach import ProjectionSite
from agentmem.delta.decode import DecodeStep, PackedWeights
from agentmem.delta.passes import Forward, Pending
from agentmem.errors import TurnError
from agentmem.kernels.numba_step import STEER, WRITE, steer, write
from agentmem.kernels.recurrence import MODES


class SteerCall(NamedTuple):
    """Arguments of `numba_step.steer`: address of its table, width of a row of the output, factor of the correction."""

    table: int
    stride: int
    scale: float


class NumbaDecodeStep(DecodeStep):
    """Buffers and tables for a fixed number of rows; all weights are float32, contiguous, and on a CPU."""

    def __init__(self, weights: PackedWeights, state: Tensor, writing: bool) -> None:
        super().__init__(weights, state, writing)
        batch, heads, rank = self.batch, self.heads, self.rank
        config, first = self.memory[0].config, weights.packed[0]
        layers, rows = len(weights.packed), first.shape[0] if writing else heads * rank
        with torch.inference_mode(False):
            # Dtype and device are explicit: the process may have changed torch's defaults.
            self._products = torch.empty(layers, batch, rows, dtype=torch.float32, device="cpu")
            self._read = torch.empty(batch, 1, heads, rank, dtype=torch.float32, device="cpu")
        self._hidden_numbers = batch * first.shape[1]  # elements of a layer's hidden states
        self._steer: dict[str, int] = {
            "rows": rows, "hidden": first.shape[1], "batch": batch, "heads": heads, "rank": rank,
            "normalize": config.normalize_qk, "layers": layers, "reads": self._read.data_ptr(),
        }  # fmt: skip
        self._tables: list[Tensor] = []
        # By site number; empty for a site whose output has to be corrected by torch.
        self._calls: dict[int, tuple[SteerCall, ...]] = {}
        self._reading = [self._steer_table(layer) for layer in range(layers)]
        self._write = self._table(
            WRITE, products=self._products.data_ptr(), rows=rows, batch=batch, heads=heads, rank=rank,
            normalize=config.normalize_qk, layers=layers, beta=weights.beta_bias.data_ptr(),
            lam=0 if weights.lambda_bias is None else weights.lambda_bias.data_ptr(),
            gates=weights.beta_bias[0].numel(), mode=MODES[config.state_update_mode],
        )  # fmt: skip
        self._learned: list[ProjectionSite] = []  # sites whose factors may change from token to token
        self._address = 0  # address of the state

    def begin(self) -> None:
        self._contiguous = self.state.contiguous()
        self._address = self._contiguous.data_ptr()
        self._layers_read, self._layer = 0, -1
        for site in self._learned:
            module = self.memory[site.layer]
            calls = zip(self._calls[site.number], site.heads, strict=True)
            self._calls[site.number] = tuple(call._replace(scale=module.scale(head)) for call, (head, _) in calls)

    def forward(
        self, site: ProjectionSite, projection: Forward, hidden: Tensor, *inputs: Any, **options: Any
    ) -> Tensor:
        output = projection(hidden, *inputs, **options)
        # A layer's weights have just gone through the caches, so everything touched here has to be fetched again, code
        # included: each access to a tensor costs microseconds.
        _, number, layer, heads, is_output = site
        address = 0
        if layer != self._layer and not is_output:
            if self._layers_read == 0:
                self._need_one_token(hidden)
            self._layer = layer
            self._layers_read += 1
            if hidden.dtype is not torch.float32 or not hidden.is_contiguous():
                hidden = hidden.float().contiguous()
            address = hidden.data_ptr()
        # Checked every time: the model may have been cast to another dtype, and the call writes to raw memory.
        if output.dtype is torch.float32 and output.is_contiguous():
            if number not in self._calls:
                self._calls[number] = self._prepared(site, output)
            calls = self._calls[number]
            for table, stride, scale in calls:
                steer(table, self._address, address, output.data_ptr(), stride, scale)
                address = 0
            if calls:
                return output
        if address:
            self.read(layer, hidden)
        for head, start in heads:
            output = self.memory[layer].correct(head, self._read, output, start)
        return output

    def read(self, layer: int, hidden: Tensor) -> Tensor:
        """The read [B, 1, H, r] of contiguous float32 hidden states; overwritten when the next layer reads."""
        steer(self._reading[layer], self._address, hidden.data_ptr(), 0, 0, 0.0)
        return self._read

    def end(self, close: bool) -> tuple[Tensor, Pending | None]:
        # The common case for most adapters, handled without a call into another file.
        if self.segments is None and self.writing and self._layers_read == len(self.memory):
            return self.write(), None
        return super().end(close)

    def write(self) -> Tensor:
        state, after = self._contiguous, torch.empty_like(self._contiguous)
        mask = None if self.mask is None else self.mask.contiguous()
        write(self._write, state.data_ptr(), after.data_ptr(), 0 if mask is None else mask.data_ptr())
        return after

    def write_features(self) -> Tensor:
        return self.memory[0].write_features(self._products)[:, :, None]

    def _need_one_token(self, hidden: Tensor) -> None:
        """Refuse hidden states of several tokens or on another device; checked once per step."""
        if hidden.device.type != "cpu" or hidden.numel() != self._hidden_numbers:
            raise TurnError(
                f"the memory lies on a CPU and a step is of {self.batch} rows, one token each; the model gave it "
                f"hidden states {list(hidden.shape)} on {hidden.device}. Move a model before memory is attached to it"
            )

    def _prepared(self, site: ProjectionSite, output: Tensor) -> tuple[SteerCall, ...]:
        """The calls for a site; none where its correction is more than a product."""
        module = self.memory[site.layer]
        if (site.is_output and module.config.delta_o_rmsnorm) or output.numel() != self.batch * output.shape[-1]:
            return ()
        calls = []
        for head, start in site.heads:
            weight = module.output_weight(head)
            numbers = {"output_weight": weight.data_ptr(), "width": weight.shape[0], "start": start}
            table = self._steer_table(site.layer, **numbers)
            calls.append(SteerCall(table, output.shape[-1], module.scale(head)))
        if module.config.trainable_delta_scale:
            self._learned.append(site)
        return tuple(calls)

    def _steer_table(self, layer: int, **numbers: int) -> int:
        addresses = {"weight": self.weights.packed[layer].data_ptr(), "products": self._products[layer].data_ptr()}
        return self._table(STEER, **self._steer, **addresses, layer=layer, **numbers)

    def _table(self, names: tuple[str, ...], **numbers: int) -> int:
        """The address of a table that holds these numbers; entries that are not given are 0."""
        table = torch.tensor([int(numbers.get(name, 0)) for name in names], dtype=torch.int64, device="cpu")
        self._tables.append(table)
        return table.data_ptr()
