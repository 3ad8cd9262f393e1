"""Tiny random models and memories that the core tests share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from agentmem import MemoryConfig, SteeredModel

GOLDEN = Path(__file__).parents[1] / "golden"
VOCABULARY = 61

TERMS = 1000
"""Numbers that are summed one after another on the way through a tiny model. In each of three layers about 330: 32 of
the hidden size in two norms, in products with the projections and the memory and in the MLP, 48 of the MLP, 64 of the
heads' outputs, 16 in norms and scores of a head, some 20 tokens that are attended to, and ranks of 8 in the read and
both corrections."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large enough that layers matter: at the default 0.02 a tiny model is close to its embeddings alone.
    "initializer_range": 0.15,
}

ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layer_interval": 2}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        {"attention_multiplier": 0.35, "residual_multiplier": 0.6, "logits_scaling": 2.0},
    ),
}


# Every option of the mechanism.
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "four state heads": {"num_state_heads": 4},
    "uncoupled": {"couple_lambda": False, "lambda_bias_init": 1.0},
    "lambda outside": {"couple_lambda": False, "state_update_mode": "lambda_outside"},
    "lambda outside, coupled": {"state_update_mode": "lambda_outside"},
    "no lambda": {"state_update_mode": "no_lambda"},
    "no lambda, weights there": {"couple_lambda": False, "state_update_mode": "no_lambda"},
    "one gate a head": {"rankwise_gates": False, "num_state_heads": 2},
    "one gate a head, uncoupled": {"rankwise_gates": False, "num_state_heads": 2, "couple_lambda": False},
    "raw q and k": {"normalize_qk": False, "beta_bias_init": -4.0},
    "all corrections": {"delta_heads": ("q", "k", "v", "o")},
    "k and v": {"delta_heads": ("k", "v")},
    "v alone": {"delta_heads": ("v",)},
    "o alone": {"delta_heads": ("o",)},
    "o normalised": {"delta_o_rmsnorm": True},
    "scale a layer": {"trainable_delta_scale": True, "delta_scale_max": 3.0},
    "scale a head": {
        "trainable_delta_scale": True,
        "delta_scale_granularity": "head",
        "delta_heads": ("q", "k", "v", "o"),
        "delta_o_rmsnorm": True,
    },
    "one layer": {"target_layers": (1,)},
    "two layers, any order": {"target_layers": (2, 0)},
    "odd rank": {"rank": 5, "alpha": 3.0},
}


def build(architecture: str, *, seed: int = 11, attention: str = "sdpa", **changes: Any) -> Any:
    """A random model, the same in every call with the same arguments."""
    model_class, config_class, own = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = config_class(**{**_SIZES, **own, **changes}, attn_implementation=attention)
    return model_class(config).eval()


def tiny(architecture: str = "qwen3", **options: Any) -> Any:
    """The same with norms that are not all one."""
    model = build(architecture, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def attach_lively(model: Any, *, seed: int = 0, **options: Any) -> SteeredModel:
    """Attach a memory whose corrections and write strengths are random, all else as it is made."""
    steered = SteeredModel.attach(model, config=MemoryConfig(**({"rank": 4} | options)), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in steered.memory.named_parameters():
            if "delta_" in name or name.endswith("beta_proj"):
                parameter.normal_(0.0, 0.3, generator=generator)
    return steered


def steer(model: Any, *, seed: int = 3, dtype: torch.dtype | None = None, **options: Any) -> SteeredModel:
    """Attach a memory whose weights are all random and strong enough to be seen in the logits."""
    steered = SteeredModel.attach(model, config=MemoryConfig(**options), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in steered.memory.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if name.endswith(("beta_bias", "lambda_bias")):
                parameter.add_(0.5 * noise)
            elif name.endswith("delta_o_rmsnorm_weight"):
                parameter.copy_(0.3 + 0.1 * noise)
            elif name.endswith("delta_scale_raw"):
                parameter.copy_(noise)
            else:
                parameter.copy_(0.25 * noise)
    return steered


def random_state(steered: SteeredModel, batch: int = 1, *, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.4 * torch.randn(batch, *steered.state_shape, generator=generator)


def random_ids(batch: int, length: int, *, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def padded(rows: Iterable[Tensor], *, left: bool, fill: int = 0) -> Tensor:
    """Rows of different lengths as one batch."""
    rows = list(rows)
    longest = max(len(row) for row in rows)
    out = []
    for row in rows:
        pad = row.new_full((longest - len(row),), fill)
        out.append(torch.cat((pad, row) if left else (row, pad)))
    return torch.stack(out)
