"""The mechanism once more, the slow and obvious way: DESIGN section 1 on a bare model, token by token, in float64.

Shares no code with the package: hooks of its own on the projections of the first module tree it is given, one float64
loop over rows and tokens. What the package computes must agree with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from agentmem import MemoryConfig


class Oracle:
    """Steers `model` by the tensors of an adapter file; `states` [B, L, H, r, r] float64 after a forward pass."""

    def __init__(self, model: Any, config: MemoryConfig, tensors: dict[str, Tensor], state: Tensor) -> None:
        self.config = config
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.layers = list(model.get_decoder().layers)
        self.numbers = sorted({int(name.split(".")[2]) for name in tensors})
        self.states = state.double().clone()

    def _weight(self, layer: int, name: str) -> Tensor:
        return self.tensors[f"model.layers.{layer}.self_attn.{name}"]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(self.config.num_state_heads, -1)

    def _gate(self, layer: int, name: str, h: Tensor) -> Tensor:
        gate = torch.sigmoid(self._weight(layer, f"{name}_proj") @ h + self._weight(layer, f"{name}_bias"))
        return self._heads(gate).expand(self.config.num_state_heads, self.config.rank)

    def _token(self, place: int, row: int, h: Tensor) -> Tensor:
        """Read, then write; the read [H, r]."""
        config, layer = self.config, self.numbers[place]
        q = self._heads(self._weight(layer, "memory_q_proj") @ h)
        k = self._heads(self._weight(layer, "memory_k_proj") @ h)
        v = self._heads(self._weight(layer, "memory_v_proj") @ h)
        if config.normalize_qk:
            q, k = (torch.tanh(x) / torch.tanh(x).norm(dim=-1, keepdim=True).clamp_min(1e-6) for x in (q, k))
        beta = self._gate(layer, "beta", h)
        lam = 1 - beta if config.couple_lambda else self._gate(layer, "lambda", h)
        keep, erase, write = {
            "standard": (lam, beta, beta),
            "lambda_outside": (lam, lam * beta, beta),
            "no_lambda": (torch.ones_like(beta), beta, beta),
        }[config.state_update_mode]
        read = torch.zeros_like(q)
        for head in range(config.num_state_heads):
            s = self.states[row, place, head].clone()
            read[head] = s @ q[head]
            for i in range(config.rank):
                seen = float(s[i] @ k[head])
                self.states[row, place, head, i] = (
                    keep[head, i] * s[i] - erase[head, i] * seen * k[head] + write[head, i] * v[head, i] * k[head]
                )
        return read

    def _correction(self, layer: int, name: str, read: Tensor) -> Tensor:
        """[B, T, W] from reads [B, T, H r]."""
        config = self.config
        delta = read @ self._weight(layer, f"delta_{name}_proj").T * (config.alpha / config.rank)
        if config.trainable_delta_scale:
            raw = self._weight(layer, "delta_scale_raw")
            place = "qkvo".index(name) if config.delta_scale_granularity == "head" else 0
            delta = delta * torch.sigmoid(raw[place]) * config.delta_scale_max
        if name == "o" and config.delta_o_rmsnorm:
            size = delta.pow(2).mean(-1, keepdim=True)
            delta = delta / (size + config.delta_o_rmsnorm_eps).sqrt()
            delta = delta * self._weight(layer, "delta_o_rmsnorm_weight")
        return delta

    @contextmanager
    def steering(self) -> Iterator[None]:
        handles, reads = [], {}

        def reader(place: int) -> Any:
            def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
                h = inputs[0].double()
                reads[place] = torch.stack(
                    [
                        torch.stack([self._token(place, row, token).flatten() for token in h[row]])
                        for row in range(len(h))
                    ]
                )

            return hook

        def adder(place: int, parts: list[tuple[str, int]]) -> Any:
            def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
                output = output.clone()
                for name, column in parts:
                    delta = self._correction(self.numbers[place], name, reads[place])
                    output[..., column : column + delta.shape[-1]] += delta.to(output.dtype)
                return output

            return hook

        for place, number in enumerate(self.numbers):
            attention = self.layers[number].self_attn
            active = self.config.delta_heads
            if hasattr(attention, "qkv_proj"):
                width = attention.o_proj.in_features
                kv = (attention.qkv_proj.out_features - width) // 2
                starts = {"q": 0, "k": width, "v": width + kv}
                inner = attention.qkv_proj
                packed = [(name, starts[name]) for name in active if name != "o"]
                handles.append(inner.register_forward_hook(adder(place, packed)))
            else:
                inner = attention.q_proj
                for name in active:
                    if name != "o":
                        module = getattr(attention, f"{name}_proj")
                        handles.append(module.register_forward_hook(adder(place, [(name, 0)])))
            handles.append(inner.register_forward_pre_hook(reader(place)))
            if "o" in active:
                handles.append(attention.o_proj.register_forward_hook(adder(place, [("o", 0)])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
