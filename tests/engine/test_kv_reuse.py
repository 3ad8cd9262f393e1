"""kv="carry": KV of the turn before is used where it may be, counted, and never where exact numbers are asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch

from agentmem import Message, Sampling, Turn, Window
from agentmem.errors import ConfigError

REPLY = Sampling(max_tokens=12)
SYSTEM = Message("system", "You are brief.")


def talk(engine: Any, turns: int, kv: Any, **options: Any) -> tuple[list[Turn], list[Message]]:
    history: list[Message] = [SYSTEM]
    state, done = None, []
    for n in range(turns):
        history.append(Message("user", f"number {n} is here and says hello"))
        done.append(engine.turn(history, state, sampling=REPLY, kv=kv, **options))
        history.append(done[-1].message)
        state = done[-1].state
    return done, history


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("strategy", ["token", "message", "sentence"])
def test_the_turn_before_is_read_from_its_kv(make_engine: Any, strategy: str) -> None:
    # With corrected keys and values the first layer's KV depends on the memory too. By the default heads only that of
    # the second does, and in a model of two layers nothing that is written rests on it.
    engine = make_engine(write_strategy=strategy, delta_heads=("q", "k", "v", "o"))
    exact, _ = talk(engine, 3, "exact")
    assert [turn.usage.cache_read_tokens for turn in exact] == [0, 0, 0]
    carried, _ = talk(engine, 3, "carry")
    # A first turn has nothing to carry and is the exact one, to the bit.
    assert carried[0].usage.carried_tokens == 0
    assert (carried[0].state, carried[0].token_ids) == (exact[0].state, exact[0].token_ids)
    for before, turn in pairwise(carried):
        # All that was read then, the reply and its end included, where these tokens are tokenised alike.
        assert turn.usage.carried_tokens == turn.usage.cache_read_tokens
        assert before.usage.input_tokens <= turn.usage.carried_tokens < turn.usage.input_tokens
        assert turn.written > 0
    # What was written rests on KV of an older state, by more than rounding.
    own, older = (torch.tensor(turns[1].state.matrices) for turns in (exact, carried))
    assert float((own - older).norm()) > 1e-3 * float(own.norm())


def test_it_saves_forward_passes_over_what_is_carried(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    done, history = talk(engine, 3, "carry")
    history.append(Message("user", "and?"))
    read: list[int] = []
    inner = engine.model.get_decoder().embed_tokens
    handle = inner.register_forward_hook(lambda _, given, out: read.append(given[0].numel()))
    turn = engine.turn(history, done[-1].state, sampling=REPLY, kv="carry")
    handle.remove()
    fed = turn.usage.input_tokens - turn.usage.carried_tokens + len(turn.token_ids)
    assert fed <= sum(read) <= fed + 4  # the closing tokens


def test_a_reply_that_was_decoded_beside_others_is_carried_too(make_engine: Any) -> None:
    engine = make_engine()
    ask = [[SYSTEM, Message("user", f"number {n} is here and says hello")] for n in range(4)]
    rows: list[int] = []

    def turn(n: int) -> tuple[Turn, Turn]:
        first = engine.turn(ask[n], sampling=REPLY, kv="carry")
        after = [*ask[n], first.message, Message("user", "and?")]
        return first, engine.turn(after, first.state, sampling=REPLY, kv="carry")

    alone = [turn(n)[1].usage.carried_tokens for n in range(4)]
    engine.forget_prefills()
    inner = engine.model.get_decoder().embed_tokens
    handle = inner.register_forward_hook(lambda _, given, out: rows.append(given[0].shape[0]))
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(turn, range(4)))
    handle.remove()
    assert max(rows) > 1, "they did not meet"
    for n, (first, second) in enumerate(done):
        assert second.usage.carried_tokens == alone[n] > first.usage.input_tokens


def test_exact_turns_never_see_what_was_carried(make_engine: Any) -> None:
    engine = make_engine()
    done, history = talk(engine, 3, "carry")
    history.append(Message("user", "and?"))
    state = done[-1].state
    engine.turn(history, state, sampling=REPLY, kv="carry")
    warm = engine.turn(history, state, sampling=REPLY)
    assert warm.usage.cache_read_tokens == 0
    engine.forget_prefills()
    cold = engine.turn(history, state, sampling=REPLY)
    assert (warm.state, warm.token_ids) == (cold.state, cold.token_ids)


def test_branches_of_one_state_carry_the_same_and_without_it_the_turn_is_exact(make_engine: Any) -> None:
    engine = make_engine()
    done, history = talk(engine, 2, "carry")
    history.append(Message("user", "and?"))
    state = done[-1].state
    first, again = (engine.turn(history, state, sampling=REPLY, kv="carry") for _ in range(2))
    assert first.usage.carried_tokens == again.usage.carried_tokens > 0
    assert (first.state, first.token_ids) == (again.state, again.token_ids)
    engine.forget_prefills()
    afresh = engine.turn(history, state, sampling=REPLY, kv="carry")
    exact = engine.turn(history, state, sampling=REPLY)
    assert afresh.usage.carried_tokens == 0
    assert (afresh.state, afresh.token_ids) == (exact.state, exact.token_ids)


def test_a_window_that_slides_carries_what_stands_before_the_gap(make_engine: Any) -> None:
    engine = make_engine()
    done, _ = talk(engine, 6, "carry", window=Window(messages=3))
    system = engine.count_tokens([SYSTEM])
    shared = engine.count_tokens([SYSTEM, Message("user", "number ")])  # and the head of the message that follows
    assert done[1].usage.carried_tokens > done[0].usage.input_tokens  # not slid yet
    for turn in done[2:]:
        assert system <= turn.usage.carried_tokens <= shared


def test_an_edit_ends_what_is_carried(make_engine: Any) -> None:
    engine = make_engine()
    done, history = talk(engine, 3, "carry")
    history[3] = Message("user", "something else was said here")
    history.append(Message("user", "and?"))
    turn = engine.turn(history, done[-1].state, sampling=REPLY, kv="carry")
    assert turn.edits == (3,)
    assert 0 < turn.usage.carried_tokens <= engine.count_tokens(history[:4])


def test_what_is_kept_is_bounded(make_engine: Any) -> None:
    engine = make_engine(kv_cache_tokens=60)
    done, _ = talk(engine, 4, "carry")
    assert done[-1].usage.input_tokens > 60
    assert done[-1].usage.carried_tokens == 0


@pytest.mark.parametrize("kv", ["exact", "carry"])
def test_what_one_reads_says_nothing_to_another(make_engine: Any, kv: Any) -> None:
    engine = make_engine()
    history = [SYSTEM, Message("user", "a secret of the first user")]
    state = engine.zero_state()

    def turn(salt: str | None) -> Turn:
        return engine.turn(history, state, sampling=REPLY, kv=kv, cache_salt=salt, write="off")

    first = turn("first")
    assert first.usage.cache_read_tokens == 0
    for other in ("second", None):
        assert turn(other).usage.cache_read_tokens == 0
    again = turn("first")
    assert again.usage.cache_read_tokens > 0
    assert again.token_ids == first.token_ids


def test_a_memory_that_is_rebuilt_goes_on_from_no_kv_of_the_old_one(make_engine: Any) -> None:
    engine = make_engine()
    done, history = talk(engine, 3, "carry")
    history[1] = Message("user", "something else was said here")
    history.append(Message("user", "and?"))
    rebuilt = engine.turn(history, done[-1].state, sampling=REPLY, kv="carry", on_edit="rebuild")
    assert rebuilt.usage.carried_tokens == 0
    engine.forget_prefills()
    afresh = engine.turn(history, None, sampling=REPLY)
    assert (rebuilt.state, rebuilt.token_ids) == (afresh.state, afresh.token_ids)


@pytest.mark.parametrize("kv", ["exact", "carry"])
def test_kept_prefills_hold_no_replies(make_engine: Any, kv: Any) -> None:
    """In memory too: a cache that is cut back is a view of what it was cut from."""
    engine = make_engine(kv_cache_tokens=600)
    for n in range(6):
        turn = engine.turn([Message("user", f"number {n} " * 18)], sampling=Sampling(max_tokens=40), kv=kv)
        assert len(turn.token_ids) == 40
    entries = engine._context.prefills._entries.values()
    parts = [part for entry in entries for layer in entry.cache.layers for part in (layer.keys, layer.values)]
    assert sum(entry.length for entry in entries) > 100
    token = 2 * 2 * 16 * 4  # keys and values of two layers, one head of 16 float32
    assert sum(part.untyped_storage().nbytes() for part in parts) <= 600 * token


def test_an_unknown_kv_is_refused(make_engine: Any) -> None:
    with pytest.raises(ConfigError, match="kv must be one of exact, carry; found 'fast'"):
        make_engine().turn([Message("user", "a")], kv="fast")
