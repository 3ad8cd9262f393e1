"""Two ways to use a retrieved snippet: write it into the memory once, or show it in each prompt that needs it.

Written, it costs no prompt tokens later, cannot be cited and cannot be taken out. Shown, it costs tokens each time, is
cited, and is gone when its source is.
"""

from __future__ import annotations

from agentmem_chroma import FactStore
from agentmem_langgraph import ChatDeltaMem, MemoryTurn
from hybrid_rag.parts import MAIN, chat, finds, prompt_tokens

SNIPPET = f"The database is {MAIN}."


def recipe(llm: ChatDeltaMem, store: FactStore) -> bool:
    """Whether both ways answer, the second with its citation and with a longer prompt."""
    memory = MemoryTurn()
    # As a turn of the conversation, with its acknowledgement: that is what adapters are trained on.
    llm.remember([("user", SNIPPET), ("assistant", f"Noted, {SNIPPET.replace('The', 'the', 1)}")], memory=memory)
    written = llm.invoke("What is the database?", memory=MemoryTurn(memory.state))
    store.add(SNIPPET, source="handbook.md")
    shown = chat(llm, finds(store)).say("What is the database?")
    print(f"  written: {written.text} ({prompt_tokens(written)} tokens); shown: {prompt_tokens(shown)} tokens")
    correct = MAIN in written.text and MAIN in shown.text and "[1]" in shown.text
    return correct and prompt_tokens(written) < prompt_tokens(shown)
