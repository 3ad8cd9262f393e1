"""One token at a time gives what a whole pass gives, for every form of the mechanism and however weights changed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from agentmem import SteeredModel
from agentmem.delta.passes import row_of, side_by_side
from agentmem.errors import TurnError
from tests.helpers.core_models import OPTIONS, TERMS, random_ids, steer, tiny
from tests.helpers.numeric import assert_close

pytestmark = pytest.mark.usefixtures("backend")

# In Phi3 one product gives q, k and v.
FORMS = [*(("qwen3", name) for name in OPTIONS), *(("phi3", name) for name in ("paper", "all corrections", "v alone"))]


def compare(steered: SteeredModel, writes: bool | torch.Tensor = True) -> None:
    """Three rows of some tokens: read together, and one by one."""
    # What is not normalised grows without bound, errors too.
    ids = random_ids(3, 8 if steered.config.normalize_qk else 3)
    writes = writes if isinstance(writes, bool) else writes[:, : ids.shape[1]]
    with torch.inference_mode():
        whole = steered(ids, None, write=writes)
        state, cache, logits = steered.zeros(3), None, []
        for at in range(ids.shape[1]):
            now = writes if isinstance(writes, bool) else writes[:, at : at + 1]
            out = steered(ids[:, at : at + 1], state, cache=cache or True, write=now)
            state, cache = out.state, out.cache
            logits.append(out.logits)
    growth = 1.0 if steered.config.normalize_qk else 50.0
    assert_close(torch.cat(logits, 1), whole.logits, TERMS, growth=growth)
    assert_close(state, whole.state, TERMS, growth=growth)


@pytest.mark.parametrize(("family", "name"), FORMS)
def test_steps_are_a_pass(family: str, name: str) -> None:
    steered = steer(tiny(family), **OPTIONS[name])
    some = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    for writes in (True, some) if name != "paper" else (True, some, False):
        compare(steered, writes)


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
@pytest.mark.parametrize(
    "name", ["paper", "four state heads", "raw q and k", "all corrections", "two layers, any order"]
)
def test_steps_gather_what_a_pass_gathers(family: str, name: str) -> None:
    """Adapters that write by sentence: segments that rows share, open, leave and come back to, and unwritten tokens."""
    steered = steer(tiny(family), write_strategy="sentence", **OPTIONS[name])
    ids = random_ids(3, 8)
    segments = torch.tensor([[0, 0, 1, 1, -1, 1, 3, 3], [-1, 0, 0, 2, 2, 0, 0, -1], [-1] * 8])
    start = torch.randn(3, *steered.state_shape, generator=torch.Generator().manual_seed(2)) * 0.3
    with torch.inference_mode():
        whole = steered(ids, start, segments=segments)
        for several in (0, 3):  # tokens of the pass that are read together before the single ones
            state, cache, pending, logits = start, None, None, []
            parts = [slice(0, several)] * (several > 0) + [slice(at, at + 1) for at in range(several, 8)]
            for part in parts:
                last = part.stop == 8
                given = {"segments": segments[:, part], "cache": cache or True, "pending": pending, "close": last}
                out = steered(ids[:, part], state, **given)
                if not last:
                    assert out.state is state, "nothing is written before the pass is closed"
                state, cache, pending = out.state, out.cache, out.pending
                logits.append(out.logits)
            assert pending is None
            assert_close(torch.cat(logits, 1), whole.logits, TERMS)
            assert_close(state, whole.state, TERMS)


def test_a_step_that_only_reads_leaves_an_open_pass_open() -> None:
    steered = steer(tiny("qwen3"), write_strategy="message")
    ids, segments = random_ids(1, 4), torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        opened = steered(ids[:, :1], segments=segments, cache=True, close=False)
        sums = [one.clone() for one in opened.pending.sums]
        read = steered(ids[:, 1:2], opened.state, write=False, cache=opened.cache, pending=opened.pending, close=False)
        assert read.pending is opened.pending
        more = steered(ids[:, 2:3], read.state, segments=segments, cache=True, pending=read.pending, close=False)
        assert all(torch.equal(one, was) for one, was in zip(opened.pending.sums, sums, strict=True))
        assert float(more.pending.counts) == 2
        closed = steered(ids[:, 3:4], read.state, write=False, cache=True, pending=read.pending)
    assert closed.pending is None
    assert not torch.equal(closed.state, opened.state)


def test_open_passes_go_on_side_by_side_and_apart() -> None:
    """Rows that are in other segments, one of them in none yet, each as alone."""
    steered = steer(tiny("qwen3"), write_strategy="sentence")
    ids, segments = random_ids(3, 4), torch.tensor([[0, 2, 2, 5], [1, 1, 1, 2], [-1, -1, 7, 7]])
    with torch.inference_mode():
        begun = [steered(ids[r : r + 1, :2], segments=segments[r : r + 1, :2], close=False).pending for r in range(3)]
        assert begun[2] is None
        whole = steered(ids[:, 2:3], segments=segments[:, 2:3], pending=side_by_side(begun), close=False).pending
        for row, own in enumerate([(0, 2), (1,), (7,)]):
            part = slice(row, row + 1)
            alone = steered(ids[part, 2:3], segments=segments[part, 2:3], pending=begun[row], close=False).pending
            found = row_of(whole, row, own)
            assert found.ids == alone.ids
            torch.testing.assert_close(found.counts, alone.counts)
            for one, other in zip(found.sums, alone.sums, strict=True):
                assert_close(one, other, TERMS)


def _assigned(module: nn.Module) -> None:
    module.load_state_dict({name: 2 * one for name, one in module.state_dict().items()}, assign=True)


def _replaced(module: nn.Module) -> None:
    for name, one in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(2 * one.detach(), requires_grad=one.requires_grad))


def _swapped(module: nn.Module) -> None:
    for one in module.parameters():
        one.data = 2 * one.data


def _in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for one in module.parameters():
            one.mul_(2)


def _fused(module: nn.Module) -> None:
    """torch does not count what this optimiser changes."""
    for one in module.parameters():
        one.grad = torch.ones_like(one)
    torch.optim.AdamW(module.parameters(), lr=0.3, fused=True).step()


CHANGES = [(change, frozen) for change in (_assigned, _replaced, _swapped, _in_place) for frozen in (True, False)]


@pytest.mark.parametrize(("change", "frozen"), [*CHANGES, (_fused, False)])
def test_weights_that_changed_since_count(change: Any, frozen: bool) -> None:
    steered = steer(tiny("qwen3"), couple_lambda=False)
    steered.memory.requires_grad_(not frozen)
    compare(steered)
    before = steered.adapter_fingerprint
    change(steered.memory[1])  # neither the first layer nor the last
    compare(steered)
    assert steered.adapter_fingerprint != before


def test_what_computes_a_step_is_what_was_asked_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steered, called = steer(tiny("qwen3")), []
    if find_spec("numba") is not None:
        from agentmem.delta import decode_numba

        real = decode_numba.steer
        monkeypatch.setattr(decode_numba, "steer", lambda *given: called.append(given) or real(*given))
    compare(steered)
    assert len(called) == (2 * 3 * 8 if backend == "numba" else 0), "one call for q and one for o, layer by layer"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_moved_to_another_type_between_steps(dtype: torch.dtype) -> None:
    """What was float32 has other sizes then; nothing may be written beside it."""
    steered = steer(tiny("qwen3"))
    compare(steered)
    steered.model.to(dtype)
    ids = random_ids(2, 1)
    with torch.inference_mode():
        found = steered(ids, steered.zeros(2) + 0.1)
        several = steered(ids.expand(2, 1), steered.zeros(2) + 0.1, write=torch.ones(2, 1, dtype=torch.bool))
    assert found.logits.dtype is dtype
    assert found.logits.isfinite().all()
    assert_close(found.state, several.state, TERMS)


def test_rows_alone_and_in_a_batch_have_the_same_numbers() -> None:
    steered = steer(tiny("qwen3"), num_state_heads=2)
    ids = random_ids(5, 1)
    start = torch.randn(5, *steered.state_shape, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        whole = steered(ids, start).state
        alone = [steered(ids[row : row + 1], start[row : row + 1]).state for row in range(5)]
    assert_close(torch.cat(alone), whole, TERMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_the_process_makes_tensors_of_by_default_does_not_matter(dtype: torch.dtype) -> None:
    steered = steer(tiny("qwen3"), num_state_heads=2)
    ids = random_ids(2, 1)
    with torch.inference_mode():
        before = steered(ids, cache=True)
        torch.set_default_dtype(dtype)
        try:
            steered = steer(tiny("qwen3").float(), num_state_heads=2, dtype=torch.float32)
            after = steered(ids, cache=True)
        finally:
            torch.set_default_dtype(torch.float32)
    assert before.state.dtype is after.state.dtype is torch.float32
    assert after.state.shape == before.state.shape
    assert after.logits.isfinite().all()


def test_hidden_states_of_more_tokens_are_refused(backend: str) -> None:
    """As where prompt tuning puts tokens before the one that was given."""
    steered = steer(tiny("qwen3"))
    decoder = steered.model.get_decoder()
    twice = decoder.embed_tokens.register_forward_hook(lambda _m, _i, out: torch.cat((out, out), dim=1))
    with torch.inference_mode(), pytest.raises(TurnError if backend == "numba" else RuntimeError):
        steered(random_ids(2, 1), position_ids=torch.zeros(2, 1, dtype=torch.int64))
    twice.remove()
    compare(steered)
