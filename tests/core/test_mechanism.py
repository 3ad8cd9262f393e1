"""Every option of the mechanism and every supported architecture against an independent, obvious version of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agentmem import SteeredModel
from tests.helpers.core_models import ARCHITECTURES, random_ids, random_state, steer, tiny
from tests.helpers.core_oracle import Oracle

EVERY_HEAD = ("q", "k", "v", "o")

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
    "all corrections": {"delta_heads": EVERY_HEAD},
    "k and v": {"delta_heads": ("k", "v")},
    "v alone": {"delta_heads": ("v",)},
    "o normalised": {"delta_o_rmsnorm": True},
    "scale a layer": {"trainable_delta_scale": True, "delta_scale_max": 3.0},
    "scale a head": {
        "trainable_delta_scale": True,
        "delta_scale_granularity": "head",
        "delta_heads": EVERY_HEAD,
        "delta_o_rmsnorm": True,
    },
    "one layer": {"target_layers": (1,)},
    "two layers, any order": {"target_layers": (2, 0)},
    "odd rank": {"rank": 5, "alpha": 3.0},
}


def _oracle(model: Any, steered: SteeredModel, ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    oracle = Oracle(model, steered.config, dict(steered.adapter.tensors), state)
    with oracle.steering():
        logits = model(input_ids=ids, use_cache=False).logits
    return logits, oracle.states.float()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@torch.no_grad()
def test_every_option_is_what_it_says(options: dict[str, Any]) -> None:
    model = tiny()
    steered = steer(model, **{"rank": 4, **options})
    ids, state = random_ids(2, 9), random_state(steered, 2)
    out = steered(ids, state)
    bare = model(input_ids=ids).logits
    logits, after = _oracle(model, steered, ids, state)
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.state, after, atol=1e-5, rtol=1e-5)
    assert (out.logits - bare).abs().max() > 1e-2
    assert (out.state - state).abs().max() > 1e-2


@pytest.mark.parametrize("heads", [("q", "o"), EVERY_HEAD], ids=["qo", "qkvo"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_corrections_land_where_they_should(architecture: str, heads: tuple[str, ...]) -> None:
    model = tiny(architecture)
    steered = steer(model, rank=4, delta_heads=heads)
    assert steered.layers == [0, 1, 2]
    ids, state = random_ids(1, 12), random_state(steered)
    out = steered(ids, state)
    logits, after = _oracle(model, steered, ids, state)
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.state, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", EVERY_HEAD)
@pytest.mark.parametrize("architecture", ["qwen3", "phi3"])
@torch.no_grad()
def test_each_correction_is_added_to_its_projection_alone(architecture: str, head: str) -> None:
    """In a steered call one projection gives what it gives alone plus the correction, the others what they give."""
    model = tiny(architecture, num_hidden_layers=1)
    steered = steer(model, rank=4, delta_heads=(head,))
    attention = model.get_decoder().layers[0].self_attn
    seen: dict[str, Tensor] = {}
    for name, module in attention.named_children():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out.clone()))
    ids, state = random_ids(1, 6), random_state(steered)
    model(input_ids=ids)
    bare = dict(seen)
    steered(ids, state, write=False)
    inner = "qkv_proj" if architecture == "phi3" else f"{head}_proj"
    changed = bare["o_proj"] if head == "o" else bare[inner]
    difference = seen["o_proj" if head == "o" else inner] - changed
    width = {"q": 32, "k": 16, "v": 16, "o": 32}[head] if architecture == "phi3" else changed.shape[-1]
    start = {"q": 0, "k": 32, "v": 48, "o": 0}[head] if architecture == "phi3" else 0
    assert difference[..., start : start + width].abs().min() > 0
    rest = torch.cat((difference[..., :start], difference[..., start + width :]), dim=-1)
    assert not rest.any()
    for name in bare.keys() - {inner, "o_proj"}:
        assert torch.equal(seen[name], bare[name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_each_architecture_holds_the_contract(architecture: str) -> None:
    model = tiny(architecture)
    ids = random_ids(2, 14)
    bare = model(input_ids=ids).logits
    silent = steer(model, alpha=0.0, delta_heads=EVERY_HEAD)
    assert torch.equal(silent(ids, random_state(silent, 2)).logits, bare)
    silent.detach()

    steered = steer(model, rank=4, delta_heads=EVERY_HEAD)
    state = random_state(steered, 2)
    whole = steered(ids, state)
    assert (whole.logits - bare).abs().max() > 1e-2
    assert torch.equal(model(input_ids=ids).logits, bare), "a steered model called directly is the bare model"

    last, kept, logits = state, True, []
    # 14 tokens pass the windows of 8 that Mistral and Gemma3 slide here.
    for start, stop in ((0, 3), (3, 4), (4, 11), (11, 14)):
        out = steered(ids[:, start:stop], last, cache=kept)
        last, kept = out.state, out.cache
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, whole.state, atol=1e-5, rtol=1e-5)

    mask = torch.tensor([[0] * 4 + [1] * 10, [1] * 14])
    batch = steered(ids, state, attention_mask=mask)
    alone = steered(ids[:1, 4:], state[:1])
    torch.testing.assert_close(batch.logits[0, 4:], alone.logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.state[0], alone.state[0], atol=1e-5, rtol=1e-5)

    assert steered.detach() is model
    assert torch.equal(model(input_ids=ids).logits, bare)


@torch.no_grad()
def test_two_memories_on_one_model_do_not_see_each_other() -> None:
    model = tiny()
    ids = random_ids(1, 8)
    first = steer(model, seed=1)
    alone = first(ids)
    second = steer(model, seed=2)
    both = first(ids), second(ids)
    assert torch.equal(both[0].logits, alone.logits)
    assert not torch.equal(both[1].logits, alone.logits)
    second.detach()
    assert torch.equal(first(ids).logits, alone.logits)
