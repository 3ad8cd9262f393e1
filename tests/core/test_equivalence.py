"""One pass is the same however it is cut, padded, batched and cached, up to the order of its sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as memoised
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from agentmem import SteeredModel
from tests.helpers.core_models import TERMS, padded, random_ids, random_state, steer, tiny
from tests.helpers.numeric import assert_close

pytestmark = pytest.mark.usefixtures("backend")

LENGTHS = (19, 12, 5)
CUTS: tuple[tuple[int, ...], ...] = ((1,), (18,), (7,), (3, 4, 11), tuple(range(1, 19)))


class Rows(NamedTuple):
    """Three rows of different lengths: tokens, the segment of each and whether it writes."""

    ids: list[Tensor]
    segments: list[Tensor]
    write: list[Tensor]


@memoised
def rows() -> Rows:
    # Segments start below 0 (never written), skip numbers, differ from row to row and return after another began.
    segments = (
        [-1, -1, 0, 0, 0, 1, 1, -1, 1, 4, 4, 4, 4, 4, 2, 2, 9, 9, 9],
        [0, 0, 1, 1, 1, 1, -1, 3, 3, 3, 3, 3],
        [5, 5, -1, 6, 6],
    )
    write = [torch.ones(n, dtype=torch.bool) for n in LENGTHS]
    write[0][[3, 10, 11]] = False
    write[1][5] = False
    ids = random_ids(3, max(LENGTHS))
    return Rows([ids[i, :n] for i, n in enumerate(LENGTHS)], [torch.tensor(s) for s in segments], write)


@memoised
def _model(attention: str) -> Any:
    return tiny(attention=attention, num_hidden_layers=2)


def _cache(steered: SteeredModel, kind: str) -> Any:
    return True if kind == "dynamic" else StaticCache(config=steered.model.config, max_cache_len=32)


def _run(
    steered: SteeredModel,
    state: Tensor,
    ids: Tensor,
    segments: Tensor,
    write: Tensor,
    *,
    mask: Tensor | None = None,
    cuts: Sequence[int] = (),
    cache: Any = None,
) -> tuple[Tensor, Tensor]:
    """One pass, cut at `cuts`; logits [B, T, V] and the state after it."""
    length = ids.shape[1]
    edges = [0, *(c for c in cuts if c < length), length]
    logits, pending, given, last = [], None, state.clone(), state
    for start, stop in pairwise(edges):
        out = steered(
            ids[:, start:stop],
            last,
            attention_mask=mask[:, :stop] if mask is not None else None,
            segments=segments[:, start:stop],
            write=write[:, start:stop],
            cache=cache,
            pending=pending,
            close=stop == length,
        )
        if stop < length and steered.config.write_strategy != "token":
            assert torch.equal(out.state, last)
        last, pending = out.state, out.pending
        cache = out.cache
        assert out.logits is not None
        logits.append(out.logits)
    assert pending is None
    assert torch.equal(state, given)
    return torch.cat(logits, dim=1), last


def _close(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, TERMS)


# Every strategy with every attention and cache, and with both memories; the memories in turn.
COUPLED, UNCOUPLED = (1, True), (4, False)
CASES = [
    pytest.param(strategy, *memory, *kept, id=f"{strategy}-{memory[0]}-{'-'.join(kept)}")
    for number, strategy in enumerate(("token", "message", "sentence"))
    for place, kept in enumerate((("sdpa", "dynamic"), ("sdpa", "static"), ("eager", "dynamic")))
    for memory in [(COUPLED, UNCOUPLED)[(number + place) % 2]]
]


@pytest.mark.parametrize(("strategy", "heads", "coupled", "attention", "cache"), CASES)
@torch.no_grad()
def test_cut_padded_batched_or_alone(strategy: str, heads: int, coupled: bool, attention: str, cache: str) -> None:
    steered = steer(
        _model(attention),
        write_strategy=strategy,
        num_state_heads=heads,
        couple_lambda=coupled,
        rank=4,
        lambda_bias_init=1.0,
    )
    start = random_state(steered, 3)
    given = rows()
    alone = [
        _run(steered, start[i : i + 1], given.ids[i][None], given.segments[i][None], given.write[i][None])
        for i in range(3)
    ]
    states = torch.cat([state for _, state in alone])
    assert (states - start).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-2, "every row must have written"

    for cuts in CUTS:
        logits, state = _run(
            steered,
            start[:1],
            given.ids[0][None],
            given.segments[0][None],
            given.write[0][None],
            cuts=cuts,
            cache=_cache(steered, cache),
        )
        _close(logits, alone[0][0])
        _close(state, alone[0][1])

    for left in (True, False):
        mask = padded([torch.ones(n, dtype=torch.long) for n in LENGTHS], left=left)
        # Padding is marked as writing, in a segment of its own: the mask alone must keep it out.
        batch = (
            padded(given.ids, left=left),
            padded(given.segments, left=left, fill=7),
            padded([w.long() for w in given.write], left=left, fill=1).bool(),
        )
        for cuts, kept in (((), None), ((), _cache(steered, cache)), ((8, 15), _cache(steered, cache))):
            logits, state = _run(steered, start, *batch, mask=mask, cuts=cuts, cache=kept)
            _close(state, states)
            for row, (expected, _) in enumerate(alone):
                _close(logits[row][mask[row].bool()], expected[0])


@pytest.mark.parametrize("strategy", ["token", "message"])
@torch.no_grad()
def test_random_cuts_of_a_long_pass(strategy: str) -> None:
    """Long enough for the blocked scan, and cut where each form of it begins and ends."""
    steered = steer(_model("sdpa"), write_strategy=strategy, rank=8)
    ids = random_ids(1, 150)
    segments = torch.arange(150)[None] // 7
    write = torch.ones_like(ids, dtype=torch.bool)
    start = random_state(steered)
    expected, state = _run(steered, start, ids, segments, write)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 5):
        cuts = sorted({int(c) for c in torch.randint(1, 150, (count,), generator=generator)})
        logits, cut_state = _run(steered, start, ids, segments, write, cuts=cuts, cache=True)
        _close(logits, expected)
        _close(cut_state, state)


@pytest.mark.parametrize("strategy", ["message", "sentence"])
@torch.no_grad()
def test_open_pass_closes_with_a_call_that_only_reads(strategy: str) -> None:
    steered = steer(_model("sdpa"), write_strategy=strategy)
    ids, segments = random_ids(1, 12), torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3])
    whole = steered(ids, segments=segments)
    first = steered(ids[:, :9], segments=segments[:, :9], cache=True, close=False)
    assert not first.state.any()
    last = steered(ids[:, 9:], first.state, write=False, cache=first.cache, pending=first.pending)
    _close(last.state, whole.state)
    assert last.pending is None


@torch.no_grad()
def test_segments_write_in_ascending_order_of_their_numbers() -> None:
    """Order of appearance does not matter, the numbers do."""
    steered = steer(_model("sdpa"), write_strategy="message")
    ids = random_ids(1, 8)
    one = steered(ids, segments=torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])).state
    same = steered(ids, segments=torch.tensor([[9, 9, 9, 9, 3, 3, 3, 3]])).state
    other = steered(ids, segments=torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])).state
    _close(one, same)
    assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_every_token_of_a_segment_pass_reads_the_state_from_before_it() -> None:
    steered = steer(_model("sdpa"), write_strategy="message")
    ids, state = random_ids(1, 9), random_state(steered)
    writing = steered(ids, state, segments=torch.zeros(1, 9, dtype=torch.long))
    reading = steered(ids, state, write=False)
    _close(writing.logits, reading.logits)
    assert not torch.equal(writing.state, reading.state)


@pytest.mark.parametrize("keep", [1, 4])
@torch.no_grad()
def test_logits_to_keep(keep: int) -> None:
    steered = steer(_model("sdpa"))
    ids = random_ids(2, 9)
    every = steered(ids)
    some, none = steered(ids, logits_to_keep=keep), steered(ids, logits_to_keep=-1)
    assert every.logits.shape == (2, 9, 61)
    _close(some.logits, every.logits[:, -keep:])
    assert none.logits is None
    _close(some.state, every.state)
    _close(none.state, every.state)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_bias_parts_what_one_call_holds(attention: str) -> None:
    """Two texts side by side that do not see each other equal two calls, the second from the first's state."""
    steered = steer(_model(attention))
    ids, state = random_ids(1, 14), random_state(steered)
    first = steered(ids[:, :8], state)
    second = steered(ids[:, 8:], first.state)
    text = torch.tensor([0] * 8 + [1] * 6)
    allowed = (text[:, None] == text) & torch.ones(14, 14).tril().bool()
    positions = torch.cat((torch.arange(8), torch.arange(6)))[None]
    both = steered(ids, state, position_ids=positions, attention_bias=allowed[None, None])
    _close(both.logits, torch.cat((first.logits, second.logits), dim=1))
    _close(both.state, second.state)


@pytest.mark.parametrize("strategy", ["token", "message"])
@torch.no_grad()
def test_tokens_that_are_not_steered_are_those_of_the_bare_model_and_write(strategy: str) -> None:
    model = _model("sdpa")
    steered = steer(model, write_strategy=strategy, rank=4)
    ids, segments, state = random_ids(2, 12), torch.arange(12).expand(2, -1) // 4, random_state(steered, 2)
    out = steered(ids, state, segments=segments, steer=False)
    assert torch.equal(out.logits, model(ids).logits)
    assert (out.state - state).abs().amax() > 1e-2
    masked = steered(ids, state, segments=segments, steer=torch.tensor([[False] * 8 + [True] * 4]).expand(2, -1))
    assert torch.equal(masked.logits[:, :8], out.logits[:, :8])
    assert (masked.logits[:, 8:] - out.logits[:, 8:]).abs().amax() > 1e-2
