"""Memory goes on and off a model without a trace, beside what others put on its modules; other models are refused with
what was seen.
"""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
from agentmem.errors import ConfigError, TurnError, UnsupportedModelError
from tests.helpers.core_models import random_ids, random_state, steer, tiny


def answer(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=random_ids(2, 7)).logits
    return logits


def test_a_copy_of_a_model_with_memory_is_a_bare_model_of_its_own() -> None:
    model = tiny()
    bare = answer(model)
    steered = steer(model)
    copied, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(answer(copied), bare), "it runs on its own weights"
    assert torch.equal(answer(torch.load(file, weights_only=False)), bare), "so does a pickled one"
    ids, state = random_ids(2, 7), random_state(steered, 2)
    with torch.no_grad():
        assert torch.equal(steered(ids, state).logits, steered(ids, state).logits)
    assert torch.equal(answer(copied), bare)
    # And may have a memory of its own.
    again = steer(copied)
    with torch.no_grad():
        assert not torch.allclose(again(ids, random_state(again, 2)).logits, bare)
    with pytest.raises(ConfigError, match=r"attach\(copy.deepcopy\(steered.model\)"):
        copy.deepcopy(steered)


def test_a_forward_that_was_there_before_is_called_and_stays() -> None:
    """As accelerate puts one on modules of models that are spread over devices."""
    model, called = tiny(), []
    projection = model.get_decoder().layers[1].self_attn.q_proj
    own = projection.forward

    def theirs(*inputs: Any) -> Tensor:
        called.append(len(inputs))
        return own(*inputs)

    projection.forward = theirs
    bare = answer(model)
    steered = steer(model)
    called.clear()
    with torch.no_grad():
        steered(random_ids(1, 3))
    assert called == [1]
    steered.detach()
    assert projection.forward is theirs
    assert torch.equal(answer(model), bare)


def test_a_forward_that_was_put_around_it_stays_and_finds_no_pass_after_detach() -> None:
    model = tiny()
    bare = answer(model)
    steered = steer(model)
    projection = model.get_decoder().layers[1].self_attn.o_proj
    inner = projection.forward
    projection.forward = partial(inner)
    with torch.no_grad():
        found = steered(random_ids(2, 7), random_state(steered, 2)).logits
    assert not torch.allclose(found, bare)
    steered.detach()
    assert isinstance(projection.forward, partial)
    assert torch.equal(answer(model), bare)


def test_two_memories_of_one_model_come_off_in_any_order() -> None:
    for order in ((0, 1), (1, 0)):
        model = tiny()
        bare = answer(model)
        both = [steer(model, seed=seed) for seed in (3, 4)]
        ids, state = random_ids(2, 7), random_state(both[0], 2)
        with torch.no_grad():
            for one, seed in zip(both, (3, 4), strict=True):
                alone = steer(tiny(), seed=seed)(ids, state).logits
                assert torch.equal(one(ids, state).logits, alone), "neither sees the other"
        for number in order:
            both[number].detach()
        assert torch.equal(answer(model), bare)
        assert not any("forward" in vars(module) for module in model.modules())


def test_between_calls_nothing_is_on_the_model_and_during_one_only_on_its_projections() -> None:
    model = tiny()
    steered, patched = steer(model, delta_heads=("v", "o")), []
    model.get_decoder().norm.register_forward_hook(
        lambda *_: patched.extend(name for name, module in model.named_modules() if "forward" in vars(module))
    )
    with torch.no_grad():
        steered(random_ids(1, 3))
    assert patched == [f"model.layers.{n}.self_attn.{p}_proj" for n in range(3) for p in ("q", "v", "o")]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("write_strategy", ["token", "sentence"])
@pytest.mark.parametrize("length", [1, 4])
def test_a_layer_that_does_not_read_is_noticed(write_strategy: str, length: int, backend: str) -> None:
    """As where layers are left out, or a layer was put in another's place."""
    steered = steer(tiny(), write_strategy=write_strategy)
    steered.model.get_decoder().layers[1].forward = lambda hidden, *_, **__: hidden
    ids, segments = random_ids(1, length), torch.zeros(1, length, dtype=torch.int64)
    for write in (True, False):
        with torch.no_grad(), pytest.raises(TurnError, match="ran 2 of its 3 steered layers; nothing was written"):
            steered(ids, segments=segments, write=write)


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


def test_two_attentions_in_a_layer_lacking_projections_and_none_at_all_are_refused() -> None:
    model = tiny()
    model.get_decoder().layers[0].cross_attn = _Reused()
    with pytest.raises(UnsupportedModelError, match=r"layer 0 has more than one attention.*cross_attn"):
        SteeredModel.attach(model, config=MemoryConfig())
    model = tiny()
    del model.get_decoder().layers[2].self_attn.v_proj
    with pytest.raises(UnsupportedModelError, match=r"layers\.2.* has q_proj but no v_proj"):
        SteeredModel.attach(model, config=MemoryConfig())
    with pytest.raises(UnsupportedModelError, match=r"Linear has no attention layer.*its modules are Linear"):
        SteeredModel.attach(nn.Linear(2, 2), config=MemoryConfig())
