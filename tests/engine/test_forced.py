"""What a format leaves no choice about is read in one pass: the same tokens and the same memory as token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentmem import Engine, Message, ReplyFormat, Sampling, Turn
from agentmem.generation import turn as turns
from agentmem.generation.guided import Constraint
from agentmem.generation.runner import ModelRunner
from tests.helpers.numeric import assert_same_at_once, assert_same_turn

MakeEngine = Callable[..., Engine]
ASK = [Message("user", "Hello there, how are you?")]
BOOK = {
    "type": "function",
    "function": {
        "name": "book_a_flight",
        "parameters": {
            "type": "object",
            "properties": {
                "destination": {"type": "string", "maxLength": 5},
                "travellers": {"type": "integer", "minimum": 1, "maximum": 99},
                "conditions": {"enum": ["refundable", "rebookable"]},
            },
            "required": ["destination", "travellers", "conditions"],
        },
    },
}
FORMS = {
    "call": ReplyFormat(tools=[BOOK], calls="must"),
    "calls": ReplyFormat(tools=[BOOK], calls="must", parallel=True),
    "text, then a call": ReplyFormat(tools=[BOOK], calls="may"),
    "json": ReplyFormat(schema=BOOK["function"]["parameters"]),  # type: ignore[index]
}


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the model choose where there is no choice, and read one token at a time."""

    def patch() -> None:
        real, read = Constraint.follow, turns._read
        monkeypatch.setattr(Constraint, "follow", lambda own: real(own) if own.closing else None)

        def each(context: Any, sequence: Any, tokens: Any, segment: int) -> Any:
            for token in tokens:
                yield from read(context, sequence, [token], segment)

        monkeypatch.setattr(turns, "_read", each)

    return patch


def assert_same(found: Turn, expected: Turn) -> None:
    assert found.usage == expected.usage
    assert_same_turn(found, expected)


@pytest.mark.parametrize("strategy", ["token", "message", "sentence"])
def test_tokens_and_memory_are_those_of_one_by_one(
    make_engine: MakeEngine, one_by_one: Callable[[], None], strategy: str
) -> None:
    engines = [make_engine(write_strategy=strategy, model_seed=seed) for seed in range(2)]
    budgets = [(101, "all"), (106, "input"), (160, "all"), (120, "off")]
    cases = [
        (engine, form, *budgets[(number + at) % 4])
        for number, form in enumerate(FORMS.values())
        for at, engine in enumerate(engines)
    ]

    def run(engine: Engine, form: ReplyFormat, most: int, write: Any) -> Turn:
        engine.forget_prefills()
        return engine.turn(ASK, sampling=Sampling(max_tokens=most), form=form, write=write)

    quick = [run(*case) for case in cases]
    one_by_one()
    for case, turn in zip(cases, quick, strict=True):
        assert_same(turn, run(*case))
    assert {turn.finish_reason for turn in quick} >= {"length", "tool_calls"}


@pytest.mark.parametrize("stop", ["light", 'ion": "', '"travellers": ', "refund", "}}"])
def test_a_stop_string_within_takes_back_what_is_behind_it(
    make_engine: MakeEngine, one_by_one: Callable[[], None], stop: str
) -> None:
    engine = make_engine()
    sampling = Sampling(max_tokens=160, stop=(stop,))

    def run(form: ReplyFormat) -> Turn:
        engine.forget_prefills()
        return engine.turn(ASK, sampling=sampling, form=form)

    quick = [run(form) for form in FORMS.values()]
    one_by_one()
    for form, turn in zip(FORMS.values(), quick, strict=True):
        assert_same(turn, run(form))


def test_a_call_without_a_choice_needs_one_pass(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    nothing = {"type": "function", "function": {"name": "nothing", "parameters": {"type": "object", "properties": {}}}}
    passes: list[int] = []
    real = ModelRunner.forward

    def forward(own: ModelRunner, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(tokens.shape[1])
        return real(own, tokens, *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    turn = engine.turn(ASK, form=ReplyFormat(tools=[nothing], calls="must"))
    assert turn.message.tool_calls[0].name == "nothing"
    assert len(turn.token_ids) > 10
    assert len(passes) <= 3, "the prompt in two parts, and the reply with what closes it"


def test_in_company_each_is_as_it_is_alone(make_engine: MakeEngine) -> None:
    engine = make_engine()
    forms = [*FORMS.values(), None]

    def run(number: int) -> Turn:
        sampling = Sampling(temperature=(0.0, 1.0)[number % 2], seed=number, max_tokens=110 + 10 * (number % 4))
        return engine.turn([Message("user", f"Hello {number}.")], sampling=sampling, form=forms[number % 5])

    alone = [run(number) for number in range(15)]
    assert_same_at_once(run, range(15), alone)
