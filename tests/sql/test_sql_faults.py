"""Writers that are killed: what was acknowledged is there, and nothing is there in part."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from sqlalchemy import make_url

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config
from tests.helpers.sql_chains import unaccounted
from tests.helpers.sql_fault_child import INTERRUPT, INTERRUPTS, pending, question, values
from tests.helpers.sql_processes import Template, template

Sql = Callable[..., list[Any]]
NewUrl = Callable[[str], str]

SESSIONS = {
    "postgresql": """
        SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
    """,
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND id <> connection_id()",
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    with template(tmp_path_factory.mktemp("reports")) as started:
        yield started


@dataclass
class Known:
    """What must be in a checkpoint that was acknowledged."""

    step: int
    writes: bool = False
    interrupt: int = -1


@dataclass
class Ledger:
    """What a thread must hold, going by what its writers said."""

    known: dict[str, Known] = field(default_factory=dict)
    pruning: str | None = None  # the checkpoint whose ancestors may be gone

    def read(self, said: list[list[Any]]) -> None:
        for what, own_id, *more in said:
            if what == "put":
                self.known[own_id] = Known(more[0])
            elif what == "writes":
                self.known[own_id].writes = True
            elif what == "interrupt":
                self.known[own_id].interrupt = more[0]
            elif what == "pruning":
                self.pruning = own_id
            else:
                self.known, self.pruning = {own_id: self.known[own_id]}, None

    def check(self, saver: SQLAlchemySaver) -> None:
        """Compare with what is stored, and take over what was stored but not acknowledged any more."""
        found = {one.config["configurable"]["checkpoint_id"]: one for one in saver.list(config())}
        if self.pruning is not None and found.keys() == {self.pruning}:
            self.known = {self.pruning: self.known[self.pruning]}
        self.pruning = None
        assert self.known.keys() <= found.keys()
        assert len(found.keys() - self.known.keys()) <= 1
        for own_id, one in found.items():
            known = self.known.setdefault(own_id, Known(one.metadata["step"]))
            assert one.metadata["step"] == known.step
            assert one.checkpoint["channel_values"] == values(known.step)
            ordinary = [(channel, value) for task, channel, value in one.pending_writes or () if task == "task"]
            asked = [
                value for task, channel, value in one.pending_writes or () if (task, channel) == ("asking", INTERRUPT)
            ]
            assert ordinary == pending(known.step) or (not known.writes and not ordinary)
            known.writes = bool(ordinary)
            possible = {known.interrupt, min(known.interrupt + 1, INTERRUPTS - 1)}
            assert asked in [[] if number < 0 else [question(known.step, number)] for number in possible]
            known.interrupt = asked[0]["number"] if asked else -1


def wait_for_sessions_to_end(look: Sql, url: str) -> None:
    """A server may finish the statement that a process sent before it was killed."""
    backend = make_url(url).get_backend_name()
    ends = time.monotonic() + 10
    while backend in SESSIONS and look(url, SESSIONS[backend]) != [(0,)]:
        assert time.monotonic() < ends
        time.sleep(0.002)


def kill_writers(url: str, look: Sql, processes: Template, rounds: int) -> None:
    """Kill writer after writer, each of which goes on where the one before it was killed; look after each."""
    chance = random.Random(rounds)
    ledger = Ledger()
    for number in range(rounds):
        mode = "async" if chance.random() < 0.5 else "sync"
        if number % 3 == 2:
            writer = processes.start("grow", url, mode, chance.randint(1, 150))
        else:
            writer = processes.start("grow", url, mode)
            if number % 3:
                writer.until_it_says(1)
            time.sleep(chance.uniform(0, 0.1))
            writer.kill()
        assert writer.wait() == -signal.SIGKILL
        ledger.read(writer.said())
        wait_for_sessions_to_end(look, url)
        with SQLAlchemySaver.from_url(url) as saver:
            ledger.check(saver)
        assert unaccounted(partial(look, url)) == (set(), set())
        if url.startswith("sqlite"):
            assert look(url, "PRAGMA integrity_check") == [("ok",)]
    assert max(one.step for one in ledger.known.values()) > rounds


def test_killed_writers_lose_nothing_that_was_acknowledged(database_url: str, look: Sql, processes: Template) -> None:
    kill_writers(database_url, look, processes, 10 if database_url.startswith("sqlite") else 6)


@pytest.mark.slow
def test_writers_killed_two_hundred_times(database_url: str, look: Sql, processes: Template) -> None:
    kill_writers(database_url, look, processes, 200 if database_url.startswith("sqlite") else 60)
