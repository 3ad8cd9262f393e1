"""The benchmarks run, and say what they measured and how; and what one of them counts: a steered prefill holds hardly
more.
"""

from __future__ import annotations

import json
import re
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import nn
from transformers import DynamicCache
from typer.testing import CliRunner

from tests.helpers.core_models import random_ids, steer, tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def run(module: ModuleType, *arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_the_forms_of_the_recurrence_are_timed(
    benchmarks: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = tmp_path / "s.png"
    # So short that the chooser takes no blocks, and no bar is looked at.
    arguments = ["scan.py", "--ranks", "8", "--lengths", "1", "4", "--repeats", "1", "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert benchmarks["scan"].main() == 0
    said = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    for part in ("hardware: ", "1 thread(s)", "float32", "torch", "command: python scan.py --ranks 8", "tight loop"):
        assert part in said
    if not torch.cuda.is_available():
        assert "agentmem.kernels.scan: not timed" in said


def test_the_scan_of_the_kernels_is_timed_with_and_without_gradients(benchmarks: dict[str, ModuleType]) -> None:
    scan = benchmarks["scan"]
    cell = scan.kernel_cell(4, 8, 1, CPU)
    assert all(len(times) == 1 for times in cell.times.values())
    page = StringIO()
    Console(width=200, file=page).print(scan.kernel_report([cell], CPU))
    assert "kernels, gradients" in page.getvalue()


def test_sessions_are_measured(
    benchmarks: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, out, picture = benchmarks["sessions"], tmp_path / "s.json", tmp_path / "s.png"
    assert sessions.bar_for("nano", CPU, False) == (16, 4.0)
    assert sessions.bar_for("qwen3-4b", GPU, False) is None
    assert sessions.bar_for("qwen3-4b", GPU, True) == (32, 16.0)
    monkeypatch.setattr(sessions, "BARS", {("tiny", "cpu"): (2, 99.0)})
    options = ["--shape", "tiny", "--count", "1", "--count", "2", "--tokens", "3", "--repeats", "1"]
    code, said = run(sessions, *options, "--out", str(out), "--plot", str(picture))
    assert code == 1, said
    assert "bar: 2 sessions at least 99 times, missed" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("hardware", "dtype", "versions", "command", "model", "memory decodes by"):
        assert re.search(rf"^{name}: .", said, re.MULTILINE)
    figures = json.loads(out.read_text())
    assert figures["rates"].keys() == {"1", "2"}
    assert figures["command"].startswith("python ")


@pytest.fixture
def overhead(benchmarks: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The small shapes are a CPU's, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return benchmarks["overhead"]


def test_every_strategy_is_measured(overhead: ModuleType, tmp_path: Path) -> None:
    picture = tmp_path / "o.png"
    code, said = run(overhead, "--shape", "tiny", "--steps", "1", "--prefills", "1", "--fixed", "--plot", str(picture))
    assert code == 0, said
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("torch", "transformers", "agentmem", "1 thread(s)", "2 layers x 32", "memory decodes by: "):
        assert name in said
    for way in ("TSW", "SSW", "MSW"):
        for what in (f"decode after 16, batch 1{', fixed' * (way != 'SSW')}", "prefill of 32"):
            assert re.search(rf"{way}: {what}\W+[\d.]+ ms\W+[\d.]+ ms\W+[\d.]+", said), (way, what, said)


@pytest.mark.parametrize(
    ("bar", "fits", "found"),
    [(99.0, True, r"99.00 missed"), (0.5, False, r"decode after 4, batch 1\W+does not fit\W+0.50: not measured")],
)
def test_a_missed_bar_is_an_exit_code(
    overhead: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bar: float, fits: bool, found: str
) -> None:

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    shape = overhead.Shape("tiny", 1, 32, 2, 1, 16, 64, prompts=(4,), bars={("decode", 1, 4): bar})
    monkeypatch.setattr(overhead, "TINY", shape)
    if not fits:
        monkeypatch.setattr(overhead, "side_by_side", full)
    options = ("--shape", "tiny", "--write", "TSW", "--steps", "1", "--prefills", "0")
    code, said = run(overhead, *options, "--plot", str(tmp_path / "o.png"))
    assert code == 1
    assert re.search(found, said), said


def test_what_is_not_known_is_refused(overhead: ModuleType) -> None:
    code, said = run(overhead, "--write", "XSW")
    assert code == 2
    assert "XSW" in said


LENGTH = 1024


of_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the tensors of a CPU")


@pytest.fixture(scope="module")
def memory(benchmarks: dict[str, ModuleType]) -> ModuleType:
    return benchmarks["overhead_memory"]


@pytest.fixture(scope="module")
def model() -> Any:
    """Wide enough that the memory of rank 8 is small beside it, as it is beside real models."""
    return tiny("qwen3", hidden_size=256, intermediate_size=1024, num_hidden_layers=2).requires_grad_(False)


@pytest.fixture(scope="module")
def bare(model: Any, memory: ModuleType) -> int:
    """Bytes that a bare prefill makes."""
    ids = random_ids(1, LENGTH)
    with torch.inference_mode():
        return int(memory.peak(lambda: model(ids, cache=DynamicCache(), use_cache=True, logits_to_keep=1)))


@of_a_cpu
@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("write", ["token", "message", "sentence"])
def test_a_prefill_holds_half_a_percent_more_at_most(
    model: Any, memory: ModuleType, bare: int, write: str, close: bool
) -> None:
    """Also where a pass of 64 sentences stays open: what gathers is a few numbers of each, not its hidden states."""
    steered = steer(model, write_strategy=write, rank=8)
    count = 64 if write == "sentence" else 2
    given: dict[str, Any] = {"close": close, "logits_to_keep": 1}
    if write != "token":
        given["segments"] = (torch.arange(LENGTH) * count // LENGTH)[None]
    ids = random_ids(1, LENGTH)
    with torch.inference_mode():
        steered(ids[:, :64], **given | {"segments": None if write == "token" else given["segments"][:, :64]})
        most = memory.peak(lambda: steered(ids, cache=True, **given))
    steered.detach()
    assert bare > 10e6, "the model's own tensors were counted"
    assert most < 1.005 * bare


@of_a_cpu
def test_what_is_counted_is_what_is_alive_at_once(memory: ModuleType) -> None:
    layer = nn.Linear(4, 4)

    def run() -> None:
        kept = torch.zeros(256)
        for _ in range(3):
            (kept + 1).view(2, 128)[0].add_(1)  # 1,024 bytes each time, dropped again

    assert memory.peak(run) == 2048
    assert memory.peak(run, layer, layer) == 2048 + 4 * (16 + 4)
