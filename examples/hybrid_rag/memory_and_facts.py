"""Memory for the thread, Chroma for facts: what the user says steers, what documents state is quoted."""

from __future__ import annotations

from agentmem_chroma import FactStore
from agentmem_langgraph import ChatDeltaMem
from hybrid_rag.parts import REMOTE, chat, finds


def recipe(llm: ChatDeltaMem, store: FactStore) -> bool:
    """Whether both are answered, and the fact with its citation."""
    store.add("The retry limit is 300.", source="runbook.md")
    talk = chat(llm, finds(store))
    talk.say(f"The database is {REMOTE}.")
    told = talk.say("What is the database?").text
    stated = talk.say("What is the retry limit?").text
    return REMOTE in told and "[" not in told and "300" in stated and "[1]" in stated
