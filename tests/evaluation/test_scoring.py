"""When a reply states a short answer, and the published scores beside it."""

from __future__ import annotations

import pytest

from agentmem.evaluation.scoring import hotpot_exact, hotpot_f1, locomo_f1, states


@pytest.mark.parametrize(
    ("answer", "reply", "stated"),
    [
        ("in a shoe rack in my closet", "They are in your closet, in the shoe rack.", True),
        ("in a shoe rack in my closet", "They are in your closet.", False),
        ("2", "You went to two appointments.", True),
        ("two", "2", True),
        ("2", "You went to 12 appointments.", False),
        ("2", "It was 2 or 3.", False),
        ("2", "It was one of the 2 in March.", True),
        ("2", "In 2023 it was 2.", True),  # a number of the question
        ("$5,850", "You raised 5850 dollars.", True),
        ("20%", "20 percent", True),
        ("6:00 pm", "At 6 pm.", True),
        ("7:30 am", "At 7 am.", False),
        ("February 14th", "on 14 February", True),
        ("3 months", "Three month's time.", True),
        ("25 minutes and 50 seconds (or 25:50)", "25 minutes, 50 seconds", True),
        ("over a year", "a year", False),
        ("Yes. (You have a road bike too.)", "Yes, you do.", True),
        ("Yes", "No, yes, no.", False),
        ("Luna", "LUNA!", True),
        ("Luna", "Lunatic", False),
        ('"That"', 'He watches "That".', True),
        ("Luna", "", False),
    ],
)
def test_a_reply_states_an_answer(answer: str, reply: str, stated: bool) -> None:
    assert states(answer, "What happened in 2023?", reply) is stated


def test_published_scores_are_those_of_their_authors() -> None:
    assert locomo_f1(4, "the dogs and cats", "A dog, a cat") == 1
    assert locomo_f1(4, "pottery class", "pottery") == pytest.approx(2 / 3)
    assert locomo_f1(1, "pottery, camping", "camping trip, pottery") == pytest.approx((1 + 2 / 3) / 2)
    assert locomo_f1(2, "pottery, camping", "camping") == pytest.approx(2 / 3)
    assert locomo_f1(3, "National park; she likes the outdoors", "national park") == 1
    assert locomo_f1(4, "a dog", "") == 0
    assert (hotpot_exact("The Times", "times."), hotpot_exact("The Times", "a Times of")) == (1, 0)
    assert hotpot_f1("San Juan", "in San Juan") == pytest.approx(0.8)
    assert (hotpot_f1("yes", "yes"), hotpot_f1("yes", "yes, it is"), hotpot_f1("yes it is", "yes")) == (1, 0, 0)
