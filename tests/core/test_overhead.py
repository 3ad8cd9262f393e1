"""The benchmark of what steering costs runs, and says what it measured and how."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "overhead.py"


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    spec = importlib.util.spec_from_file_location("overhead", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "overhead", module)
        patch.syspath_prepend(BENCHMARK.parent)
        spec.loader.exec_module(module)
    return module


def run(module: ModuleType, *arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_every_strategy_is_measured(overhead: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "o.png"
    code, said = run(overhead, "--shape", "tiny", "--steps", "1", "--prefills", "1", "--plot", str(picture))
    assert code == 0, said
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("torch", "transformers", "agentmem", "1 thread(s)", "2 layers x 32"):
        assert name in said
    for way in ("TSW", "SSW", "MSW"):
        for what in ("decode after 16, batch 1", "prefill of 32"):
            assert re.search(rf"{way}: {what}\W+[\d.]+ ms\W+[\d.]+ ms\W+[\d.]+", said), (way, what, said)


def test_fixed_buffers_are_measured_where_they_can_be(overhead: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("--shape", "tiny", "--steps", "1", "--prefills", "0", "--fixed", "--plot", str(tmp_path / "o.png"))
    code, said = run(overhead, *arguments)
    assert code == 0, said
    for way in ("TSW", "MSW"):
        assert f"{way}: decode after 16, batch 1, fixed" in said
    assert "SSW: decode after 16, batch 1 " in said


def test_a_missed_bar_is_an_exit_code(overhead: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(overhead, "TINY", overhead.Shape("tiny", 1, 32, 2, 1, 16, 64, prompts=(4,), bar_decode=99.0))
    arguments = (
        "--shape",
        "tiny",
        "--write",
        "TSW",
        "--steps",
        "1",
        "--prefills",
        "0",
        "--plot",
        str(tmp_path / "o.png"),
    )
    code, said = run(overhead, *arguments)
    assert code == 1
    assert "99.00 missed" in said


def test_what_is_not_known_is_refused(overhead: ModuleType) -> None:
    code, said = run(overhead, "--write", "XSW")
    assert code == 2
    assert "XSW" in said
