"""A deletion that is killed at any of its steps is completed by the next process: all of it goes, and nothing else."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import ConfigError, StorageError
from agentmem_chroma import Fact, FactStore
from agentmem_governance import Governor
from agentmem_sql import SQLAlchemySaver
from tests.helpers.fact_processes import Hashed
from tests.helpers.governance_processes import SECRET, THREAD, Memory, forget, forget_and_die, message_of, say, told
from tests.helpers.processes import Process
from tests.helpers.sql_cases import config

Processes = Callable[..., Process]
SAID = ["My editor is helix.", f"The codename is {SECRET}.", "My name is Tom."]


def left(folder: Path) -> list[str]:
    pieces = [SECRET.encode(name) for name in ("utf-8", "utf-16-le", "utf-16-be")]
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file.name for file in files if any(piece in file.read_bytes() for piece in pieces)]


def fill(folder: Path, *, facts: bool) -> str:
    """Two users' threads, with an audit trail; gives the URL."""
    folder.mkdir()
    url = f"sqlite:///{folder}/threads.db"
    with SQLAlchemySaver.from_url(url, audit=True) as saver:
        for text in SAID:
            say(saver, text)
        say(saver, "My editor is vim.", "ben/1")
        message = message_of(saver)
    if facts:
        with FactStore(folder / "facts", embeddings=Hashed()) as store:
            drawn = Fact(f"The codename is {SECRET}.", thread=THREAD, metadata={"message": message})
            store.add([drawn, Fact("kept", thread="ben/1")])
    return url


def check(folder: Path, what: str, *, facts: bool) -> None:
    """Complete what was begun, or begin it, and look whether it is as if nothing had happened."""
    with ExitStack() as stack:
        saver = stack.enter_context(SQLAlchemySaver.from_url(f"sqlite:///{folder}/threads.db"))
        store = None
        if facts:
            store = stack.enter_context(FactStore(folder / "facts", embeddings=Hashed(), rebuild=True))
        engine: Any = Memory()
        governor = Governor(saver, facts=store, engines=[engine])
        receipts = governor.resume()
        if message_of(saver):
            assert receipts == [], "a deletion that was begun is complete"
            receipts = [forget(governor, what)]
        assert governor.pending() == []
        assert left(folder) == []
        for receipt in receipts:
            assert governor.verify(receipt).holds
            assert receipt.checkpoints == {"subject": 9, "message": 6, "rewritten": 0}[what]
            assert receipt.rewritten == {"subject": 0, "message": 0, "rewritten": 6}[what]
        assert governor.audit(THREAD).holds
        assert governor.audit().holds
        assert told(saver, "ben/1") == ["My editor is vim."]
        if what == "subject":
            assert list(saver.list(config(THREAD))) == []
        else:
            assert told(saver) == [SAID[0], SAID[2]]
            # Those from before, and a new one; or all.
            assert len(list(saver.list(config(THREAD)))) == {"message": 4, "rewritten": 9}[what]
        if store is not None:
            assert [fact.text for fact in store.facts()] == ["kept"]


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("what", ["subject", "message", "rewritten"])
def test_killed_before_any_statement(tmp_path: Path, processes: Processes, what: str, every: int) -> None:
    fill(tmp_path / "data", facts=False)
    for die_at in range(2, 200, every):  # the first one reads what there is
        folder = tmp_path / f"{die_at}"
        shutil.copytree(tmp_path / "data", folder)
        ended = processes(forget_and_die, f"sqlite:///{folder}/threads.db", "", what, die_at, "").wait()
        assert ended in (0, -signal.SIGKILL)
        check(folder, what, facts=False)
        if ended == 0:
            break
    assert 10 < die_at < 199


@pytest.mark.parametrize("step", ["before delete", "after delete", "after rebuild_index"])
def test_killed_at_the_fact_store(tmp_path: Path, processes: Processes, step: str) -> None:
    folder = tmp_path / "data"
    arguments = (fill(folder, facts=True), f"{folder}/facts", "message", 0, step)
    assert processes(forget_and_die, *arguments).wait() == -signal.SIGKILL
    check(folder, "message", facts=True)


def test_what_was_begun_comes_first_and_needs_its_stores(tmp_path: Path, processes: Processes) -> None:
    folder = tmp_path / "data"
    url = fill(folder, facts=True)
    processes(forget_and_die, url, f"{folder}/facts", "subject", 0, "before delete").wait()
    with SQLAlchemySaver.from_url(url) as saver:
        governor = Governor(saver)
        with pytest.raises(StorageError, match=r"resume\(\)"):
            governor.forget("ben")
        with pytest.raises(ConfigError, match="facts="):
            governor.resume()
    check(folder, "subject", facts=True)


def test_a_thread_that_went_on_after_the_plan_is_planned_again(tmp_path: Path, processes: Processes) -> None:
    folder = tmp_path / "data"
    url = fill(folder, facts=False)
    engine: Any = Memory()
    for die_at in range(1, 100):  # the first statement after the plan is stored
        processes(forget_and_die, url, "", "message", die_at, "").wait()
        with SQLAlchemySaver.from_url(url) as saver:
            if Governor(saver).pending():
                break
    with SQLAlchemySaver.from_url(url) as saver:
        say(saver, "My shell is fish.")
        with pytest.raises(ConfigError, match="engines="):
            Governor(saver).resume()
        (receipt,) = Governor(saver, engines=[engine]).resume()
        assert told(saver) == [SAID[0], SAID[2], "My shell is fish."]
        assert Governor(saver).verify(receipt).holds
        assert left(folder) == []
