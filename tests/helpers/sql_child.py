"""What the SQL tests run in a process of its own: ``sql_child.py turn|write URL ...``."""

from __future__ import annotations

import sys

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put


def turn(url: str, thread: str) -> None:
    """One more turn of a thread; prints the answer and the first byte of the memory."""
    from tests.helpers.sql_graphs import chat_graph, say

    with SQLAlchemySaver.from_url(url) as saver:
        state = chat_graph(saver).invoke(say("and now?"), config(thread))
    print(state["messages"][-1].content, state["memory"]["matrices"][0])


def write(url: str, own: str, count: str) -> None:
    """Store that many checkpoints with writes on a thread of its own and on one that others write too."""
    with SQLAlchemySaver.from_url(url) as saver:
        for number in range(int(count)):
            for thread in (own, "everybody's"):
                at = put(saver, config(thread), {"n": number, "shared": b"same" * 500}, writer=own)
                saver.put_writes(at, [("n", number), ("shared", b"same" * 500)], "task", "path")
    print("done")


if __name__ == "__main__":
    {"turn": turn, "write": write}[sys.argv[1]](*sys.argv[2:])
