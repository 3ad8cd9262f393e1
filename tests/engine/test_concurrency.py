"""Many threads and event loops on one engine: isolated sessions, cancelled turns, streams."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from agentmem import Engine, MemoryState, Message, Sampling, Turn
from agentmem.errors import EngineClosedError, TurnCancelledError
from tests.helpers.numeric import assert_states_close

LONG = Sampling(max_tokens=400)
SHORT = Sampling(max_tokens=10)


def user(text: str) -> Message:
    return Message("user", text)


def essence(turn: Turn) -> tuple[Any, ...]:
    """Everything of a turn but how many prompt tokens were at hand."""
    return turn.message, turn.state, turn.token_ids, turn.finish_reason, turn.written


def converse(engine: Engine, name: str) -> list[Turn]:
    history: list[Message] = []
    state: MemoryState | None = None
    turns = []
    for said in ("My name is {}.", "Remember that, {}!", "How are you, {}?"):
        history.append(user(said.format(name)))
        turn = engine.turn(history, state, sampling=SHORT)
        history.append(turn.message)
        state = turn.state
        turns.append(turn)
    return turns


@pytest.mark.parametrize("max_batch", [64, 1])
def test_sessions_beside_each_other_equal_their_solo_runs(make_engine: Any, max_batch: int) -> None:
    engine = make_engine(max_batch=max_batch)
    names = [f"fox {n}" for n in range(6)]
    alone = {name: converse(engine, name) for name in names}
    engine.forget_prefills()
    with ThreadPoolExecutor(len(names)) as pool:
        together = dict(zip(names, pool.map(lambda name: converse(engine, name), names), strict=True))
    for name in names:
        assert [t.token_ids for t in together[name]] == [t.token_ids for t in alone[name]]
        for beside, solo in zip(together[name], alone[name], strict=True):
            assert_states_close(beside.state, solo.state)
            assert beside.state.record == solo.state.record
            assert max_batch > 1 or beside.state == solo.state


def test_a_stream_gives_the_reply_piece_by_piece(make_engine: Any) -> None:
    engine = make_engine()
    messages = [user("How are you today?")]
    turn = engine.turn(messages, sampling=LONG)
    stream = engine.stream(messages, sampling=LONG)
    pieces = [delta.text for delta in stream]
    assert len(pieces) > 10
    assert "".join(pieces) == turn.message.content
    assert essence(stream.result()) == essence(turn)
    stop = turn.message.content[50:56]
    shown = "".join(d.text for d in engine.stream(messages, sampling=Sampling(max_tokens=400, stop=(stop,))))
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


async def test_async_turns_run_beside_each_other_and_never_block_the_loop(make_engine: Any) -> None:
    engine = make_engine()
    alone = [engine.turn([user(f"Number {n}?")], sampling=SHORT) for n in range(4)]
    beats = 0

    async def heart() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0.002)

    pulse = asyncio.create_task(heart())
    together = await asyncio.gather(*(engine.aturn([user(f"Number {n}?")], sampling=SHORT) for n in range(4)))
    pulse.cancel()
    for beside, solo in zip(together, alone, strict=True):
        assert beside.token_ids == solo.token_ids
        assert_states_close(beside.state, solo.state)
    assert beats > 3


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
