"""Whether what was said bears out a reply that was drafted from memory."""

from __future__ import annotations

import pytest

from agentmem import Message
from agentmem.training.drafts import stands

TOLD = (
    Message("system", "The password is swordfish."),
    Message("user", "My sport is climbing."),
    Message("assistant", "Noted, your sport is climbing."),
    Message("user", "The database of our backend is Cassandra, and its language is Haskell."),
    Message("assistant", "Good to know."),
    Message("user", "Lunch is at 12:30 in the red house."),
)


@pytest.mark.parametrize(
    ("question", "draft", "expected"),
    [
        ("What is my sport?", "Your sport is climbing.", True),
        ("What is my sport?", "Your sport is tennis.", False),
        ("What is my sport?", "Your sport is Cassandra.", False),  # said, but not of this
        ("Which sport do I do?", "You do climbing and tennis.", False),
        ("Where do I eat?", "In the red house, at 12:30.", True),  # no word of the question was said
        ("When is lunch?", "Lunch is at 12:45.", False),
        ("Is my sport climbing or tennis?", "Your sport is climbing.", True),
        ("Is my sport climbing or tennis?", "Your sport is tennis.", False),
        ("Do I climb?", "Yes.", False),  # nothing that could be found
        ("What is the password?", "The password is swordfish.", False),  # of the system's message
        ("What is my favourite film?", "You have not told me your favourite film.", True),
        ("Tell me once more: what did I give as my favourite film?", "You have not told me your favourite film.", True),
        ("What is my sport?", "You have not told me your sport.", False),
        # A message that asks for nothing cannot be looked up.
        ("Yes, please book it.", "Please confirm: lunch for 2 at 12:30.", True),
        ("Sure. Could you book it, please?", "Please confirm: lunch for 2 at 12:30.", True),
        ("Yes, please book it.", "That is not something you have told me.", True),
        ("Great. Book lunch in the red house.", "That is not something you have told me.", False),
        ("Is it climbing?", "Your sport is tennis.", False),
        ("Could you tell me my sport?", "Your sport is tennis.", False),
        ("¿Cuál es mi deporte?", "Tu deporte es tennis.", False),
    ],
)
def test_a_draft_stands_where_a_passage_about_the_question_has_its_words(
    question: str, draft: str, expected: bool
) -> None:
    assert stands(draft, question, TOLD) is expected


def test_nothing_bears_a_draft_out_where_nothing_was_said() -> None:
    assert not stands("Your sport is climbing.", "What is my sport?", ())
    assert stands("You have not told me.", "What is my sport?", ())
