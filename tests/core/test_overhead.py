"""The benchmark of what steering costs runs, and says what it measured and how."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small shapes are a CPU's, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def overhead(benchmarks: dict[str, ModuleType]) -> ModuleType:
    return benchmarks["overhead"]


def run(module: ModuleType, *arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_every_strategy_is_measured(overhead: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
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
    pytest.importorskip("matplotlib")

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


@pytest.mark.parametrize("fixed", [False, True])
def test_bare_and_steered_share_one_kv(benchmarks: dict[str, ModuleType], fixed: bool) -> None:
    overhead, decoders = benchmarks["overhead"], benchmarks["overhead_decoders"]
    model = overhead.TINY.model(torch.device("cpu"), torch.float32)
    bare = overhead.bare_copy(model)
    with torch.inference_mode(), overhead.steering(model, 2, "TSW") as steered:
        one, other = decoders.side_by_side(bare, model, steered, 3, 5, fixed)
        if fixed:
            assert one.kv is other.kv
            assert one.kv.tokens == 4 * 256, "no row is added later"
        else:
            assert one.cache is other.cache
        for decoder in (one, other, one):
            decoder.step()
        if fixed:
            assert [row.length for row in one.kv.rows] == [5, 5, 5]
        else:
            assert one.cache.layers[0].keys.shape == (3, 1, 5, 16)


def test_bars_of_a_gpu_are_for_cuda_graphs(overhead: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    shape = next(one for one in overhead.REAL if one.name == "qwen3-4b")
    assert shape.bars["decode", 1, 32_768] == 0.90
    assert shape.bars["decode", 32, 16_384] == 0.96
    for case in shape.bars:
        what, batch, length = case
        assert length in (shape.prompts if what == "decode" else shape.prefills)
        assert batch in shape.batches
    monkeypatch.setattr("shapes.uses_graphs", lambda device: False)
    assert not shape.judged(gpu, "TSW", 8, True)
    monkeypatch.setattr("shapes.uses_graphs", lambda device: device.type == "cuda")
    assert shape.judged(gpu, "TSW", 8, True)
    assert not shape.judged(gpu, "MSW", 8, True)
    assert not shape.judged(cpu, "TSW", 8, False)


def test_more_memory_than_the_bar_allows_is_missed(overhead: ModuleType) -> None:
    report = overhead.Report(Table())
    report.memory("m", "peak", 1000.0, 1005.0, 0.5)
    assert report.held
    report.memory("m", "peak", 1000.0, 1006.0, None)
    assert report.held
    report.memory("m", "peak", 1000.0, 1006.0, 0.5)
    assert not report.held


def test_what_ran_on_a_device_is_counted(benchmarks: dict[str, ModuleType]) -> None:
    counting, x = benchmarks["counting"], torch.ones(4)
    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.profiler.record_function("a span"):
        for _ in range(3):
            x.neg()
    assert counting.ran(seen.events()) == 0, "there is no GPU in it"
    assert counting.ran(seen.events(), DeviceType.CPU) == 3
    assert counting.operations(lambda: x.view(2, 2).neg()) == 1, "a view is no work"
