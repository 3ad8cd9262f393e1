"""The mechanism against vectors that the authors' public implementation computed, and every option of it and every
supported architecture against an independent, obvious version of it; with every backend under it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from agentmem import SteeredModel
from agentmem.delta.adapter import load_adapter
from tests.helpers.backends import DEVICE, INTERPRETED, poisoned_memory, slow_interpreted
from tests.helpers.core_models import ARCHITECTURES, GOLDEN, OPTIONS, TERMS, random_ids, random_state, steer, tiny
from tests.helpers.core_oracle import Oracle
from tests.helpers.numeric import assert_close

CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
SEGMENTS = {"message": "prefill.message_ids", "sentence": "prefill.sentence_ids"}
EVERY_HEAD = ("q", "k", "v", "o")


def mostly_slow(*cases: str) -> list[Any]:
    """All cases, of which an ordinary run has only the first in the interpreter."""
    return [cases[0], *(pytest.param(case, marks=[pytest.mark.slow] * INTERPRETED) for case in cases[1:])]


@pytest.fixture(scope="module", autouse=True)
def computing(backend: str) -> Iterator[None]:
    """Models decide what computes them when they first decode, so every backend loads its own."""
    golden.cache_clear()
    if backend != "triton":
        yield
        return
    from agentmem.kernels import triton_scan

    with poisoned_memory(), pytest.MonkeyPatch.context() as patch:
        # Short enough that a few tokens are several chunks.
        patch.setattr(triton_scan, "chunk_length", lambda length, rank, backward=False: 16)
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, backend: str) -> dict[str, int] | None:
    """How often each kernel of Triton was called; None where another backend computes."""
    if backend != "triton":
        return None
    from agentmem.kernels import triton_scan, triton_step

    counts = {"step": 0, "scan": 0}

    def counting(name: str, function: Any) -> Any:
        def called(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return called

    monkeypatch.setattr(triton_step, "step", counting("step", triton_step.step))
    monkeypatch.setattr(triton_scan, "scan", counting("scan", triton_scan.scan))
    return counts


@cache
def golden(case: str, attention: str) -> tuple[SteeredModel, dict[str, Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(
        GOLDEN / case / "base", attn_implementation=attention, dtype=torch.float32
    ).eval()
    steered = SteeredModel.attach(model.to(DEVICE), adapter=load_adapter(GOLDEN / case / "adapter"))
    return steered, {name: x.to(DEVICE) for name, x in load_file(GOLDEN / case / "io.safetensors").items()}


def own_terms(steered: SteeredModel, tokens: int) -> int:
    """What a number of the vectors sums itself: the hidden size in a norm and in a product, the tokens that are written
    or attended to, and the rank of a read. What the layers below have rounded comes in through a residual and a norm,
    beside numbers of its own size; in the vectors it does not add to the largest difference.
    """
    return 2 * int(steered.model.config.hidden_size) + tokens + steered.config.rank


def ours(state: Tensor) -> Tensor:
    """[L, B, (H,) r, r] as the vectors have it -> [B, L, H, r, r]."""
    if state.dim() == 4:
        state = state.unsqueeze(2)
    return state.transpose(0, 1).contiguous()


def prefill(steered: SteeredModel, io: dict[str, Tensor], **options: Any) -> Any:
    strategy = steered.config.write_strategy
    if strategy != "token":
        options["segments"] = io[SEGMENTS[strategy]]
    return steered(io["prefill.input_ids"], attention_mask=io["prefill.attention_mask"], **options)


with_attention = pytest.mark.parametrize("attention", mostly_slow("sdpa", "eager"))
BY_SEGMENT = ["qwen3_sentence", "qwen3_ssw"]
BY_TOKEN = [case for case in CASES if case not in BY_SEGMENT]
every_case = pytest.mark.parametrize("case", mostly_slow(*BY_SEGMENT, *BY_TOKEN))


def test_there_are_cases() -> None:
    strategies = {golden(case, "sdpa")[0].config.write_strategy for case in CASES}
    assert len(CASES) == 6
    assert strategies == {"token", "message", "sentence"}


@with_attention
@every_case
@torch.no_grad()
def test_prefill_writes_the_state(case: str, attention: str, launched: dict[str, int] | None) -> None:
    steered, io = golden(case, attention)
    out = prefill(steered, io, position_ids=io["prefill.position_ids"])
    valid = io["prefill.attention_mask"].bool()
    terms = own_terms(steered, valid.shape[1])
    assert out.logits is not None
    assert_close(out.logits[valid], io["prefill.logits"][valid], terms)
    assert_close(out.state, ours(io["prefill.state"]), terms)
    assert_close(prefill(steered, io).state, ours(io["prefill.state"]), terms)  # positions follow from the mask
    assert launched in (None, {"step": 0, "scan": 2 * len(steered.layers)})


@with_attention
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_pass_that_only_reads_leaves_the_state(case: str, attention: str, launched: dict[str, int] | None) -> None:
    steered, io = golden(case, attention)
    state = ours(io["prefill.state"])
    out = steered(io["read.input_ids"], state, write=False)
    terms = own_terms(steered, out.logits.shape[1])
    assert_close(out.logits, io["read.logits"], terms)
    assert out.state is state
    assert torch.equal(ours(io["read.state"]), state)
    first = steered(io["read.input_ids"][:, :1], state, write=False)
    assert_close(first.logits[:, 0], io["read.logits"][:, 0], terms)
    assert first.state is state
    # One token of a message or sentence adapter runs with torch's operations.
    assert launched in (None, {"step": len(steered.layers) if case in BY_TOKEN else 0, "scan": 0})


@with_attention
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_zero_state(case: str, attention: str) -> None:
    steered, io = golden(case, attention)
    out = steered(io["read.input_ids"], write=False)
    assert_close(out.logits, io["reset.logits"], own_terms(steered, out.logits.shape[1]))
    assert not out.state.any()
    # The case is worth something only if memory is seen in it.
    assert (io["read.logits"] - io["reset.logits"]).abs().max() > 1e-3


@with_attention
@pytest.mark.parametrize("case", mostly_slow(*BY_TOKEN))
@torch.no_grad()
def test_pieces_and_single_tokens_with_a_cache(case: str, attention: str, launched: dict[str, int] | None) -> None:
    steered, io = golden(case, attention)
    ids, splits = io["incremental.input_ids"], io["incremental.splits"].tolist()
    assert splits[0] == 0
    assert splits[-1] == ids.shape[1]
    assert len(splits) == len(io["incremental.states"]) + 1
    state, kept, logits = None, True, []
    for number, (start, stop) in enumerate(pairwise(splits)):
        before = None if state is None else state.clone()
        out = steered(ids[:, start:stop], state, cache=kept)
        assert state is None or torch.equal(state, before), "a state that was given is a value"
        state, kept = out.state, out.cache
        logits.append(out.logits)
        assert_close(state, ours(io["incremental.states"][number]), own_terms(steered, stop))
    assert_close(torch.cat(logits, dim=1), io["incremental.logits"], own_terms(steered, ids.shape[1]))
    single = sum(stop - start == 1 for start, stop in pairwise(splits))
    assert single > 0
    assert launched is None or launched["step"] == single * len(steered.layers)


def oracle(model: Any, steered: SteeredModel, ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    obvious = Oracle(model, steered.config, dict(steered.adapter.tensors), state)
    with obvious.steering():
        logits = model(input_ids=ids, use_cache=False).logits
    return logits, obvious.states.float()


@slow_interpreted
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@torch.no_grad()
def test_every_option_is_what_it_says(options: dict[str, Any]) -> None:
    model = tiny()
    steered = steer(model, **{"rank": 4, **options})
    ids, state = random_ids(2, 9), random_state(steered, 2)
    out = steered(ids, state)
    bare = model(input_ids=ids).logits
    logits, after = oracle(model, steered, ids, state)
    assert_close(out.logits, logits, TERMS)
    assert_close(out.state, after, TERMS)
    assert (out.logits - bare).abs().max() > 1e-2
    assert (out.state - state).abs().max() > 1e-2


@slow_interpreted
@pytest.mark.parametrize(
    ("architecture", "heads"),
    # Of a projection that is fused (phi3) each part alone, too.
    [*((name, EVERY_HEAD) for name in ARCHITECTURES), ("qwen3", ("q", "o")), ("phi3", ("q", "o")), ("phi3", ("k",))],
)
@torch.no_grad()
def test_corrections_land_where_they_should(architecture: str, heads: tuple[str, ...]) -> None:
    model = tiny(architecture)
    steered = steer(model, rank=4, delta_heads=heads)
    assert steered.layers == [0, 1, 2]
    ids, state = random_ids(1, 12), random_state(steered)
    out = steered(ids, state)
    logits, after = oracle(model, steered, ids, state)
    assert_close(out.logits, logits, TERMS)
    assert_close(out.state, after, TERMS)


@slow_interpreted
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
    assert_close(torch.cat(logits, dim=1), whole.logits, TERMS)
    assert_close(last, whole.state, TERMS)

    mask = torch.tensor([[0] * 4 + [1] * 10, [1] * 14])
    batch = steered(ids, state, attention_mask=mask)
    alone = steered(ids[:1, 4:], state[:1])
    assert_close(batch.logits[0, 4:], alone.logits[0], TERMS)
    assert_close(batch.state[0], alone.state[0], TERMS)

    assert steered.detach() is model
    assert torch.equal(model(input_ids=ids).logits, bare)
