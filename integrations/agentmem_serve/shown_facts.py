"""Which exact facts a turn shows: those closest to its question, of whoever may see them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from langchain_core.documents import Document

if TYPE_CHECKING:
    from agentmem_chroma import FactStore


class ShownFacts:
    """Finds the facts that are shown in a turn.

    Args:
        store: the facts.
        count: the most facts of a turn.
        min_score: how close a fact has to be to the question, as a cosine similarity.
    """

    def __init__(self, store: FactStore, count: int, min_score: float) -> None:
        from agentmem_chroma import FactRetriever

        self._retriever = FactRetriever(store=store, k=count, min_score=min_score)
        self._count = count

    async def find(self, question: str, owners: Sequence[str]) -> list[Document]:
        """The facts of these owners that are closest to a question, best first.

        Raises:
            FactStoreError: the store cannot be used.
        """
        if not question.strip():
            return []
        found = await asyncio.gather(*(self._retriever.ainvoke(question, thread=owner) for owner in owners))
        documents = [document for documents in found for document in documents]
        return sorted(documents, key=lambda document: -document.metadata["score"])[: self._count]
