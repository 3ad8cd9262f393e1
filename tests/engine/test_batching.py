"""Many sessions in one batch, on models of several makes: each as it is alone, fair, and none the victim of another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agentmem import Engine, MemoryState, Message, ReplyFormat, Sampling, Turn, Window
from agentmem.errors import ConfigError, TurnCancelledError, TurnTimeoutError
from agentmem.generation.batch_cache import BatchedKVCache
from tests.helpers.core_models import attach_lively, build
from tests.helpers.numeric import assert_same_at_once, assert_same_turn

MakeEngine = Callable[..., Engine]
LISTED = ReplyFormat(schema={"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 9})


def ask(number: int) -> list[Message]:
    """Histories of very different lengths."""
    return [Message("user", f"Hello there, {number}! " + "How are you today? " * (7 * (number % 5)))]


LONG = ask(4)  # little less than 256 tokens


def options(number: int) -> dict[str, Any]:
    """Every session has its own sampling, grammar, length and write policy."""
    return {
        "sampling": Sampling(
            temperature=(0.0, 1.0, 0.7)[number % 3],
            seed=number,
            max_tokens=12 + 5 * (number % 7),
            top_k=5 * (number % 2),
        ),
        "write": ("all", "input", "off")[number % 3 if number % 4 else 0],
        "form": LISTED if number % 5 == 1 else None,
        "memory": number % 6 != 5,
    }


class Count:
    """How often the model is run, and for how many sessions each time."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.fail: Callable[[int], None] = lambda rows: None
        model = engine.model
        real = type(model).forward

        def forward(own: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            if own is model:
                if input_ids.shape[1] == 1:
                    self.batches.append(input_ids.shape[0])
                self.fail(input_ids.shape[0])
            return real(own, input_ids, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", forward)


def batches_of(sessions: int, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sessions at once are as they are alone; gives how many sessions the model was run for each time."""
    states = [engine.remember(ask(n + 1)).state for n in range(sessions)]
    alone = [engine.turn(ask(n), states[n], **options(n)) for n in range(sessions)]
    count = Count(engine, monkeypatch)
    assert_same_at_once(lambda n: engine.turn(ask(n), states[n], **options(n)), range(sessions), alone)
    return count.batches


@pytest.mark.parametrize(
    ("backend", "strategy"),
    [("torch", "token"), ("torch", "message"), ("numba", "token"), ("numba", "sentence")],
    indirect=["backend"],
)
@pytest.mark.usefixtures("backend")
def test_each_session_is_as_it_is_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    batches = batches_of(16, make_engine(write_strategy=strategy), monkeypatch)
    assert max(batches) > 8, "they did not meet"
    assert sum(batches) / len(batches) > 3


def test_where_no_session_may_share_a_pass_they_take_turns(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(batches_of(5, make_engine(max_batch=1), monkeypatch)) == {1}


def test_replies_that_outgrow_their_rows(make_engine: MakeEngine) -> None:
    """Rows hold 256 tokens at first: these begin below and end beyond, in the company of shorter ones."""
    engine = make_engine()
    sampling = [Sampling(temperature=1.0, seed=n, max_tokens=(20, 60)[n % 2]) for n in range(4)]
    alone = [engine.turn(LONG, sampling=each) for each in sampling]
    assert [turn.usage.input_tokens + len(turn.token_ids) > 256 for turn in alone] == [False, True] * 2
    assert_same_at_once(lambda each: engine.turn(LONG, sampling=each), sampling, alone)


@pytest.mark.parametrize(("temperature", "operation"), [(0.0, "argmax"), (1.0, "softmax")])
def test_a_token_that_was_written_is_not_read_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, temperature: float, operation: str
) -> None:
    """Where choosing the next tokens of a batch fails: states have been handed out by then."""
    engine = make_engine()
    sampling = [Sampling(temperature=temperature, seed=n, max_tokens=20) for n in range(4)]
    alone = [engine.turn(ask(n), sampling=sampling[n]) for n in range(4)]
    real, failed = getattr(Tensor, operation), []

    def choosing(own: Tensor, *given: Any, **more: Any) -> Tensor:
        if own.dim() == 2 and len(own) > 1:
            failed.append(len(own))
            raise torch.OutOfMemoryError("no room for so many")
        return real(own, *given, **more)

    monkeypatch.setattr(Tensor, operation, choosing)
    assert_same_at_once(lambda n: engine.turn(ask(n), sampling=sampling[n]), range(4), alone)
    assert failed


@pytest.mark.parametrize("strategy", ["token", "sentence"])
def test_stop_strings_take_back_tokens_of_a_row(make_engine: MakeEngine, strategy: str) -> None:
    engine = make_engine(write_strategy=strategy)
    plain = engine.turn(ask(0), sampling=Sampling(max_tokens=60)).message.content
    stops = [plain[at : at + 4] for at in (12, 20, 28, 36)]
    sampling = [Sampling(max_tokens=60, stop=(stop,)) for stop in stops]
    alone = [engine.turn(ask(0), sampling=each) for each in sampling]
    assert_same_at_once(lambda each: engine.turn(ask(0), sampling=each), sampling, alone)


async def test_a_hundred_requests_are_all_served(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=16)
    ends: list[int] = []

    async def one(number: int) -> None:
        await engine.aturn(ask(number % 5), sampling=Sampling(max_tokens=6))
        ends.append(number)

    await asyncio.gather(*(one(number) for number in range(100)))
    # In about the order in which they came: nobody is left for the end.
    assert max(abs(place - number) for place, number in enumerate(ends)) < 30


def test_a_short_request_does_not_wait_for_a_long_prompt(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(limit=32768)
    events: list[str] = []
    long = [Message("user", "The quick brown fox says: hello there. " * 700)]
    begun = threading.Event()
    decoder = engine.model.get_decoder()
    forward = type(decoder).forward

    def watched(own: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        if own is decoder and input_ids is not None and input_ids.shape[1] == 1024:
            events.append("chunk")
            begun.set()
        return forward(own, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(decoder), "forward", watched)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            engine.turn, long, sampling=Sampling(max_tokens=2), window=Window(tokens=30000), write="off"
        )
        assert begun.wait(30)
        before = len(events)
        stream = engine.stream(ask(0), sampling=Sampling(max_tokens=3))
        next(iter(stream))
        waited = len(events) - before
        running.result(60)
    assert len(events) > before + 3, "the long prompt was over too soon to say anything"
    assert waited <= 3


def test_cancelling_frees_the_row_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    streams = [engine.stream(ask(n), sampling=Sampling(temperature=1.0, seed=n, max_tokens=3000)) for n in range(6)]
    for stream in streams:
        next(iter(stream))
    for stream in streams[:5]:
        stream.cancel()
        with pytest.raises(TurnCancelledError):
            stream.result()
    alone = engine.turn(ask(7), sampling=Sampling(max_tokens=20))
    assert len(alone.token_ids) == 20
    streams[5].cancel()
    engine.turn(ask(8), sampling=Sampling(max_tokens=2))


def test_a_turn_that_takes_too_long(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    count = Count(engine, monkeypatch)
    start = engine.turn(ask(1), sampling=Sampling(max_tokens=4)).state
    ten = Sampling(max_tokens=10)
    assert len(engine.turn(ask(2), start, sampling=ten).token_ids) == 10
    count.fail = lambda rows: time.sleep(0.02)  # on any machine ten tokens take longer than the timeout then
    with pytest.raises(TurnTimeoutError, match=r"longer than its timeout of 0\.05 seconds"):
        engine.turn(ask(2), start, sampling=ten, timeout=0.05)
    count.fail = lambda rows: None
    assert len(engine.turn(ask(2), start, sampling=ten, timeout=60).token_ids) == 10
    with pytest.raises(ConfigError, match="timeout"):
        engine.turn(ask(2), start, timeout=0)


def test_a_batch_that_does_not_fit_is_split(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    alone = [engine.turn(ask(n), **options(n)) for n in range(8)]
    count = Count(engine, monkeypatch)

    def fail(rows: int) -> None:
        if rows > 3:
            raise torch.OutOfMemoryError("out of memory")

    count.fail = fail
    assert_same_at_once(lambda n: engine.turn(ask(n), **options(n)), range(8), alone)
    assert max(count.batches) > 3, "no batch was too large"
    assert sum(rows > 3 for rows in count.batches) < 4, "a size that did not fit is not tried at every token"


def test_batches_grow_again_when_there_is_memory_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmem.generation.batch._PATIENCE", 2)
    engine, fits = make_engine(max_batch=6), [3]
    count = Count(engine, monkeypatch)

    def fail(rows: int) -> None:
        if rows > fits[0]:
            raise torch.OutOfMemoryError("out of memory")

    count.fail = fail

    def wave(tokens: int = 12) -> tuple[int, int]:
        """The largest batch, and how many were too large."""
        count.batches.clear()
        sampling = Sampling(temperature=1.0, seed=1, max_tokens=tokens)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: engine.turn(ask(0), sampling=sampling), range(8)))
        return max(count.batches), sum(rows > fits[0] for rows in count.batches)

    assert wave()[0] > 3
    tried = [wave()[1] for _ in range(6)]
    assert sum(tried[:3]) >= 1, "it is tried again"
    assert sum(tried[3:]) <= 2, "but less and less"
    fits[0] = 6
    assert any(wave(60)[0] == 6 for _ in range(20)), "up to max_batch"


def test_one_that_fails_does_not_take_the_others_with_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    alone = [engine.turn(ask(n), **options(n)) for n in range(6)]

    def broken(*_: object) -> int:
        raise ZeroDivisionError("no token today")

    from agentmem.generation import sampling as module

    real = module.Sampler.choose
    with ThreadPoolExecutor(7) as pool:
        monkeypatch.setattr(
            module.Sampler,
            "choose",
            lambda own, logits, *chosen: broken() if own.sampling.max_tokens == 77 else real(own, logits, *chosen),
        )
        bad = pool.submit(engine.turn, ask(6), sampling=Sampling(max_tokens=77))
        good = [pool.submit(engine.turn, ask(n), **options(n)) for n in range(6)]
        with pytest.raises(ZeroDivisionError, match="no token today"):
            bad.result(60)
        for found, solo in zip(good, alone, strict=True):
            assert_same_turn(found.result(60), solo)


def test_what_is_lost_in_a_row_is_lost_to_one_session(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for what was read in the row, when replies outgrow it: an error there, and the others as ever."""
    engine = make_engine()
    sampling = [Sampling(temperature=1.0, seed=n, max_tokens=60) for n in range(3)]
    alone = [engine.turn(LONG, sampling=each) for each in sampling]
    real, failures = BatchedKVCache.copy_back, [1]

    def copy_back(own: BatchedKVCache, *arguments: Any) -> None:
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("out of memory")
        real(own, *arguments)

    monkeypatch.setattr(BatchedKVCache, "copy_back", copy_back)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(engine.turn, LONG, sampling=each) for each in sampling]
        ends = [one.exception(60) for one in running]
    assert sum(isinstance(end, torch.OutOfMemoryError) for end in ends) == 1
    for one, end, solo in zip(running, ends, alone, strict=True):
        if end is None:
            assert_same_turn(one.result(), solo)


def test_a_row_is_left_clean(make_engine: MakeEngine) -> None:
    engine = make_engine(memory=False)
    like = engine.model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).cache
    batch = BatchedKVCache(like, 16)
    first, second = batch.add_row(like, 5), batch.add_row(like, 5)
    for keys, values in batch._kv:
        keys[0], values[1] = torch.nan, torch.inf
    batch.remove_row(first)
    batch.remove_row(second)
    assert all(not part.isnan().any() and not part.any() for parts in batch._kv for part in parts)


def test_a_batch_of_none_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="max_batch"):
        make_engine(max_batch=0)


