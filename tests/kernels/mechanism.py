"""The mechanism with the kernels under it, against vectors that the authors' public implementation computed.

Run by ``test_backends.py`` alone: without a backend of its own this would be ``core/test_golden.py`` once more.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from agentmem import SteeredModel, kernels
from agentmem.kernels import triton_scan, triton_step

GOLDEN = Path(__file__).parents[1] / "golden"
# Every kind of gate, of state heads and of corrections that the vectors have, written by token. The first has the most,
# and the fewest programs to interpret.
CASES = ["qwen3_all_options", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen3_tsw", "qwen3_msw"))]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel was called; and chunks short enough that there are several."""
    counts = {"step": 0, "scan": 0}

    def counting(name: str, function: Any) -> Any:
        def called(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return called

    monkeypatch.setattr(triton_step, "step", counting("step", triton_step.step))
    monkeypatch.setattr(triton_scan, "scan", counting("scan", triton_scan.scan))
    monkeypatch.setattr(triton_scan, "chunk_length", lambda length, rank: 16)
    return counts


def load(case: str, device: torch.device) -> tuple[SteeredModel, dict[str, Tensor]]:
    assert kernels.runs_triton(device)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / case / "base", dtype=torch.float32).eval().to(device)
    vectors = load_file(GOLDEN / case / "io.safetensors")
    return SteeredModel.attach(model, adapter=GOLDEN / case / "adapter"), {k: v.to(device) for k, v in vectors.items()}


def ours(state: Tensor) -> Tensor:
    state = state.unsqueeze(2) if state.dim() == 4 else state
    return state.transpose(0, 1)


@pytest.mark.slow  # the pieces of the next test are scanned by the same kernels
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_prefill(case: str, device: torch.device, launched: dict[str, int]) -> None:
    steered, io = load(case, device)
    mask = io["prefill.attention_mask"]
    out = steered(io["prefill.input_ids"], attention_mask=mask, position_ids=io["prefill.position_ids"])
    torch.testing.assert_close(out.logits[mask.bool()], io["prefill.logits"][mask.bool()], atol=2e-5, rtol=0)
    torch.testing.assert_close(out.state, ours(io["prefill.state"]), atol=5e-6, rtol=0)
    assert launched == {"step": 0, "scan": len(steered.layers)}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_pieces_and_single_tokens(case: str, device: torch.device, launched: dict[str, int]) -> None:
    steered, io = load(case, device)
    ids, splits = io["incremental.input_ids"], io["incremental.splits"].tolist()
    state, kept, logits = None, True, []
    for number, (start, stop) in enumerate(pairwise(splits)):
        before = None if state is None else state.clone()
        out = steered(ids[:, start:stop], state, cache=kept)
        assert state is None or torch.equal(state, before), "a state that was given is a value"
        state, kept = out.state, out.cache
        logits.append(out.logits)
        torch.testing.assert_close(state, ours(io["incremental.states"][number]), atol=5e-6, rtol=0)
    torch.testing.assert_close(torch.cat(logits, dim=1), io["incremental.logits"], atol=2e-5, rtol=0)
    single = sum(stop - start == 1 for start, stop in pairwise(splits))
    assert launched["step"] == single * len(steered.layers) > 0


@torch.no_grad()
def test_a_token_that_only_reads(device: torch.device, launched: dict[str, int]) -> None:
    steered, io = load("qwen3_all_options", device)
    state = ours(io["prefill.state"])
    whole = steered(io["read.input_ids"], state, write=False)
    first = steered(io["read.input_ids"][:, :1], state, write=False)
    assert launched["step"] == len(steered.layers)
    assert first.state is state
    torch.testing.assert_close(first.logits[:, 0], whole.logits[:, 0], atol=2e-5, rtol=0)
