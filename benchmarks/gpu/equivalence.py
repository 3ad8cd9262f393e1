"""Part 1: the device gives what the authors' code gave, what the CPU gives, and what a session alone gets.

In float32 that means up to the order of sums, and the same tokens; in bfloat16 that the device is no further from
float32 than the CPU is in bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from sessions import of_shape
from torch import Tensor
from transformers import AutoModelForCausalLM

import agentmem
from agentmem import Engine, Message, Sampling, SteeredModel
from agentmem.delta.adapter import load_adapter
from agentmem.generation.cuda_graph import CapturedDecode, GraphCapturer
from agentmem.training.smollm2 import is_complete
from gpu.parts import ROOT, Setting
from gpu.results import Recorder
from tests.helpers.core_models import GOLDEN, TERMS, random_ids, random_state, steer, tiny
from tests.helpers.numeric import tolerance

CPU = torch.device("cpu")
SEGMENTS = {"message": "prefill.message_ids", "sentence": "prefill.sentence_ids"}
FURTHER = 2.0
"""How many times the CPU's distance from float32 the device's may be, in bfloat16: both round, each in its way."""
_LENGTH, _PADS = 16, 5  # tokens of a pass, and on its left beside a longer row
_CUTS = (5, 6, 7, 13)
_DRIFT = 100.0  # two memories after a turn of many tokens, in units of one pass's rounding


class Pass(NamedTuple):
    """Logits, of tokens that are there, and states; on the CPU."""

    logits: Tensor
    state: Tensor


def check(recorder: Recorder, setting: Setting) -> None:
    """Golden cases, passes that are cut and padded, turns, and rows that come and go."""
    device = torch.device(setting.device)
    with torch.no_grad():
        cases = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
        for case in ["qwen3_tsw"] if setting.tiny else cases:
            recorder.attempt(f"golden case {case}", partial(_golden, recorder, case, device), exact=True)
        for strategy in ("token",) if setting.tiny else ("token", "message", "sentence"):
            what = f"cut and padded, writing by {strategy}"
            recorder.attempt(what, partial(_cut, recorder, what, strategy, device), exact=True)
    names = ["nano", *["smollm2"] * (not setting.tiny and is_complete(ROOT / "build" / "smollm2"))]
    # The interpreter is too slow for nano.
    for name in ["tiny"] if setting.device == "cpu" else names:
        what = f"turns of {name}, float32"
        recorder.attempt(what, partial(_turns, recorder, what, name, setting), exact=True)


def _judge(recorder: Recorder, what: str, found: Pass, expected: Pass, terms: int) -> None:
    """In float32: the largest difference, as a share of what the order of sums explains."""
    bound = tolerance(torch.float32, terms)
    share = max(float(((a - b).abs() / (bound * (1 + b.abs()))).max()) for a, b in zip(found, expected, strict=True))
    recorder.judge(what, share, 1.0, f"off by {share:.2f} of what rounding explains", most=True, exact=True)


def _judge_rounded(recorder: Recorder, what: str, found: Pass, on_cpu: Pass, expected: Pass) -> None:
    """In bfloat16: the distance from float32, in that of the CPU."""
    ratios = [
        float((a - c).square().mean().sqrt() / (b - c).square().mean().sqrt().clamp_min(1e-12))
        for a, b, c in zip(found, on_cpu, expected, strict=True)
    ]
    said = f"logits {ratios[0]:.2f}, state {ratios[1]:.2f} times as far from float32 as the CPU"
    recorder.judge(what, max(ratios), FURTHER, said, most=True, exact=True)


def _golden(recorder: Recorder, case: str, device: torch.device) -> None:
    io = load_file(GOLDEN / case / "io.safetensors")
    there = io["prefill.attention_mask"].bool()
    state = io["prefill.state"]
    state = (state.unsqueeze(2) if state.dim() == 4 else state).transpose(0, 1)  # [L, B, (H,) r, r] -> [B, L, H, r, r]
    expected = Pass(io["prefill.logits"][there], state)

    def run(device: torch.device, dtype: torch.dtype) -> tuple[Pass, int]:
        model = AutoModelForCausalLM.from_pretrained(GOLDEN / case / "base", dtype=dtype).eval().to(device)
        steered = SteeredModel.attach(model, adapter=load_adapter(GOLDEN / case / "adapter"))
        given: dict[str, Any] = {"attention_mask": io["prefill.attention_mask"].to(device)}
        if steered.config.write_strategy != "token":
            given["segments"] = io[SEGMENTS[steered.config.write_strategy]].to(device)
        out = steered(io["prefill.input_ids"].to(device), **given)
        assert out.logits is not None
        terms = 2 * int(model.config.hidden_size) + there.shape[1] + steered.config.rank
        return Pass(out.logits.float().cpu()[there], out.state.cpu()), terms

    found, terms = run(device, torch.float32)
    _judge(recorder, f"golden case {case}, float32", found, expected, terms)
    found, _ = run(device, torch.bfloat16)
    with _without_interpreter():
        on_cpu, _ = run(CPU, torch.bfloat16)
    _judge_rounded(recorder, f"golden case {case}, bfloat16", found, on_cpu, expected)


def _cut(recorder: Recorder, what: str, strategy: str, device: torch.device) -> None:
    """One pass, whole on the CPU; on the device cut, with single tokens in between, and padded beside a longer row."""
    ids = random_ids(1, _LENGTH)
    segments = torch.arange(_LENGTH)[None] // 5

    def run(device: torch.device, dtype: torch.dtype, how: str) -> Pass:
        steered = steer(tiny(num_hidden_layers=2).to(device, dtype), write_strategy=strategy, rank=4, num_state_heads=2)
        state = random_state(steered).to(device)
        mine = ids.to(device)
        own = None if strategy == "token" else segments.to(device)
        if how == "padded":
            pad = torch.zeros(1, _PADS, dtype=torch.int64)
            mask = torch.cat((torch.cat((pad, torch.ones_like(ids)), 1), torch.ones(1, _PADS + _LENGTH).long()))
            both = torch.cat((torch.cat((pad, ids), 1), random_ids(1, _PADS + _LENGTH, seed=8))).to(device)
            beside = None if strategy == "token" else torch.cat((pad - 1, segments), 1).expand(2, -1).to(device)
            out = steered(both, torch.cat((state, state)), attention_mask=mask.to(device), segments=beside)
            assert out.logits is not None
            return Pass(out.logits[0, _PADS:].float().cpu(), out.state[0].cpu())
        logits, cache, pending = [], True, None
        for start, stop in pairwise([0, *(_CUTS if how == "cut" else ()), _LENGTH]):
            part = None if own is None else own[:, start:stop]
            out = steered(
                mine[:, start:stop], state, segments=part, cache=cache, pending=pending, close=stop == _LENGTH
            )
            state, cache, pending = out.state, out.cache, out.pending
            assert out.logits is not None
            logits.append(out.logits)
        return Pass(torch.cat(logits, dim=1)[0].float().cpu(), state[0].cpu())

    with _without_interpreter():
        expected, on_cpu = (run(CPU, dtype, "whole") for dtype in (torch.float32, torch.bfloat16))
    for how in ("cut", "padded"):
        _judge(recorder, f"{what}: {how}, float32", run(device, torch.float32, how), expected, TERMS)
        found = run(device, torch.bfloat16, how)
        _judge_rounded(recorder, f"{what}: {how}, bfloat16", found, on_cpu, expected)


def _turns(recorder: Recorder, what: str, name: str, setting: Setting) -> None:
    """Turns on the CPU, then on the device alone without graphs, then all at once in graphs, twice."""
    numbers = range(3 if setting.tiny else 4 if name == "smollm2" else 14)
    tokens = 2 if setting.tiny else 10
    with _without_interpreter(), _environment(AGENTMEM_CUDA_GRAPHS="0"), _loaded(name, "cpu") as engine:
        expected = [_turn(engine, number, tokens) for number in numbers]
    with _environment(AGENTMEM_CUDA_GRAPHS="0"), _loaded(name, setting.device) as engine:
        alone = [_turn(engine, number, tokens) for number in numbers]
    _judge_turns(recorder, f"{what}: as on the CPU", alone, expected)
    calls: dict[str, int] = {}
    with (
        _counted(CapturedDecode, "run", calls),
        _counted(GraphCapturer, "capture", calls),
        _loaded(name, setting.device) as engine,
        ThreadPoolExecutor(len(numbers)) as threads,
    ):
        for time in ("first", "second"):
            found = list(threads.map(lambda number: _turn(engine, number, tokens), numbers))
            _judge_turns(recorder, f"{what}: rows that come and go, {time} time", found, expected)
        kept = engine._context.batch.uses_graphs
    said = f"{calls.get('run', 0)} passes in fixed buffers, {calls.get('capture', 0)} captured"
    cuda = setting.device == "cuda"
    works = kept and calls.get("capture" if cuda else "run", 0) > 0
    said += "" if kept else "; capture refused, the rest was decoded without graphs"
    way = "graphs are captured and replayed" if cuda else "fixed buffers, as graphs have them"
    recorder.judge(f"{what}: {way}", float(works), 1.0, said, exact=True)


def _judge_turns(
    recorder: Recorder, what: str, found: Sequence[agentmem.Turn], expected: Sequence[agentmem.Turn]
) -> None:
    """The same tokens, and memories that differ by rounding."""
    same = 0
    for one, other in zip(found, expected, strict=True):
        assert one.state is not None
        assert other.state is not None
        a, b = (torch.tensor(turn.state.matrices) for turn in (one, other) if turn.state is not None)
        bound = _DRIFT * tolerance(torch.float32, TERMS)
        same += one.token_ids == other.token_ids and torch.allclose(a, b, rtol=bound, atol=bound)
    recorder.judge(what, same, len(expected), f"{same} of {len(expected)} turns the same", exact=True)


def _turn(engine: Engine, number: int, tokens: int) -> agentmem.Turn:
    """The second turn of a session: half of them greedy, of different lengths."""
    sampling = Sampling(temperature=(0.0, 1.0)[number % 2], seed=number, max_tokens=tokens * (1 + number % 4))
    told = [Message("user", f"My favorite number is {number}. " * (1 + number % 3))]
    first = engine.turn(told, sampling=Sampling(max_tokens=2))
    return engine.turn([*told, first.message, Message("user", "What is it?")], first.state, sampling=sampling)


@contextmanager
def _loaded(name: str, device: str) -> Iterator[Engine]:
    if name == "tiny":
        torch.manual_seed(0)
        with of_shape(name) as engine:
            yield engine
    else:
        with agentmem.load(name, device=device, dtype="float32", progress=False) as engine:
            yield engine


def _without_interpreter() -> AbstractContextManager[None]:
    """The CPU as it computes by itself, with which the device is compared; a rehearsal's is Triton's interpreter."""
    # Whether kernels are interpreted was settled when triton was imported; here it says whether they are used.
    return _environment(TRITON_INTERPRET="0")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Other settings while computing; they are looked up when weights are packed and scans run."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if before[name] is not None})
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _counted(owner: Any, name: str, calls: dict[str, int]) -> Iterator[None]:
    """Count the calls of a method that come to their end."""
    real: Callable[..., Any] = getattr(owner, name)

    def counting(*given: Any) -> Any:
        result = real(*given)
        calls[name] = calls.get(name, 0) + 1
        return result

    setattr(owner, name, counting)
    try:
        yield
    finally:
        setattr(owner, name, real)