SESSIONS = 6
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Architecture, its other options, and whether sessions share passes: with sliding windows they take turns.
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "qwen3": ("qwen3", {}, True),
    "llama": ("llama", {}, True),
    "llama with scaled positions": ("llama", {"rope_parameters": LLAMA3}, True),
    "mistral": ("mistral", {"sliding_window": None}, True),
    "mistral with a window": ("mistral", {"sliding_window": 24}, False),
    "gemma3": ("gemma3", {"sliding_window": 24, "query_pre_attn_scalar": 16, "layer_types": None}, False),
}

Make = Callable[..., Engine]


@pytest.fixture(name="make")
def make_engines(tokenizer: Any) -> Iterator[Make]:
    made: list[Engine] = []

    def make(name: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0) -> Engine:
        architecture, more, _ = MODELS[name]
        model = build(
            architecture,
            seed=seed,
            attention=attention,
            vocab_size=len(tokenizer),
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=2048,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            **more,
        ).to(dtype)
        steered = attach_lively(model, seed=seed)
        made.append(Engine(model, tokenizer, steered, name=name))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def run(engine: Engine, number: int, state: MemoryState, tokens: int = 16) -> Turn:
    """Sessions of very different lengths, the shortest from within a window of 24 and the others beyond."""
    text = f"Hello, {number}! " + "How are you today? " * (3 * (number % 3))
    return engine.turn([Message("user", text)], state, sampling=Sampling(max_tokens=tokens))


