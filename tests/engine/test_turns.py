"""A turn is a transaction whose state follows from messages and start state alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
import torch

from agentmem import Engine, MemoryState, Message, Sampling, TurnOptions, Window
from agentmem.errors import (
    ConfigError,
    CorruptStateError,
    HistoryEditedError,
    MissingAdapterError,
    StateMismatchError,
    TranscriptError,
    WindowError,
)
from agentmem.generation.plan import DEFAULTS
from agentmem.prompt.transcript import Transcript, sentence_numbers
from tests.helpers.numeric import assert_close, assert_states_close

STRATEGIES = ("token", "message", "sentence")


def user(text: str, **more: Any) -> Message:
    return Message("user", text, **more)


def by_hand(engine: Engine, messages: list[Message], reply: tuple[int, ...], text: str) -> np.ndarray[Any, Any]:
    """The state after a first turn, from the definition: one pass over the messages, one over the reply."""
    steered, transcript = engine.steered, Transcript(engine.tokenizer)
    assert steered is not None
    strategy = steered.config.write_strategy
    prompt = transcript.render(messages, add_generation_prompt=True, sentences=True)
    numbers = prompt.sentence_segments() if strategy == "sentence" else prompt.message_segments()
    end = len(prompt.input_ids) - prompt.owner.count(len(messages))
    opening, closing = prompt.input_ids[end:], transcript.closing_ids()
    segments = torch.tensor([numbers[:end]])
    with torch.no_grad():
        everywhere = steered.config.steered_tokens == "all"
        out = steered(
            torch.tensor([prompt.input_ids[:end]]),
            write=segments >= 0,
            segments=segments,
            cache=True,
            steer=everywhere,
        )
        spoken = [0] * (len(opening) + len(reply) + len(closing))
        if strategy == "sentence":
            pieces = sentence_numbers(text, reply, lambda t: engine.tokenizer.encode(t, add_special_tokens=False))
            spoken = [*(-1 for _ in opening), *pieces, *(-1 for _ in closing)]
        numbers_after = torch.tensor([spoken])
        out = steered(
            torch.tensor([[*opening, *reply, *closing]]),
            out.state,
            write=numbers_after >= 0,
            segments=numbers_after,
            cache=out.cache,
            steer=everywhere or torch.arange(len(spoken))[None] >= len(opening) - 1,
        )
    state: np.ndarray[Any, Any] = out.state[0].numpy()
    return state


ENDINGS = ("length", "stop string", "stop inside a token", "second end token")
MEMORIES = ((1, "all"), (4, "all"), (1, "reply"))  # state heads, and which tokens are steered


# Each two of strategy, memory and ending meet once.
@pytest.mark.parametrize(
    ("strategy", "heads", "steered", "ending"),
    [
        (strategy, *MEMORIES[(number + place) % 3], ending)
        for number, strategy in enumerate(STRATEGIES)
        for place, ending in enumerate(ENDINGS)
    ],
)
def test_state_equals_feeding_the_returned_reply_by_hand(
    make_engine: Any, strategy: str, heads: int, steered: str, ending: str
) -> None:
    engine = make_engine(
        write_strategy=strategy, num_state_heads=heads, couple_lambda=heads == 1, steered_tokens=steered
    )
    messages = [Message("system", "Be kind."), user("My favorite color is teal. Really!\n\nDo you know?")]
    free = engine.turn(messages, sampling=Sampling(max_tokens=24))
    assert free.finish_reason == "length"
    assert len(free.token_ids) <= 24
    turn, sampling = free, Sampling(max_tokens=24)
    text = engine.tokenizer.decode(free.token_ids)
    if ending == "stop string":
        sampling = Sampling(max_tokens=24, stop=(text[9:13],))
    elif ending == "stop inside a token":
        sampling = Sampling(max_tokens=24, stop=(_inside_a_token(engine, free.token_ids),))
    elif ending == "second end token":
        engine.close()
        engine.model.generation_config.eos_token_id = [engine.tokenizer.eos_token_id, free.token_ids[7]]
        engine = Engine(engine.model, engine.tokenizer, engine.steered)
    if ending != "length":
        turn = engine.turn(messages, sampling=sampling)
        assert turn.finish_reason == "stop"
        assert len(turn.message.content) < len(free.message.content)
    for stop in sampling.stop:
        assert stop not in turn.message.content
        assert text.startswith(turn.message.content)
    reply = engine.tokenizer.decode(turn.token_ids)
    assert reply.startswith(turn.message.content)
    assert turn.state is not None
    expected = by_hand(engine, messages, turn.token_ids, reply)
    assert_close(torch.tensor(turn.state.matrices), torch.as_tensor(expected), 1000)
    engine.close()


def _inside_a_token(engine: Engine, ids: tuple[int, ...]) -> str:
    """A stop string that begins inside one of the reply's tokens and ends inside another."""
    texts = [engine.tokenizer.decode([i]) for i in ids]
    for n in range(4, len(texts) - 1):
        if len(texts[n]) > 1 and "�" not in texts[n] + texts[n + 1] and texts[n + 1]:
            return texts[n][1:] + texts[n + 1][:1]
    pytest.fail("the random reply has no token of two characters; choose another seed")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prefills_at_hand_change_no_bit(make_engine: Any, strategy: str) -> None:
    warm, cold = make_engine(write_strategy=strategy), make_engine(write_strategy=strategy)
    histories: list[list[Message]] = [[], []]
    states: list[MemoryState | None] = [None, None]
    hits = 0
    for said in ("Hello there.", "My favorite color is teal.", "The test command is pytest -q.", "How are you?"):
        for branch in range(2):  # the same turn twice: a retry
            results = []
            for place, engine in enumerate((warm, cold)):
                cold.forget_prefills()
                messages = [*histories[place], user(f"{said}{branch // 2}")]
                results.append(engine.turn(messages, states[place], sampling=Sampling(max_tokens=8)))
            assert results[0].token_ids == results[1].token_ids
            assert results[0].state == results[1].state
            assert results[1].usage.cache_read_tokens == 0
            hits += results[0].usage.cache_read_tokens
        other = warm.turn([*histories[0], user("Another branch?")], states[0], sampling=Sampling(max_tokens=3))
        hits += other.usage.cache_read_tokens if histories[0] else 0
        for place, result in enumerate(results):
            histories[place] += [user(f"{said}0"), result.message]
            states[place] = result.state
    assert hits > 100


