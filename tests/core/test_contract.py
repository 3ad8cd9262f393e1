"""The core call's contract: what never changes, what never writes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentmem import MemoryConfig, SteeredModel
from agentmem.errors import AdapterError, ConfigError, SegmentsRequiredError, StateMismatchError, TurnError
from tests.helpers.core_models import TERMS, random_ids, random_state, steer, tiny
from tests.helpers.numeric import assert_close

STRATEGIES = ("token", "message", "sentence")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(num_hidden_layers=2)


def _segments(batch: int, length: int) -> torch.Tensor:
    return (torch.arange(length) // 4).expand(batch, length)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_without_strength_logits_are_the_untouched_models_bit_for_bit(strategy: str, attention: str) -> None:
    model = tiny(attention=attention)
    ids, mask = random_ids(2, 11), torch.tensor([[1] * 11, [0] * 3 + [1] * 8])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    bare = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    steered = steer(model, alpha=0.0, write_strategy=strategy, delta_heads=("q", "k", "v", "o"))
    state = random_state(steered, 2)
    out = steered(ids, state, attention_mask=mask, segments=_segments(2, 11))
    assert torch.equal(out.logits, bare)
    assert not torch.equal(out.state, state), "silent, but it still writes"
    strong = steer(model, write_strategy=strategy)
    assert not torch.equal(strong(ids, state, write=False).logits, bare)
    for attached in (steered, strong):
        assert attached.detach() is model
    assert torch.equal(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits, bare)


@torch.no_grad()
def test_idle_and_after_an_error_the_model_is_bare(model: Any) -> None:
    ids = random_ids(1, 7)
    bare = model(input_ids=ids).logits
    steered = steer(model)
    steered(ids)
    assert torch.equal(model(input_ids=ids).logits, bare)
    with pytest.raises(IndexError):
        steered(torch.full((1, 7), 10_000))
    assert torch.equal(model(input_ids=ids).logits, bare)
    assert steered(ids).state.any(), "and the steered model goes on"
    steered.detach()


@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_no_state_is_the_zero_state_and_states_are_never_changed(model: Any, strategy: str) -> None:
    steered = steer(model, write_strategy=strategy, num_state_heads=2)
    ids, segments = random_ids(2, 9), _segments(2, 9)
    zeros = steered.zeros(2)
    assert zeros.shape == (2, 2, 2, 8, 8)
    assert zeros.dtype == torch.float32
    a, b = steered(ids, segments=segments), steered(ids, zeros, segments=segments)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.state, b.state)
    assert not zeros.any()
    state = random_state(steered, 2)
    before = state.clone()
    again = [steered(ids, state, segments=segments) for _ in range(2)]
    assert torch.equal(state, before)
    assert torch.equal(again[0].state, again[1].state)
    assert torch.equal(again[0].logits, again[1].logits)
    steered.detach()


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_tokens_that_do_not_write(model: Any, strategy: str, coupled: bool) -> None:
    """Padding, writes off for a token, and segment -1 are one and the same: identity."""
    steered = steer(model, write_strategy=strategy, couple_lambda=coupled, state_update_mode="lambda_outside")
    ids, segments, state = random_ids(2, 9), _segments(2, 9), random_state(steered, 2)
    write = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    by_write = steered(ids, state, segments=segments, write=write)
    by_segment = steered(ids, state, segments=torch.where(write, segments, -1))
    assert torch.equal(by_write.state, by_segment.state)
    assert torch.equal(by_write.logits, by_segment.logits)
    assert not torch.equal(by_write.state, steered(ids, state, segments=segments).state)
    for nothing in (
        {"write": False},
        {"write": torch.zeros(2, 9, dtype=torch.bool)},
        {"segments": torch.full((2, 9), -1)},
    ):
        assert torch.equal(steered(ids, state, **{"segments": segments, **nothing}).state, state)
    # One row off, the other goes on as if alone.
    write = torch.tensor([[False] * 9, [True] * 9])
    out = steered(ids, state, segments=segments, write=write)
    assert torch.equal(out.state[0], state[0])
    alone = steered(ids[1:], state[1:], segments=segments[1:])
    assert_close(out.state[1], alone.state[0], TERMS)
    steered.detach()


@pytest.mark.parametrize("coupled", [True, False])
@torch.no_grad()
def test_a_finished_row_never_writes_again(model: Any, coupled: bool) -> None:
    """Decoding in a batch goes on feeding a row that has ended; its state stands still, bit for bit."""
    steered = steer(model, couple_lambda=coupled)
    ids, ends = random_ids(3, 12), (4, 12, 8)
    state, kept = random_state(steered, 3), True
    history = []
    for step in range(12):
        write = torch.tensor([[step < end] for end in ends])
        out = steered(ids[:, step : step + 1], state, write=write, cache=kept)
        state, kept = out.state, out.cache
        history.append(state)
    for row, end in enumerate(ends):
        assert all(torch.equal(later[row], history[end - 1][row]) for later in history[end - 1 :])
        assert all(not torch.equal(history[i][row], history[i + 1][row]) for i in range(end - 1))
        alone = steered(ids[row : row + 1, :end], random_state(steered, 3)[row : row + 1])
        assert_close(state[row], alone.state[0], TERMS)
    steered.detach()


@pytest.mark.parametrize("strategy", ["message", "sentence"])
def test_segments_are_required_to_write(model: Any, strategy: str) -> None:
    steered = steer(model, write_strategy=strategy)
    for write in (True, torch.ones(1, 4, dtype=torch.bool)):
        with pytest.raises(SegmentsRequiredError, match=f"writes by {strategy}.*segments="):
            steered(random_ids(1, 4), write=write)
    assert not steered(random_ids(1, 4), write=False).state.any()
    steered.detach()


def test_a_foreign_state_is_refused(model: Any) -> None:
    steered = steer(model, rank=4)
    ids = random_ids(2, 4)
    for state, found in (
        (torch.zeros(2, 2, 1, 8, 8), r"found torch.float32 \[2, 2, 1, 8, 8\]"),
        (torch.zeros(1, 2, 1, 4, 4), r"\[2, 2, 1, 4, 4\].*found.*\[1, 2, 1, 4, 4\]"),
        (torch.zeros(2, 3, 1, 4, 4), r"found.*\[2, 3, 1, 4, 4\]"),
        (torch.zeros(2, 2, 4, 4), r"found.*\[2, 2, 4, 4\]"),
        (torch.zeros(2, 2, 1, 4, 4, dtype=torch.float64), "expected a float32.*float64"),
        (torch.zeros(2, 2, 1, 4, 4, dtype=torch.bfloat16), "bfloat16"),
    ):
        with pytest.raises(StateMismatchError, match=found):
            steered(ids, state)
    steered.detach()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("attention_mask", torch.ones(2, 4)),
        ("attention_mask", torch.ones(1, 5)),
        ("attention_mask", torch.ones(2, 1, 5, 5)),
        ("position_ids", torch.zeros(2, 4, dtype=torch.long)),
        ("segments", torch.zeros(2, 6, dtype=torch.long)),
        ("segments", torch.zeros(5, dtype=torch.long)),
        ("write", torch.ones(5, dtype=torch.bool)),
        ("write", torch.ones(2, 1, dtype=torch.bool)),
        ("attention_bias", torch.ones(2, 5, 5, dtype=torch.bool)),
    ],
)
@pytest.mark.parametrize("strategy", ["token", "message"])
def test_misshaped_arguments_are_refused_by_name(model: Any, strategy: str, name: str, given: torch.Tensor) -> None:
    steered = steer(model, write_strategy=strategy)
    arguments = {"segments": torch.zeros(2, 5, dtype=torch.long), name: given}
    with pytest.raises(TurnError, match=f"{name}.*found"):
        steered(random_ids(2, 5), **arguments)
    if name == "attention_mask":
        # It covers what the cache holds.
        with torch.no_grad():
            first = steered(random_ids(1, 5), cache=True, write=False)
        with pytest.raises(TurnError, match=r"attention_mask.*\[1, 8\].*found \[1, 3\]"):
            steered(random_ids(1, 3), first.state, attention_mask=torch.ones(1, 3), cache=first.cache, write=False)
    steered.detach()


@torch.no_grad()
def test_pending_sums_are_not_taken_from_elsewhere(model: Any) -> None:
    message = steer(model, write_strategy="message")
    ids, segments = random_ids(1, 4), torch.zeros(1, 4, dtype=torch.long)
    pending = message(ids, segments=segments, close=False).pending
    with pytest.raises(TurnError, match="pending must be of 2 rows"):
        message(random_ids(2, 4), segments=segments.expand(2, 4), pending=pending)
    narrow = steer(model, write_strategy="message", target_layers=(0,))
    with pytest.raises(TurnError, match="1 layers"):
        narrow(ids, segments=segments, pending=pending)
    token = steer(model)
    with pytest.raises(TurnError, match="writes by token"):
        token(ids, pending=pending)
    for steered in (message, narrow, token):
        steered.detach()


def test_one_call_at_a_time_and_none_after_detach(model: Any) -> None:
    """Also of two memories of one model, which replace the same methods."""
    steered, other = steer(model), steer(model, seed=1)
    ids = random_ids(1, 4)
    bare = model(input_ids=ids).logits
    refused: list[str] = []

    def call_again(*_: Any) -> None:
        for memory, said in ((steered, "one call at a time"), (other, "of this memory or of another")):
            with pytest.raises(TurnError, match=said) as caught:
                memory(ids)
            refused.append(str(caught.value))

    handle = model.get_decoder().layers[1].register_forward_hook(call_again)
    with torch.no_grad():
        out = steered(ids)
        handle.remove()
        assert len(refused) == 2
        assert torch.equal(out.logits, steered(ids).logits), "the refused call disturbed the running one"
        other(ids)
    assert torch.equal(model(input_ids=ids).logits, bare)
    other.detach()
    steered.detach()
    with pytest.raises(TurnError, match="detached"):
        steered(ids)


def test_attach_takes_one_of_adapter_and_config_and_layers_that_there_are(model: Any, tmp_path: Any) -> None:
    for given in ({}, {"adapter": tmp_path, "config": MemoryConfig()}):
        with pytest.raises(ConfigError, match=r"either adapter= .* or config="):
            SteeredModel.attach(model, **given)
    with pytest.raises(AdapterError, match=r"layers \[2, 7\].*attention layers are \[0, 1\]"):
        SteeredModel.attach(model, config=MemoryConfig(target_layers=(0, 2, 7)))


def test_fresh_weights(model: Any) -> None:
    """A fresh memory leaves the model as it is, writes all the same, and follows its seed."""
    ids = random_ids(1, 6)
    fresh = [SteeredModel.attach(model, config=MemoryConfig(couple_lambda=False), seed=s) for s in (1, 1, 2)]
    with torch.no_grad():
        bare = model(input_ids=ids).logits
        outs = [steered(ids) for steered in fresh]
    assert all(torch.equal(out.logits, bare) for out in outs)
    assert torch.equal(outs[0].state, outs[1].state)
    assert not torch.equal(outs[0].state, outs[2].state)
    parameters = dict(fresh[0].memory[0].named_parameters())
    assert parameters["beta_bias"].unique().tolist() == [-1.5]
    assert parameters["lambda_bias"].unique().tolist() == [4.0]
    assert not parameters["delta_o_proj"].any()
    sliced = SteeredModel.attach(model, config=MemoryConfig(output_init="base_slice_fixed", online_gain=0.2))
    weight = sliced.memory[0].get_parameter("delta_q_proj")
    base = model.get_decoder().layers[0].self_attn.q_proj.weight[:, :8]
    torch.testing.assert_close(weight / base, (weight / base).mean().expand_as(weight))
    assert weight.pow(2).mean().sqrt().item() == pytest.approx(0.2 / 8**0.5)
    with pytest.raises(ConfigError, match=r"base_slice_fixed takes 64 columns.*use zero"):
        SteeredModel.attach(model, config=MemoryConfig(output_init="base_slice_fixed", rank=64))
    with pytest.raises(ConfigError, match=r"output_init.*found 'xavier'"):
        SteeredModel.attach(model, config=MemoryConfig(output_init="xavier"))
    for steered in (*fresh, sliced):
        steered.detach()


@torch.no_grad()
def test_weights_changed_between_calls_count(model: Any) -> None:
    """Packed weights are kept between calls; an optimiser's step must be seen in the next one."""
    steered = steer(model)
    ids = random_ids(1, 6)
    before = steered(ids).state
    for parameter in steered.memory.parameters():
        parameter.mul_(1.5)
    assert not torch.equal(steered(ids).state, before)
    steered.detach()


def test_inference_mode(model: Any) -> None:
    ids = random_ids(1, 6)
    with torch.inference_mode():
        inside = steer(model)
        first = inside(ids)
        second = inside(ids, first.state.clone())
        inside.detach()
    outside = steer(model)
    with torch.no_grad():
        assert torch.equal(outside(ids).state, first.state)
        assert torch.equal(outside(ids, first.state).state, second.state)
    outside.detach()
