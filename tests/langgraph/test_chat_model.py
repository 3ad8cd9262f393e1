"""ChatDeltaMem: memory through a call, what its carrier promises, streams, options and metadata."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import is_dataclass
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, HumanMessage, trim_messages
from pydantic import ValidationError

from agentmem import Delta, Message, Window
from agentmem.errors import ConfigError, CorruptStateError, MissingAdapterError, TurnError
from agentmem_langgraph import ChatDeltaMem, MemoryTurn, MemoryWarning, with_context
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.talks import ASK, KNOWN, TELL, UNKNOWN, gathered, told


def test_a_memory_goes_in_and_the_new_one_comes_out(llm: ChatDeltaMem) -> None:
    state = told(llm)
    turn = MemoryTurn(state)
    assert llm.invoke(ASK, memory=turn).text == KNOWN
    assert turn.state is not None
    assert turn.state != state
    assert turn.state.count == state.count + 2


def test_without_a_memory_it_is_a_plain_chat_model(llm: ChatDeltaMem) -> None:
    told(llm)
    assert llm.invoke(ASK).text == UNKNOWN
    assert llm.invoke([HumanMessage(TELL), AIMessage("Noted."), HumanMessage(ASK)]).text == KNOWN


async def test_all_four_ways_to_call_give_the_same_reply_and_memory(llm: ChatDeltaMem) -> None:
    state = told(llm)
    turns = [MemoryTurn(state) for _ in range(4)]
    replies = [
        llm.invoke(ASK, memory=turns[0]),
        await llm.ainvoke(ASK, memory=turns[1]),
        gathered(list(llm.stream(ASK, memory=turns[2]))),
        gathered([chunk async for chunk in llm.astream(ASK, memory=turns[3])]),
    ]
    assert [reply.text for reply in replies] == [KNOWN] * 4
    assert len({turn.state for turn in turns}) == 1
    assert len({str(reply.usage_metadata) for reply in replies}) == 1
    assert len({str(reply.response_metadata) for reply in replies}) == 1


def test_the_metadata_names_the_memory_by_its_digest_only(llm: ChatDeltaMem) -> None:
    turn = MemoryTurn(told(llm))
    reply = llm.invoke(ASK, memory=turn)
    assert turn.state is not None
    assert reply.response_metadata == {
        "model_name": "fake",
        "finish_reason": "stop",
        "memory": {"digest": turn.state.digest, "written": 1, "read": 0},
    }
    assert reply.usage_metadata == {
        "input_tokens": 6,
        "output_tokens": 5,
        "total_tokens": 11,
        "input_token_details": {"cache_read": 3},
    }


def test_edits_and_deletions_of_the_history_are_reported(llm: ChatDeltaMem) -> None:
    turn = MemoryTurn()
    reply = llm.invoke(history := [HumanMessage(TELL), AIMessage("Noted."), HumanMessage(ASK)], memory=turn)
    for changed, found in (
        ([HumanMessage("My favorite color is red."), *history[1:], reply, HumanMessage("d")], {"edits": [0]}),
        ([*history[:2], reply, HumanMessage("d")], {"deletions": 1}),
    ):
        metadata = llm.invoke(changed, memory=MemoryTurn(turn.state)).response_metadata
        assert {name: metadata[name] for name in ("edits", "deletions") if name in metadata} == found


async def test_remember_writes_without_a_reply(llm: ChatDeltaMem, fake: FakeEngine) -> None:
    turns = [MemoryTurn(), MemoryTurn()]
    assert llm.remember([("user", TELL)], memory=turns[0]).written == 1
    assert (await llm.aremember(TELL, memory=turns[1])).written == 1
    assert not fake.calls
    assert turns[0].state == turns[1].state
    assert llm.invoke(ASK, memory=MemoryTurn(turns[0].state)).text == KNOWN
    for wrong in (None, turns[0].state, {}):
        with pytest.raises(TurnError, match="takes a MemoryTurn"):
            llm.remember(TELL, memory=wrong)  # type: ignore[arg-type]
        with pytest.raises(TurnError, match="takes a MemoryTurn"):
            await llm.aremember(TELL, memory=wrong)  # type: ignore[arg-type]


def test_use_memory_false_is_the_bare_model_and_leaves_the_memory_alone(llm: ChatDeltaMem) -> None:
    state = told(llm)
    bare = llm.model_copy(update={"use_memory": False})
    turn = MemoryTurn(state)
    assert bare.invoke(ASK, memory=turn).text == UNKNOWN
    assert turn.state == state
    with pytest.raises(MissingAdapterError):
        bare.remember(TELL, memory=MemoryTurn())


def test_a_stream_has_one_text_block_usage_once_and_an_end(llm: ChatDeltaMem) -> None:
    chunks = list(llm.stream(ASK))
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]
    assert sum(chunk.usage_metadata is not None for chunk in chunks) == 1
    assert sum(bool(chunk.response_metadata) for chunk in chunks) == 1
    whole = gathered(chunks)
    assert [block["type"] for block in whole.content_blocks] == ["text"]
    assert len(chunks) > 3
    newer = gathered(list(ChatDeltaMem(engine=llm.engine, output_version="v1").stream(ASK)))
    assert [block["type"] for block in newer.content] == ["text"]
    assert newer.text == UNKNOWN


@pytest.mark.parametrize(
    "deltas",
    [
        [Delta("  Two lines.\n"), Delta("\nAnd more. \n")],
        [Delta("Sure.\n\n"), Delta('{"name": "f", "arguments": {"x": 1.5, "y": "ü"}}', "tool_call")],
        [Delta("hm\n", "reasoning"), Delta("\n\n"), Delta("Right. "), Delta("So.")],
        [Delta(" Sure"), Delta('{"name": "f", "arguments": {}}', "tool_call"), Delta("\n"), Delta("{", "tool_call")],
        [Delta('{"name": "f", "arguments": {"x": ', "tool_call")],
        [Delta('{"arguments": {}}', "tool_call")],
    ],
    ids=["space", "call", "reasoning", "call-then-invalid", "cut-off", "no-name"],
)
def test_a_streamed_reply_and_a_whole_one_are_the_same_message_to_the_memory(
    fake: FakeEngine, deltas: list[Delta]
) -> None:
    llm = ChatDeltaMem(engine=fake)
    for how in (
        lambda turn: llm.invoke("Hello!", memory=turn),
        lambda turn: gathered(list(llm.stream("Hello!", memory=turn))),
    ):
        fake.scripted.append(list(deltas))
        turn = MemoryTurn()
        reply = how(turn)
        kinds = [delta.kind for delta in deltas]
        assert len(reply.tool_calls) + len(reply.invalid_tool_calls) == kinds.count("tool_call")
        # What follows in the same history is new, and nothing else.
        llm.invoke([HumanMessage("Hello!"), reply, HumanMessage("Go on.")], memory=(after := MemoryTurn(turn.state)))
        assert turn.state is not None
        assert after.state is not None
        assert after.state.count == turn.state.count + 2


def call_of(text: str, call: str = "call_1") -> list[Delta]:
    """A call, letter by letter."""
    return [Delta(letter, "tool_call", call) for letter in text]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('\n{"name": "f", "arguments": {"x": {"y": ["}", "\\"}"]}}}\n', '{"x": {"y": ["}", "\\"}"]}}'),
        ('{"name": "f", "arguments": {"x": "a', '{"x": "a"]<tool_call>'),
        ('{"arguments": {"x": 1}, "name": "f"}', '{"x": 1}'),
        ('{"name": "f"}', "{}"),
        ("[1, 2", "<tool_call>[1, 2"),
    ],
    ids=["nested", "cut-off", "other-order", "no-arguments", "no-call"],
)
def test_calls_in_pieces_add_up_to_the_whole_call(fake: FakeEngine, text: str, shown: str) -> None:
    llm = ChatDeltaMem(engine=fake)
    replies = []
    for how in (llm.invoke, lambda said: gathered(list(llm.stream(said)))):
        fake.scripted.append([Delta("Sure.\n"), *call_of(text)])
        replies.append(how("Hello!"))
    plain, streamed = replies
    assert [c["args"] for c in streamed.invalid_tool_calls] == [c["args"] for c in plain.invalid_tool_calls]
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(c["name"], c["args"]) for c in plain.tool_calls]
    assert "".join(piece["args"] or "" for piece in streamed.tool_call_chunks) == shown


def test_reasoning_is_kept_apart_and_never_sent_back(fake: FakeEngine) -> None:
    llm = ChatDeltaMem(engine=fake)
    for how in (llm.invoke, lambda text: gathered(list(llm.stream(text)))):
        fake.scripted.append([Delta("Let me ", "reasoning"), Delta("think.\n", "reasoning"), Delta("Yes.")])
        reply = how("Hello!")
        assert reply.text == "Yes."
        assert [block["type"] for block in reply.content_blocks] == ["reasoning", "text"]
        assert reply.content_blocks[0]["reasoning"] == "Let me think."
        llm.invoke([HumanMessage("Hello!"), reply, HumanMessage("Why?")])
        assert fake.calls[-1]["messages"][1].content == "Yes."


def test_options_of_the_model_reach_the_engine_and_those_of_a_call_win(fake: FakeEngine) -> None:
    llm = ChatDeltaMem(
        engine=fake, temperature=0.5, top_p=0.9, top_k=7, max_tokens=11, stop=["a"], seed=3, window=99, write="input"
    )
    llm.invoke("Hello!")
    sampling = fake.calls[-1]["sampling"]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.max_tokens, sampling.stop, sampling.seed) == (11, ("a",), 3)
    assert fake.calls[-1]["window"] == Window(tokens=99)
    assert fake.calls[-1]["write"] == "input"
    llm.bind(max_tokens=2, window=Window(tokens=None, messages=3), write="off").invoke("Hello!", stop=["b"], seed=None)
    assert fake.calls[-1]["sampling"].max_tokens == 2
    assert fake.calls[-1]["sampling"].stop == ("b",)
    assert fake.calls[-1]["sampling"].seed is None
    assert fake.calls[-1]["window"] == Window(tokens=None, messages=3)
    assert fake.calls[-1]["write"] == "off"


def test_one_stop_string_is_one_and_none_says_nothing(fake: FakeEngine) -> None:
    llm = ChatDeltaMem(engine=fake, stop="know", temperature=None, timeout=3.0)
    assert llm.invoke(ASK).text == "I do not "
    assert llm.invoke(ASK, stop="do").text == "I "
    with pytest.raises(ConfigError, match="stop is a string or a list of strings; found 5"):
        llm.invoke(ASK, stop=5)
    llm.invoke(ASK, temperature=None, top_p=None, max_tokens=None, write=None, on_edit=None, kv=None, timeout=None)
    call = fake.calls[-1]
    assert (call["sampling"].temperature, call["sampling"].top_p, call["sampling"].max_tokens) == (0.0, 1.0, 512)
    assert (call["write"], call["on_edit"], call["kv"], call["timeout"]) == ("all", "write", "exact", None)
    for name, said in (
        ("temperature", "sampling takes numbers"),
        ("window", "number of tokens"),
        ("timeout", "seconds"),
    ):
        with pytest.raises(ConfigError, match=f"{said}.*found.*'hot'"):
            llm.invoke(ASK, **{name: "hot"})


@pytest.mark.parametrize(
    "option",
    [
        *({"temperature": -1}, {"temperature": "hot"}, {"top_p": 2}, {"top_k": -1}, {"max_tokens": 0}, {"seed": -1}),
        *({"stop": [""]}, {"window": 0}, {"window": "x"}, {"timeout": 0}, {"timeout": float("nan")}, {"write": "some"}),
        *({"on_edit": "x"}, {"kv": "x"}, {"cache_salt": 5}),
    ],
)
def test_an_option_that_cannot_be_is_refused_where_it_is_given(option: dict[str, Any]) -> None:
    """As LangChain's users expect: by pydantic where a model is made, and before any token in a call."""
    with pytest.raises(ValidationError, match=next(iter(option))):
        ChatDeltaMem(**option)
    llm = ChatDeltaMem(model="nano")  # shared by all of these
    with pytest.raises(ConfigError):
        llm.invoke(ASK, **option)