@pytest.mark.parametrize("steered", ["reply", "all"])
def test_where_only_replies_are_steered_a_memory_has_no_part_in_what_is_written(make_engine: Any, steered: str) -> None:
    """A write is affine in the state then: keys, values and gates are those of the bare model."""
    engine = make_engine(steered_tokens=steered)
    zero = engine.zero_state()
    rng = np.random.default_rng(0)
    one, two = (rng.normal(size=zero.shape).astype(np.float32) for _ in range(2))

    def after(matrices: np.ndarray[Any, Any]) -> torch.Tensor:
        start = MemoryState.from_matrices(
            matrices,
            zero.record,
            model_fingerprint=zero.model_fingerprint,
            adapter_fingerprint=zero.adapter_fingerprint,
        )
        return torch.tensor(engine.remember([user("My favorite color is teal.")], start).state.matrices)

    both = after(one + two) + after(zero.matrices)
    difference = (both - after(one) - after(two)).abs().max()
    assert (difference < 1e-4) == (steered == "reply")


def test_a_history_is_written_once_however_it_is_windowed(make_engine: Any) -> None:
    engine = make_engine()
    history = [user("One."), Message("assistant", "Two."), user("Three."), Message("assistant", "Four."), user("Five?")]
    sampling = Sampling(max_tokens=4)
    first = engine.turn(history, window=Window(messages=1), sampling=sampling)
    again = engine.turn(
        [*history, first.message, user("Six?")], first.state, window=Window(messages=1), sampling=sampling
    )
    assert first.state.record.count == 6
    assert again.state.record.count == 8
    # What was hidden and new in the first turn is written by a pass of its own; in the second nothing is.
    size = engine.count_tokens
    closing = len(Transcript(engine.tokenizer).closing_ids())
    asked = Transcript(engine.tokenizer).render([user("x")], add_generation_prompt=True)
    opening = asked.owner.count(1)
    assert first.written == size(history) + opening + len(first.token_ids) + closing
    assert again.written == size([user("Six?")]) + opening + len(again.token_ids) + closing
    assert again.usage.input_tokens == size([user("Six?")]) + opening


