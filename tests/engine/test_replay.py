"""Decoding in fixed buffers, as CUDA graphs replay it: the same replies and memories, whoever comes and goes.

Here the passes run uncaptured; that nothing in them waits for numbers of the device is what a capture needs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agentmem import Engine, Message, Sampling, Turn, batching
from agentmem.replay import Replay

MakeEngine = Callable[..., Engine]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Fixed buffers also on a CPU: notes the buffers of each pass and how many sessions it was for."""
    seen: list[tuple[int, int]] = []
    real = Replay.run

    def run(own: Replay, tokens: Any, *rest: Any) -> Any:
        seen.append((id(own), len(tokens)))
        return real(own, tokens, *rest)

    monkeypatch.setattr(batching, "replays", lambda device: True)
    monkeypatch.setattr(Replay, "run", run)
    return seen


def turn(engine: Engine, number: int) -> Turn:
    said = f"Hello there, {number}! " + "How are you today? " * (3 * (number % 4))
    sampling = Sampling(temperature=(0.0, 1.0)[number % 2], seed=number, max_tokens=10 + 9 * (number % 5))
    write: Any = ("all", "input", "off")[number % 3]
    return engine.turn([Message("user", said)], sampling=sampling, write=write, memory=number % 7 != 6)


def assert_same(found: Turn, alone: Turn) -> None:
    assert (found.token_ids, found.finish_reason, found.written) == (
        alone.token_ids, alone.finish_reason, alone.written,
    )  # fmt: skip
    assert (found.state is None) == (alone.state is None)
    if found.state is not None and alone.state is not None:
        np.testing.assert_allclose(found.state.matrices, alone.state.matrices, atol=1e-5)


@pytest.fixture
def alone(make_engine: MakeEngine) -> list[Turn]:
    engine = make_engine()
    return [turn(engine, number) for number in range(14)]


def test_each_session_is_as_it_is_alone(
    make_engine: MakeEngine, alone: list[Turn], passes: list[tuple[int, int]]
) -> None:
    engine = make_engine()
    for number in (0, 5):
        assert_same(turn(engine, number), alone[number])
    assert {rows for _, rows in passes} == {1}, "one session decodes in them too"
    with ThreadPoolExecutor(14) as pool:
        for found, solo in zip(pool.map(lambda n: turn(engine, n), range(14)), alone, strict=True):
            assert_same(found, solo)
    assert max(rows for _, rows in passes) > 4, "they did not meet"


def test_what_is_captured_serves_whoever_comes_next(
    make_engine: MakeEngine, alone: list[Turn], passes: list[tuple[int, int]]
) -> None:
    engine = make_engine()
    for number in (0, 4, 8, 12):
        assert_same(turn(engine, number), alone[number])
    assert len({buffers for buffers, _ in passes}) == 1


def test_nothing_in_a_pass_waits_for_the_device(
    make_engine: MakeEngine, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = {"aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.masked_select", "aten.unique_dim"}
    found: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.add(func._schema.name.replace("::", "."))
            return func(*args, **(kwargs or {}))

    real = Replay._pass

    def watched(own: Replay) -> None:
        if own.rows > 1:  # one row alone on a CPU takes a shorter way, which no device takes
            with Watch():
                real(own)
        else:
            real(own)

    monkeypatch.setattr(Replay, "_pass", watched)
    engine = make_engine()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: turn(engine, n), range(1, 5)))
    assert "aten.index_copy_" in found
    assert not found & waits


def test_a_pass_touches_no_other_row(make_engine: MakeEngine, passes: list[tuple[int, int]]) -> None:
    """Of two rows of four buffers only what belongs to them changes, and of a row that does not write its state."""
    engine = make_engine()
    real = Replay.run
    checked = []

    def run(own: Any, tokens: Any, places: Any, writes: Any, states: Any) -> Any:
        kv = [part.clone() for layer in own._block._kv for part in layer]
        logits, after = real(own, tokens, places, writes, states)
        for old, part in zip(kv, (part for layer in own._block._kv for part in layer), strict=True):
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
        patch.setattr(Replay, "run", run)
        list(pool.map(lambda n: turn(engine, n), range(1, 6)))
    assert max(checked) > 1


@pytest.mark.gpu
def test_captured_and_replayed(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMEM_TRITON", "1")
    plain = make_engine(device="cuda")
    alone = [turn(plain, number) for number in range(14)]
    captured: list[bool] = []
    real = Replay._capture

    def capture(own: Replay) -> None:
        real(own)
        captured.append(own._graph is not None)

    monkeypatch.setattr(Replay, "_capture", capture)
    monkeypatch.setenv("AGENTMEM_CUDA_GRAPHS", "1")
    engine = make_engine(device="cuda")
    for _ in range(2):
        with ThreadPoolExecutor(14) as pool:
            for found, solo in zip(pool.map(lambda n: turn(engine, n), range(14)), alone, strict=True):
                assert_same(found, solo)
    assert captured
    assert all(captured)
