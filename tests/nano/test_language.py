"""The language: deterministic in its seed, drawn afresh every time, and judged by whole words."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from agentmem.nano import language
from agentmem.nano.episodes import draw_episode, draw_memory_episode
from agentmem.nano.language import Binding
from agentmem.nano.pools import ATTRIBUTES


def test_pools_are_large_and_free_of_repeats() -> None:
    assert len(ATTRIBUTES) >= 30
    for attribute in ATTRIBUTES.values():
        assert 24 <= len(attribute.values) == len(set(attribute.values))


@pytest.mark.parametrize("attribute", sorted(ATTRIBUTES))
def test_every_answer_is_correct_for_its_binding_and_for_no_other(attribute: str) -> None:
    bindings = [Binding(attribute, value) for value in ATTRIBUTES[attribute].values]
    for binding in bindings:
        said = language.answer(binding)
        assert [other for other in bindings if language.is_correct(said, other)] == [binding]


def test_is_correct_refuses_a_second_value_a_part_of_a_word_and_silence() -> None:
    teal = Binding("favorite color", "teal")
    assert language.is_correct("I think it is teal.", teal)
    assert not language.is_correct("It is teal or blue.", teal)
    assert not language.is_correct("It is tealish.", teal)
    assert not language.is_correct(language.unknown("favorite color"), teal)


def test_telling_changing_and_asking_name_the_attribute_and_the_value() -> None:
    rng = Random(3)
    for binding in language.draw_bindings(rng, 20):
        for said, reply in (language.tell(rng, binding), language.change(rng, binding)):
            assert binding.attribute in said.lower()
            assert binding.value in said
            assert language.is_correct(reply, binding)
        question = language.ask(rng, binding.attribute)
        assert binding.attribute in question
        assert not language.named_values(question.replace(binding.attribute, ""), binding.attribute)


def test_same_seed_same_conversation_other_seed_another() -> None:
    def conversations(seed: int) -> list[object]:
        rng = Random(seed)
        return [draw_episode(rng) for _ in range(10)] + [
            draw_memory_episode(rng, bindings=3, fillers=2, changes=1, asks=1) for _ in range(10)
        ]

    assert conversations(5) == conversations(5)
    assert conversations(5) != conversations(6)


def test_bindings_are_not_fixed() -> None:
    rng = Random(0)
    values = Counter(b.value for _ in range(3000) for b in language.draw_bindings(rng, 1, attributes=["pet"]))
    pool = ATTRIBUTES["pet"].values
    assert set(values) == set(pool)
    assert max(values.values()) < 2 * 3000 / len(pool)


def test_drawn_bindings_have_distinct_attributes_and_more_than_there_are_is_refused() -> None:
    assert len({b.attribute for b in language.draw_bindings(Random(1), len(ATTRIBUTES))}) == len(ATTRIBUTES)
    with pytest.raises(ValueError, match="larger"):
        language.draw_bindings(Random(1), len(ATTRIBUTES) + 1)


def test_redraw_keeps_the_attribute_and_changes_the_value() -> None:
    binding = Binding("port", "8080")
    again = language.redraw(Random(2), binding)
    assert again.attribute == "port"
    assert again.value != "8080"


def test_a_memory_episode_is_asked_for_the_latest_value() -> None:
    rng = Random(8)
    for _ in range(50):
        episode = draw_memory_episode(rng, bindings=1, fillers=2, changes=2)
        *_, last = [
            reply.content
            for said, reply in episode.turns
            if " is " in reply.content
            and ", " in reply.content
            and language.named_values(reply.content, _asked(episode.questions[0].turn[1].content))
        ]
        question, answer = episode.questions[0].turn
        attribute = _asked(answer.content)
        assert language.is_correct(last, Binding(attribute, *language.named_values(answer.content, attribute)))
        assert question.role == "user"


def _asked(answer: str) -> str:
    return next(name for name in sorted(ATTRIBUTES, key=len, reverse=True) if f"{name} is" in answer)
