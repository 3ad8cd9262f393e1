"""A writer that is killed (`chroma/test_fact_index.py`), in a module that imports no test, no torch and no model."""

from __future__ import annotations

from multiprocessing.connection import Connection

import chromadb  # noqa: F401 - so that processes that are forked off have it
import numpy as np
from langchain_core.embeddings import Embeddings

from agentmem_chroma import FactStore


class Hashed(Embeddings):
    """Vectors that depend on the text alone, made quickly."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [np.random.default_rng(list(text.encode())).normal(size=8).tolist() for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


def write(directory: str, acknowledged: Connection) -> None:
    """Add facts for ever; sends how many there are, at the beginning and whenever some were added."""
    with FactStore(directory, embeddings=Hashed(), rebuild=True) as store:
        count = store.count()
        while True:
            acknowledged.send(count)
            store.add([f"fact {n}" for n in range(count, count + 250)])
            count += 250
