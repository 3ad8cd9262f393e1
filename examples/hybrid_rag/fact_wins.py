"""When memory and a fact disagree, the fact wins, and the reply says what the memory has.

A model may mix the two. So each is asked alone: the facts with the memory off, the memory with no fact in the prompt.
Code compares what they say, and the reply is put together of the two.
"""

from __future__ import annotations

from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage

from agentmem import MemoryState
from agentmem_chroma import FactStore, cited, facts_block
from agentmem_langgraph import ChatDeltaMem, MemoryTurn
from hybrid_rag.parts import MAIN, REMOTE, finds


def recipe(llm: ChatDeltaMem, store: FactStore) -> bool:
    """Whether the reply gives the fact's value first, cites it, and then names the other one."""
    told = MemoryTurn()
    llm.invoke(f"The database is {REMOTE}.", memory=told)
    store.add(f"The database is {MAIN}.", source="deploy.md")
    reply = answer(llm, store, "What is the database?", told.state)
    print(f"  {reply}")
    fact, _, said = reply.partition("[1]")
    return MAIN in fact and REMOTE not in fact and REMOTE in said


def answer(llm: ChatDeltaMem, store: FactStore, question: str, memory: MemoryState | None) -> str:
    """What the facts say; what the memory says as well if it differs, and alone where no fact is cited."""
    remembered = llm.invoke(question, memory=MemoryTurn(memory)).text
    documents = finds(store).invoke(question)
    messages: list[AnyMessage] = [SystemMessage(facts_block(documents)), HumanMessage(question)]
    stated = llm.model_copy(update={"use_memory": False}).invoke(messages)
    if not cited(stated, documents):
        return remembered
    same = remembered.rstrip(".") in stated.text
    return stated.text if same else f"{stated.text} But from you I have: {remembered}"
