"""Finds the places in a model where memory can be attached, by its structure and not by its class name.

An attention layer is a module with `o_proj` and either `q_proj`, `k_proj`, `v_proj` or a packed `qkv_proj` whose output
is simply q, k and v concatenated. The input of `q_proj` must be the hidden state, and its output must be as wide as the
input of `o_proj`. Anything else is refused with `UnsupportedModelError`, which says what the model has instead: a model
that is corrected in the wrong place would still answer, only worse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from agentmem.delta.config import DELTA_HEADS, DeltaHead, MemoryConfig
from agentmem.errors import AdapterError, ConfigError, UnsupportedModelError

# What other model families call their projections. The error names them, so that the reader sees what the model has.
_OTHER_FAMILIES = {
    "c_attn": "a packed Conv1D projection (GPT-2 style)",
    "query_key_value": "a packed projection interleaved by head (Falcon and GPT-NeoX style)",
    "Wqkv": "a packed projection (MPT style)",
    "out_proj": "an output projection named out_proj (OPT and BART style)",
    "kv_a_proj_with_mqa": "multi-head latent attention (DeepSeek style)",
}


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer.

    Attributes:
        layer: its number in depth order, as in adapter files.
        hidden: D, the hidden size.
        widths: output widths of the four projections.
        targets: for each of q, k, v and o, the module whose output is corrected, and the first column of that
            projection in the output (other than 0 only where q, k and v share one packed product).
        first: the first module of the layer that sees the hidden state in a forward pass.
    """

    layer: int
    hidden: int
    widths: dict[DeltaHead, int]
    targets: dict[DeltaHead, tuple[nn.Module, int]]
    first: nn.Module

    def base_weight(self, head: DeltaHead) -> Tensor:
        """The frozen weight [W, in] of one projection; where q, k and v are packed, its rows of the packed weight."""
        module, start = self.targets[head]
        weight: Tensor = module.get_parameter("weight")
        return weight[start : start + self.widths[head]]


class ProjectionSite(NamedTuple):
    """A projection in a layer with memory, and which parts of its output are corrected.

    Attributes:
        module: the projection.
        number: its index among all sites of the model.
        layer: the index of its layer among the layers with memory.
        heads: the heads that are corrected in its output, each with its first column there.
        is_output: whether it is the layer's output projection. All other sites have the hidden state as their input.
    """

    module: nn.Module
    number: int
    layer: int
    heads: tuple[tuple[DeltaHead, int], ...]
    is_output: bool


