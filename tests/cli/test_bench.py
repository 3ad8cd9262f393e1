"""`agentmem bench` on nano, tiny: every figure is there and says what the model itself says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from typer.testing import CliRunner

from agentmem import MemoryConfig, SteeredModel, load
from agentmem.errors import ConfigError
from agentmem_cli.app import app

TINY = ["bench", "--prompt", "24", "--pairs", "2", "--reply", "3", "--sessions", "1", "--sessions", "2"]


def test_all_figures_are_there_and_the_table_names_them() -> None:
    result = CliRunner().invoke(app, TINY, catch_exceptions=False)
    assert result.exit_code == 0
    for part in ("bare : steered", "a prompt of 24 tokens", "state of a session", "sessions at once"):
        assert part in result.stdout
    result = CliRunner().invoke(app, [*TINY, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    figures = json.loads(result.stdout)
    with load("nano") as engine:
        assert figures["state_bytes"] == len(engine.zero_state().data)
        config = engine.model.config
    assert figures["kv_bytes"] == 24 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    for name in ("decode", "prefill"):
        pair = figures[name]
        assert pair["bare"] > 0
        assert pair["steered"] > 0
        assert 0.01 < pair["ratio"] < 100
    assert [rate["sessions"] for rate in figures["rates"]] == [1, 2]
    assert all(rate["tokens_per_second"] > 0 for rate in figures["rates"])
    assert "nano in float32 on cpu" in figures["machine"]


@pytest.mark.parametrize("strategy", ["message", "sentence"])
def test_adapters_that_write_by_segment_are_measured(strategy: Literal["message", "sentence"], tmp_path: Path) -> None:
    with load("nano", adapter=False) as engine:
        config = MemoryConfig(rank=2, write_strategy=strategy)
        SteeredModel.attach(engine.model, config=config, seed=1).save(tmp_path)
    # More than one sentence.
    command = [*TINY, "--prompt", "70", "--adapter", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    figures = json.loads(result.stdout)
    assert figures["prompt"] == 70
    assert all(figures[name]["ratio"] > 0 for name in ("decode", "prefill"))


def test_a_prompt_longer_than_the_model_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match="--prompt is at most"):
        CliRunner().invoke(app, ["bench", "--prompt", "9000"], catch_exceptions=False)
