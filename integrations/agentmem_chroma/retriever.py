"""A LangChain retriever for a fact store: takes a query, returns documents with sources and scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, model_validator

from agentmem.errors import FactStoreError
from agentmem_chroma.facts import to_document
from agentmem_chroma.store import FactStore

# Names of these options in LangChain's own stores.
_ALIASES = {"thread_id": "thread", "score_threshold": "min_score"}
_PER_CALL = ("k", "thread", "source", "min_score", "filter")


class FactRetriever(BaseRetriever):
    """Finds the facts that are closest to a query.

    `retriever.invoke(query)` and `ainvoke` return documents, best first. `k`, `thread`, `source`, `min_score` and
    `filter` may also be passed to a single call: `invoke(query, k=2, thread="ops")`. A document's id is the fact's id.
    Its metadata is the fact's metadata, overridden by `source`, `thread`, `time` (ISO 8601, UTC) and `score` (cosine
    similarity).

    LangChain's names work too: `thread_id`, `score_threshold`, and `search_kwargs` with any of these options. Unknown
    options are refused: if one were ignored, the facts of all threads would be returned. For the same reason None in a
    call is no option: the retriever's own stays.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    store: FactStore
    """The fact store. The retriever does not close it."""

    k: int = Field(default=4, ge=1)
    """At most this many documents are returned."""

    thread: str | None = None
    """Only facts of this thread; None for all, "" for facts of no thread."""

    source: str | None = None
    """Only facts of this source; None for all, "" for facts of no source."""

    min_score: float | None = None
    """Only facts with at least this cosine similarity."""

    filter: dict[str, Any] | None = None
    """Only facts that match this filter, see `FactStore.search`."""

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, options: Any) -> Any:
        return _renamed(options) if isinstance(options, Mapping) else options

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        hits = self.store.search(query, **self._search_options(options))
        return [to_document(hit.fact, hit.score) for hit in hits]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        hits = await self.store.asearch(query, **self._search_options(options))
        return [to_document(hit.fact, hit.score) for hit in hits]

    def _search_options(self, named: Mapping[str, Any]) -> dict[str, Any]:
        options = _renamed(named)
        unknown = sorted(options.keys() - set(_PER_CALL))
        if unknown:
            raise FactStoreError(
                f"a retrieval takes {', '.join(_PER_CALL)}; got {', '.join(unknown)}, and without it more facts would "
                "be found than were meant"
            )
        # None is what a caller has who looked for a thread and found none: it must not lift what was set here.
        given = {name: value for name, value in options.items() if value is not None}
        return {name: getattr(self, name) for name in _PER_CALL} | given


def _renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names used here, including those in `search_kwargs`.

    Raises:
        ValueError: an option is given twice, with different values; or `search_kwargs` is no mapping.
    """
    renamed: dict[str, Any] = {}
    found = options.get("search_kwargs") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"search_kwargs should be a mapping of options, got {found!r}")
    inner: Mapping[str, Any] = found
    for name, value in [*inner.items(), *((n, v) for n, v in options.items() if n != "search_kwargs")]:
        own = _ALIASES.get(name, name)
        if own in renamed and renamed[own] != value:
            raise ValueError(f"{own} is given twice: {renamed[own]!r} and {value!r}")
        renamed[own] = value
    return renamed
