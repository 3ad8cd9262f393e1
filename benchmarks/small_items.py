"""What many small items cost, beside LangGraph's saver on SQLite: long lists that grow, and many tasks in one step.

A turn of a list is one call of a graph whose node adds all items at first and one item later. A turn of tasks is one
call of a graph that sends so many to one node, each of which writes a short text. Times are CPU milliseconds of the
process (`time.process_time`, since the machine may be busy): of the first turn, of the later ones their median, and of
the first `get_tuple` of a saver opened anew. Every turn of tasks has a thread of its own.

    python benchmarks/small_items.py --items 50000 --tasks 300
"""

from __future__ import annotations

import argparse
import operator
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Send

from agentmem_sql import SQLAlchemySaver

TURNS = 8
SAVERS: dict[str, Callable[[Path], Any]] = {
    "SqliteSaver": lambda file: SqliteSaver.from_conn_string(str(file)),
    "SQLAlchemySaver": lambda file: SQLAlchemySaver.from_url(f"sqlite:///{file}"),
}
ITEMS: dict[str, Callable[[int], Any]] = {
    "texts of 12": lambda number: f"{number}".ljust(12, "x"),
    "texts of 60": lambda number: f"{number}".ljust(60, "x"),
    "dictionaries": lambda number: {"number": number, "done": False},
    "integers": lambda number: number,
}


class State(TypedDict):
    items: Annotated[list[Any], operator.add]


def growing(saver: Any, make: Callable[[int], Any], count: int) -> Any:
    """A graph whose node adds `count` items to an empty list, and one item to any other."""

    def grow(state: State) -> dict[str, Any]:
        there = len(state["items"])
        return {"items": [make(number) for number in range(there, there + 1 if there else count)]}

    return StateGraph(State).add_node(grow).add_edge(START, "grow").compile(checkpointer=saver)


def sending(saver: Any, count: int) -> Any:
    """A graph that sends `count` tasks to one node."""

    def work(state: Any) -> dict[str, Any]:
        return {"items": [f"result {state}"]}

    builder = StateGraph(State).add_node(work)
    builder.add_conditional_edges(START, lambda _: [Send("work", number) for number in range(count)], ["work"])
    return builder.compile(checkpointer=saver)


def measure(
    open_saver: Callable[[Path], Any], file: Path, make: Callable[[int], Any] | None, count: int
) -> list[float]:
    """CPU milliseconds of the first and of later turns, and of the first get."""
    times: list[float] = []
    with open_saver(file) as saver:
        saver.setup()
        graph = sending(saver, count) if make is None else growing(saver, make, count)
        for number in range(TURNS):
            at: Any = {"configurable": {"thread_id": str(number) if make is None else "0"}}
            before = time.process_time()
            graph.invoke({"items": []}, at, durability="sync")
            times.append(1000 * (time.process_time() - before))
    with open_saver(file) as saver:
        saver.setup()
        before = time.process_time()
        saver.get_tuple(at)
        first_get = 1000 * (time.process_time() - before)
    return [times[0], statistics.median(times[1:]), first_get]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--tasks", type=int, default=300)
    options = parser.parse_args()
    print(" " * 40, *(f"{name:>11}" for name in ("first turn", "later turn", "first get")))
    loads: dict[str, tuple[Callable[[int], Any] | None, int]] = {
        f"{options.items:,} {name}": (make, options.items) for name, make in ITEMS.items()
    }
    loads[f"{options.tasks:,} tasks"] = None, options.tasks
    for load, (make, count) in loads.items():
        for name, open_saver in SAVERS.items():
            with tempfile.TemporaryDirectory() as folder:
                figures = measure(open_saver, Path(folder) / "threads.db", make, count)
            print(f"{load}, {name}".rjust(40), *(f"{figure:11.1f}" for figure in figures))


if __name__ == "__main__":
    main()
