"""The carrier's contract: one call, nothing applied twice, nothing but a digest to be seen, no LLM cache."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import is_dataclass
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel

from agentmem import MemoryState
from agentmem.errors import CorruptStateError, TurnError
from agentmem_langgraph import ChatDeltaMem, MemoryTurn
from tests.helpers.fake_engine import FakeEngine

TELL = "My favorite color is teal."
ASK = "What is my favorite color?"
KNOWN = "Your favorite color is teal."


def told(llm: BaseChatModel) -> MemoryState:
    turn = MemoryTurn()
    llm.invoke(TELL, memory=turn)
    assert turn.state is not None
    return turn.state


# ---------------------------------------------------------------------- the carrier


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


def test_a_batch_with_one_carrier_raises_and_applies_at_most_once(llm: ChatDeltaMem) -> None:
    turn = MemoryTurn()
    with pytest.raises(TurnError, match="one call"):
        llm.batch([TELL, ASK, "Hello!"], memory=turn)
    assert turn.state is None or turn.state.count == 2


async def test_a_gather_with_one_carrier_raises(llm: ChatDeltaMem) -> None:
    turn = MemoryTurn()
    with pytest.raises(TurnError, match="serving another call"):
        await asyncio.gather(llm.ainvoke(TELL, memory=turn), llm.ainvoke(TELL, memory=turn))


def test_a_batch_with_a_carrier_each_is_fine(llm: ChatDeltaMem) -> None:
    turns = [MemoryTurn(), MemoryTurn()]
    llm.batch([TELL, TELL])
    for turn in turns:
        llm.batch([TELL], memory=turn)
    assert turns[0].state == turns[1].state


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


def test_leaving_a_stream_early_cancels_the_turn(llm: ChatDeltaMem, fake: FakeEngine) -> None:
    turn = MemoryTurn(told(llm))
    stream = llm.stream(ASK, memory=turn)
    next(stream)
    stream.close()
    assert fake.cancelled == 1
    assert not turn.used


async def test_leaving_an_async_stream_early_cancels_the_turn(llm: ChatDeltaMem, fake: FakeEngine) -> None:
    turn = MemoryTurn(told(llm))
    stream = llm.astream(ASK, memory=turn)
    await anext(stream)
    await stream.aclose()
    assert fake.cancelled == 1
    assert not turn.used


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


def test_a_bare_state_is_refused(llm: ChatDeltaMem) -> None:
    with pytest.raises(TurnError, match=r"MemoryTurn\(state\)"):
        llm.invoke(ASK, memory=told(llm))


# ---------------------------------------------------------------------- the LLM cache


@pytest.fixture
def llm_cache() -> Any:
    cache = InMemoryCache()
    set_llm_cache(cache)
    yield cache
    set_llm_cache(None)


def test_an_llm_cache_never_answers_for_another_memory(llm: ChatDeltaMem, llm_cache: InMemoryCache) -> None:
    known, empty = MemoryTurn(told(llm)), MemoryTurn()
    assert llm.invoke(ASK, memory=known).text == KNOWN
    assert llm.invoke(ASK, memory=empty).text == "I do not know yet."
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
