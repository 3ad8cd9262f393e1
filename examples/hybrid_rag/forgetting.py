"""Forgetting a source removes its facts, and nothing of them is left.

Shown facts are never written into the memory. A reply that quotes one would be: here replies are not (`write="input"`).
"""

from __future__ import annotations

from agentmem_chroma import FactStore
from agentmem_langgraph import ChatDeltaMem
from hybrid_rag.parts import chat, finds


def recipe(llm: ChatDeltaMem, store: FactStore) -> bool:
    """Whether the fact is answered before and not after, and the other source's fact stays."""
    store.add("The retry limit is 300.", source="runbook.md")
    store.add("The page size is 250.", source="api.md")
    talk = chat(llm.model_copy(update={"write": "input"}), finds(store))
    before = talk.say("What is the retry limit?").text
    removed = store.delete(source="runbook.md")
    after = talk.say("What is the retry limit?").text
    other = talk.say("What is the page size?").text
    return removed == 1 and "300" in before and "300" not in after and "250" in other
