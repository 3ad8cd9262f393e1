"""The mechanism with the kernels under it: against vectors that the authors' public implementation computed, and
against itself without them, however a pass is cut, padded and batched.

As ``core/test_golden.py`` and ``core/test_equivalence.py``, whose cases these are, without what no kernel is part of.

Run by ``test_backends.py`` alone: without a backend of its own this would be those once more.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from agentmem import SteeredModel, kernels
from agentmem.kernels import triton_scan, triton_step
from tests.helpers.core_models import GOLDEN, padded, random_ids, random_state, steer, tiny

SEGMENTS = {"message": "prefill.message_ids", "sentence": "prefill.sentence_ids"}


def slow(*cases: str) -> list[Any]:
    """Cases of many programs, which the interpreter runs one after another."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


BY_SEGMENT = ["qwen3_sentence", "qwen3_ssw"]
BY_TOKEN = ["qwen3_all_options", "qwen3_tsw", "qwen3_msw", "smollm3_tsw"]
# Rows of a batch, and where the first of them is cut: before and behind a single token, and inside a segment.
LENGTHS = (11, 7, 3)
CUTS: tuple[tuple[int, ...], ...] = ((1,), (5, 6), (10,))


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


@pytest.mark.parametrize("case", [*BY_SEGMENT, *slow(*BY_TOKEN)])
@torch.no_grad()
def test_prefill(case: str, device: torch.device, launched: dict[str, int]) -> None:
    steered, io = load(case, device)
    mask, strategy = io["prefill.attention_mask"], steered.config.write_strategy
    out = steered(
        io["prefill.input_ids"],
        attention_mask=mask,
        position_ids=io["prefill.position_ids"],
        segments=None if strategy == "token" else io[SEGMENTS[strategy]],
    )
    torch.testing.assert_close(out.logits[mask.bool()], io["prefill.logits"][mask.bool()], atol=2e-5, rtol=0)
    torch.testing.assert_close(out.state, ours(io["prefill.state"]), atol=5e-6, rtol=0)
    assert launched == {"step": 0, "scan": len(steered.layers)}


@pytest.mark.parametrize("case", [*BY_TOKEN[:2], *slow(*BY_TOKEN[2:])])
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


@pytest.mark.parametrize("case", BY_TOKEN + BY_SEGMENT)
@torch.no_grad()
def test_passes_that_only_read(case: str, device: torch.device, launched: dict[str, int]) -> None:
    steered, io = load(case, device)
    state = ours(io["prefill.state"])
    whole = steered(io["read.input_ids"], state, write=False)
    torch.testing.assert_close(whole.logits, io["read.logits"], atol=2e-5, rtol=0)
    first = steered(io["read.input_ids"][:, :1], state, write=False)
    torch.testing.assert_close(first.logits[:, 0], io["read.logits"][:, 0], atol=2e-5, rtol=0)
    assert first.state is state
    assert launched == {"step": len(steered.layers) if case in BY_TOKEN else 0, "scan": 0}
    empty = steered(io["read.input_ids"], write=False)
    torch.testing.assert_close(empty.logits, io["reset.logits"], atol=2e-5, rtol=0)


def run(
    steered: SteeredModel,
    state: Tensor,
    ids: Tensor,
    segments: Tensor,
    mask: Tensor | None = None,
    cuts: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """One pass, cut; logits [B, T, V] and the state after it."""
    length, logits, pending, cache = ids.shape[1], [], None, True
    for start, stop in pairwise((0, *cuts, length)):
        out = steered(
            ids[:, start:stop],
            state,
            attention_mask=None if mask is None else mask[:, :stop],
            segments=segments[:, start:stop],
            cache=cache,
            pending=pending,
            close=stop == length,
        )
        state, pending, cache = out.state, out.pending, out.cache
        logits.append(out.logits)
    return torch.cat(logits, dim=1), state


@pytest.mark.parametrize("strategy", ["token", "message", "sentence"])
@torch.no_grad()
def test_cut_padded_batched_or_alone(
    strategy: str, device: torch.device, launched: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels as without them, and a row in company, in pieces and behind padding as alone."""
    model = tiny(num_hidden_layers=2).to(device)
    steered = steer(model, write_strategy=strategy, num_state_heads=2, couple_lambda=False, rank=4)
    states = random_state(steered, 3).to(device)
    # Segments start below 0 (never written), skip numbers, differ from row to row and return after another began.
    written = [[-1, 0, 0, 4, 4, -1, 4, 2, 2, 9, 9], [0, 0, 1, 1, -1, 3, 3], [5, -1, 6]]
    rows = list(zip(random_ids(3, max(LENGTHS)), map(torch.tensor, written), strict=True))
    rows = [(ids[: len(segments)], segments) for ids, segments in rows]
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.delenv("AGENTMEM_TRITON", raising=False)
        alone = [
            run(steered, states[row : row + 1], *(x[None].to(device) for x in one)) for row, one in enumerate(rows)
        ]
    assert launched == {"step": 0, "scan": 0}

    def check(found: tuple[Tensor, Tensor], row: int, tokens: Any = slice(None)) -> None:
        torch.testing.assert_close(found[0][0, tokens], alone[row][0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], alone[row][1], atol=1e-5, rtol=1e-5)

    for cuts in CUTS:
        check(run(steered, states[:1], *(x[None].to(device) for x in rows[0]), cuts=cuts), 0)
    for left, cuts in ((True, ()), (False, (6,))):
        # Padding is in a segment of its own: the mask alone must keep it out.
        mask = padded([torch.ones(n, dtype=torch.long) for n in LENGTHS], left=left).to(device)
        ids, segments = (
            padded(one, left=left, fill=fill).to(device)
            for one, fill in zip(zip(*rows, strict=True), (0, 7), strict=True)
        )
        logits, after = run(steered, states, ids, segments, mask, cuts)
        for row in range(3):
            check((logits[row : row + 1], after[row : row + 1]), row, mask[row].bool())
    assert launched["scan"] > 0
    assert (launched["step"] > 0) == (strategy == "token")
