"""Gradients through a write pass and a read pass, and what stays float32 in a bfloat16 model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from agentmem.kernels.recurrence import ScanArgs, scan_reference
from tests.helpers.core_models import OPTIONS, TERMS, random_ids, random_state, steer, tiny
from tests.helpers.numeric import assert_close, tolerance

LEARNED = [
    *(
        ("token", name)
        for name in ("paper", "lambda outside", "no lambda, weights there", "scale a layer", "scale a head")
    ),
    ("message", "paper"),
    ("sentence", "four state heads"),
]


@pytest.mark.parametrize(("strategy", "name"), LEARNED)
def test_every_active_parameter_learns(strategy: str, name: str) -> None:
    """Context written in one pass, asked for in another, the loss on the second alone."""
    model = tiny(num_hidden_layers=2).requires_grad_(False)
    steered = steer(model, write_strategy=strategy, **OPTIONS[name])
    context, question = random_ids(2, 60, seed=1), random_ids(2, 8, seed=2)
    written = steered(context, segments=(torch.arange(60) // 9).expand(2, 60), logits_to_keep=-1)
    read = steered(question, written.state, write=False)
    torch.nn.functional.cross_entropy(read.logits[:, :-1].flatten(0, 1), question[:, 1:].flatten()).backward()
    idle = {f"delta_{head}_proj" for head in "qkvo" if head not in steered.config.delta_heads}
    if steered.config.state_update_mode == "no_lambda":
        idle |= {"lambda_proj", "lambda_bias"}
    for name, parameter in steered.memory.named_parameters():
        if name.rpartition(".")[2] in idle:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
        else:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert bool(parameter.grad.any()), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_do_not_depend_on_cuts() -> None:
    model = tiny(num_hidden_layers=2).requires_grad_(False)
    steered = steer(model, write_strategy="message")
    ids, segments = random_ids(1, 12), (torch.arange(12) // 5)[None]

    def gradients(cuts: list[int]) -> list[Tensor]:
        state, kept, pending = None, True, None
        for start, stop in pairwise(cuts):
            out = steered(
                ids[:, start:stop],
                state,
                segments=segments[:, start:stop],
                cache=kept,
                pending=pending,
                close=stop == 12,
            )
            state, kept, pending = out.state, out.cache, out.pending
        parameters = [p for n, p in steered.memory.named_parameters() if "memory_" in n]
        return list(torch.autograd.grad(state.pow(2).sum(), parameters, allow_unused=True))

    for one, many in zip(gradients([0, 12]), gradients([0, 2, 7, 12]), strict=True):
        if one is None:
            assert many is None, "the query takes no part in the state"
        else:
            # The gradient's sums are as long as those of the call, once more.
            assert_close(many, one, 2 * TERMS)


def _layer_zero(model: Any, ids: Tensor) -> Tensor:
    """What q_proj of the first layer sees: it stands before any correction."""
    seen: list[Tensor] = []
    handle = (
        model.get_decoder()
        .layers[0]
        .self_attn.q_proj.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    )
    model(input_ids=ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("memory_dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_state_stays_float32_in_a_bfloat16_model(memory_dtype: torch.dtype) -> None:
    """500 tokens, one by one: the state equals a float64 run over the same projections, which bfloat16 could not."""
    model = tiny(num_hidden_layers=2).to(torch.bfloat16)
    steered = steer(model, dtype=memory_dtype, beta_bias_init=-4.0)
    assert {p.dtype for p in steered.memory.parameters()} == {memory_dtype}
    ids = random_ids(1, 500)
    hidden = _layer_zero(model, ids)
    assert hidden.dtype == torch.bfloat16
    inputs = [x.double() for x in steered.memory[0].terms(hidden)]
    _, exact = scan_reference(ScanArgs(torch.zeros(1, 1, 8, 8, dtype=torch.float64), *inputs))

    state, coarse = steered.zeros(), torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)
    for t in range(500):
        _, coarse = scan_reference(ScanArgs(coarse, *(x[:, t : t + 1].bfloat16() for x in inputs)))
    for start in range(0, 500, 20):
        out = steered(ids[:, start : start + 20], state, cache=None, logits_to_keep=-1)
        state = out.state
        assert state.dtype == torch.float32

    def error(found: Tensor) -> float:
        return ((found.double() - exact).norm() / exact.norm()).item()

    # A sum of 500 writes, of products with 32 numbers and reads of 8 before each.
    assert error(state[:, 0]) < tolerance(torch.float32, 500 + 32 + 8)
    assert error(coarse) > 1e-3


@pytest.mark.parametrize("head", ["q", "o"])
@torch.no_grad()
def test_a_correction_is_cast_once(head: str) -> None:
    """Float32 memory in a bfloat16 model: the correction is float32 until it is added."""
    model = tiny(num_hidden_layers=1).to(torch.bfloat16)
    steered = steer(model, dtype=torch.float32, alpha=5.0, delta_heads=(head,), trainable_delta_scale=True)
    seen: list[Tensor] = []
    projection = getattr(model.get_decoder().layers[0].self_attn, f"{head}_proj")
    projection.register_forward_hook(lambda _m, _i, output: seen.append(output))
    ids, state = random_ids(1, 9), random_state(steered)
    model(input_ids=ids)
    out = steered(ids, state, write=False)
    assert out.logits.dtype == torch.bfloat16
    memory = steered.memory[0]
    read = torch.einsum("bhij,bthj->bthi", state[:, 0], memory.query(_layer_zero(model, ids)))
    scale = 5.0 / 8 * torch.sigmoid(memory.delta_scale_raw[0]) * 2.0
    exact = (read.flatten(-2).double() @ memory.get_parameter(f"delta_{head}_proj").double().T) * scale.double()
    # Rounded to bfloat16 once and added there. Ties aside, which the two ways of summing may break differently.
    once = seen[0] + exact.bfloat16()
    assert (seen[1] == once).double().mean() > 0.99
    twice = seen[0] + ((exact / scale).bfloat16() * scale).bfloat16()
    assert (twice == once).double().mean() < 0.97, "the case could not tell"
    assert exact.abs().max() > 0.01
