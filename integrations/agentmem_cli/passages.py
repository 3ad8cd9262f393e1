"""Ranks a conversation's passages by meaning: each conversation is a thread of a fact store, which Chroma searches."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from tempfile import TemporaryDirectory

from agentmem_chroma import FactStore, local_embeddings


class NearestPassages:
    """The similarity of passages to a question, by the sentence model that facts are searched with by default.

    The store is in a folder of its own, which is made when something is first ranked and removed by `close`. May be
    called from several threads.

    Raises:
        MissingExtraError: the extra `minilm` or `chroma` is not installed.
    """

    def __init__(self) -> None:
        self._embeddings = local_embeddings()
        self._resources = ExitStack()
        self._store: FactStore | None = None
        self._lock = threading.Lock()
        self._kept: set[str] = set()

    def __call__(self, texts: Sequence[str], question: str) -> list[float]:
        """The cosine similarity of each text to the question, from -1 to 1."""
        thread = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        with self._lock:
            if self._store is None:
                folder = self._resources.enter_context(TemporaryDirectory(prefix="agentmem-passages-"))
                self._store = self._resources.enter_context(FactStore(folder, embeddings=self._embeddings))
            store = self._store
            if thread not in self._kept:
                store.add(list(dict.fromkeys(texts)), thread=thread)
                self._kept.add(thread)
        scores = {hit.fact.text: hit.score for hit in store.search(question, len(texts), thread=thread)}
        return [scores.get(text, -1.0) for text in texts]

    def close(self) -> None:
        """Close the store and remove its folder."""
        self._resources.close()
