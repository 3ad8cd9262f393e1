"""The benchmarks of the checkpointer run, at sizes that measure nothing, and show what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = "--turns 10 --repeats 1 --window 1 --children 1 --workers 1 --worker-turns 2 --rounds 1"
SERVERS = ["--postgres", "postgresql://postgres@127.0.0.1:1/none", "--mariadb", ""]
SAVERS = {"SqliteSaver", "SQLAlchemySaver"}
TIMES = {"put", "put_writes", "get_tuple", "whole turn", "get_tuple, new process", "opening and get_tuple, new process"}


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *options, *SERVERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    return done


@pytest.mark.slow
def test_benchmark_shows_what_it_measured(tmp_path: Path, needs: Callable[[object, str], None]) -> None:
    needs(find_spec("langgraph.checkpoint.sqlite"), "langgraph-checkpoint-sqlite, the saver to compare with")
    page, files = tmp_path / "results.md", tmp_path / "files"
    files.mkdir()
    done = run("checkpointers.py", *TINY.split(), "--folder", str(files), "--page", str(page))

    figures = json.loads(page.with_suffix(".json").read_text())
    assert {row["saver"] for row in figures["sizes"] if row["bytes"]["10"] > 10 * 9216} == SAVERS
    for saver in SAVERS:
        assert {row["call"] for row in figures["times"] if row["saver"] == saver and row["median"] > 0} == TIMES
        assert [row["rounds"][0] > 0 for row in figures["rates"] if row["saver"] == saver] == [True, True]
    judged = {bar["what"]: bar["held"] for bar in figures["bars"]}
    assert judged["put, turn 10, ours : SqliteSaver's"] is not None
    assert judged["put, turn 500, SqliteSaver's : ours"] is None, "a short run says nothing about turn 500"
    assert done.returncode == (1 if False in judged.values() else 0)

    wanted = ["SqliteSaver, SQLite", "SQLAlchemySaver, SQLite", "ours : LangGraph's", "checkpoints a second"]
    wanted += [f"{saver}, SQLite: synchronous = 2" for saver in SAVERS]
    for text in (done.stdout, page.read_text()):
        words = " ".join(text.split())  # a narrow terminal breaks lines
        for word in (*wanted, "PostgreSQL is left out", "MariaDB is left out"):
            assert word in words
    assert "](results.png)" in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert list(files.iterdir()) == [], "the databases are gone"


def test_listings_are_measured_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: Callable[[object, str], None]
) -> None:
    needs(find_spec("langgraph.checkpoint.sqlite"), "langgraph-checkpoint-sqlite, the saver to compare with")
    monkeypatch.syspath_prepend(BENCHMARKS)
    app = typer.Typer()
    app.command()(import_module("listings").main)
    options = ["--threads", "10", "--stages", "2", "--rounds", "1", "--folder", str(tmp_path)]
    done = CliRunner().invoke(app, [*options, *SERVERS])
    assert done.exit_code == (1 if "missed" in done.output else 0), done.output
    savers = (f"{saver}, SQLite" for saver in SAVERS)
    for words in (*savers, "180 checkpoints", "ours : SqliteSaver's", "2 times as"):
        assert words in done.output
    assert list(tmp_path.iterdir()) == [], "the databases are gone"
