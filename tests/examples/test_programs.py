"""The analysis agent's table and tools; the examples as their pages run them; and that none of their values was trained
on.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage
from langchain_core.tools import ToolException

from agentmem.messages import Message
from agentmem.nano.recipe.chatml import render
from agentmem.nano.recipe.episodes import draw_episode, draw_memory_episode
from agentmem.nano.recipe.pools import ATTRIBUTES
from agentmem.prompt.transcript import Transcript
from agentmem_chroma import FactStore
from analysis_agent import phrases as analysis
from coding_assistant import phrases as coding
from hybrid_rag.parts import TOLD
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


@pytest.mark.parametrize("name", ["analysis_agent", "coding_assistant"])
def test_a_model_that_shows_no_tools_is_refused(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    needs: Callable[[object, str], None],
) -> None:
    needs(name != "analysis_agent" or find_spec("duckdb"), "duckdb, of the dependency group examples")
    program = import_module(f"{name}.__main__")
    monkeypatch.setattr(Transcript, "takes_tools", lambda _: False)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit):
        program.main()
    assert "the chat template of nano has no place for tools" in capsys.readouterr().err


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


VALUES = sorted({*astuple(coding.Settings()), *astuple(analysis.Terms()), *TOLD, "whole rule", "bar chart"})
QUESTIONS = ("ask", "remembered", "offer", "fact", "unknown", "tool")


def curriculum(seed: int) -> str:
    """A conversation for the base and one for the adapter, as the model reads them."""
    rng = Random(f"examples {seed}")
    base = draw_episode(rng, long=seed % 7 == 0, skills=0.6)
    memory = draw_memory_episode(rng, bindings=6, fillers=3, changes=1, asks=1, calls=1, questions=QUESTIONS)
    asked: list[Message] = [m for question in memory.questions for m in question.turn]
    told = [m for turn in memory.turns for m in turn]
    return "".join(piece.text for piece in [*render(base.messages, base.tools), *render(told), *render(asked)])


def test_no_value_is_in_a_pool() -> None:
    pools = {value.lower() for one in ATTRIBUTES.values() for value in one.values}
    assert not pools & {value.lower() for value in VALUES}


def test_the_curriculum_never_says_one() -> None:
    said = re.compile("|".join(rf"\b{re.escape(value)}\b" for value in VALUES))
    seen = re.compile(r"\bpytest\b")
    texts = [curriculum(seed) for seed in range(1_500)]
    assert not [found for text in texts if (found := said.search(text))]
    assert any(seen.search(text) for text in texts), "a pool's value would be found"


if TYPE_CHECKING:
    from analysis_agent.tools import Analysis


@pytest.fixture
def analysis(tmp_path: Path, needs: Callable[[object, str], None]) -> Iterator[Analysis]:
    needs(find_spec("duckdb"), "duckdb, of the dependency group examples")
    from analysis_agent.data import write_sales
    from analysis_agent.tools import Analysis

    write_sales(tmp_path / "sales.csv")
    embeddings = DeterministicFakeEmbedding(size=8)
    with FactStore(tmp_path / "facts", embeddings=embeddings, embedder="fake") as store:
        made = Analysis(tmp_path / "sales.csv", store, tmp_path)
        yield made
        made.close()


def rows(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "sales.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_definitions_make_the_numbers_and_queries_are_their_sources(analysis: Analysis, tmp_path: Path) -> None:
    assert len(rows(tmp_path)) == 6_000
    kept = [row for row in rows(tmp_path) if row["branch"] != "demo desk"]
    assert analysis.prepare_rows("demo desk") == f"The order count is {len(kept)}."
    euros = [row for row in kept if row["currency"] == "net euro"]
    assert analysis.measure_sums("net euro") == f"The sale total is {sum(int(row['amount']) for row in euros)}."
    year = [row for row in euros if "2024-10-01" <= row["day"] < "2025-10-01"]
    assert analysis.render_tables("autumn quarter") == f"The year total is {sum(int(row['amount']) for row in year)}."
    sources = {fact.metadata["subject"]: fact.source for fact in analysis.store.facts()}
    assert set(sources) == {"order count", "sale total", "year total"}
    assert (
        sources["sale total"] == "SELECT sum(amount) FROM sales WHERE branch <> 'demo desk' AND currency = 'net euro'"
    )


def test_a_new_result_replaces_the_fact(analysis: Analysis) -> None:
    old, new = analysis.measure_sums("net dollar"), analysis.measure_sums("net euro")
    assert old != new
    assert [fact.text for fact in analysis.store.facts()] == [new]


@pytest.mark.parametrize("value", ["", "nothing", "net euro' OR true --", "'; DROP TABLE sales; --"])
def test_only_values_of_the_table_come_into_a_query(analysis: Analysis, value: str) -> None:
    for use in (analysis.prepare_rows, analysis.measure_sums, analysis.render_tables, analysis.plot_sums):
        with pytest.raises(ToolException, match="is not valid"):
            use(value)
    assert analysis.store.count() == 0
    assert analysis.measure_sums("net euro").startswith("The sale total is ")


@pytest.mark.parametrize("chart", [f"{kind} chart" for kind in ("bar", "line", "pie", "area", "scatter")])
def test_plots_are_written(analysis: Analysis, tmp_path: Path, chart: str) -> None:
    assert analysis.plot_sums(chart) == "Saved."
    assert (tmp_path / "sums.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_the_same_every_time(tmp_path: Path) -> None:
    from analysis_agent.data import write_sales

    for name in ("a.csv", "b.csv"):
        write_sales(tmp_path / name)
    write_sales(tmp_path / "c.csv", seed=1)
    same, again, other = ((tmp_path / name).read_bytes() for name in ("a.csv", "b.csv", "c.csv"))
    assert same == again
    assert same != other
