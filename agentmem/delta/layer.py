"""The memory of one layer: its projections, gates and corrections. It holds parameters only, never a session's state.

Names, shapes and equations follow arXiv 2605.12357 (eq. 4-12) and the authors' file format; D is the hidden size, r the
rank, H the state heads, W the width of a corrected projection:

    memory_{q,k,v}_proj [H r, D]   beta_proj, lambda_proj [H r or H, D]   beta_bias, lambda_bias [H r or H]
    delta_{q,k,v,o}_proj [W, H r]  delta_scale_raw [1 or 4]               delta_o_rmsnorm_weight [D]

Projections run in the parameters' dtype. From tanh to the read everything is float32. A correction is cast once, when
it is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentmem.delta.config import DELTA_HEADS, DeltaHead, MemoryConfig
from agentmem.errors import ConfigError
from agentmem.kernels.recurrence import NORM_EPS


class Gates(NamedTuple):
    """The factors in the update rule, each [B, T, H, r] float32."""

    keep: Tensor
    erase: Tensor
    write: Tensor


class TokenTerms(NamedTuple):
    """What tokens contribute to a scan, each [B, T, H, r] float32, in the order of `ScanArgs` after the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    erase: Tensor
    write: Tensor


class Products(NamedTuple):
    """Products with the packed weight, as views of its parts."""

    q: Tensor  # [..., H, r], as are k and v
    k: Tensor
    v: Tensor
    beta: Tensor  # [..., H, r], or [..., H, 1] where each head has a single gate
    lam: Tensor | None  # shaped as beta; None where the config has none


