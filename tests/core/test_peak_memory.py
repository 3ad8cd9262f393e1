"""A steered prefill holds hardly more than a bare one: its tensors are counted, as `benchmarks/overhead.py` does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from tests.helpers.core_models import random_ids, steer, tiny

LENGTH = 1024


def _module() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "overhead_memory.py"
    spec = importlib.util.spec_from_file_location("overhead_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


memory = _module()


@pytest.fixture(scope="module")
def model() -> Any:
    """Wide enough that the memory of rank 8 is small beside it, as it is beside real models."""
    return tiny("qwen3", hidden_size=256, intermediate_size=1024, num_hidden_layers=2).requires_grad_(False)


@pytest.fixture(scope="module")
def bare(model: Any) -> int:
    """Bytes that a bare prefill makes."""
    ids = random_ids(1, LENGTH)
    with torch.inference_mode():
        return int(memory.peak(lambda: model(ids, cache=DynamicCache(), use_cache=True, logits_to_keep=1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the tensors of a CPU")
@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("write", ["token", "message", "sentence"])
def test_a_prefill_holds_half_a_percent_more_at_most(model: Any, bare: int, write: str, close: bool) -> None:
    """Also where a pass of 64 sentences stays open: what gathers is a few numbers of each, not its hidden states."""
    steered = steer(model, write_strategy=write, rank=8)
    count = 64 if write == "sentence" else 2
    given: dict[str, Any] = {"close": close, "logits_to_keep": 1}
    if write != "token":
        given["segments"] = (torch.arange(LENGTH) * count // LENGTH)[None]
    ids = random_ids(1, LENGTH)
    with torch.inference_mode():
        steered(ids[:, :64], **given | {"segments": None if write == "token" else given["segments"][:, :64]})
        most = memory.peak(lambda: steered(ids, cache=True, **given))
    steered.detach()
    assert bare > 10e6, "the model's own tensors were counted"
    assert most < 1.005 * bare


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the tensors of a CPU")
def test_what_is_counted_is_what_is_alive_at_once() -> None:
    layer = nn.Linear(4, 4)

    def run() -> None:
        kept = torch.zeros(256)
        for _ in range(3):
            (kept + 1).view(2, 128)[0].add_(1)  # 1,024 bytes each time, dropped again

    assert memory.peak(run) == 2048
    assert memory.peak(run, layer, layer) == 2048 + 4 * (16 + 4)
