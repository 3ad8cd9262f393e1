"""`benchmarks/serve_load.py`: sessions at once, whose database is cut off in the middle and comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Two models are loaded.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "serve_load.py"


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=900, check=False
    )


def test_sessions_go_on_when_the_database_is_back_and_have_lost_nothing(postgresql_url: str, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    options = ["--sessions", "3", "--seconds", "15", "--cut", "3", "--replicas", "2", "--moves", "2", "--out", str(out)]
    done = started("--db", postgresql_url, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert figures["outcomes"].keys() <= {"200", "409", "503"}
    assert figures["outcomes"]["503"] > 0, "it was cut"
    assert figures["answers_again_after"] is not None
    assert (figures["lost"], figures["doubled"]) == (0, 0)
    assert figures["turns"] >= 3
    assert figures["turn"]["moves"] > 0


def test_what_cannot_be_measured_is_refused() -> None:
    for options in (["--cut", "3"], ["--cut", "3", "--db", "postgresql://h/d", "--seconds", "4"], ["--moves", "2"]):
        assert started(*options).returncode == 2
