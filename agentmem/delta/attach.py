"""Finds where a model can be steered, by structure and not by class name.

An attention layer is a module with ``o_proj`` and either ``q_proj``, ``k_proj``, ``v_proj`` or a packed
``qkv_proj`` whose output is the plain concatenation q, k, v. ``q_proj``'s input must be the hidden state and
its output as wide as ``o_proj``'s input. Anything else is refused with ``UnsupportedModelError``, which names
what was seen: a model that is steered in the wrong place would answer, only worse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from agentmem.delta.config import DELTA_HEADS, DeltaHead, MemoryConfig
from agentmem.errors import AdapterError, ConfigError, UnsupportedModelError

# What other families call their projections; named in the refusal so that the reader sees what was found.
_KNOWN_OTHERS = {
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
        layer: its number in depth order, as adapter files count it.
        hidden: D, the width of the hidden state.
        widths: output width of the four projections.
        targets: for each of q, k, v, o the module whose output is corrected, and the first column of that
            projection in the output (not 0 only where q, k, v share one packed product).
        first: the module that sees the hidden state first in a forward pass.
    """

    layer: int
    hidden: int
    widths: dict[DeltaHead, int]
    targets: dict[DeltaHead, tuple[nn.Module, int]]
    first: nn.Module

    def base_weight(self, head: DeltaHead) -> Tensor:
        """The frozen weight [W, in] of one projection (rows of a packed product where it is packed)."""
        module, start = self.targets[head]
        weight: Tensor = module.get_parameter("weight")
        return weight[start : start + self.widths[head]]


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """The self-attention layers of a causal language model, in depth order.

    Raises:
        UnsupportedModelError: no layer, or a layer that is built another way.
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
            f"{child}: {_KNOWN_OTHERS[child]}"
            for child in {n for m in root.modules() for n, _ in m.named_children()} & _KNOWN_OTHERS.keys()
        )
        raise UnsupportedModelError(
            f"{name} has no attention layer with o_proj and q_proj or qkv_proj; "
            + (f"it has {'; '.join(seen)}" if seen else f"its modules are {_outline(root)}")
        )
    return [sites[n] for n in sorted(sites)]


def targeted(sites: list[AttentionSite], config: MemoryConfig) -> list[AttentionSite]:
    """The sites of the layers that the config wants, in depth order."""
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
    """Refuse a model some of whose weights lie on no device: accelerate fetches them only when a layer runs."""
    absent = next((name for name, one in model.named_parameters() if one.is_meta), None)
    if absent is not None:
        raise ConfigError(
            f"the weights of this model must lie on a device, found {absent} offloaded; "
            "spread the model over more devices, quantise it (quantize='4bit'), or use a smaller one"
        )


def _site(
    where: str, layer: int, children: dict[str, nn.Module], hidden: int | None, head_dim: int | None
) -> AttentionSite:
    if "kv_a_proj_with_mqa" in children:
        raise UnsupportedModelError(f"{where} is {_KNOWN_OTHERS['kv_a_proj_with_mqa']}, which cannot be steered")
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
    """(in, out) of a linear-like module; wrapped and quantised ones keep these attributes."""
    base = getattr(module, "base_layer", module)
    found = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if not isinstance(found[0], int) or not isinstance(found[1], int):
        raise UnsupportedModelError(f"{where} is a {type(module).__name__}, not a linear projection")
    return found[0], found[1]


def _outline(root: nn.Module) -> str:
    kinds = sorted({type(m).__name__ for m in root.modules() if "ttention" in type(m).__name__})
    return ", ".join(kinds) if kinds else type(root).__name__
