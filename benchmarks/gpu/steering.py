"""Part 2: decode, prefill and peak memory, bare against steered, in the shape of Qwen3-4B; kernels a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from counting import kernels, operations
from overhead import bare_copy, compare, counted, steering
from overhead_decoders import Decoder, side_by_side
from overhead_memory import peak
from shapes import REAL, TINY, Case, Shape
from torch import Tensor
from transformers import Qwen3ForCausalLM

from agentmem import SteeredModel
from gpu.parts import Setting
from gpu.places import allocated, spent, top
from gpu.results import Recorder

RANK = 8
STEPS, PREFILLS = 60, 3
"""Pairs of steps and of prefills."""
_PROFILED = 3


def measure(recorder: Recorder, setting: Setting) -> None:
    """Every bar of the shape."""
    device = torch.device(setting.device)
    shape = _rehearsal() if setting.tiny else next(one for one in REAL if one.name == "qwen3-4b")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.inference_mode():
        model = shape.model(device, dtype)
        bare = bare_copy(model)
        recorder.tell("shape", f"{shape}, {dtype}".replace("torch.", ""))
        # Of the bare model before memory is attached to the weights that both share.
        peaks: dict[int, int] = {}
        lengths = [length for kind, _, length in shape.bars if kind == "peak"]
        for length in lengths:
            what = f"peak memory of the bare model, prefill of {length:,}"
            recorder.attempt(what, partial(_bare_peak, recorder, what, bare, length, peaks))
        with steering(model, RANK, "TSW") as steered:
            for case, bar in shape.bars.items():
                what = _name(case)
                run: Callable[[], None]
                if case[0] == "peak":
                    run = partial(_memory, recorder, what, bare, model, steered, case[2], peaks, bar)
                else:
                    run = partial(_time, recorder, what, case, bare, model, steered, bar, setting.tiny)
                recorder.attempt(what, run, bar=bar, most=case[0] == "peak")
            recorder.attempt("kernels a layer and step", partial(_count, recorder, bare, model, steered, device))


def _rehearsal() -> Shape:
    """A shape that holds none of its bars, so that all that is said of a miss is said."""
    bars: dict[Case, float] = {
        ("decode", 1, 16): 99.0, ("decode", 2, 16): 99.0, ("prefill", 1, 32): 99.0, ("peak", 1, 32): -99.0,
    }  # fmt: skip
    return replace(TINY, bars=bars)


def _name(case: Case) -> str:
    kind, batch, length = case
    if kind == "decode":
        return f"decode, batch {batch}, after {length:,} tokens"
    return f"prefill of {length:,} tokens" if kind == "prefill" else f"peak memory, prefill of {length:,} tokens"


def _time(
    recorder: Recorder,
    what: str,
    case: Case,
    bare: Qwen3ForCausalLM,
    model: Qwen3ForCausalLM,
    steered: SteeredModel,
    bar: float,
    tiny: bool,
) -> None:
    """The ratio of bare : steered; steps are replayed graphs on a GPU."""
    kind, batch, length = case
    alone: Callable[[], Any]
    other: Callable[[], Any]
    if kind == "decode":
        one, two = side_by_side(bare, model, steered, batch, length, fixed=True)
        alone, other, pairs = one.step, two.step, STEPS
    else:
        ids = _ids(model, length)
        alone, other, pairs = partial(Decoder, bare, None, ids), partial(Decoder, model, steered, ids), PREFILLS
    figure = compare(alone, other, 2 if tiny else pairs)

    def places() -> list[str]:
        return top(*(spent(run, model.device, _PROFILED) for run in (other, alone)))

    said = f"{figure.ratio:.3f} of bare ({1e3 * figure.bare:.2f} ms bare, {1e3 * figure.steered:.2f} steered)"
    recorder.judge(what, figure.ratio, bar, said, places=places, bare=figure.bare, steered=figure.steered)


def _ids(model: Qwen3ForCausalLM, length: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (1, length), device=model.device)


def _most(model: Qwen3ForCausalLM, steered: SteeredModel | None, length: int) -> int:
    """Peak bytes of a prefill; the second of two, since the first fills what is kept."""
    ids = _ids(model, length)
    Decoder(model, steered, ids)
    held = (model,) if steered is None else (model, steered.memory)
    return peak(partial(Decoder, model, steered, ids), *held)


def _bare_peak(recorder: Recorder, what: str, bare: Qwen3ForCausalLM, length: int, peaks: dict[int, int]) -> None:
    peaks[length] = _most(bare, None, length)
    recorder.tell(what, f"{peaks[length] / 2**20:,.1f} MB", bytes=peaks[length])


def _memory(
    recorder: Recorder,
    what: str,
    bare: Qwen3ForCausalLM,
    model: Qwen3ForCausalLM,
    steered: SteeredModel,
    length: int,
    peaks: dict[int, int],
    bar: float,
) -> None:
    if length not in peaks:
        raise RuntimeError("that of the bare model is not known")
    most = _most(model, steered, length)
    more = 100 * (most / peaks[length] - 1)
    ids = _ids(model, length)

    def places() -> list[str]:
        found = [allocated(partial(Decoder, *pair, ids), model.device) for pair in ((model, steered), (bare, None))]
        return top(*found, unit="MB")

    said = f"{more:+.2f} % ({peaks[length] / 2**20:,.1f} MB bare, {most / 2**20:,.1f} steered)"
    recorder.judge(what, more, bar, said, most=True, places=places, bare=peaks[length], steered=most)


def _count(
    recorder: Recorder, bare: Qwen3ForCausalLM, model: Qwen3ForCausalLM, steered: SteeredModel, device: torch.device
) -> None:
    """In a step outside of graphs, which replay the same ones."""
    cuda = device.type == "cuda"
    for what, count in [("operations of torch", operations), *[("kernels", kernels)] * cuda]:
        found = counted(bare, model, steered, count)
        said = "not known" if found is None else f"{found[0]:.1f} bare, {found[1]:+.1f} steered"
        recorder.tell(f"{what} a layer and step", said)
