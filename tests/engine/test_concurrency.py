"""Many threads and event loops on one engine: isolated sessions, cancelled turns, streams, and turns that take long to
prepare.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import agentmem.engine
import agentmem.generation.turn
from agentmem import Message, ReplyFormat, Sampling, ToolCall, Turn, Window
from agentmem.errors import EngineClosedError, TurnCancelledError, TurnTimeoutError, WindowError
from agentmem.generation.guided import Grammars

LONG = Sampling(max_tokens=400)
SHORT = Sampling(max_tokens=10)


def user(text: str) -> Message:
    return Message("user", text)


def essence(turn: Turn) -> tuple[Any, ...]:
    """Everything of a turn but how many prompt tokens were at hand."""
    return turn.message, turn.state, turn.token_ids, turn.finish_reason, turn.written


def test_a_stream_gives_the_reply_piece_by_piece(make_engine: Any) -> None:
    engine = make_engine()
    messages = [user("How are you today?")]
    turn = engine.turn(messages, sampling=Sampling(max_tokens=60))
    stream = engine.stream(messages, sampling=Sampling(max_tokens=60))
    pieces = [delta.text for delta in stream]
    assert len(pieces) > 10
    assert "".join(pieces) == turn.message.content
    assert essence(stream.result()) == essence(turn)
    stop = turn.message.content[50:56]
    assert len(stop) == 6
    shown = "".join(d.text for d in engine.stream(messages, sampling=Sampling(max_tokens=60, stop=(stop,))))
    assert shown == turn.message.content[: turn.message.content.index(stop)], "a stop string never shows"


@pytest.mark.parametrize("leave", [False, True])
def test_cancelling_midway_changes_nothing(make_engine: Any, leave: bool) -> None:
    engine = make_engine()
    start = engine.turn([user("Hello.")], sampling=SHORT).state
    before = start.to_bytes()
    messages = [user("Hello."), user("How are you?")]
    stream = engine.stream(messages, start, sampling=LONG)
    if leave:
        for _ in stream:
            break
    else:
        next(iter(stream))
        stream.cancel()
    with pytest.raises(TurnCancelledError):
        stream.result()
    assert start.to_bytes() == before
    undisturbed = make_engine()
    repeated = engine.turn(messages, start, sampling=SHORT)
    assert essence(repeated) == essence(undisturbed.turn(messages, start, sampling=SHORT))


def test_a_failing_turn_reaches_its_caller_and_nobody_else(make_engine: Any, monkeypatch: Any) -> None:
    engine = make_engine()
    expected = engine.turn([user("Fine?")], sampling=SHORT)
    failures = iter([False] * 4 + [True])
    real = engine.model.forward

    def flaky(*args: Any, **kwargs: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("the device is on fire")
        return real(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", flaky)
    with pytest.raises(RuntimeError, match="on fire"):
        engine.turn([user("Fine?")], sampling=Sampling(max_tokens=50))
    assert engine.turn([user("Fine?")], sampling=SHORT).state == expected.state


def test_a_failure_inside_a_forward_pass_leaves_no_torn_prefill(make_engine: Any) -> None:
    engine, undisturbed = make_engine(), make_engine()
    messages = [user("My favorite color is teal.")]
    engine.turn(messages, sampling=SHORT)  # its prefill is at hand for what follows
    calls = iter(range(100))

    def fail(*_: Any) -> None:
        if next(calls) == 4:
            raise MemoryError("out of memory between two layers")

    handle = engine.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        engine.turn(messages, sampling=LONG)
    handle.remove()
    assert essence(engine.turn(messages, sampling=SHORT)) == essence(undisturbed.turn(messages, sampling=SHORT))


async def test_async_stream_and_cancel(make_engine: Any) -> None:
    engine = make_engine()
    messages = [user("How are you today?")]
    turn = await engine.aturn(messages, sampling=SHORT)
    stream = engine.astream(messages, sampling=SHORT)
    assert "".join([delta.text async for delta in stream]) == turn.message.content
    assert essence(await stream.result()) == essence(turn)
    task = asyncio.create_task(engine.aturn(messages, sampling=Sampling(max_tokens=2000)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert essence(await engine.aturn(messages, sampling=SHORT)) == essence(turn)


def test_closing_ends_what_runs_and_refuses_what_comes(make_engine: Any) -> None:
    engine = make_engine()
    started, failed = threading.Event(), []

    def run() -> None:
        try:
            for _ in engine.stream([user("How are you?")], sampling=Sampling(max_tokens=3000)):
                started.set()
        except EngineClosedError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(10)
    engine.close()
    thread.join(10)
    assert failed
    with pytest.raises(EngineClosedError):
        engine.turn([user("Anyone?")])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_is_refused_at_once(make_engine: Any) -> None:
    """The thread that owns the model does not come along: a turn would wait for it for ever."""
    engine = make_engine()
    turn = engine.turn([user("Hello.")], sampling=SHORT)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        refused = 0
        for attempt in (
            lambda: engine.turn([user("Hello.")], sampling=SHORT, timeout=5),
            lambda: engine.stream([user("Hello.")], sampling=SHORT),
            lambda: engine.count_tokens([user("Hello.")]),
            lambda: asyncio.run(engine.aturn([user("Hello.")], sampling=SHORT)),
        ):
            try:
                attempt()
            except EngineClosedError as error:
                refused += f"process {os.getppid()}" in str(error)
        engine.close()
        os.write(write, bytes([refused]))
        os._exit(0)
    os.close(write)
    assert os.read(read, 1) == bytes([4])
    os.close(read)
    os.waitpid(child, 0)
    assert essence(engine.turn([user("Hello.")], sampling=SHORT)) == essence(turn)


LARGE = [Message("user", "the quick brown fox says hello " * 1100)]
SMALL = [Message("user", "How are you?")]
REPLY = Sampling(max_tokens=4)
PLAIN = {"type": "object", "properties": {"answer": {"type": "string", "maxLength": 3}}, "required": ["answer"]}


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
        large = pool.submit(engine.turn, LARGE, sampling=REPLY)
        for _ in range(3):
            engine.turn(SMALL, sampling=REPLY)
        assert not large.done()
        gate.set()
        apart = large.result()
    # The same as prepared on the thread of the model.
    monkeypatch.setattr("agentmem.engine._LARGE", 10**9)
    engine.forget_prefills()
    there = engine.turn(LARGE, sampling=REPLY)
    assert (apart.state, apart.token_ids, apart.truncation) == (there.state, there.token_ids, there.truncation)


def test_tokens_are_counted_while_the_model_is_at_work(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    begun, opened, run = threading.Event(), threading.Event(), agentmem.engine.run_turn

    def waiting(*arguments: Any) -> Any:
        begun.set()
        assert opened.wait(60)
        return (yield from run(*arguments))

    monkeypatch.setattr("agentmem.engine.run_turn", waiting)
    with ThreadPoolExecutor(2) as pool:
        turn = pool.submit(engine.turn, SMALL, sampling=REPLY)
        assert begun.wait(60)
        try:
            counted = pool.submit(engine.count_tokens, SMALL).result(60)
        finally:
            opened.set()
        assert counted > 0
        assert turn.result().usage.input_tokens > counted, "the prompt also opens the reply"


def test_a_large_turn_is_given_up_at_its_time(make_engine: Any, gate: threading.Event) -> None:
    engine = make_engine()
    begin = time.monotonic()
    with pytest.raises(TurnTimeoutError, match=r"timeout of 0\.2 seconds"):
        engine.turn(LARGE, timeout=0.2)
    assert time.monotonic() - begin < 10
    gate.set()
    assert engine.turn(LARGE, sampling=REPLY, timeout=60).written > 1000
    # Also after it was prepared, by the time that it was given at first.
    with pytest.raises(TurnTimeoutError):
        engine.turn(LARGE, sampling=Sampling(max_tokens=2000), timeout=1.0)


async def test_a_large_turn_is_cancelled_while_it_is_prepared(make_engine: Any, gate: threading.Event) -> None:
    engine = make_engine()
    task = asyncio.create_task(engine.aturn(LARGE))
    stream = engine.astream(LARGE)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream.cancel()
    with pytest.raises(TurnCancelledError):
        await stream.result()
    gate.set()
    assert (await engine.aturn(LARGE, sampling=REPLY)).written > 1000


def test_closing_ends_what_is_prepared(make_engine: Any, gate: threading.Event) -> None:
    engine = make_engine()
    with ThreadPoolExecutor(2) as pool:
        turns = [pool.submit(engine.turn, LARGE) for _ in range(2)]
        time.sleep(0.05)
        engine.close()
        gate.set()
        for turn in turns:
            with pytest.raises(EngineClosedError):
                turn.result(60)
    with pytest.raises(EngineClosedError):
        engine.turn(LARGE)


# Larger than what is prepared apart in the test below.
SCHEMA = {**PLAIN, "description": "x" * 4000}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
TEXT = [Message("user", LARGE[0].content[:4000])]
CALLS: dict[str, Callable[[Any], Any]] = {
    "a message": lambda engine: engine.turn(TEXT, sampling=REPLY),
    "many messages": lambda engine: engine.turn(SMALL * 300, sampling=REPLY),
    "arguments": lambda engine: engine.turn(
        [*SMALL, Message("assistant", "", (ToolCall("f", {"x": ["y" * 4000]}, "1"),)), Message("tool", "z")],
        sampling=REPLY,
    ),
    "a schema": lambda engine: engine.turn(SMALL, form=ReplyFormat(schema=SCHEMA), sampling=Sampling(max_tokens=30)),
    "a forced call": lambda engine: engine.turn(
        SMALL, form=ReplyFormat(tools=[TOOL], calls="must"), sampling=Sampling(max_tokens=60)
    ),
    "a write": lambda engine: engine.remember(TEXT),
}


@pytest.mark.parametrize("what", CALLS)
def test_whatever_is_large_is_prepared_apart(what: str, make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    monkeypatch.setattr("agentmem.engine._LARGE", 3000)

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
    engine.turn(SMALL, sampling=Sampling(max_tokens=30), form=form)
    assert threads == {"agentmem-tiny"}


def test_what_is_wrong_with_a_large_turn_is_said_as_ever(make_engine: Any) -> None:
    engine = make_engine()
    with pytest.raises(WindowError, match="a window of 100 tokens"):
        engine.turn([Message("system", LARGE[0].content), *SMALL], window=Window(tokens=100))
