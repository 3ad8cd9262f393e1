"""Several users of one agent: a thread each for the memory, and the same name as the namespace of their facts."""

from __future__ import annotations

from agentmem_chroma import FactStore
from agentmem_langgraph import ChatDeltaMem
from hybrid_rag.parts import LIGHT, REMOTE, chat, finds


def recipe(llm: ChatDeltaMem, store: FactStore) -> bool:
    """Whether each user gets the own value and the own fact, and nothing of the other's."""
    told = {"ada": (REMOTE, "300"), "ben": (LIGHT, "200")}
    replies = {}
    # One graph each, since a retriever looks into one namespace; threads and model are shared.
    talks = {user: chat(llm, finds(store, thread=user)) for user in told}
    for user, (database, limit) in told.items():
        store.add(f"The retry limit is {limit}.", source="account", thread=user)
        talks[user].say(f"The database is {database}.", user)
    for user in told:
        replies[user] = (
            talks[user].say("What is the database?", user).text + talks[user].say("What is the retry limit?", user).text
        )
    return all(all(v in replies[user] for v in own) for user, own in told.items()) and not any(
        v in replies[user] for user in told for other, own in told.items() if other != user for v in own
    )
