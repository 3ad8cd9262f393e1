"""The benchmarks of the checkpointer run, at sizes that measure nothing, and show what they measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = "--turns 10 --repeats 1 --window 1 --children 1 --workers 1 --worker-turns 2 --rounds 1"
SERVERS = ["--postgres", "postgresql://postgres@127.0.0.1:1/none", "--mariadb", ""]
SAVERS = {"SqliteSaver", "SQLAlchemySaver"}
TIMES = {"put", "put_writes", "get_tuple", "whole turn", "get_tuple, new process", "opening and get_tuple, new process"}


def test_benchmark_shows_what_it_measured(tmp_path: Path, needs: Callable[[object, str], None]) -> None:
    needs(find_spec("langgraph.checkpoint.sqlite"), "langgraph-checkpoint-sqlite, the saver to compare with")
    page, files = tmp_path / "results.md", tmp_path / "files"
    files.mkdir()
    command = [
        sys.executable,
        str(BENCHMARKS / "checkpointers.py"),
        *TINY.split(),
        *SERVERS,
        "--folder",
        str(files),
        "--page",
        str(page),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""

    figures = json.loads(page.with_suffix(".json").read_text())
    assert {row["saver"] for row in figures["sizes"] if row["bytes"]["10"] > 10 * 9216} == SAVERS
    for saver in SAVERS:
        assert {row["call"] for row in figures["times"] if row["saver"] == saver and row["median"] > 0} == TIMES
        assert [row["rounds"][0] > 0 for row in figures["rates"] if row["saver"] == saver] == [True, True]
    judged = {bar["what"]: bar["held"] for bar in figures["bars"]}
    assert judged["put, turn 10, ours : SqliteSaver's"] is not None
    assert judged["put, turn 500, SqliteSaver's : ours"] is None, "a short run says nothing about turn 500"
    assert done.returncode == (1 if False in judged.values() else 0)

    for text in (done.stdout, page.read_text()):
        # A narrow terminal breaks lines.
        words = re.sub(r"\s+", " ", text)
        for column in ("SqliteSaver, SQLite", "SQLAlchemySaver, SQLite", "ours : LangGraph's", "checkpoints a second"):
            assert column in words
        for saver in SAVERS:
            assert f"{saver}, SQLite: synchronous = 2" in words
        assert "PostgreSQL is left out" in words
        assert "MariaDB is left out" in words
    assert "](results.png)" in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert list(files.iterdir()) == [], "the databases are gone"


def test_listings_are_measured_beside_each_other(tmp_path: Path, needs: Callable[[object, str], None]) -> None:
    needs(find_spec("langgraph.checkpoint.sqlite"), "langgraph-checkpoint-sqlite, the saver to compare with")
    tiny = ["--threads", "10", "--stages", "2", "--rounds", "1", *SERVERS, "--folder", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "listings.py"), *tiny]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    assert done.returncode == (1 if "missed" in done.stdout else 0)
    for words in (
        "SqliteSaver, SQLite",
        "SQLAlchemySaver, SQLite",
        "180 checkpoints",
        "ours : SqliteSaver's",
        "2 times as",
    ):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == [], "the databases are gone"
