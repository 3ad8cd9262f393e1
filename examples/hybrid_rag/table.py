"""The table: whole conversation, window, retrieval, memory and both, on generated tasks.

    python -m hybrid_rag table [--conversations 20] [--pools] [--model nano] [--adapter DIR]

What each arm has:

- whole conversation: all turns in the prompt, no memory;
- window: the question alone;
- window + retrieval: the two closest facts of a store that holds the documents and all that the user stated;
- window + memory: the turns are written into the memory as they pass;
- window + both: the memory of the turns, and a store that holds the documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage

from agentmem import MemoryState, Window
from agentmem.training.intervals import share
from agentmem_chroma import FactStore, facts_block
from agentmem_langgraph import ChatDeltaMem, MemoryTurn
from hybrid_rag.parts import CITE, finds, prompt_tokens
from hybrid_rag.tasks import KINDS, Task, draw

ARMS = ("whole conversation", "window", "window + retrieval", "window + memory", "window + both")


def table(llm: ChatDeltaMem, embeddings: Embeddings, conversations: int, *, pools: bool = False, seed: int = 0) -> str:
    """Shares of right replies with 95 % intervals over conversations, and the mean tokens of the last prompt."""
    lines = [f"| arm | {' | '.join(KINDS)} | prompt tokens |", "|---" * (len(KINDS) + 2) + "|"]
    right: dict[tuple[str, str], list[tuple[int, int]]] = {}
    tokens: dict[str, list[int]] = {arm: [] for arm in ARMS}
    for kind in KINDS:
        for number in range(conversations):
            task = draw(kind, Random(f"hybrid {seed} {kind} {number}"), pools=pools)
            for arm, reply in replies(llm, embeddings, task).items():
                right.setdefault((arm, kind), []).append((int(task.right(reply)), 1))
                tokens[arm].append(prompt_tokens(reply))
    for arm in ARMS:
        cells = (share(right[arm, kind]) for kind in KINDS)
        shares = " | ".join(f"{cell.value:.2f} ({cell.low:.2f}-{cell.high:.2f})" for cell in cells)
        lines.append(f"| {arm} | {shares} | {sum(tokens[arm]) / len(tokens[arm]):.0f} |")
    return "\n".join(lines)


def replies(llm: ChatDeltaMem, embeddings: Embeddings, task: Task) -> dict[str, AIMessage]:
    """What each arm replies."""
    memory = written(llm, task.turns)
    said = HumanMessage(task.question)
    turns: list[AnyMessage] = [m for user, reply in task.turns for m in (HumanMessage(user), AIMessage(reply))]
    documents = _found(embeddings, task.documents, task.question)
    indexed = _found(embeddings, (*task.documents, *task.statements), task.question)
    bare = llm.model_copy(update={"use_memory": False})
    whole = bare.model_copy(update={"window": Window()})
    prompts: dict[str, tuple[ChatDeltaMem, list[AnyMessage], MemoryState | None]] = {
        "whole conversation": (whole, [*turns, said], None),
        "window": (bare, [said], None),
        "window + retrieval": (bare, [*_shown(llm, indexed), said], None),
        "window + memory": (llm, [said], memory),
        "window + both": (llm, [*_shown(llm, documents), said], memory),
    }
    return {arm: _asked(model, messages, task.tools, state) for arm, (model, messages, state) in prompts.items()}


def written(llm: ChatDeltaMem, turns: Sequence[tuple[str, str]]) -> MemoryState | None:
    """The memory of a conversation, each turn written alone as a window of one turn has it."""
    memory: MemoryState | None = None
    messages: list[AnyMessage] = []
    for user, reply in turns:
        messages += [HumanMessage(user), AIMessage(reply)]
        turn = MemoryTurn(memory)
        llm.remember(messages, memory=turn)
        memory = turn.state
    return memory


def _asked(
    llm: ChatDeltaMem, messages: list[AnyMessage], tools: Sequence[dict[str, Any]], memory: MemoryState | None
) -> AIMessage:
    asked = llm.bind_tools(list(tools), strict=True) if tools else llm
    reply = asked.invoke(messages, memory=MemoryTurn(memory))
    assert isinstance(reply, AIMessage)
    return reply


def _found(embeddings: Embeddings, texts: Sequence[str], question: str) -> str:
    """The closest of the texts, numbered; "" where none is close."""
    if not texts:
        return ""
    with TemporaryDirectory() as folder, FactStore(folder, embeddings=embeddings) as store:
        # A store of facts: what was stated earlier stays beside what replaced it.
        store.add(list(dict.fromkeys(texts)), source="hybrid")
        return facts_block(finds(store).invoke(question))


def _shown(llm: ChatDeltaMem, facts: str) -> list[AnyMessage]:
    system = "\n\n".join(part for part in ("" if llm.model == "nano" else CITE, facts) if part)
    return [SystemMessage(system)] if system else []
