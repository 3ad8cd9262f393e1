"""A store of passages and summaries that fade: what it keeps, recalls and forgets."""

from __future__ import annotations

from agentmem import Message
from agentmem.training.memory_bank import SESSION_TURNS, MemoryBank


def talk(*texts: str) -> list[Message]:
    return [m for text in texts for m in (Message("user", text), Message("assistant", "I see."))]


def bank(*texts: str) -> MemoryBank:
    def summarise(prompt: Message) -> str:
        prompts.append(prompt.content)
        return f"Summary {len(prompts)}."

    prompts: list[str] = []
    return MemoryBank.fill([Message("system", "You are kind."), *talk(*texts)], summarise)


def found(store: MemoryBank, question: str, words: int) -> list[str]:
    message = store.excerpts(question, lambda quoted: len(quoted.content.split()) <= words)
    return [] if message is None else message.content.split("\n")[1:]


RAIN = [f"On day {day} it rained." for day in range(2 * SESSION_TURNS)]


def test_every_session_is_kept_with_a_summary() -> None:
    store = bank(*RAIN)
    assert [each.text for each in store.kept if each.role == "summary"] == ["Summary 1.", "Summary 2."]
    assert [each.text for each in store.kept if each.role == "user"] == RAIN
    assert store.now == 1
    assert store.bytes == sum(len(each.text) for each in store.kept)
    assert found(bank(), "Anything?", 50) == []


def test_what_was_said_lately_is_found_before_what_has_faded() -> None:
    store = bank("My boat is a yawl.", *RAIN, "My boat is a ketch.")
    assert found(store, "What is my boat?", 10) == ["user: My boat is a ketch."]
    assert found(store, "What is my yawl?", 10) == ["user: My boat is a yawl."]


def test_what_is_recalled_fades_more_slowly() -> None:
    often = bank("My boat is a yawl.", *RAIN[:SESSION_TURNS], "Is the yawl fast?", *RAIN[SESSION_TURNS:])
    once = bank("My boat is a yawl.", *RAIN)
    (strong,), (weak,) = ([each for each in store.kept if each.text == "My boat is a yawl."] for store in (often, once))
    assert strong.strength > weak.strength == 1
    assert strong.left(9) > weak.left(9) > 0
    assert strong.left(strong.session) == 1