@pytest.mark.parametrize("engine", ["nano", 5])
def test_what_is_no_engine_is_refused(engine: object) -> None:
    with pytest.raises(ValidationError, match="engine takes an agentmem"):
        ChatDeltaMem(engine=engine)


def test_unknown_options_are_refused(fake: FakeEngine, llm: ChatDeltaMem) -> None:
    with pytest.raises(ConfigError, match="penalty"):
        llm.invoke("Hello!", penalty=2)
    with pytest.raises(ConfigError, match="temprature is temperature here"):
        llm.invoke("Hello!", temprature=2)
    with pytest.raises(ConfigError, match="model is another ChatDeltaMem here"):
        llm.invoke("Hello!", model="nano")
    with pytest.raises(ValidationError, match="max_new_tokens is max_tokens here"):
        ChatDeltaMem(engine=fake, max_new_tokens=3)
    with pytest.raises(ValidationError, match="maxtokens"):
        ChatDeltaMem(engine=fake, maxtokens=3)
    with pytest.raises(ValidationError, match="found both"):
        ChatDeltaMem(engine=fake, model="nano")
    with pytest.raises(ValidationError, match="found both"):
        ChatDeltaMem(engine=fake, load_options={"dtype": "float32"})


def test_tokens_are_counted_and_messages_trimmed_by_the_models_own_tokenizer(llm: ChatDeltaMem) -> None:
    assert llm.get_num_tokens("two words") == 2
    assert llm.get_num_tokens_from_messages([HumanMessage("two words"), AIMessage("yes")]) == 5
    assert llm.get_num_tokens_from_messages([]) == 0
    history = [HumanMessage("one two"), AIMessage("three"), HumanMessage("four five six")]
    kept = trim_messages(history, max_tokens=4, token_counter=llm, strategy="last", allow_partial=True)
    assert [message.text for message in kept] == ["four five six"]
    assert trim_messages([], max_tokens=4, token_counter=llm) == []


