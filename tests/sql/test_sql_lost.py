"""Connections to servers that are lost: the call that meets it succeeds all the same, and is done once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import make_url

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config
from tests.helpers.sql_chains import unaccounted
from tests.helpers.sql_fault_child import INTERRUPT, Async, Sync, pending, question, values
from tests.helpers.sql_proxy import Proxy, proxy

Sql = Callable[..., list[Any]]
NewUrl = Callable[[str], str]

MODES = (
    ("sync", "postgresql+psycopg"),
    ("async", "postgresql+psycopg"),
    ("async", "postgresql+asyncpg"),
    ("sync", "mysql+pymysql"),
    ("async", "mysql+asyncmy"),
)
PORTS = {"postgresql": 5432, "mysql": 3306}


@pytest.fixture(params=MODES, ids=" ".join)
def mode(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def server_url(mode: tuple[str, str], new_url: NewUrl) -> str:
    return new_url(mode[1])


@pytest.fixture
def line(server_url: str) -> Iterator[Proxy]:
    """The line to the server."""
    url = make_url(server_url)
    with proxy((url.host or "127.0.0.1", url.port or PORTS[url.get_backend_name()])) as opened:
        yield opened


@pytest.fixture
def saver(mode: tuple[str, str], server_url: str, line: Proxy) -> Iterator[Sync]:
    made = SQLAlchemySaver.from_url(make_url(server_url).set(host="127.0.0.1", port=line.port))
    opened = Async(made) if mode[0] == "async" else Sync(made)
    yield opened
    opened.close()


def converse(saver: Sync, step: int) -> None:
    """Store, replace, read, and delete; what is read at the end is what was stored, once."""
    at = saver.put(config(), step)
    saver.call("put_writes", at, pending(step), "task")
    for number in range(2):
        saver.call("put_writes", at, [(INTERRUPT, question(step, number))], "asking")
    saver.put(config(f"new {step}"), step)
    saver.call("delete_thread", f"new {step}")
    found = saver.call("get_tuple", at)
    assert found.checkpoint["channel_values"] == values(step)
    assert found.pending_writes == [
        ("asking", INTERRUPT, question(step, 1)),
        *(("task", channel, value) for channel, value in pending(step)),
    ]


def cut(saver: Sync, line: Proxy, look: Sql, every: int) -> None:
    """Converse, and again, with the line cut at one message after the other, by steps of ``every``.

    Before the message reaches the server or, every other time, after it did, so that only the answer is lost.
    """
    for step in range(3):  # until everything is prepared and cached
        line.messages = 0
        converse(saver, step)
    numbers = range(0, line.messages, every)
    cuts = 0
    for step, number in enumerate(numbers, start=3):
        line.messages, line.cut_at, line.after = 0, number, not line.after
        converse(saver, step)
        cuts += line.cut_at is None
    line.cut_at = None
    assert cuts > len(numbers) - 3  # a new connection prepares a statement again: the last messages may not come
    assert look("SELECT count(*) FROM agentmem_threads") == [(1,)]
    assert look("SELECT count(*) FROM agentmem_checkpoints") == [(3 + len(numbers),)]
    assert unaccounted(look) == (set(), set())


def test_a_line_that_is_cut_in_the_middle_of_calls(saver: Sync, line: Proxy, look: Sql, server_url: str) -> None:
    cut(saver, line, partial(look, server_url), every=11)


@pytest.mark.slow
def test_a_line_that_is_cut_at_every_message(saver: Sync, line: Proxy, look: Sql, server_url: str) -> None:
    cut(saver, line, partial(look, server_url), every=1)
