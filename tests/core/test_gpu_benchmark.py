"""What a GPU is asked, rehearsed on a CPU with failures: they are seen, and none takes the results of another part.

`.ci/run` runs the command without a failure. The slow tests run the whole of it, with Triton's kernels in the
interpreter: each of its seven parts is a process that imports torch and transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("kernels", "equivalence", "steering", "sessions", "training", "scan", "recipe")
Run = Callable[..., list[Any]]


def command(out: Path, *arguments: str, minutes: int = 120) -> subprocess.CompletedProcess[str]:
    """A rehearsal; minutes enough for any machine."""
    given = ["--device", "cpu", "--tiny", "--minutes", str(minutes), "--out", str(out), *arguments]
    line = [sys.executable, "-m", "benchmarks.gpu", *given]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def reported(out: Path) -> dict[str, Any]:
    """The parts of `results.json` by name."""
    body = json.loads((out / "results.json").read_text())
    return {part["name"]: part for part in body["parts"]}


@pytest.fixture(scope="module")
def gpu(benchmarks: dict[str, ModuleType]) -> Iterator[Callable[[str], ModuleType]]:
    """A module of the benchmark by name."""
    yield lambda name: import_module(f"gpu.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu"]:
        del sys.modules[name]


@pytest.fixture
def run(gpu: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a part in this process, with a failure or without, and gives what it has written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(name: str, fault: tuple[str, int] | None = None) -> list[Any]:
        results, parts = gpu("results"), gpu("parts")
        part = next(entry for entry in parts.PARTS if entry.name == name)
        path = tmp_path / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        recorder = results.Recorder(path, time.monotonic() + 600, fault and results.Fault(*fault))
        module, _, function = part.function.partition(":")
        try:
            getattr(gpu(module), function)(recorder, parts.Setting("cpu", True, tmp_path))
        finally:
            torch.set_deterministic_debug_mode("default")
        found: list[Any] = results.read(path)[1]
        return found

    return run


def test_a_wrong_kernel_is_seen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentmem import kernels

    real = kernels.step
    monkeypatch.setattr(kernels, "step", lambda args: real(args) * 1.001)
    for result in run("kernels"):
        if result.exact and "float32" in result.what:
            assert result.verdict == "missed", result
            assert "(reads)" in result.said


def test_a_miss_names_three_places_and_a_case_that_fails_leaves_the_others(run: Run) -> None:
    found = run("steering", ("memory", 2))
    (failed,) = (result for result in found if result.verdict == "failed")
    assert failed.what.startswith("decode, batch 1")
    assert failed.said.startswith("out of memory")
    assert failed.bar is not None
    missed = [result for result in found if result.verdict == "missed"]
    assert len(missed) == 3, "none of a rehearsal's bars can be held"
    for result in missed:
        assert 1 <= len(result.places) <= 3, result
        assert all(("MB" if result.most else "ms") in place for place in result.places)
    assert found[-1].what == "operations of torch a layer and step"


def test_without_smollm2_the_recipe_is_left_out(
    gpu: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, results = gpu("training"), gpu("results")
    monkeypatch.setattr(training, "ROOT", tmp_path)
    for part in (training.measure, training.run_recipe):
        path = tmp_path / f"{part.__name__}.jsonl"
        part(results.Recorder(path, time.monotonic() + 60), gpu("parts").Setting("cuda", False, tmp_path))
        (said,) = results.read(path)[1]
        assert "left out: SmolLM2 is not in build/smollm2" in said.said


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "finds no CUDA device; rehearse with --device cpu --tiny" in done.stdout
    assert list(reported(tmp_path)) == ["kernels"], "nothing else was tried"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "cpu"), "give --tiny"),
        (("--part", "other"), "there are kernels"),
        (("--simulate", "scan=other"), "memory|capture|time"),
    ],
)
def test_what_cannot_be_run_is_refused(
    gpu: Callable[[str], ModuleType], arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit) as end:
        gpu("command").main(None)
    assert end.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "said"), [("memory", "out of memory"), ("capture", "capture refused")])
def test_the_first_case_of_every_part_fails_and_all_others_run(kind: str, said: str, tmp_path: Path) -> None:
    done = command(tmp_path, *(word for name in PARTS for word in ("--simulate", f"{name}={kind}")))
    assert done.returncode == 1
    parts = reported(tmp_path)
    assert tuple(parts) == PARTS
    for name, part in parts.items():
        assert part["why"] == ""
        failed = [result["said"] for result in part["results"] if result["verdict"] == "failed"]
        assert failed[0].startswith(said)
        assert name == "recipe" or len(part["results"]) > len(failed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("hanging", [PARTS[::2], PARTS[1::2]])
def test_parts_that_hang_are_ended_and_all_others_run(hanging: tuple[str, ...], tmp_path: Path) -> None:
    done = command(tmp_path, *(word for name in hanging for word in ("--simulate", f"{name}=time")))
    assert done.returncode == 1
    words = " ".join(done.stdout.split())
    for part in ("time over", "(does not count)", "hardware: ", "command: "):
        assert part in words
    assert " ".join((tmp_path / "table.txt").read_text().split()) in words
    parts = reported(tmp_path)
    assert tuple(parts) == PARTS
    for name, part in parts.items():
        assert part["why"].startswith("time over") == (name in hanging)
        assert part["results"] or name in hanging
        assert "failed" not in {result["verdict"] for result in part["results"]}
