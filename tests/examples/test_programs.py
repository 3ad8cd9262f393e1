"""The examples as their pages run them: by one command, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from langchain_core.messages import AIMessage

from hybrid_rag.tasks import KINDS, draw

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def started(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=EXAMPLES, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1_800, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_definitions_steer_later_sessions(tmp_path: Path, needs: Callable[[object, str], None]) -> None:
    needs(find_spec("duckdb"), "duckdb, of the dependency group examples")
    done = started("analysis_agent", "--data", str(tmp_path / "data"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "source: SELECT sum(amount) FROM sales WHERE branch <> 'demo desk' AND currency = 'net euro'" in done.stdout
    assert (tmp_path / "data" / "with-memory" / "sums.png").exists()


@pytest.mark.slow
def test_recipes_do_what_they_say() -> None:
    done = started("hybrid_rag")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 recipes" in done.stdout


@pytest.mark.slow
def test_the_table_has_every_arm() -> None:
    done = started("hybrid_rag", "table", "--conversations", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 7
    assert all(line.count("|") == 8 for line in lines)


@pytest.mark.parametrize("pools", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_judged_by_their_own_values(kind: str, pools: bool) -> None:
    for seed in range(20):
        task, same = (draw(kind, Random(seed), pools=pools) for _ in range(2))
        assert (task.turns, task.question) == (same.turns, same.question)
        assert not task.right(AIMessage("I do not know."))
        stated = [*task.documents, *task.statements]
        right = [text for text in stated if task.right(AIMessage(text))]
        if kind == "a rule":
            value = next(s for s in task.statements if "test command" in s).rstrip(".").partition(" is ")[2]
            call = {"name": "run_tests", "args": {"test_command": value}, "id": "1", "type": "tool_call"}
            assert task.right(AIMessage("", tool_calls=[call]))
            assert not task.right(AIMessage("", tool_calls=[{**call, "args": {"test_command": "x"}}]))
        else:
            assert len(right) == 1
