"""Queries over the table, each with an argument that is one of the told definitions.

Every result is one number with one sentence. The sentence goes into the fact store with the query that gave it as its
source, so that an answer can cite it later and anybody can run the query again.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from matplotlib.figure import Figure

from agentmem_chroma import FactStore

QUARTERS = {"winter quarter": 1, "spring quarter": 4, "summer quarter": 7, "autumn quarter": 10}
"""With the months that they begin with."""
CHARTS = ("bar chart", "line chart", "pie chart", "area chart", "scatter chart")


class Analysis:
    """The tools over one CSV.

    Args:
        table: the CSV.
        store: where results are kept as facts.
        plots: the folder that plots are written to.
    """

    def __init__(self, table: Path, store: FactStore, plots: Path) -> None:
        self.store = store
        self.plots = plots
        self._db = duckdb.connect()
        # The name of the table in sources: who runs a query again has the CSV by that name.
        self._db.execute("CREATE TABLE sales AS SELECT * FROM read_csv(?)", [str(table)])
        # Queries that a model influences touch this table and nothing else on the machine.
        self._db.execute("SET enable_external_access = false")
        self._branch = self._currency = ""

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def all(self) -> list[BaseTool]:
        """The tools for LangChain; what they refuse is a result that the model reads."""
        functions = (self.prepare_rows, self.measure_sums, self.render_tables, self.plot_sums)
        return [StructuredTool.from_function(function, handle_tool_error=True) for function in functions]

    def prepare_rows(self, branch: str) -> str:
        """Prepare the rows: leave out those that the branch has recorded."""
        self._check("branch", branch)
        self._branch = branch
        return self._fact("order count", "SELECT count(*) FROM sales WHERE " + self._where())

    def measure_sums(self, currency: str) -> str:
        """Measure the sums of one currency."""
        self._check("currency", currency)
        self._currency = currency
        return self._fact("sale total", "SELECT sum(amount) FROM sales WHERE " + self._where())

    def render_tables(self, release_month: str) -> str:
        """Render the tables."""
        # Of the fiscal year, which begins with a quarter.
        if release_month not in QUARTERS:
            raise ToolException(f"Error: the month {release_month} is not valid.")
        begin = f"DATE '2024-{QUARTERS[release_month]:02}-01'"
        year = f"day >= {begin} AND day < {begin} + INTERVAL 1 YEAR"
        return self._fact("year total", f"SELECT sum(amount) FROM sales WHERE {self._where()} AND {year}")

    def plot_sums(self, chart_type: str) -> str:
        """Plot the sums."""
        if chart_type not in CHARTS:
            raise ToolException(f"Error: the chart {chart_type} is not valid.")
        query = f"SELECT region, sum(amount) FROM sales WHERE {self._where()} GROUP BY region ORDER BY region"
        rows = self._db.sql(query).fetchall()
        draw(chart_type, [str(region) for region, _ in rows], [float(total) for _, total in rows], self.plots)
        return "Saved."

    def _where(self) -> str:
        parts = [f"branch <> '{self._branch}'"] if self._branch else []
        parts += [f"currency = '{self._currency}'"] if self._currency else []
        return " AND ".join(parts) or "true"

    def _check(self, column: str, value: str) -> None:
        """Only values of the column come into a query.

        Raises:
            ToolException: the column has no such value.
        """
        (known,) = self._db.execute(f"SELECT count(*) FROM sales WHERE {column} = ?", [value]).fetchall()
        if not known[0]:
            raise ToolException(f"Error: the {column} {value} is not valid.")

    def _fact(self, subject: str, query: str) -> str:
        """Run a query, and keep its result as the only fact about the subject."""
        ((found,),) = self._db.sql(query).fetchall()
        sentence = f"The {subject} is {int(found or 0)}."
        outdated = [fact.id for fact in self.store.facts() if fact.metadata.get("subject") == subject]
        if outdated:
            self.store.delete(outdated)
        self.store.add(sentence, source=query, metadata={"subject": subject})
        return sentence


def draw(chart_type: str, names: list[str], values: list[float], folder: Path) -> Path:
    """Write the plot of the values as `sums.png`."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    if chart_type == "pie chart":
        axes.pie(values, labels=names)
    else:
        if chart_type == "bar chart":
            axes.bar(names, values)
        elif chart_type == "line chart":
            axes.plot(names, values)
        elif chart_type == "area chart":
            axes.fill_between(range(len(names)), values)
            axes.set_xticks(range(len(names)), names)
        else:
            axes.scatter(names, values)
        axes.set_ylabel("sum of amounts")
    path = folder / "sums.png"
    figure.savefig(path, dpi=120)
    return path
