"""Decoding in fixed buffers, as CUDA graphs replay it: the same replies and memories, whoever comes and goes.

Here the passes run uncaptured; that nothing in them waits for numbers of the device is what a capture needs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agentmem import Engine, Message, Sampling, Turn
from agentmem.generation import batch
from agentmem.generation.batch_cache import BatchedKVCache
from agentmem.generation.cuda_graph import CannotCapture, CapturedDecode, GraphCapturer
from agentmem.generation.runner import ModelRunner
from tests.helpers.numeric import assert_same_at_once, assert_same_turn

MakeEngine = Callable[..., Engine]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Fixed buffers also on a CPU: notes the buffers of each pass and how many sessions it was for."""
    seen: list[tuple[int, int]] = []
    real = CapturedDecode.run

    def run(own: CapturedDecode, tokens: Any, *rest: Any) -> Any:
        seen.append((id(own), len(tokens)))
        return real(own, tokens, *rest)

    monkeypatch.setattr(batch, "uses_graphs", lambda device: True)
    # The pass of devices with kernels; the operators' plain form stands in for these.
    monkeypatch.setattr("agentmem.kernels.runs_triton", lambda device: True)
    monkeypatch.setattr(CapturedDecode, "run", run)
    return seen


def turn(engine: Engine, number: int) -> Turn:
    said = f"Hello there, {number}! " + "How are you today? " * (3 * (number % 4))
    sampling = Sampling(temperature=(0.0, 1.0)[number % 2], seed=number, max_tokens=10 + 9 * (number % 5))
    write: Any = ("all", "input", "off")[number % 3]
    return engine.turn([Message("user", said)], sampling=sampling, write=write, memory=number % 7 != 6)


def caches(engine: Engine) -> list[BatchedKVCache]:
    """What the engine has for sessions that decode together."""
    return [kv for kind in engine._context.batch._caches.values() for kv in kind]


@pytest.fixture(scope="module")
def alone(make_engine_once: MakeEngine) -> list[Turn]:
    engine = make_engine_once()
    return [turn(engine, number) for number in range(14)]


def test_each_session_is_as_it_is_alone(
    make_engine: MakeEngine, alone: list[Turn], passes: list[tuple[int, int]]
) -> None:
    engine = make_engine()
    for number in (0, 4, 5, 8):
        assert_same_turn(turn(engine, number), alone[number])
    assert {rows for _, rows in passes} == {1}, "one session decodes in them too"
    assert len({buffers for buffers, _ in passes}) == 1, "what was captured serves whoever comes next"
    assert_same_at_once(lambda n: turn(engine, n), range(14), alone)
    assert max(rows for _, rows in passes) > 4, "they did not meet"


