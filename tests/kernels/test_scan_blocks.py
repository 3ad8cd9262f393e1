"""Chunks of the Triton scan: as measured where there is a table, estimated where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import ConfigError
from agentmem.kernels.scan_blocks import VARIABLE, Block, BlockTable, chunk_length, estimated, read_table

MEASURED = (
    Block(rank=8, tokens=1024, forward=32, backward=16),
    Block(rank=8, tokens=32_768, forward=256, backward=128),
    Block(rank=32, tokens=1024, forward=512, backward=64),
)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "blocks.json"
    BlockTable("a device", "torch 1", MEASURED).write(path)
    monkeypatch.setenv(VARIABLE, str(path))
    return path


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_measured_is_an_estimate(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("agentmem.kernels.scan_blocks.TABLE", Path("not-there.json"))
    for length, rank in ((0, 1), (1024, 8), (32_768, 64)):
        assert chunk_length(length, rank, backward=backward) == estimated(length, rank)


@pytest.mark.parametrize(
    ("length", "rank", "forward", "backward"),
    [(1024, 8, 32, 16), (1, 4, 32, 16), (0, 8, 32, 16), (9000, 8, 256, 128), (40_000, 9, 512, 64)],
)
@pytest.mark.usefixtures("table")
def test_the_nearest_measurement_counts(length: int, rank: int, forward: int, backward: int) -> None:
    assert chunk_length(length, rank) == forward
    assert chunk_length(length, rank, backward=True) == backward


@pytest.mark.usefixtures("table")
def test_ranks_above_all_that_were_measured_are_estimated() -> None:
    assert chunk_length(1024, 33) == estimated(1024, 33)


def test_a_table_is_read_as_it_was_written(table: Path) -> None:
    assert read_table(table) == BlockTable("a device", "torch 1", MEASURED)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"forward": 48}, "powers of two"),
        ({"tokens": 0}, "whole numbers from 1"),
        ({"rank": "8"}, "whole numbers from 1"),
        ({"rows": 4}, "rows"),
        (None, "at least one"),
    ],
)
def test_another_file_is_refused(changes: dict[str, Any] | None, said: str, table: Path) -> None:
    body = json.loads(table.read_text())
    body["blocks"] = [] if changes is None else [body["blocks"][0] | changes]
    table.write_text(json.dumps(body))
    with pytest.raises(ConfigError, match=said):
        read_table(table)


def test_a_cell_measured_twice_is_refused(table: Path) -> None:
    BlockTable("a device", "torch 1", (*MEASURED, MEASURED[0])).write(table)
    with pytest.raises(ConfigError, match="one block for each"):
        read_table(table)


def test_a_missing_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"none\.json"):
        chunk_length(1024, 8)
