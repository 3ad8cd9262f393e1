"""Requirements on results: what their text means, and that nothing else is understood."""

from __future__ import annotations

import pytest

from agentmem import Message
from agentmem.errors import ConfigError
from agentmem.evaluation.requirements import parse_requirement
from agentmem.training.contexts import Arm
from agentmem.training.predictions import ArmResults, Prediction

MEASURED: dict[str, tuple[Arm, ...]] = {
    "sgd": ("memory", "zero", "foreign", "window_memory"),
    "ifeval": ("memory", "zero"),
}


def made(arm: Arm, right: int, of: int = 50) -> list[Prediction]:
    return [
        Prediction(f"{arm}{n}", arm, n, "?", "?", (), (), Message("assistant", "x"), 9, n < right, False)
        for n in range(of)
    ]


RESULTS = ArmResults(tuple(made("memory", 40) + made("zero", 5) + made("foreign", 10) + made("window_memory", 40)))


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("memory>0.7", 0.8, True),
        ("memory>=0.8", 0.8, True),
        ("memory>.8", 0.8, False),
        ("zero<=0.1", 0.1, True),
        ("memory - zero > 0.6", 0.7, True),
        ("memory-max(zero,foreign)>=0.25", 0.6, True),
        ("memory-max(zero, foreign)>0.65", 0.6, False),
        ("window_memory-memory>-0.1", 0.0, True),
        ("memory-window_memory<0", 0.0, False),
    ],
)
def test_shares_and_differences_are_compared(text: str, value: float, met: bool) -> None:
    found = parse_requirement("sgd:" + text, MEASURED).check(RESULTS)
    assert found == (pytest.approx(value), met)


def test_the_lower_end_of_an_interval_can_be_required() -> None:
    required = parse_requirement("sgd:low(memory-foreign)>0", MEASURED)
    value, met = required.check(RESULTS)
    assert 0.3 < value < 0.6
    assert met
    assert parse_requirement("low(memory)>0.7", MEASURED).check(RESULTS)[1] is False


def test_a_requirement_is_about_every_task_or_one() -> None:
    every, one = parse_requirement("memory-zero>0", MEASURED), parse_requirement("sgd:memory-foreign>0", MEASURED)
    assert [every.applies_to(task) for task in MEASURED] == [True, True]
    assert [one.applies_to(task) for task in MEASURED] == [True, False]
    assert one.arms == ("memory", "foreign")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "memory",
        "memory>",
        "memory>high",
        "memory>1e3",
        "memory>nan",
        "memory==0.2",
        "0.2<memory",
        "memory-zero-foreign>0",
        "memory+zero>0",
        "memory-max(zero)>0",
        "max(zero,foreign)>0",
        "low(memory-zero>0",
        "memory-zero)>0",
        "memory>0.2; rm",
        "__import__('os')>0",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a requirement is like"):
        parse_requirement(text, MEASURED)


def test_what_is_not_measured_is_named() -> None:
    with pytest.raises(ConfigError, match=r"names 'zeroed'; arms are memory, zero"):
        parse_requirement("memory-zeroed>0", MEASURED)
    with pytest.raises(ConfigError, match=r"names 'foreign'; in the task ifeval are measured memory, zero"):
        parse_requirement("memory-foreign>0", MEASURED)
    with pytest.raises(ConfigError, match=r"the task 'locomo'; measured: sgd, ifeval"):
        parse_requirement("locomo:memory>0", MEASURED)
