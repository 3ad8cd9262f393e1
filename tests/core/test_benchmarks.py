"""The benchmarks of the recurrence and of sessions run, and say what they measured and how."""

from __future__ import annotations

import json
import re
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_forms_of_the_recurrence_are_timed(
    benchmarks: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
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
    pytest.importorskip("matplotlib")
    sessions, out, picture = benchmarks["sessions"], tmp_path / "s.json", tmp_path / "s.png"
    assert sessions.bar_for("nano", CPU, False) == (16, 4.0)
    assert sessions.bar_for("qwen3-4b", GPU, False) is None
    assert sessions.bar_for("qwen3-4b", GPU, True) == (32, 16.0)
    monkeypatch.setattr(sessions, "BARS", {("tiny", "cpu"): (2, 99.0)})
    app = typer.Typer()
    app.command()(sessions.main)
    options = ["--shape", "tiny", "--count", "1", "--count", "2", "--tokens", "3", "--repeats", "1"]
    result = CliRunner().invoke(app, [*options, "--out", str(out), "--plot", str(picture)])
    assert result.exit_code == 1, result.output
    assert "bar: 2 sessions at least 99 times, missed" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("hardware", "dtype", "versions", "command", "model", "memory decodes by"):
        assert re.search(rf"^{name}: .", result.output, re.MULTILINE)
    figures = json.loads(out.read_text())
    assert figures["rates"].keys() == {"1", "2"}
    assert figures["command"].startswith("python ")