def test_write_policy(make_engine: Any) -> None:
    engine = make_engine()
    messages = [user("My favorite color is teal.")]
    start = engine.turn(messages, sampling=Sampling(max_tokens=4)).state
    history = [*messages, user("And now?")]
    off = engine.turn(history, start, write="off", sampling=Sampling(max_tokens=6))
    assert off.state is start
    assert off.written == 0
    only = engine.turn(history, start, write="input", sampling=Sampling(max_tokens=6), window=Window(messages=1))
    full = engine.turn(history, start, write="all", sampling=Sampling(max_tokens=6), window=Window(messages=1))
    assert only.state.record.count == start.record.count + 2
    assert_states_close(only.state, engine.remember(history, start).state)
    assert np.abs(only.state.matrices - full.state.matrices).max() > 1e-4


def test_messages_that_must_not_write_are_shown_only(make_engine: Any) -> None:
    engine = make_engine()
    facts = user("Facts: the moon is far.", write=False)
    plain = engine.turn([Message("system", "Be kind."), user("Hello?")], sampling=Sampling(max_tokens=4))
    shown = engine.turn([Message("system", "Be kind."), facts, user("Hello?")], sampling=Sampling(max_tokens=4))
    assert shown.usage.input_tokens > plain.usage.input_tokens
    assert shown.written - len(shown.token_ids) == plain.written - len(plain.token_ids)
    assert shown.state.record.count == plain.state.record.count == 2


def test_edits_are_reported_refused_or_rebuilt(make_engine: Any) -> None:
    engine = make_engine()
    first = engine.turn([user("The port is 80.")], sampling=Sampling(max_tokens=4))
    edited = [user("The port is 81."), first.message, user("Well?")]
    written = engine.turn(edited, first.state, sampling=Sampling(max_tokens=4))
    assert written.edits == (0,)
    assert written.state.record.count == 5
    with pytest.raises(HistoryEditedError, match="message 0"):
        engine.turn(edited, first.state, on_edit="error")
    rebuilt = engine.turn(edited, first.state, on_edit="rebuild", sampling=Sampling(max_tokens=4))
    afresh = engine.turn(edited, None, sampling=Sampling(max_tokens=4))
    assert rebuilt.state == afresh.state


def test_a_foreign_state_is_refused_and_names_both_sides(make_engine: Any) -> None:
    engine, other_model, other_adapter = make_engine(), make_engine(model_seed=7), make_engine(seed=9)
    for other in (other_model, other_adapter):
        state = other.turn([user("Hi.")], sampling=Sampling(max_tokens=2)).state
        with pytest.raises(StateMismatchError) as raised:
            engine.turn([user("Hi.")], state)
        here, there = (engine.model_fingerprint, other.model_fingerprint)
        if here == there:
            here, there = (engine.adapter_fingerprint, other.adapter_fingerprint)
        assert here[:8] in str(raised.value)
        assert there[:8] in str(raised.value)


def test_no_memory_is_the_bare_model(make_engine: Any) -> None:
    bare, steered = make_engine(memory=False), make_engine()
    messages = [user("How are you today?")]
    sampling = Sampling(max_tokens=12)
    expected = bare.turn(messages, sampling=sampling)
    state = steered.turn([user("My favorite color is teal.")], sampling=sampling).state
    without = steered.turn(messages, state, sampling=sampling, memory=False)
    assert without.token_ids == expected.token_ids
    assert without.state is state
    assert expected.state is None
    assert steered.turn(messages, state, sampling=sampling).token_ids != expected.token_ids
    with pytest.raises(MissingAdapterError, match="adapter="):
        bare.zero_state()
    with pytest.raises(MissingAdapterError, match="adapter="):
        bare.remember(messages, state)
    with pytest.raises(MissingAdapterError, match="adapter="):
        bare.turn(messages, state)
    assert bare.turn(messages, state, sampling=sampling, memory=False).state is state


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": -1}, {"temperature": 1e-40}, {"top_p": 0}, {"stop": ("",)}),
        *({"seed": wrong} for wrong in (2**64, 1.5, True, "1")),
        *({"max_tokens": wrong} for wrong in (0, 1.5, True, "5", None)),
        *({"top_k": wrong} for wrong in (-1, 1.5, "5")),
    ],
)
def test_sampling_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_fingerprint_sees_the_whole_vocabulary(make_engine: Any) -> None:
    engine = make_engine(memory=False)
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[-40:] += 1.0
    assert Engine(engine.model, engine.tokenizer).model_fingerprint != engine.model_fingerprint


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("window", [Window(), Window(tokens=100), Window(messages=1)])
def test_a_message_longer_than_the_context_is_written_in_pieces(
    make_engine: Any, strategy: str, window: Window
) -> None:
    engine = make_engine(write_strategy=strategy, limit=256)
    long = user("First of all. " + "hello there, how are you today? " * 90 + "What is it?")
    size = engine.count_tokens([long])
    assert size > 2 * 256
    sampling = Sampling(max_tokens=8)
    turn = engine.turn([user("Hi."), Message("assistant", "Yes?"), long], window=window, sampling=sampling)
    assert turn.truncation is not None
    assert (turn.truncation.rule, turn.truncation.messages) == ("middle", (2,))
    most = min(window.tokens or 256, 256)
    assert most - 40 < turn.usage.input_tokens <= most
    assert turn.usage.input_tokens + turn.truncation.tokens >= size
    # The memory has it as if it had been written without being shown, and with it what stood before it.
    before = engine.remember([user("Hi."), Message("assistant", "Yes?"), long])
    assert before.written >= (size if strategy != "sentence" else size - 10)
    history = [user("Hi."), Message("assistant", "Yes?"), long]
    reads = engine.turn(history, window=window, sampling=sampling, write="input")
    np.testing.assert_array_equal(reads.state.matrices, before.state.matrices)
    assert turn.state.record.count == 4
    # Later turns go on.
    after = engine.turn([*history, turn.message, user("And?")], turn.state, window=window, sampling=sampling)
    assert after.truncation is None
    assert after.edits == ()