@pytest.mark.parametrize("shown_id", ["1", None])
def test_context_put_around_a_question_for_one_call_is_said(
    llm: ChatDeltaMem, fake: FakeEngine, shown_id: str | None
) -> None:
    question = HumanMessage(TELL, id=shown_id)
    turn = MemoryTurn()
    reply = llm.invoke([HumanMessage(f"It is noon.\n\n{TELL}", id=shown_id)], memory=turn)
    with pytest.warns(MemoryWarning, match="with_context"):
        again = llm.invoke([question, reply, HumanMessage(ASK, id="2")], memory=MemoryTurn(turn.state))
    assert again.response_metadata["edits"] == [0]
    # The supported way writes the question once, and whoever edits a message is not told about context.
    turn = MemoryTurn()
    reply = llm.invoke(with_context([question], "It is noon."), memory=turn)
    assert fake.calls[-1]["messages"][0] == Message("system", "It is noon.")
    again = llm.invoke([question, reply, HumanMessage(ASK, id="2")], memory=MemoryTurn(turn.state))
    assert "edits" not in again.response_metadata
    llm.invoke([HumanMessage("Other.", id="1"), reply, HumanMessage(ASK, id="2")], memory=MemoryTurn(turn.state))


def test_different_settings_are_different_models_to_langchain(fake: FakeEngine) -> None:
    seen = {
        str(ChatDeltaMem(engine=fake, **options).asdict())
        for options in ({}, {"temperature": 1.0}, {"window": 7}, {"write": "off"}, {"seed": 1}, {"use_memory": False})
    }
    assert len(seen) == 6
    assert ChatDeltaMem(engine=fake)._get_ls_params(stop=["x"]) == {
        "ls_provider": "agentmem",
        "ls_model_name": "fake",
        "ls_model_type": "chat",
        "ls_temperature": 0.0,
        "ls_max_tokens": 512,
        "ls_stop": ["x"],
    }


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