class LayerMemory(nn.Module):
    """The memory parameters of one attention layer.

    Args:
        config: the mechanism.
        hidden: D, the hidden size, which is the input width of q_proj.
        widths: output width of each projection. All four are needed, since the authors' files hold the weights of
            inactive heads too.

    Attributes:
        idle: names of the parameters that have no effect under this config. Files may lack them, and they get no
            gradient.
        query_width: H r, the number of a token's products that are its query.
    """

    memory_q_proj: nn.Parameter
    memory_k_proj: nn.Parameter
    memory_v_proj: nn.Parameter
    beta_proj: nn.Parameter
    beta_bias: nn.Parameter
    lambda_proj: nn.Parameter
    lambda_bias: nn.Parameter
    delta_scale_raw: nn.Parameter
    delta_o_rmsnorm_weight: nn.Parameter

    def __init__(self, config: MemoryConfig, hidden: int, widths: dict[DeltaHead, int]) -> None:
        super().__init__()
        self.config = config
        self.hidden = hidden
        size = config.rank * config.num_state_heads
        gate = size if config.rankwise_gates else config.num_state_heads
        shapes: dict[str, tuple[int, ...]] = {
            "memory_q_proj": (size, hidden),
            "memory_k_proj": (size, hidden),
            "memory_v_proj": (size, hidden),
            "beta_proj": (gate, hidden),
            "beta_bias": (gate,),
        }
        if not config.couple_lambda:
            shapes |= {"lambda_proj": (gate, hidden), "lambda_bias": (gate,)}
        shapes |= {f"delta_{head}_proj": (widths[head], size) for head in DELTA_HEADS}
        if config.delta_o_rmsnorm:
            shapes["delta_o_rmsnorm_weight"] = (widths["o"],)
        if config.trainable_delta_scale:
            shapes["delta_scale_raw"] = (len(DELTA_HEADS) if config.delta_scale_granularity == "head" else 1,)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        idle = [f"delta_{head}_proj" for head in DELTA_HEADS if head not in config.delta_heads]
        if config.state_update_mode == "no_lambda" and not config.couple_lambda:
            idle += ["lambda_proj", "lambda_bias"]
        self.idle = frozenset(idle)
        self.query_width = size
        self._fixed_scale = config.scale
        for name in idle:
            self.get_parameter(name).requires_grad_(False)
        self._packed: tuple[list[int], Tensor] | None = None
        self._scales: tuple[tuple[int, ...], list[float]] | None = None

    def reset_parameters(
        self, base: dict[DeltaHead, Tensor] | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Initialise the weights: projections normal with std 1/sqrt(D), gates at their bias, outputs by `output_init`.

        `zero` outputs leave the model unchanged until training moves them. `base_slice_fixed` starts each output weight
        as the first H r columns of the projection that it corrects, scaled to a root mean square of online_gain /
        sqrt(base_slice_ref_width). The paper names this initialisation without defining it; this definition is ours.

        Raises:
            ConfigError: `output_init` has another value, or a projection is too narrow for its slice.
        """
        config = self.config
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name in ("memory_q_proj", "memory_k_proj", "memory_v_proj"):
                    parameter.normal_(0.0, self.hidden**-0.5, generator=generator)
                elif name == "beta_bias":
                    parameter.fill_(config.beta_bias_init)
                elif name == "lambda_bias":
                    parameter.fill_(config.lambda_bias_init)
                elif name == "delta_o_rmsnorm_weight":
                    parameter.fill_(1.0)
                elif name == "delta_scale_raw":
                    share = min(max(config.delta_scale_init / config.delta_scale_max, 1e-4), 1 - 1e-4)
                    parameter.fill_(torch.logit(torch.tensor(share)).item())
                elif name.startswith("delta_"):
                    parameter.copy_(self._output_start(name, parameter, base))
                else:
                    parameter.zero_()

    def _output_start(self, name: str, parameter: Tensor, base: dict[DeltaHead, Tensor] | None) -> Tensor:
        config = self.config
        if config.output_init == "zero":
            return torch.zeros_like(parameter)
        if config.output_init != "base_slice_fixed" or base is None:
            raise ConfigError(
                "output_init must be zero or base_slice_fixed (with the base weights at hand) to start "
                f"fresh weights; found {config.output_init!r}"
            )
        head: DeltaHead = next(h for h in DELTA_HEADS if name == f"delta_{h}_proj")
        piece = base[head].detach()[:, : parameter.shape[1]].to(parameter)
        if piece.shape != parameter.shape:
            raise ConfigError(
                f"output_init base_slice_fixed takes {parameter.shape[1]} columns (rank x num_state_heads) "
                f"of the {head} projection, which is {list(base[head].shape)}; use zero or a smaller rank"
            )
        target: float = config.online_gain / config.base_slice_ref_width**0.5
        return piece * (target / piece.pow(2).mean().sqrt().clamp_min(1e-12))

    def terms(self, hidden: Tensor, mask: Tensor | None = None) -> TokenTerms:
        """What tokens contribute to a scan.

        Args:
            hidden: [B, T, D], any float dtype.
            mask: [B, T] bool, False where a token must not write (keep 1, erase and write 0); None = all tokens write.
        """
        return self.terms_from(self.products(hidden), mask)

    def products(self, hidden: Tensor) -> Tensor:
        """The products [..., 3 H r + gates] of [..., D] with the packed weight, in the weights' dtype."""
        weight = self.packed_weight()
        return F.linear(hidden.to(weight.dtype), weight)

    def write_features(self, products: Tensor) -> Tensor:
        """The part of the products that a write is computed from, a view [..., 2 H r + gates]."""
        return products[..., self.query_width :]

    def terms_from(self, products: Tensor, mask: Tensor | None = None) -> TokenTerms:
        """What tokens contribute to a scan, from their products with the packed weight, [B, T, 3 H r + gates]."""
        parts = self.split(products.float())
        lambda_bias: Tensor | None = getattr(self, "lambda_bias", None)
        lam = None if lambda_bias is None else self.by_head(lambda_bias.float())
        k, v, gates = self.write_terms(parts, self.by_head(self.beta_bias.float()), lam, mask)
        return TokenTerms(self.unit(parts.q), k, v, *gates)

    def split(self, products: Tensor) -> Products:
        """The parts of products with the packed weight, as views of [..., 3 H r + gates]."""
        size, width = self.config.rank * self.config.num_state_heads, self.beta_bias.shape[0]
        q, k, v = (products[..., at * size : (at + 1) * size] for at in range(3))  # each [..., H r]
        shape = (*q.shape[:-1], self.config.num_state_heads, self.config.rank)
        beta = self.by_head(products[..., 3 * size : 3 * size + width])
        lam = None if self.config.couple_lambda else self.by_head(products[..., 3 * size + width :])
        return Products(q.view(shape), k.view(shape), v.view(shape), beta, lam)

    def write_terms(
        self, parts: Products, beta_bias: Tensor, lambda_bias: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gates]:
        """What tokens write: key, value and gates, each [..., B, T, H, r] float32.

        For this layer, or for all layers at once where the biases of all layers broadcast against `parts`.
        """
        k = self.unit(parts.k)
        beta = torch.sigmoid(parts.beta + beta_bias)  # [..., H, r or 1]
        lam = 1.0 - beta if parts.lam is None or lambda_bias is None else torch.sigmoid(parts.lam + lambda_bias)
        return k, parts.v, gates(self.config, beta.expand(k.shape), lam.expand(k.shape), mask)

    def query(self, hidden: Tensor) -> Tensor:
        """Only the query, [B, T, H, r] float32: all that a pass without writes needs."""
        config = self.config
        q = F.linear(hidden.to(self.memory_q_proj.dtype), self.memory_q_proj).float()  # [B, T, H r]
        return self.unit(q.view(*q.shape[:-1], config.num_state_heads, config.rank))

    def unit(self, x: Tensor) -> Tensor:
        """Queries or keys as the update rule takes them: tanh, then unit length along the last dimension."""
        return F.normalize(torch.tanh(x), dim=-1, eps=NORM_EPS) if self.config.normalize_qk else x

    def correction(self, head: DeltaHead, read: Tensor) -> Tensor:
        """The correction that is added to a projection's output: [B, T, W] from the read [B, T, H, r] float32."""
        config = self.config
        weight = self.get_parameter(f"delta_{head}_proj")
        # Scaled while it is still float32 and only r wide, so that only the product is rounded to the weights' dtype.
        read = read * config.scale
        if config.trainable_delta_scale:
            index = DELTA_HEADS.index(head) if config.delta_scale_granularity == "head" else 0
            read = read * (torch.sigmoid(self.delta_scale_raw[index].float()) * config.delta_scale_max)
        delta = F.linear(read.flatten(-2).to(weight.dtype), weight)  # [B, T, H r] -> [B, T, W]
        if head == "o" and config.delta_o_rmsnorm:
            x = delta.float()
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.delta_o_rmsnorm_eps)
            delta = x * self.delta_o_rmsnorm_weight.float()
        return delta

    def correct(self, head: DeltaHead, read: Tensor, output: Tensor, start: int) -> Tensor:
        """A projection's output [B, T, ...] with the correction added to the columns from `start` on.

        Without gradients the output is changed in place.
        """
        weight = self.output_weight(head)
        width = weight.shape[0]
        fused = not torch.is_grad_enabled() and output.dtype == weight.dtype and output.is_contiguous()
        # A compiled graph would hold a trained scale as a constant, even if the scale changes later.
        fused = fused and not (self.config.trainable_delta_scale and torch.compiler.is_compiling())
        if not fused or (head == "o" and self.config.delta_o_rmsnorm):
            delta = self.correction(head, read).to(output.dtype)
            rest = output.shape[-1] - start - width
            return output + (F.pad(delta, (start, rest)) if start or rest else delta)
        rows = output.view(-1, output.shape[-1])  # [B T, columns]
        if rows.shape[1] != width:
            rows = rows[:, start : start + width]
        rows.addmm_(read.reshape(rows.shape[0], -1).to(weight.dtype), weight.t(), alpha=self.scale(head))
        return output

    def output_weight(self, head: DeltaHead) -> Tensor:
        """The output weight [W, H r] of a head."""
        weight = self._parameters[f"delta_{head}_proj"]
        assert weight is not None
        return weight

    def scale(self, head: DeltaHead) -> float:
        """The factor of a correction."""
        config = self.config
        if not config.trainable_delta_scale:
            return self._fixed_scale
        raw = self.delta_scale_raw
        stamp = id(raw), raw.data_ptr(), 0 if raw.is_inference() else raw._version
        if self._scales is None or self._scales[0] != stamp or (raw.requires_grad and torch.is_grad_enabled()):
            learned = (torch.sigmoid(raw.float()) * config.delta_scale_max).tolist()
            self._scales = (stamp, [config.scale * factor for factor in learned])
        return self._scales[1][DELTA_HEADS.index(head) if config.delta_scale_granularity == "head" else 0]

    def by_head(self, x: Tensor) -> Tensor:
        """Gate values with the heads as a dimension: [..., H r] -> [..., H, r], [..., H] -> [..., H, 1]."""
        return x.view(*x.shape[:-1], self.config.num_state_heads, -1)

    def packed_weight(self) -> Tensor:
        """All projections of the hidden state stacked, [3 H r + gates, D], so that one product computes them.

        Without gradients the parameters become views of it, so that it always holds their current values. It is made
        again when one of them was replaced or moved.
        """
        parts = self.packed_parts()
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            return torch.cat(parts)
        # The packed weight keeps its memory alive, so a tensor at the same address is a view of it.
        if self._packed is None or self._packed[0] != [part.data_ptr() for part in parts]:
            packed = pack(parts)
            self._packed = [part.data_ptr() for part in parts], packed
        return self._packed[1]

    def packed_parts(self) -> list[Tensor]:
        """The projections of the hidden state, in the order in which they are packed."""
        parts: list[Tensor] = [self.memory_q_proj, self.memory_k_proj, self.memory_v_proj, self.beta_proj]
        return parts if self.config.couple_lambda else [*parts, self.lambda_proj]


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors in new memory, and make each of them a view of its part.

    Tensors made in inference mode cannot become views: they are copied, and later changes to them are not seen.
    """
    # Outside inference mode: what is made in it could not be changed outside of it.
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.cat([tensor.detach() for tensor in tensors])
        if not any(map(Tensor.is_inference, tensors)):
            for tensor, rows in zip(tensors, torch.split(packed, [len(x) for x in tensors]), strict=True):
                tensor.data = rows
    return packed


def gates(config: MemoryConfig, beta: Tensor, lam: Tensor, mask: Tensor | None) -> Gates:
    """The factors keep, erase and write from beta and lambda, each [B, T, H, r].

    standard: lambda, beta, beta; lambda_outside: lambda, lambda beta, beta; no_lambda: 1, beta, beta. Where the mask
    [B, T] is False they are 1, 0, 0: the only values that leave a state unchanged under every mode.
    """
    if config.state_update_mode == "standard":
        made = Gates(lam, beta, beta)
    elif config.state_update_mode == "lambda_outside":
        made = Gates(lam, lam * beta, beta)
    else:
        made = Gates(torch.ones_like(beta), beta, beta)
    if mask is None:
        return made
    on = mask[..., None, None]  # [B, T, 1, 1]
    return Gates(torch.where(on, made.keep, 1.0), torch.where(on, made.erase, 0.0), torch.where(on, made.write, 0.0))
