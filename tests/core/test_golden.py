"""The mechanism against vectors that the authors' public implementation computed (``tests/golden``)."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from agentmem import SteeredModel
from tests.helpers.core_models import GOLDEN

CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
SEGMENTS = {"message": "prefill.message_ids", "sentence": "prefill.sentence_ids"}

pytestmark = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@pytest.fixture(scope="module", autouse=True)
def _fresh(steps: str) -> None:
    """Models decide when they first decode."""
    _load.cache_clear()


@cache
def _load(case: str, attention: str) -> tuple[SteeredModel, dict[str, Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(
        GOLDEN / case / "base", attn_implementation=attention, dtype=torch.float32
    ).eval()
    steered = SteeredModel.attach(model, adapter=GOLDEN / case / "adapter")
    return steered, load_file(GOLDEN / case / "io.safetensors")


def _ours(state: Tensor) -> Tensor:
    """[L, B, (H,) r, r] as the vectors have it -> [B, L, H, r, r]."""
    if state.dim() == 4:
        state = state.unsqueeze(2)
    return state.transpose(0, 1).contiguous()


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def _prefill(steered: SteeredModel, io: dict[str, Tensor], **options: Any) -> Any:
    strategy = steered.config.write_strategy
    if strategy != "token":
        options["segments"] = io[SEGMENTS[strategy]]
    return steered(io["prefill.input_ids"], attention_mask=io["prefill.attention_mask"], **options)


def test_there_are_cases(attention: str) -> None:
    strategies = {_load(case, attention)[0].config.write_strategy for case in CASES}
    assert len(CASES) == 6
    assert strategies == {"token", "message", "sentence"}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_prefill_writes_the_state(case: str, attention: str) -> None:
    steered, io = _load(case, attention)
    out = _prefill(steered, io, position_ids=io["prefill.position_ids"])
    valid = io["prefill.attention_mask"].bool()
    assert out.logits is not None
    _close(out.logits[valid], io["prefill.logits"][valid], 2e-5)
    _close(out.state, _ours(io["prefill.state"]), 5e-6)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_positions_follow_from_the_mask(case: str, attention: str) -> None:
    steered, io = _load(case, attention)
    _close(_prefill(steered, io).state, _ours(io["prefill.state"]), 5e-6)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_read_only_pass_reads_and_leaves_the_state(case: str, attention: str) -> None:
    steered, io = _load(case, attention)
    state = _ours(io["prefill.state"])
    out = steered(io["read.input_ids"], state, write=False)
    _close(out.logits, io["read.logits"], 2e-5)
    assert torch.equal(out.state, state)
    _close(out.state, _ours(io["read.state"]), 5e-6)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_reset_state(case: str, attention: str) -> None:
    steered, io = _load(case, attention)
    out = steered(io["read.input_ids"], write=False)
    _close(out.logits, io["reset.logits"], 2e-5)
    assert not out.state.any()
    # The case is worth something only if memory is seen in it.
    assert (io["read.logits"] - io["reset.logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("qwen3_ssw", "qwen3_sentence")])
@torch.no_grad()
def test_incremental_with_cache(case: str, attention: str) -> None:
    steered, io = _load(case, attention)
    ids, splits = io["incremental.input_ids"], io["incremental.splits"].tolist()
    states = io["incremental.states"]
    assert splits[0] == 0
    assert splits[-1] == ids.shape[1]
    state, kept, logits = None, True, []
    for number, (start, stop) in enumerate(pairwise(splits)):
        out = steered(ids[:, start:stop], state, cache=kept)
        state, kept = out.state, out.cache
        logits.append(out.logits)
        _close(state, _ours(states[number]), 5e-6)
    assert number + 1 == len(states)
    _close(torch.cat(logits, dim=1), io["incremental.logits"], 2e-5)
