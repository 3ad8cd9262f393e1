"""Ctrl-C anywhere in a call: the saver goes on, nothing is locked, and what was stored is whole.

Python handles a signal when it enters a function and when a C function has returned, so these are the points at which
the interruption comes here: a sample of those of one call, another with every test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from types import FrameType
from typing import Any

import pytest
from langchain_core.messages import HumanMessage

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put

POINTS = 45
# SQLAlchemy's pool may lose a connection when it is interrupted in the middle of giving it out.
POINTS_OF_A_SAVER = 15


def interrupted(call: Callable[[], Any], at: int = -1) -> tuple[bool, int]:
    """Call, with an interruption at a point; gives whether it came, and the number of points that were passed."""
    points = count(1)
    passed = 0

    def profile(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal passed
        if event in ("call", "c_return"):
            passed = next(points)
            if passed == at:
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    except (KeyboardInterrupt, TypeError):  # ormsgpack makes a TypeError of it in LangGraph's part of the serializer
        return True, passed
    finally:
        sys.setprofile(before)
    return False, passed


def messages(number: int) -> dict[str, Any]:
    return {"messages": [HumanMessage(f"message {n}", id=str(n)) for n in (1, 2, number)]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("method", ["put", "get_tuple", "prune"])
def test_an_interruption_anywhere(database_url: str, ask: Callable[..., list[Any]], method: str) -> None:
    fresh, newest = 0, 0
    while fresh * POINTS_OF_A_SAVER < POINTS:
        with SQLAlchemySaver.from_url(database_url) as saver, SQLAlchemySaver.from_url(database_url) as other:
            put(saver, config(), messages(0))
            at = put(saver, config(), messages(0))
            calls: dict[str, Callable[[], Any]] = {
                "put": lambda: put(saver, config(), messages(newest + 1)),  # noqa: B023
                "get_tuple": lambda: saver.get_tuple(at),  # noqa: B023
                "prune": lambda: saver.prune(["t"]),
            }
            _, points = interrupted(calls[method])
            newest = 1 if method == "put" else 0
            for point in range(1 + fresh, points, points // POINTS_OF_A_SAVER):
                came, _ = interrupted(calls[method], point)
                # Whatever it was, the next call finds the database free, from elsewhere too, and what is there whole.
                number = newest + 1
                put(other, config(), messages(number))
                newest = number
                found = saver.get_tuple(config())
                assert found is not None
                assert found.checkpoint["channel_values"] == messages(number), (came, point)
                saver.copy_thread("t", "copy")
                saver.delete_thread("copy")
            for one in saver.list(config()):  # reads and compares every stored value
                assert len(one.checkpoint["channel_values"]["messages"]) == 3
            saver.delete_thread("t")
            assert [ask(f"SELECT count(*) FROM agentmem_{name}")[0][0] for name in ("checkpoints", "blobs")] == [0, 0]
        fresh += 1


def test_an_interrupted_commit_is_an_interruption(database_url: str) -> None:
    def profile(frame: FrameType, event: str, _arg: object) -> None:
        if event == "call" and frame.f_code.co_name in ("_do_commit", "_commit"):
            raise KeyboardInterrupt

    with SQLAlchemySaver.from_url(database_url) as saver:
        put(saver, config(), messages(0))
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            with pytest.raises(KeyboardInterrupt):
                saver.delete_thread("t")
        finally:
            sys.setprofile(before)
        found = saver.get_tuple(config())
        assert found is not None
        assert found.checkpoint["channel_values"] == messages(0)
        saver.delete_thread("t")
        assert saver.get_tuple(config()) is None
