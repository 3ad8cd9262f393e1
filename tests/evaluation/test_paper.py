"""`agentmem evaluate --suite paper`: every step, with a tiny Qwen3 of random weights and an adapter as the authors'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from agentmem.errors import ConfigError, DataError
from agentmem.evaluation.report import BEGIN, END
from agentmem.evaluation.suites import PAPER_ADAPTER, PAPER_MODEL, SUITE_ARMS, suite_table, suite_tasks
from agentmem_cli.app import app
from tests.helpers.chatterer import save_chatterer
from tests.helpers.task_data import save_gpqa, save_hotpotqa, save_ifeval, save_locomo, save_memoryagentbench, save_ttl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a download of the released pair: no fingerprint, both name the same base model."""
    directory = save_chatterer(tmp_path_factory.mktemp("qwen3"), max_position_embeddings=512)
    (directory / "source.json").write_text(json.dumps({"hub_id": PAPER_MODEL}), "utf-8")
    adapter = directory / "adapter"
    weights = adapter / "adapter.safetensors"
    torch.save(load_file(weights), adapter / "delta_mem_adapter.pt")
    weights.unlink()
    shape = json.loads((adapter / "delta_mem_config.json").read_text("utf-8"))
    theirs = {key: value for key, value in shape.items() if not key.startswith("agentmem")}
    (adapter / "delta_mem_config.json").write_text(json.dumps(theirs), "utf-8")
    (adapter / "README.md").write_text(f"---\nbase_model: {PAPER_MODEL}\n---\n", "utf-8")
    return directory


def test_the_suite_fills_the_papers_table(model: Path, tmp_path: Path) -> None:
    for save in (save_ifeval, save_hotpotqa, save_ttl, save_locomo, save_memoryagentbench):
        save(tmp_path / "data")
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n", "utf-8")
    command = ["evaluate", "--suite", "paper", "--model", model, "--adapter", model / "adapter", "--limit", 9]
    command += ["--data-dir", tmp_path / "data", "--max-tokens", 2, "--out", tmp_path / "out", "--page", page]
    finished = CliRunner().invoke(app, [str(part) for part in command])
    assert finished.exit_code == 0, finished.output
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert results["context_tokens"] == 2048
    assert [task["task"] for task in results["tasks"]] == ["ifeval", "hotpotqa", "memoryagentbench", "ttl", "locomo"]
    by_task = {task["task"]: task["arms"] for task in results["tasks"]}
    assert set(by_task["hotpotqa"]) == set(SUITE_ARMS)
    assert by_task["hotpotqa"]["whole_memory"]["prompt_tokens"] == by_task["hotpotqa"]["whole"]["prompt_tokens"]
    table = (tmp_path / "out" / "paper.md").read_text("utf-8")
    assert table == suite_table(results) + "\n"
    assert table.rstrip() in page.read_text("utf-8")
    share = by_task["ifeval"]["zero"]["share"]
    assert f"| delta-mem, token writing | 82.99 | {100 * share:.2f} (" in table
    (token_writing, _) = (line for line in table.splitlines() if line.startswith("| delta-mem, token writing"))
    share = by_task["memoryagentbench"]["whole_memory"]["share"]
    assert f"| 40.40 | `gpqa/gpqa_diamond.csv`, from its gated hub page | 36.48 | {100 * share:.2f} (" in token_writing
    share = results["tasks"][2]["kinds"]["test-time learning"]["whole_memory"]["share"]
    assert f"| 40.64 | {100 * share:.2f} (" in token_writing
    assert "| MemGen (the paper's figures only) | 39.37 |  | 5.36 |  |" in table
    share = by_task["locomo"]["constant"]["scores"]["LoCoMo F1"]["value"]
    (row,) = (line for line in table.splitlines() if line.startswith("| best constant answer"))
    assert f"| {100 * share:.2f} (" in row


def test_gpqa_is_asked_where_the_file_is(model: Path, tmp_path: Path) -> None:
    save_gpqa(tmp_path)
    command = ["evaluate", "--suite", "paper", "--model", model, "--adapter", "none", "--data-dir", tmp_path]
    finished = CliRunner().invoke(app, [*map(str, command), "--out", str(tmp_path / "out")])
    assert finished.exit_code == 0, finished.output
    (task,) = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["tasks"]
    assert (task["task"], list(task["arms"]), task["questions"]) == ("gpqa", ["bare"], 2)
    assert "| 82.99 | `ifeval/` in --data-dir |" in (tmp_path / "out" / "paper.md").read_text("utf-8")


def test_a_suite_needs_its_data_and_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="suites are paper; found 'table'"):
        suite_tasks("table", [tmp_path])
    with pytest.raises(ConfigError, match="--data-dir"):
        suite_tasks("paper", [])
    with pytest.raises(DataError, match="ifeval, hotpotqa, gpqa, memoryagentbench, mab_ttl, locomo; found none"):
        suite_tasks("paper", [tmp_path])
    finished = CliRunner().invoke(app, ["evaluate", "--suite", "paper", "--task", "sgd"])
    assert isinstance(finished.exception, ConfigError)
    assert "a suite has its own tasks" in str(finished.exception)


def test_the_page_has_the_papers_figures_and_says_what_to_run() -> None:
    page = (ROOT / "docs" / "results" / "paper.md").read_text("utf-8")
    assert f"{BEGIN}\n{suite_table()}\n{END}" in page
    assert PAPER_MODEL in page
    assert PAPER_ADAPTER in page