def test_nothing_in_a_pass_waits_for_the_device(
    make_engine: MakeEngine, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number of the device decides anything, and nothing is brought from it or to it."""
    waits = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_dim"}
    found: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.add(func._schema.name.replace("::", "."))
            if func is torch.ops.aten.index.Tensor:
                assert all(one is None or one.dtype != torch.bool for one in args[1])
            return func(*args, **(kwargs or {}))

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pass waits for the device")

    real = CapturedDecode._run_step

    def watched(own: CapturedDecode) -> None:
        with pytest.MonkeyPatch.context() as patch, Watch():
            for name in ("tolist", "item", "cpu", "numpy"):
                patch.setattr(torch.Tensor, name, refused)
            patch.setattr(torch, "tensor", refused)
            real(own)

    monkeypatch.setattr(CapturedDecode, "_run_step", watched)
    engine = make_engine()
    solo = turn(engine, 1)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda n: turn(engine, n), range(1, 5)))
    assert_same_turn(together[0], solo)
    assert {"aten.index_copy_", "agentmem.step"} <= found
    assert not found & waits
    assert max(rows for _, rows in passes) > 1


def test_a_pass_touches_no_other_row(make_engine: MakeEngine, passes: list[tuple[int, int]]) -> None:
    """Of two rows of four buffers only what belongs to them changes, and of a row that does not write its state."""
    engine = make_engine()
    real = CapturedDecode.run
    checked = []

    def run(own: Any, tokens: Any, places: Any, writes: Any, states: Any) -> Any:
        _, kv, _ = own._step.args
        parts = [part for layer in kv._kv for part in layer]
        known = [part.clone() for part in parts]
        logits, after = real(own, tokens, places, writes, states)
        for old, part in zip(known, parts, strict=True):
            same = (old == part).all(1).all(-1)
            for row, place in enumerate(places):
                same[row, place] = True
            same[len(tokens) :, 0] = True  # the first place of a free row, which whoever sits down there fills
            assert same.all()
        if states is not None:
            for row, wrote in enumerate(writes):
                assert torch.equal(after[row], states[row]) == (not wrote)
            checked.append(len(tokens))
        return logits, after

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(CapturedDecode, "run", run)
        list(pool.map(lambda n: turn(engine, n), range(1, 6)))
    assert max(checked) > 1


def test_a_model_that_cannot_be_captured_decodes_as_without(
    make_engine: MakeEngine, alone: list[Turn], passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fails(own: CapturedDecode) -> None:
        raise CannotCapture("operation not permitted when stream is capturing")

    monkeypatch.setattr(CapturedDecode, "_run_step", fails)
    engine = make_engine()
    assert_same_at_once(lambda n: turn(engine, n), range(14), alone)
    assert len(passes) == 2
    assert [record.message.startswith("decoding goes on without CUDA graphs") for record in caplog.records] == [True]


def test_a_capture_that_failed_once_is_tried_again(
    make_engine: MakeEngine, alone: list[Turn], passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread that waits for the device breaks a capture that is under way."""
    real, tried = CapturedDecode._run_step, []

    def fails(own: CapturedDecode) -> None:
        tried.append(own)
        if len(tried) in (1, 9):
            raise CannotCapture("operation not permitted when stream is capturing")
        real(own)

    monkeypatch.setattr(CapturedDecode, "_run_step", fails)
    engine = make_engine()
    for number in (0, 4):
        assert_same_turn(turn(engine, number), alone[number])
    tokens = sum(len(alone[number].token_ids) for number in (0, 4))
    assert len(passes) > tokens - 4
    assert len({id(one) for one in tried}) == 3


def test_a_pass_looks_at_few_more_tokens_than_there_are(
    make_engine: MakeEngine, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows double in size; what is looked at does not. And few sizes, for each is a capture."""
    engine = make_engine()
    plain = make_engine(max_batch=1)
    ask = [Message("user", "The quick brown fox says: hello there. " * 139)]
    expected = plain.turn(ask, sampling=Sampling(max_tokens=50))
    looked: list[tuple[int, int]] = []
    real = BatchedKVCache.over

    def over(own: BatchedKVCache, places: Any, width: int) -> Any:
        looked.append((max(row.length for row in own.rows) + 1, width))
        return real(own, places, width)

    monkeypatch.setattr(BatchedKVCache, "over", over)
    assert_same_turn(engine.turn(ask, sampling=Sampling(max_tokens=50)), expected)
    assert len(looked) > 40
    assert 1024 < looked[0][0] < 1280 < looked[-1][0]
    assert all(length <= width <= length + 256 for length, width in looked)
    assert len({width for _, width in looked}) == 2
    assert len({buffers for buffers, _ in passes}) == 2


def test_memory_that_runs_out_is_given_back_first(
    make_engine: MakeEngine, alone: list[Turn], passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for later is dropped, and the batch halved; nobody loses a token."""
    engine = make_engine()
    turn(engine, 0)
    assert [len(engine._context.batch._captured[kv]) for kv in caches(engine)] == [1]
    real = CapturedDecode._run_step
    failed: list[int] = []

    def fails(own: CapturedDecode) -> None:
        if own.rows > 4 and len(failed) < 3:
            failed.append(sum(not kv.rows for kv in caches(engine)))
            raise torch.OutOfMemoryError("no room")
        real(own)

    monkeypatch.setattr(CapturedDecode, "_run_step", fails)
    assert_same_at_once(lambda n: turn(engine, n), range(14), alone)
    assert failed
    assert sum(kv.tokens for kv in caches(engine) if not kv.rows) <= 8192


def test_what_is_kept_for_later_has_a_limit(make_engine: MakeEngine, passes: list[tuple[int, int]]) -> None:
    engine = make_engine(kv_cache_tokens=300)
    for number in (0, 3):  # in rows of 256 and of 512 tokens
        turn(engine, number)
    assert [kv.tokens for kv in caches(engine)] == [256]
    engine.close()
    assert not caches(engine)


def test_a_prefill_that_does_not_fit_frees_what_is_kept(
    make_engine: MakeEngine, alone: list[Turn], passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    turn(engine, 0)
    assert caches(engine), "nothing is kept"

    def extend(*_: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "extend", extend)
        with pytest.raises(torch.OutOfMemoryError):
            turn(engine, 1)
    assert not caches(engine)
    assert_same_turn(turn(engine, 1), alone[1])


@pytest.mark.gpu
def test_captured_and_replayed(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMEM_TRITON", "1")
    plain = make_engine(device="cuda")
    alone = [turn(plain, number) for number in range(14)]
    captured: list[Any] = []
    real = GraphCapturer.capture

    def capture(own: GraphCapturer, run: Any) -> Any:
        captured.append(real(own, run))
        return captured[-1]

    monkeypatch.setattr(GraphCapturer, "capture", capture)
    monkeypatch.setenv("AGENTMEM_CUDA_GRAPHS", "1")
    engine = make_engine(device="cuda")
    for _ in range(2):
        assert_same_at_once(lambda n: turn(engine, n), range(14), alone)
    assert captured
    assert engine._context.batch.uses_graphs, "a pass could not be captured"
