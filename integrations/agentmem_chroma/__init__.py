"""agentmem_chroma: exact facts in an embedded Chroma store, to be used next to the memory.

The matrices of agentmem influence what a model says. This store holds exact text: facts that must come back word for
word, with their sources, and that can be deleted. The names below load on first use. Importing this package imports
neither chromadb nor torch: chromadb is imported when a `FactStore` is opened, torch when `local_embeddings` embeds its
first text.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentmem.errors import MissingExtraError

_HOMES = {
    "Fact": "agentmem_chroma.facts",
    "FactRetriever": "agentmem_chroma.retriever",
    "FactStore": "agentmem_chroma.store",
    "ScoredFact": "agentmem_chroma.facts",
    "cited": "agentmem_chroma.recipe",
    "facts_block": "agentmem_chroma.recipe",
    "local_embeddings": "agentmem_chroma.embeddings",
}
_NEEDS = {"langchain_core": "langchain-core", "filelock": "filelock"}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agentmem_chroma' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _NEEDS:
            raise
        raise MissingExtraError(_NEEDS[package], "chroma") from error


def __dir__() -> list[str]:
    return sorted(__all__)
