"""What arms with part of a conversation quote of it, and the best constant answer."""

from __future__ import annotations

from collections.abc import Callable

from agentmem import Message
from agentmem.training.arms import probes_of
from agentmem.training.contexts import ARMS, BASIC, SETUPS, excerpts, passages
from agentmem.training.conversations import Ask, Conversation
from agentmem.training.predictions import best_constants

TALK = (
    Message("system", "You sell cameras."),
    Message("user", "My camera is a Pentax."),
    Message("assistant", "A fine camera."),
    Message("user", "I live in Bergen."),
    Message("assistant", "It rains there."),
)


def words(most: int) -> Callable[[Message], bool]:
    return lambda quoted: len(quoted.content.split()) <= most


def quoted(question: str, most: int) -> list[str]:
    found = excerpts(TALK, question, words(most))
    if found is None:
        return []
    assert (found.role, found.write) == ("system", False)
    first, *lines = found.content.split("\n")
    assert first == "Earlier in this conversation:"
    return lines


def test_the_messages_that_fit_the_question_best_are_quoted_in_their_order() -> None:
    assert quoted("Where in Bergen do I live?", 10) == ["user: I live in Bergen."]
    assert quoted("Which camera from Bergen?", 100) == [f"{m.role}: {m.content}" for m in TALK[1:]]
    camera = quoted("What is my camera?", 16)
    assert "user: My camera is a Pentax." in camera
    assert camera == sorted(camera, key=lambda line: [f"{m.role}: {m.content}" for m in TALK].index(line))


def test_without_a_common_word_the_last_messages_are_quoted() -> None:
    assert quoted("Anything?", 8) == ["assistant: It rains there."]
    assert quoted("the of and", 8) == ["assistant: It rains there."]
    assert quoted("", 8) == ["assistant: It rains there."]


def test_nothing_is_quoted_where_nothing_fits() -> None:
    assert quoted("Where do I live?", 3) == []
    assert excerpts(TALK[:1], "Where do I live?", words(100)) is None


def test_of_a_long_message_the_passages_that_fit_the_question_best_are_quoted() -> None:
    said = [f"On day {day} it rained, and nobody went out at all." for day in range(40)]
    told = [Message("user", " ".join([*said[:20], "Our boat is a yawl.", *said[20:]]))]
    found = excerpts(told, "What is our boat?", words(90))
    assert found is not None
    assert "Our boat is a yawl." in found.content
    cut = passages(told[0].content)
    assert " ".join(cut) == told[0].content
    assert max(map(len, cut)) <= 300
    assert passages("No end to this " * 50) == ["No end to this " * 50]
    assert passages("  ") == []


def test_the_best_constant_is_chosen_by_kind() -> None:
    def ask(kind: str, *values: str) -> Ask:
        return Ask((Message("user", "?"),), Message("assistant", ""), values, kind=kind)

    asks = (ask("city", "Oslo"), ask("city", "Bergen", "Oslo"), ask("city", "Rome"), ask("age", "7"), ask("free"))
    probes = probes_of([Conversation(TALK, (False,) * len(TALK), asks=asks)])
    assert best_constants(probes, 30) == {"city": "Oslo", "age": "7"}


def test_every_arm_says_what_it_knows() -> None:
    assert set(BASIC) < set(ARMS) == set(SETUPS)
    assert len({setup.title for setup in SETUPS.values()}) == len(ARMS)
    assert len({(s.memory, s.shows, s.static) for arm, s in SETUPS.items() if arm != "constant"}) == len(ARMS) - 1
