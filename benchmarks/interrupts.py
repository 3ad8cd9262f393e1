"""What a turn with two questions to a person costs as its thread grows, beside LangGraph's saver on the same database.

Each turn is three calls of the graph: the message, which stops at the first question, the answer, which stops at the
second, and the answer to that. The second answer replaces what the task stored for the first. Times are CPU and wall
milliseconds of whole turns, the least of a few neighbours, since the machine may be busy.

    python benchmarks/interrupts.py --turns 250
    python benchmarks/interrupts.py --turns 250 --postgres postgresql://user@host/empty_database
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from agentmem_sql import SQLAlchemySaver

AROUND = 5  # turns that a figure is the least of


def asking_graph(saver: Any) -> Any:
    """A graph whose only node asks twice before it answers."""

    def answer(state: MessagesState) -> dict[str, Any]:
        number = len(state["messages"])
        answers = [interrupt({"question": f"{number}, part {part}"}) for part in (1, 2)]
        return {"messages": [AIMessage(f"answer {number}: {answers} " + "word " * 40, id=f"ai {number}")]}

    return StateGraph(MessagesState).add_node(answer).add_edge(START, "answer").compile(checkpointer=saver)


def turn(graph: Any, number: int) -> None:
    """The message and both answers."""
    at = {"configurable": {"thread_id": "1"}}
    graph.invoke({"messages": [("user", f"message {number} " + "word " * 40)]}, at)
    for answer in ("yes", "no"):
        graph.invoke(Command(resume=answer), at)


def measure(saver: Any, turns: int, shown: list[int]) -> dict[int, tuple[float, float]]:
    """CPU and wall milliseconds of the turns around those to be shown."""
    graph = asking_graph(saver)
    times: dict[int, tuple[float, float]] = {}
    for number in range(1, turns + 1):
        cpu, wall = time.process_time(), time.perf_counter()
        turn(graph, number)
        times[number] = (time.process_time() - cpu) * 1000, (time.perf_counter() - wall) * 1000
    return {
        at: (
            min(times[n][0] for n in range(max(1, at - AROUND), at + 1)),
            min(times[n][1] for n in range(max(1, at - AROUND), at + 1)),
        )
        for at in shown
    }


@contextmanager
def postgres_saver(url: str) -> Iterator[Any]:
    """LangGraph's saver on PostgreSQL, with its tables made."""
    from langgraph.checkpoint.postgres import PostgresSaver

    with PostgresSaver.from_conn_string(url) as saver:
        saver.setup()
        yield saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=250)
    parser.add_argument("--postgres", default="", help="the URL of an empty database")
    options = parser.parse_args()
    shown = sorted({10, options.turns // 2, options.turns})
    print("turn".rjust(42), *(f"{at:>15}" for at in shown))
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[[], Any]] = {
            "SqliteSaver": lambda: SqliteSaver.from_conn_string(str(Path(folder) / "official.db")),
            "SQLAlchemySaver, SQLite": lambda: SQLAlchemySaver.from_url(f"sqlite:///{folder}/ours.db"),
        }
        if options.postgres:
            makers["PostgresSaver"] = lambda: postgres_saver(options.postgres)
            makers["SQLAlchemySaver, PostgreSQL"] = lambda: SQLAlchemySaver.from_url(options.postgres)
        for name, make in makers.items():
            with make() as saver:
                times = measure(saver, options.turns, shown)
            cells = (f"{cpu:.1f} / {wall:.1f}" for cpu, wall in (times[at] for at in shown))
            print(f"{name}, CPU / wall ms".rjust(42), *(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
