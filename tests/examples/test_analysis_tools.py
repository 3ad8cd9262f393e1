"""The analysis agent's table and tools, without a model."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.tools import ToolException

from agentmem_chroma import FactStore

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
