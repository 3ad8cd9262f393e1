"""Models that cannot be steered are refused, with what was seen in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    Qwen3NextConfig,
)

from agentmem import MemoryConfig, SteeredModel
from agentmem.errors import UnsupportedModelError
from tests.helpers.core_models import tiny

_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2}
_FOUR = {name: _SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}

CASES: dict[str, tuple[Any, str]] = {
    "gpt2": (lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, **_FOUR), "GPT2LMHeadModel.*c_attn.*Conv1D"),
    "falcon": (lambda: FalconConfig(**_SIZES), "Falcon.*query_key_value"),
    "gpt-neox": (lambda: GPTNeoXConfig(**_SIZES), "GPTNeoX.*query_key_value"),
    "deepseek-v3": (lambda: DeepseekV3Config(**_SIZES, **_LATENT, q_lora_rank=8), "DeepseekV3.*latent attention"),
    "deepseek-v3, full query": (
        lambda: DeepseekV3Config(**_SIZES, **_LATENT, q_lora_rank=None),
        r"DeepseekV3.*layers\.0\.self_attn.*latent attention",
    ),
    "qwen3-next": (
        lambda: Qwen3NextConfig(
            **_SIZES, head_dim=8, layer_types=["linear_attention", "full_attention"], mlp_only_layers=[0, 1]
        ),
        r"Qwen3Next.*layers\.1\.self_attn\.q_proj is 64 wide where o_proj takes 32 .*gate interleaved",
    ),
    "opt": (
        lambda: OPTConfig(ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=32, **_SIZES),
        "OPT.*out_proj",
    ),
}


@pytest.mark.parametrize(("config", "seen"), CASES.values(), ids=CASES.keys())
def test_refused_by_what_was_seen(config: Any, seen: str) -> None:
    model = AutoModelForCausalLM.from_config(config())
    with pytest.raises(UnsupportedModelError, match=seen):
        SteeredModel.attach(model, config=MemoryConfig())
    assert not any("forward" in vars(module) for module in model.modules())


class _Reused(nn.Module):
    """An attention whose projections stand as usual."""

    def __init__(self, q_in: int = 32, packed: int | None = None, o: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        if packed is not None:
            self.qkv_proj = nn.Linear(32, packed)
        else:
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(q_in, 32), nn.Linear(q_in, 32), nn.Linear(q_in, 32)
        self.o_proj = nn.Linear(32, 32) if o is nn.Linear else o()


@pytest.mark.parametrize(
    ("attention", "seen"),
    [
        (_Reused(q_in=48), "takes 48 numbers, not the hidden state of 32"),
        (_Reused(packed=32), r"qkv_proj is 32 wide; expected q \(32\) and two equal parts"),
        (_Reused(packed=65), "qkv_proj is 65 wide"),
        (_Reused(packed=32 + 2 * 12), "qkv_proj is 56 wide"),
        (_Reused(o=nn.Identity), "o_proj is a Identity, not a linear projection"),
    ],
)
def test_strange_projections_are_refused(attention: nn.Module, seen: str) -> None:
    model = tiny(head_dim=8)
    model.get_decoder().layers[1].self_attn = attention
    with pytest.raises(UnsupportedModelError, match=rf"layers\.1\.self_attn.*{seen}"):
        SteeredModel.attach(model, config=MemoryConfig())


def test_two_attentions_in_a_layer_and_lacking_projections_are_refused() -> None:
    model = tiny()
    model.get_decoder().layers[0].cross_attn = _Reused()
    with pytest.raises(UnsupportedModelError, match=r"layer 0 has more than one attention.*cross_attn"):
        SteeredModel.attach(model, config=MemoryConfig())
    model = tiny()
    del model.get_decoder().layers[2].self_attn.v_proj
    with pytest.raises(UnsupportedModelError, match=r"layers\.2.* has q_proj but no v_proj"):
        SteeredModel.attach(model, config=MemoryConfig())


def test_a_model_without_attention_is_outlined() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear has no attention layer.*its modules are Linear"):
        SteeredModel.attach(torch.nn.Linear(2, 2), config=MemoryConfig())
