"""A LangChain retriever over a fact store: a query in, documents with their sources and scores out."""

from __future__ import annotations

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

from agentmem_chroma.facts import ScoredFact
from agentmem_chroma.store import FactStore


class FactRetriever(BaseRetriever):
    """Finds the facts that are closest to a query.

    ``retriever.invoke(query)`` and ``ainvoke`` give documents, best first; ``invoke(query, k=2)`` overrides
    ``k`` for one call. A document's id is the fact's id; its metadata is the fact's metadata with ``source``,
    ``thread``, ``time`` (ISO 8601, UTC) and ``score`` (cosine similarity) laid over it.
    """

    store: FactStore
    """Where the facts are. The retriever does not close it."""

    k: int = Field(default=4, ge=1)
    """How many documents to return at most."""

    thread: str | None = None
    """Only facts of this thread; None for all, "" for facts of no thread."""

    source: str | None = None
    """Only facts of this source; None for all, "" for facts of no source."""

    min_score: float | None = None
    """Only facts with at least this cosine similarity."""

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = self.store.search(
            query,
            self.k if k is None else k,
            source=self.source,
            thread=self.thread,
            min_score=self.min_score,
        )
        return [_document(hit) for hit in found]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = await self.store.asearch(
            query,
            self.k if k is None else k,
            source=self.source,
            thread=self.thread,
            min_score=self.min_score,
        )
        return [_document(hit) for hit in found]


def _document(hit: ScoredFact) -> Document:
    fact = hit.fact
    return Document(
        id=fact.id,
        page_content=fact.text,
        metadata={
            **fact.metadata,
            "source": fact.source,
            "thread": fact.thread,
            "time": fact.time.isoformat(),
            "score": hit.score,
        },
    )
