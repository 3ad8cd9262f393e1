"""What a GPU is asked, rehearsed on a CPU: every part says what it should, and none takes the results of another.

The parts run here in this process, on torch's operations; the slow tests run the whole command, with Triton's kernels
in the interpreter, as it is to run on a GPU. They are slow because each of its seven parts is a process that imports
torch and transformers, which alone takes half a minute of a core. `.ci/run` runs the command without a failure.
"""

from __future__ import annotations

import json
import signal
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

from agentmem.kernels.scan_blocks import VARIABLE, chunk_length

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


def test_kernels_are_compared_with_the_definition(run: Run) -> None:
    found = run("kernels")
    exact = [result for result in found if result.exact]
    assert {result.verdict for result in exact} == {"held"}
    assert {"step", "scan and gradients"} == {result.what.split(",")[0] for result in exact}
    assert all(0 < result.value <= 1 for result in exact)


def test_a_wrong_kernel_is_seen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentmem import kernels

    real = kernels.step
    monkeypatch.setattr(kernels, "step", lambda args: real(args) * 1.001)
    for result in run("kernels"):
        if result.exact and "float32" in result.what:
            assert result.verdict == "missed", result
            assert "(reads)" in result.said


def test_passes_and_turns_are_compared_with_the_cpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process there is no interpreter, with which a rehearsal decodes in fixed buffers.
    monkeypatch.setattr("agentmem.generation.batch.uses_graphs", lambda device: True)
    found = run("equivalence")
    assert {result.verdict for result in found} == {"held"}
    whats = " ".join(result.what for result in found)
    for words in ("golden case", "cut, float32", "padded, bfloat16", "as on the CPU", "rows that come and go, second"):
        assert words in whats


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


def test_sessions_are_measured(run: Run) -> None:
    found = run("sessions")
    assert all("tokens/s" in result.said for result in found)
    (judged,) = (result for result in found if result.bar is not None)
    assert judged.verdict == "missed"
    assert len(judged.places) == 3
    assert {result.what.split(",")[0] for result in found} == {"tiny", "nano"}


def test_steps_of_the_recipe_are_timed(run: Run) -> None:
    steps = run("training")
    assert [result.figures["batch"] for result in steps] == [1, 2]
    assert all(result.figures["steps_per_second"] > 0 for result in steps)


@pytest.mark.slow
def test_the_recipe_is_trained_with_the_batch_that_was_fastest(run: Run, tmp_path: Path) -> None:
    steps = run("training")
    fastest = max(steps, key=lambda result: result.figures["batch"] * result.figures["steps_per_second"])
    trained, answers = run("recipe")
    assert f"2 of the recipe's 600 steps, {fastest.figures['batch']} conversations" in trained.said
    assert answers.verdict == "held"
    assert (tmp_path / "adapter" / "adapter.safetensors").exists()


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


def test_the_scan_reads_the_chunks_that_won(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("scan", ("capture", 1))
    assert found[0].verdict == "failed"
    assert found[-1].verdict == "held"
    (block,) = json.loads((tmp_path / "scan_blocks.json").read_text())["blocks"]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "scan_blocks.json"))
    assert chunk_length(block["tokens"], block["rank"]) == block["forward"]
    assert chunk_length(block["tokens"], block["rank"], backward=True) == block["backward"]


def test_a_part_that_hangs_is_ended_and_the_next_one_runs(
    gpu: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--part", "steering", "--part", "sessions", "--simulate", "steering=time"]
    arguments += ["--minutes", "40"]  # only the part that hangs is to run out of time, on any processor
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path), *arguments])
    monkeypatch.setattr(gpu("command"), "HANGING", 1.0)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            gpu("command").main(None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 1
    parts = reported(tmp_path)
    assert parts["steering"]["why"].startswith("time over")
    assert parts["sessions"]["why"] == ""
    assert len(parts["sessions"]["results"]) >= 4
    words = " ".join(capsys.readouterr().out.split())
    for part in ("time over", "tiny, 2", "(does not count)", "where it goes: ", "hardware: ", "command: "):
        assert part in words
    assert " ".join((tmp_path / "table.txt").read_text().split()) in words


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
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = reported(tmp_path)
    assert tuple(parts) == PARTS
    assert {part["why"] for part in parts.values()} == {""}
    judged = [result for part in parts.values() for result in part["results"] if result["exact"]]
    assert len(judged) > 12
    assert {result["verdict"] for result in judged} == {"held"}
    assert json.loads((tmp_path / "results.json").read_text())["held"]


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
    parts = reported(tmp_path)
    assert tuple(parts) == PARTS
    for name, part in parts.items():
        assert part["why"].startswith("time over") == (name in hanging)
        assert part["results"] or name in hanging
        assert "failed" not in {result["verdict"] for result in part["results"]}
