"""agentmem_chroma: exact facts in an embedded Chroma store, to be used next to the memory.

The matrices of agentmem influence what a model says. This store holds exact text: facts that must come back word for
word, with their sources, and that can be deleted. The names below load on first use. Importing this package imports
neither chromadb nor torch: chromadb is imported when a `FactStore` is opened, torch when `local_embeddings` embeds its
first text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.lazy import lazy_names

_HOMES = {
    "Fact": "agentmem_chroma.facts",
    "FactRetriever": "agentmem_chroma.retriever",
    "FactStore": "agentmem_chroma.store",
    "ScoredFact": "agentmem_chroma.facts",
    "cited": "agentmem_chroma.recipe",
    "facts_block": "agentmem_chroma.recipe",
    "local_embeddings": "agentmem_chroma.embeddings",
}
_NEEDS = {"langchain_core": ("langchain-core", "chroma"), "filelock": ("filelock", "chroma")}

__all__ = [
    "Fact",
    "FactRetriever",
    "FactStore",
    "ScoredFact",
    "cited",
    "facts_block",
    "local_embeddings",
]

if TYPE_CHECKING:
    from agentmem_chroma.embeddings import local_embeddings
    from agentmem_chroma.facts import Fact, ScoredFact
    from agentmem_chroma.recipe import cited, facts_block
    from agentmem_chroma.retriever import FactRetriever
    from agentmem_chroma.store import FactStore

__getattr__, __dir__ = lazy_names(__name__, _HOMES, _NEEDS)
