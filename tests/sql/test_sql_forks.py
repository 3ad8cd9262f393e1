"""Processes that are forked while a saver is open, as servers with worker processes do it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_processes import Template, template

NewUrl = Callable[[str], str]

DRIVERS = ("sqlite+aiosqlite", "postgresql+psycopg", "postgresql+asyncpg", "mysql+asyncmy")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    with template(tmp_path_factory.mktemp("reports")) as started:
        yield started


def stored(url: str) -> dict[str, int]:
    """How many checkpoints each thread has."""
    with SQLAlchemySaver.from_url(url) as saver:
        return Counter(one.config["configurable"]["thread_id"] for one in saver.list(None))


@pytest.mark.parametrize(
    ("backend", "own"), [("sqlite", False), ("sqlite", True), ("postgresql", False), ("mysql", False)]
)
def test_both_processes_go_on(new_url: NewUrl, processes: Template, backend: str, own: bool) -> None:
    """One closes while the other goes on, with the same saver or one of its own: nothing is lost."""
    url = new_url(backend)
    assert processes.start("taking_turns", url, own).wait() == 0
    assert stored(url) == {"first": 4, "other": 2}


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_process_forked_inside_a_loop(new_url: NewUrl, processes: Template, driver: str) -> None:
    url = new_url(driver)
    assert processes.start("in_a_loop", url).wait() == 0
    assert stored(url) == {"first": 10, "other": 2}


def test_a_process_forked_in_the_middle_of_a_write(database_url: str, processes: Template) -> None:
    """On a server the two have nothing to do with each other; SQLite cannot tell whose locks are whose any more."""
    process = processes.start("busy", database_url)
    assert process.wait() == 0
    if database_url.startswith("sqlite"):
        ((message,),) = process.said()
        assert "'spawn' or 'forkserver'" in message
        assert stored(database_url) == {"first": 1}
    else:
        assert process.said() == []
        assert stored(database_url) == {"first": 1, "other": 1}


def test_an_engine_of_ones_own_is_to_be_disposed_of_in_the_forked_process(
    database_url: str, processes: Template
) -> None:
    process = processes.start("given", database_url)
    assert process.wait() == 0
    (before,), (after,) = process.said()
    assert "engine.dispose(close=False)" in before
    assert after == "stored"
    assert stored(database_url) == {"first": 2, "other": 1}
