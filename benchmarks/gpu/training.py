"""Part 4: how fast SmolLM2's recipe trains, with larger batches too, and the recipe itself in the time that is left.

It is the recipe's file and the code of `agentmem train`; only what is said here is changed. In a rehearsal nano stands
for SmolLM2, with a few small conversations.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import agentmem
from agentmem import Message, Sampling
from agentmem.training.checkpoints import best_adapters
from agentmem.training.config import RUN_FILE, TrainConfig
from agentmem.training.run import train
from agentmem.training.smollm2 import is_complete
from gpu.parts import ROOT, Setting
from gpu.results import Recorder, read

RECIPE = ROOT / "recipes" / "smollm2-135m.yaml"
BATCHES = ((1, 0), (4, 4), (8, 4))
"""How many times the recipe's batch, and how many processes prepare it beside the training one."""
_TIMED, _SETTLING = 8, 3  # steps that are timed, after some that are not
_FEWEST = 60  # steps below which the recipe is not begun: its warm-up takes 15
_SHARE, _START = 0.55, 30.0  # of the time for steps (the rest fits the start, and measures); seconds until they begin
_NANO: Mapping[str, Any] = {
    "model": "nano",
    "batch_size": 1,
    "memory": {"rank": 4, "num_state_heads": 1, "target_layers": [2, 3]},
    "facts": {"facts": [1, 2], "fillers": [0, 0], "questions": 2, "repeats": 1, "systems": 0.0},
    "start_conversations": 12,
    "lens_steps": 1,
    "held_out": 4,
    "probes": 2,
    "probe_tokens": 2,
    "warmup": 1,
}


def measure(recorder: Recorder, setting: Setting) -> None:
    """Steps a second, batch by batch."""
    if _left_out(recorder, setting):
        return
    for times, workers in ((1, 0), (2, 0)) if setting.tiny else BATCHES:
        batch = times * _config(setting, {}).batch_size
        what = f"a step of {batch} conversations"
        recorder.attempt(what, partial(_steps, recorder, what, setting, batch, workers))


def run_recipe(recorder: Recorder, setting: Setting) -> None:
    """Train with the batch that was fastest, as many of the recipe's steps as there is time for."""
    if _left_out(recorder, setting):
        return
    out = setting.out / "adapter"
    if (out / RUN_FILE).exists():  # of an earlier run
        shutil.rmtree(out)
    recorder.attempt("the recipe", partial(_recipe, recorder, setting, out))
    if (out / "README.md").exists():  # its card, which comes last
        recorder.attempt("the adapter", partial(_answers, recorder, setting, out), exact=True)


def _left_out(recorder: Recorder, setting: Setting) -> bool:
    missing = not setting.tiny and not is_complete(ROOT / "build" / "smollm2")
    if missing:
        recorder.tell("training", "left out: SmolLM2 is not in build/smollm2, and its package could not be had")
    return missing


def _config(setting: Setting, changes: Mapping[str, Any]) -> TrainConfig:
    own = {**_NANO, **changes} if setting.tiny else changes
    return TrainConfig.read(RECIPE, {"device": setting.device, **own})


def _steps(recorder: Recorder, what: str, setting: Setting, batch: int, workers: int) -> None:
    """From a start that costs nothing, and without measurements."""
    settling, timed = (1, 1) if setting.tiny else (_SETTLING, _TIMED)
    ends: list[float] = []
    with TemporaryDirectory() as folder:
        config = _config(setting, {
            "out": folder + "/run", "batch_size": batch, "workers": workers, "max_steps": settling + timed,
            "start": "copier", "lens_steps": 0, "evaluate_every": 0, "save_every": 10_000,
        })  # fmt: skip
        train(config, on_progress=lambda _: ends.append(time.perf_counter()))
    seconds = statistics.median(b - a for a, b in list(pairwise(ends))[settling - 1 :])
    said = f"{1 / seconds:.2f} steps/s, {batch / seconds:.1f} conversations/s"
    recorder.tell(what, said, batch=batch, workers=workers, steps_per_second=1 / seconds)


def _recipe(recorder: Recorder, setting: Setting, out: Path) -> None:
    measured = [result.figures for result in read(setting.out / "training.jsonl")[1] if "batch" in result.figures]
    plain = _config(setting, {})
    batch, workers, steps = plain.batch_size, plain.workers, plain.max_steps
    if measured:
        best = max(measured, key=lambda figures: figures["batch"] * figures["steps_per_second"])
        batch, workers = best["batch"], best["workers"]
        steps = min(steps, int(_SHARE * (recorder.seconds_left - _START) * best["steps_per_second"]))
    if setting.tiny:
        steps = 2
    elif steps < _FEWEST:
        command = f"agentmem train --config {RECIPE.relative_to(ROOT)} --batch-size {batch} --out DIR"
        recorder.tell("the recipe", f"not begun: only {max(0, steps)} steps would fit; more --minutes, or `{command}`")
        return
    config = _config(setting, {
        "out": str(out), "batch_size": batch, "workers": workers, "max_steps": steps,
        "evaluate_every": max(1, steps // 3), "save_every": max(1, steps // 6),
    })  # fmt: skip
    done = train(config, on_progress=lambda _: None)
    of = f"{done.steps} of the recipe's {plain.max_steps} steps"
    of += f", {batch} conversations each instead of {plain.batch_size}"
    if not done.finished:
        best = f", and the best adapter so far in {best_adapters(out)[-1][1]}" if best_adapters(out) else ""
        recorder.tell("the recipe", f"stopped after {of}; its last checkpoint is in {out}{best}")
        return
    arms = ", ".join(f"{name} {value:.2f}" for name, value in done.arms.items())
    recorder.tell("the recipe", f"{of}, in {done.seconds:.0f} s: {arms or 'not measured'}; the adapter is in {out}")


def _answers(recorder: Recorder, setting: Setting, out: Path) -> None:
    """What was written can be loaded, and takes a turn."""
    model = _config(setting, {}).model
    with agentmem.load(model, out, device=setting.device, progress=False) as engine:
        turn = engine.turn([Message("user", "My name is Ada.")], sampling=Sampling(max_tokens=3))
    wrote = turn.written > 0 and turn.state is not None
    recorder.judge("the adapter", float(wrote), 1.0, f"loads, and wrote {turn.written} tokens", exact=True)
