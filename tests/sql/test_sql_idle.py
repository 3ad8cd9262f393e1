"""A connection kept between calls: found again by the next call, and never kept from somebody who waits."""

from __future__ import annotations

import threading
from pathlib import Path

from sqlalchemy import Connection, QueuePool, create_engine, text

from agentmem_sql.idle import Idle
from agentmem_sql.transactions import Transactions


def one_connection(path: Path) -> Transactions:
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        pool_timeout=20,
        connect_args={"check_same_thread": False},
    )
    return Transactions(engine, engine, None, None, idle=Idle())


def test_the_next_call_has_the_same_connection(tmp_path: Path) -> None:
    ways = one_connection(tmp_path / "a.db")
    seen: list[Connection] = []
    for _ in range(3):
        ways.read(seen.append)
    assert seen[0] is seen[1] is seen[2]


def test_who_waits_gets_the_connection_that_somebody_else_is_done_with(tmp_path: Path) -> None:
    """The pool wakes its waiters when a connection comes back to it; one that is kept beside it would wake nobody."""
    ways = one_connection(tmp_path / "a.db")
    at_work, may_end, served = threading.Event(), threading.Event(), threading.Event()

    def long(connection: Connection) -> None:
        connection.execute(text("SELECT 1"))
        at_work.set()
        assert may_end.wait(10)

    first = threading.Thread(target=ways.read, args=(long,))
    first.start()
    assert at_work.wait(10)
    second = threading.Thread(target=ways.read, args=(lambda _: served.set(),))
    second.start()
    second.join(0.3)  # it waits for the only connection
    assert not served.is_set()
    may_end.set()
    assert served.wait(10), "the pool was given nothing, and its waiter was not told"
    first.join()
    second.join()
    again: list[Connection] = []
    ways.read(again.append)
    ways.read(again.append)
    assert again[0] is again[1], "with nobody at work it is kept again"
