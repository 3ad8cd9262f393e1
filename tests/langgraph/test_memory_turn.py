"""The carrier's contract: one call, nothing applied twice, nothing but a digest to be seen, no LLM cache."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import is_dataclass
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache

from agentmem.errors import CorruptStateError, TurnError
from agentmem_langgraph import ChatDeltaMem, MemoryTurn
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.talks import ASK, KNOWN, TELL, UNKNOWN, told


def test_a_carrier_serves_one_call(llm: ChatDeltaMem) -> None:
    turn = MemoryTurn()
    llm.invoke(TELL, memory=turn)
    state = turn.state
    for again in (
        lambda: llm.invoke(TELL, memory=turn),
        lambda: list(llm.stream(TELL, memory=turn)),
        lambda: llm.remember(TELL, memory=turn),
    ):
        with pytest.raises(TurnError, match="one call"):
            again()
    assert turn.state is state


async def test_calls_at_once_with_one_carrier_raise_and_apply_at_most_once(llm: ChatDeltaMem) -> None:
    turn = MemoryTurn()
    with pytest.raises(TurnError, match="one call"):
        llm.batch([TELL, ASK, "Hello!"], memory=turn)
    assert turn.state is None or turn.state.count == 2
    turn = MemoryTurn()
    with pytest.raises(TurnError, match="serving another call"):
        await asyncio.gather(llm.ainvoke(TELL, memory=turn), llm.ainvoke(TELL, memory=turn))


def test_a_failed_call_leaves_the_carrier_as_it_was(llm: ChatDeltaMem, fake: FakeEngine) -> None:
    state = told(llm)
    turn = MemoryTurn(state)
    fake.failures = 2
    with pytest.raises(RuntimeError):
        llm.invoke(ASK, memory=turn)
    with pytest.raises(RuntimeError):
        list(llm.stream(ASK, memory=turn))
    assert turn.state == state
    assert not turn.used
    assert llm.invoke(ASK, memory=turn).text == KNOWN


async def test_leaving_a_stream_early_cancels_the_turn(llm: ChatDeltaMem, fake: FakeEngine) -> None:
    turns = [MemoryTurn(told(llm)) for _ in range(2)]
    stream, astream = llm.stream(ASK, memory=turns[0]), llm.astream(ASK, memory=turns[1])
    next(stream)
    stream.close()
    assert fake.cancelled == 1
    await anext(astream)
    await astream.aclose()
    assert fake.cancelled == 2
    assert not any(turn.used for turn in turns)


def test_the_memory_is_there_when_the_last_chunk_is(llm: ChatDeltaMem) -> None:
    turn = MemoryTurn()
    for chunk in llm.stream(TELL, memory=turn):
        assert turn.used == (chunk.chunk_position == "last")


def test_a_carrier_shows_its_digest_and_nothing_else(llm: ChatDeltaMem) -> None:
    state = told(llm)
    turn = MemoryTurn(state)
    assert repr(turn) == str(turn) == f"MemoryTurn({state.digest})"
    assert repr(MemoryTurn()) == "MemoryTurn(empty)"
    assert not is_dataclass(turn)
    assert not hasattr(turn, "__dict__")
    assert not hasattr(turn, "to_dict")
    assert copy.deepcopy(turn) is turn
    with pytest.raises(TypeError, match="to_dict"):
        copy.copy(turn)


def test_a_carrier_takes_the_plain_form_and_verifies_it(llm: ChatDeltaMem) -> None:
    state = told(llm)
    assert MemoryTurn(state.to_dict()).state == state
    with pytest.raises(CorruptStateError):
        MemoryTurn(state.to_dict() | {"count": 7})
    with pytest.raises(TurnError, match=r"MemoryTurn\(state\)"):
        llm.invoke(ASK, memory=state)


@pytest.fixture
def llm_cache() -> Any:
    cache = InMemoryCache()
    set_llm_cache(cache)
    yield cache
    set_llm_cache(None)


def test_an_llm_cache_never_answers_for_another_memory(llm: ChatDeltaMem, llm_cache: InMemoryCache) -> None:
    known, empty = MemoryTurn(told(llm)), MemoryTurn()
    assert llm.invoke(ASK, memory=known).text == KNOWN
    assert llm.invoke(ASK, memory=empty).text == UNKNOWN
    assert known.used
    assert empty.used
    assert not llm_cache._cache


@pytest.mark.parametrize("cache", [True, None, InMemoryCache()], ids=["global", "default", "own"])
def test_a_memory_and_an_llm_cache_together_raise(fake: FakeEngine, llm_cache: InMemoryCache, cache: Any) -> None:
    llm = ChatDeltaMem(engine=fake, cache=cache)
    turn = MemoryTurn()
    with pytest.raises(TurnError, match="cache"):
        llm.invoke(TELL, memory=turn)
    assert not turn.used
    assert not fake.calls


def test_a_call_without_memory_may_be_cached(fake: FakeEngine, llm_cache: InMemoryCache) -> None:
    llm = ChatDeltaMem(engine=fake, cache=True)
    assert llm.invoke(ASK).text == llm.invoke(ASK).text
    assert len(fake.calls) == 1