def begun(engine: Engine) -> list[MemoryState]:
    """What each session has been told before."""
    return [engine.remember([Message("user", f"My number is {number}.")]).state for number in range(SESSIONS)]


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in MODELS), ("qwen3", "eager"), ("gemma3", "eager")]
)
def test_each_session_of_any_model_is_as_it_is_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, attention: str
) -> None:
    engine = make(name, attention=attention)
    first = begun(engine)
    alone = [run(engine, number, first[number]) for number in range(SESSIONS)]
    rows = Count(engine, monkeypatch)
    assert_same_at_once(lambda number: run(engine, number, first[number]), range(SESSIONS), alone)
    assert (max(rows.batches) > 2) == MODELS[name][2]


@pytest.mark.parametrize(("name", "attention"), [("qwen3", "sdpa"), ("qwen3", "eager"), ("gemma3", "sdpa")])
def test_in_bfloat16_they_are_close(make: Make, monkeypatch: pytest.MonkeyPatch, name: str, attention: str) -> None:
    """Rounding may turn a near tie of two tokens; up to there a session is as it is alone."""
    engine = make(name, dtype=torch.bfloat16, attention=attention)
    start = begun(engine)
    alone = [run(engine, number, start[number], tokens=4) for number in range(SESSIONS)]
    rows = Count(engine, monkeypatch)
    with ThreadPoolExecutor(SESSIONS) as pool:
        found = list(pool.map(lambda number: run(engine, number, start[number], tokens=4), range(SESSIONS)))
    assert (max(rows.batches) > 1) == MODELS[name][2]
    same = [(one, solo) for one, solo in zip(found, alone, strict=True) if one.token_ids == solo.token_ids]
    assert len(same) >= SESSIONS // 2
    for one, solo in same:
        assert one.state is not None
        assert solo.state is not None
        scale = float(np.abs(solo.state.matrices).max())
        assert float(np.abs(one.state.matrices - solo.state.matrices).max()) < 0.05 * scale


def test_two_engines_at_once(make: Make) -> None:
    """Each with its own model, memory, worker and batches."""
    engines = [make("qwen3", seed=1), make("llama", seed=2)]
    first = [begun(engine) for engine in engines]
    alone = [[run(e, number, first[k][number]) for number in range(SESSIONS)] for k, e in enumerate(engines)]
    jobs = [(k, number) for number in range(SESSIONS) for k in range(len(engines))]
    expected = [alone[k][number] for k, number in jobs]
    assert_same_at_once(lambda job: run(engines[job[0]], job[1], first[job[0]][job[1]]), jobs, expected)
