"""Memory goes on and off a model without a trace, and beside what others put on its modules."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from agentmem.errors import ConfigError, TurnError
from tests.helpers.core_models import random_ids, random_state, steer, tiny


def answer(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=random_ids(2, 7)).logits
    return logits


def test_a_copy_of_a_model_with_memory_is_a_bare_model_of_its_own() -> None:
    model = tiny()
    bare = answer(model)
    steered = steer(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(answer(copied), bare), "it runs on its own weights"
    ids, state = random_ids(2, 7), random_state(steered, 2)
    with torch.no_grad():
        assert torch.equal(steered(ids, state).logits, steered(ids, state).logits)
    assert torch.equal(answer(copied), bare)
    # And may have a memory of its own.
    again = steer(copied)
    with torch.no_grad():
        assert not torch.allclose(again(ids, random_state(again, 2)).logits, bare)


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


def test_hooks_of_others_see_the_corrected_output() -> None:
    model, seen = tiny(), []
    steered = steer(model)
    model.get_decoder().layers[0].self_attn.q_proj.register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
    ids = random_ids(1, 5)
    with torch.no_grad():
        model(input_ids=ids)
        steered(ids, random_state(steered))
    assert not torch.allclose(*seen)


def test_a_pickled_model_is_a_bare_one() -> None:
    model = tiny()
    bare = answer(model)
    steer(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(answer(torch.load(file, weights_only=False)), bare)


def test_a_steered_model_says_how_it_is_copied() -> None:
    steered = steer(tiny())
    with pytest.raises(ConfigError, match=r"attach\(copy.deepcopy\(steered.model\)"):
        copy.deepcopy(steered)


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


def test_two_memories_of_one_model_do_not_run_at_once() -> None:
    """They replace the same methods, so the second one is refused, and the model is bare afterwards."""
    model = tiny()
    bare = answer(model)
    first, second = steer(model), steer(model, seed=1)
    ids, refused = random_ids(1, 3), []

    def meanwhile(*_: Any) -> None:
        with pytest.raises(TurnError, match="busy with another call, of this memory or of another"):
            second(ids)
        refused.append(True)

    hook = model.get_decoder().layers[0].register_forward_hook(meanwhile)
    with torch.no_grad():
        first(ids)
    hook.remove()
    assert refused
    assert torch.equal(answer(model), bare)
    with torch.no_grad():
        second(ids)
    assert torch.equal(answer(model), bare)
