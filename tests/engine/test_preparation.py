"""Turns that take long to prepare: others go on meanwhile, and the result is the same."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import agentmem.engine
import agentmem.generation.turn
from agentmem import Message, ReplyFormat, Sampling, ToolCall, Window
from agentmem.errors import EngineClosedError, TurnCancelledError, TurnTimeoutError, WindowError
from agentmem.generation.guided import Grammars

LONG = [Message("user", "the quick brown fox says hello " * 1500)]
SHORT = [Message("user", "How are you?")]
REPLY = Sampling(max_tokens=4)
PLAIN = {"type": "object", "properties": {"answer": {"type": "string", "maxLength": 3}}, "required": ["answer"]}
LARGE_SCHEMA = {**PLAIN, "description": "x" * 40_000}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing large is prepared before the event is set."""
    opened, prepare = threading.Event(), agentmem.engine.prepare_turn

    def waiting(*arguments: Any) -> Any:
        assert opened.wait(60)
        return prepare(*arguments)

    monkeypatch.setattr("agentmem.engine.prepare_turn", waiting)
    yield opened
    opened.set()


def test_others_go_on_while_a_large_turn_is_prepared(
    make_engine: Any, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(engine.turn, LONG, sampling=REPLY)
        for _ in range(3):
            engine.turn(SHORT, sampling=REPLY)
        assert not large.done()
        gate.set()
        apart = large.result()
    # The same as prepared on the thread of the model.
    monkeypatch.setattr("agentmem.engine._LARGE", 10**9)
    engine.forget_prefills()
    there = engine.turn(LONG, sampling=REPLY)
    assert (apart.state, apart.token_ids, apart.truncation) == (there.state, there.token_ids, there.truncation)


def test_a_large_turn_is_given_up_at_its_time(make_engine: Any, gate: threading.Event) -> None:
    engine = make_engine()
    begin = time.monotonic()
    with pytest.raises(TurnTimeoutError, match=r"timeout of 0\.2 seconds"):
        engine.turn(LONG, timeout=0.2)
    assert time.monotonic() - begin < 10
    gate.set()
    assert engine.turn(LONG, sampling=REPLY, timeout=60).written > 1000
    # Also after it was prepared, by the time that it was given at first.
    with pytest.raises(TurnTimeoutError):
        engine.turn(LONG, sampling=Sampling(max_tokens=2000), timeout=1.0)


async def test_a_large_turn_is_cancelled_while_it_is_prepared(make_engine: Any, gate: threading.Event) -> None:
    engine = make_engine()
    task = asyncio.create_task(engine.aturn(LONG))
    stream = engine.astream(LONG)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream.cancel()
    with pytest.raises(TurnCancelledError):
        await stream.result()
    gate.set()
    assert (await engine.aturn(LONG, sampling=REPLY)).written > 1000


def test_closing_ends_what_is_prepared(make_engine: Any, gate: threading.Event) -> None:
    engine = make_engine()
    with ThreadPoolExecutor(2) as pool:
        turns = [pool.submit(engine.turn, LONG) for _ in range(2)]
        time.sleep(0.05)
        engine.close()
        gate.set()
        for turn in turns:
            with pytest.raises(EngineClosedError):
                turn.result(60)
    with pytest.raises(EngineClosedError):
        engine.turn(LONG)


TOOL = {"type": "function", "function": {"name": "f", "parameters": LARGE_SCHEMA}}
CALLS: dict[str, Callable[[Any], Any]] = {
    "a message": lambda engine: engine.turn(LONG, sampling=REPLY),
    "many messages": lambda engine: engine.turn(SHORT * 3000, sampling=REPLY),
    "arguments": lambda engine: engine.turn(
        [*SHORT, Message("assistant", "", (ToolCall("f", {"x": ["y" * 40_000]}, "1"),)), Message("tool", "z")],
        sampling=REPLY,
    ),
    "a schema": lambda engine: engine.turn(
        SHORT, form=ReplyFormat(schema=LARGE_SCHEMA), sampling=Sampling(max_tokens=30)
    ),
    "a forced call": lambda engine: engine.turn(
        SHORT, form=ReplyFormat(tools=[TOOL], calls="must"), sampling=Sampling(max_tokens=60)
    ),
    "a write": lambda engine: engine.remember(LONG),
}


@pytest.mark.parametrize("what", CALLS)
def test_whatever_is_large_is_prepared_apart(what: str, make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()

    def noting(place: Any, name: str) -> None:
        done = getattr(place, name)

        def note(*arguments: Any, **options: Any) -> Any:
            threads.add(threading.current_thread().name)
            return done(*arguments, **options)

        monkeypatch.setattr(place, name, note)

    noting(agentmem.generation.turn, "plan_turn")
    noting(agentmem.generation.turn, "plan_remember")
    noting(Grammars, "constraint")
    engine = make_engine()
    CALLS[what](engine)
    assert threads == {"agentmem-tiny-preparation"}
    threads.clear()
    form = ReplyFormat(schema=PLAIN) if "schema" in what else None
    engine.turn(SHORT, sampling=Sampling(max_tokens=30), form=form)
    assert threads == {"agentmem-tiny"}


def test_tokens_of_a_large_message_are_counted(make_engine: Any) -> None:
    engine = make_engine()
    assert engine.count_tokens(LONG) == len(engine._context.transcript.render(LONG).input_ids)


def test_what_is_wrong_with_a_large_turn_is_said_as_ever(make_engine: Any) -> None:
    engine = make_engine()
    with pytest.raises(WindowError, match="a window of 100 tokens"):
        engine.turn([Message("system", LONG[0].content), *SHORT], window=Window(tokens=100))
