"""Part 3: tokens a second of sessions at once, beside the same one after another."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from sessions import BARS, in_graphs, of_shape, rates, say

import agentmem
from agentmem import Engine
from agentmem.generation.cuda_graph import CannotCapture
from agentmem.training.smollm2 import is_complete
from gpu.parts import ROOT, Setting
from gpu.places import spent, top
from gpu.results import Recorder

COUNTS, TOKENS = (1, 8, 32), 64
_PROFILED = 8  # tokens of a session while it is looked at


def measure(recorder: Recorder, setting: Setting) -> None:
    """Qwen3-4B's shape with random weights, and SmolLM2 with the adapter that comes with it."""
    if setting.tiny:
        recorder.attempt("tiny", partial(_engine, recorder, "tiny", partial(of_shape, "tiny"), (1, 2), 2, (2, 99.0)))
        # Stands for a model with an adapter.
        load = partial(agentmem.load, "nano", device=setting.device)
        recorder.attempt("nano", partial(_engine, recorder, "nano", load, (1, 2), 2, None))
        return
    bar = BARS["qwen3-4b", "cuda"]
    run = partial(_engine, recorder, "qwen3-4b", partial(of_shape, "qwen3-4b"), COUNTS, TOKENS, bar)
    recorder.attempt("qwen3-4b", run, bar=bar[1])
    if not is_complete(ROOT / "build" / "smollm2"):
        recorder.tell("smollm2", "left out: SmolLM2 is not in build/smollm2 (`make smollm2`)")
        return
    load = partial(agentmem.load, "smollm2", device=setting.device, progress=False)
    recorder.attempt("smollm2", partial(_engine, recorder, "smollm2", load, COUNTS, TOKENS, None))


def _name(model: str, count: int) -> str:
    return f"{model}, {count} session{'s' * (count > 1)} at once"


def _engine(
    recorder: Recorder,
    model: str,
    load: Callable[[], Engine],
    counts: tuple[int, ...],
    tokens: int,
    bar: tuple[int, float] | None,
) -> None:
    with load() as engine:
        cuda = engine.model.device.type == "cuda"
        say(engine, 0, tokens)
        for count in counts:
            if cuda:  # so many rows are captured once
                rates(engine, count, tokens, company_first=True)
            alone, together = rates(engine, count, tokens, company_first=False)
            if cuda and not in_graphs(engine):
                raise CannotCapture("the engine gave CUDA graphs up; its log says why")
            said = f"{together:,.0f} tokens/s, {together / alone:.2f} times {alone:,.0f} one after another"
            what = _name(model, count)
            if bar is None or bar[0] != count:
                recorder.tell(what, said, alone=alone, together=together)
                continue
            places = partial(_places, engine, count, min(tokens, _PROFILED))
            ratio = together / alone
            recorder.judge(what, ratio, bar[1], said, places=places, alone=alone, together=together)


def _places(engine: Engine, count: int, tokens: int) -> list[str]:
    def run() -> Any:
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(lambda number: say(engine, number, tokens), range(count)))

    return top(spent(run, torch.device(engine.model.device)))