def test_a_message_in_pieces_is_one_segment_all_the_same(make_engine: Any) -> None:
    """As many writes as messages: where the pieces were segments of their own, the state would be another."""
    long = user("hello there, how are you today? " * 60)
    small, large = (make_engine(write_strategy="message", limit=limit) for limit in (256, 4096))
    states = [torch.tensor(engine.remember([long]).state.matrices) for engine in (small, large)]
    # Pieces are read without the KV of those before, so hidden states differ, and so does their mean, a little.
    assert float((states[0] - states[1]).norm()) < 0.3 * float(states[1].norm())


def test_a_window_that_could_be_wider_is_no_reason_to_cut(make_engine: Any) -> None:
    with pytest.raises(WindowError, match="widen the window"):
        make_engine(limit=2048).turn([user("hello there " * 200)], window=Window(tokens=100))


def test_a_reply_stops_at_the_end_of_the_context(make_engine: Any) -> None:
    engine = make_engine(limit=64)
    turn = engine.turn([user("How are you?")], sampling=Sampling(max_tokens=500))
    assert turn.finish_reason == "length"
    assert turn.usage.input_tokens + turn.usage.output_tokens <= 64


def test_options_that_do_not_exist_are_refused(make_engine: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean sampling"):
        make_engine().turn([user("How are you?")], samplin=Sampling())


def test_every_option_has_a_default() -> None:
    assert DEFAULTS.keys() == TurnOptions.__annotations__.keys()


def test_a_state_is_taken_as_graphs_and_json_hold_it(make_engine: Any) -> None:
    engine, told, more = make_engine(), [user("Hello there!")], [user("Hello there!"), user("How are you?")]
    state, sampling = engine.remember(told).state, Sampling(max_tokens=4)
    expected = engine.remember(more, state).state
    for form in (state.to_dict(), json.loads(json.dumps(state.to_json()))):
        assert engine.remember(more, form).state == expected
        assert asyncio.run(engine.aremember(more, form)).state == expected
        for turn in (engine.turn(more, form, sampling=sampling), engine.stream(more, form, sampling=sampling).result()):
            assert turn.state is not None
            assert turn.state.count == 3
    for wrong in (state.to_dict() | {"count": 9}, "state", 3, [state]):
        for call in (engine.turn, engine.remember, engine.stream):
            with pytest.raises(CorruptStateError):
                call(more, wrong)


def test_a_history_is_a_list_of_messages(make_engine: Any) -> None:
    engine = make_engine()
    for wrong in ("How are you?", None, 3, [{"role": "user", "content": "Hi"}], [None], ["Hi"], user("Hi")):
        for call in (engine.turn, engine.remember, engine.stream, engine.count_tokens):
            with pytest.raises(TranscriptError, match=r"a list of agentmem\.Message"):
                call(wrong)