def projection_sites(sites: Iterable[AttentionSite], heads: Sequence[DeltaHead]) -> list[ProjectionSite]:
    """The sites of a model at which memory is read, or a projection of `heads` is corrected, layer by layer.

    The first site of a layer is the first to see the hidden state. The layer reads its memory there, whether or not
    that projection is corrected.
    """
    projections: list[ProjectionSite] = []
    for layer, site in enumerate(sites):
        output = site.targets["o"][0]
        by_module: dict[nn.Module, list[tuple[DeltaHead, int]]] = {site.first: []}
        for head in heads:
            module, start = site.targets[head]
            by_module.setdefault(module, []).append((head, start))
        by_module.setdefault(output, [])
        for module, corrected in by_module.items():
            number = len(projections)
            projections.append(ProjectionSite(module, number, layer, tuple(corrected), module is output))
    return projections


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """The self-attention layers of a causal language model, in depth order.

    Raises:
        UnsupportedModelError: the model has no attention layer, or has one that is built differently.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if config is not None else None
    hidden = getattr(text_config, "hidden_size", None)
    head_dim = getattr(text_config, "head_dim", None)
    get_decoder = getattr(model, "get_decoder", None)
    root: nn.Module = get_decoder() if get_decoder is not None else model
    sites: dict[int, AttentionSite] = {}
    for path, module in root.named_modules():
        children = dict(module.named_children())
        if "o_proj" not in children or not ("q_proj" in children or "qkv_proj" in children):
            continue
        numbers = re.findall(r"(?:^|\.)layers\.(\d+)\.", path + ".")
        if not numbers:
            raise UnsupportedModelError(f"{name}: attention module {path!r} stands in no numbered layer")
        site = _site(f"{name}.{path}", int(numbers[0]), children, hidden, head_dim)
        if site.layer in sites:
            raise UnsupportedModelError(
                f"{name}: layer {site.layer} has more than one attention module ({path!r} is the second); "
                "only text self-attention can be steered"
            )
        sites[site.layer] = site
    if not sites:
        seen = sorted(
            f"{child}: {_OTHER_FAMILIES[child]}"
            for child in {n for m in root.modules() for n, _ in m.named_children()} & _OTHER_FAMILIES.keys()
        )
        raise UnsupportedModelError(
            f"{name} has no attention layer with o_proj and q_proj or qkv_proj; "
            + (f"it has {'; '.join(seen)}" if seen else f"its modules are {_outline(root)}")
        )
    return [sites[n] for n in sorted(sites)]


def targeted(sites: list[AttentionSite], config: MemoryConfig) -> list[AttentionSite]:
    """The sites of the layers that the config selects, in depth order."""
    if not config.target_layers:
        return sites
    by_number = {site.layer: site for site in sites}
    absent = sorted(set(config.target_layers) - by_number.keys())
    if absent:
        raise AdapterError(
            f"the adapter targets layers {absent}, which this model has not; its attention layers are "
            f"{sorted(by_number)}"
        )
    return [by_number[n] for n in sorted(config.target_layers)]


def need_weights(model: Any) -> None:
    """Refuse a model with weights that are on no device: accelerate loads those only while a layer runs."""
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise ConfigError(
            f"the weights of this model must lie on a device, found {absent} offloaded; "
            "spread the model over more devices, quantise it (quantize='4bit'), or use a smaller one"
        )


def _site(
    where: str, layer: int, children: dict[str, nn.Module], hidden: int | None, head_dim: int | None
) -> AttentionSite:
    if "kv_a_proj_with_mqa" in children:
        raise UnsupportedModelError(f"{where} is {_OTHER_FAMILIES['kv_a_proj_with_mqa']}, which cannot be steered")
    q_width, o_width = _features(children["o_proj"], where + ".o_proj")
    targets: dict[DeltaHead, tuple[nn.Module, int]] = {"o": (children["o_proj"], 0)}
    if "qkv_proj" in children:
        first = children["qkv_proj"]
        in_width, packed = _features(first, where + ".qkv_proj")
        k_width, odd = divmod(packed - q_width, 2)
        v_width = k_width
        if odd or k_width <= 0 or k_width > q_width or (head_dim and k_width % head_dim):
            raise UnsupportedModelError(
                f"{where}.qkv_proj is {packed} wide; expected q ({q_width}) and two equal parts for k and v"
            )
        targets |= {"q": (first, 0), "k": (first, q_width), "v": (first, q_width + k_width)}
    else:
        missing = {"k_proj", "v_proj"} - children.keys()
        if missing:
            raise UnsupportedModelError(f"{where} has q_proj but no {' and '.join(sorted(missing))}")
        first = children["q_proj"]
        in_width, q_out = _features(first, where + ".q_proj")
        if q_out != q_width:
            why = " (query and gate interleaved, as in Qwen3-Next)" if q_out == 2 * q_width else ""
            raise UnsupportedModelError(
                f"{where}.q_proj is {q_out} wide where o_proj takes {q_width}{why}; only equal widths can be steered"
            )
        k_width = _features(children["k_proj"], where + ".k_proj")[1]
        v_width = _features(children["v_proj"], where + ".v_proj")[1]
        targets |= {"q": (first, 0), "k": (children["k_proj"], 0), "v": (children["v_proj"], 0)}
    if hidden is not None and in_width != hidden:
        raise UnsupportedModelError(
            f"{where}: the query projection takes {in_width} numbers, not the hidden state of {hidden}; "
            "its input is another state (low-rank query or cross-attention), which cannot be steered"
        )
    widths: dict[DeltaHead, int] = {"q": q_width, "k": k_width, "v": v_width, "o": o_width}
    return AttentionSite(layer, in_width, widths, {head: targets[head] for head in DELTA_HEADS}, first)


def _features(module: nn.Module, where: str) -> tuple[int, int]:
    """(in, out) of a linear-like module; wrapped and quantised modules keep these attributes."""
    base = getattr(module, "base_layer", module)
    inputs, outputs = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        raise UnsupportedModelError(f"{where} is a {type(module).__name__}, not a linear projection")
    return inputs, outputs


def _outline(root: nn.Module) -> str:
    kinds = sorted({type(m).__name__ for m in root.modules() if "ttention" in type(m).__name__})
    return ", ".join(kinds) if kinds else type(root).__name__
