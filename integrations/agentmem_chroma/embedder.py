"""Text to vectors through any LangChain ``Embeddings``, with an identity that a collection can be held to.

Vectors of two embedders do not compare, and nothing in a vector shows where it came from. So an embedder has
a name (given, or derived from its class and model name) and a dimension, found by embedding one word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agentmem.errors import FactStoreError

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

_MODEL_ATTRIBUTES = ("model_name", "model", "model_id", "repo_id")


class Embedder:
    """An ``Embeddings`` object that is checked at every use.

    Attributes:
        name: what identifies the vectors beside their dimension.
        dimension: the length of a vector.
    """

    def __init__(self, embeddings: Embeddings, name: str | None) -> None:
        for method in ("embed_documents", "embed_query"):
            if not callable(getattr(embeddings, method, None)):
                raise FactStoreError(
                    f"embeddings should be a LangChain Embeddings object, got {type(embeddings).__name__} "
                    f"without {method}(); pass agentmem_chroma.local_embeddings(), for example"
                )
        self._embeddings = embeddings
        self.name = name or _derived_name(embeddings)
        self.dimension = self._array([embeddings.embed_query("probe")]).shape[1]

    def documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [len(texts), dimension], none of them zero."""
        vectors = self._checked(self._embeddings.embed_documents(list(texts)), len(texts))
        lengths = np.linalg.norm(vectors, axis=1)
        if not lengths.all():
            text = texts[int(np.argmin(lengths))]
            raise FactStoreError(
                f"embedder {self.name!r} gives the zero vector for {text[:80]!r}: no search could find that "
                "fact; use another embedder, or leave the text out"
            )
        return vectors

    def query(self, text: str) -> NDArray[np.float32]:
        """The query's vector [dimension]."""
        row: NDArray[np.float32] = self._checked([self._embeddings.embed_query(text)], 1)[0]
        return row

    def _checked(self, raw: Sequence[Sequence[float]], count: int) -> NDArray[np.float32]:
        vectors = self._array(raw)
        if vectors.shape != (count, self.dimension):
            raise FactStoreError(
                f"embedder {self.name!r} should give {count} vectors of {self.dimension} numbers, gave an "
                f"array of shape {vectors.shape}"
            )
        return vectors

    def _array(self, raw: Sequence[Sequence[float]]) -> NDArray[np.float32]:
        try:
            vectors = np.asarray(raw, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise FactStoreError(f"embedder {self.name!r} should give vectors of equal length: {error}") from error
        if vectors.ndim != 2 or vectors.shape[1] == 0 or not np.isfinite(vectors).all():
            raise FactStoreError(
                f"embedder {self.name!r} should give non-empty vectors of finite numbers, gave an array of "
                f"shape {vectors.shape}{'' if np.isfinite(vectors).all() else ' with NaN or infinity in it'}"
            )
        return vectors


def _derived_name(embeddings: object) -> str:
    kind = type(embeddings).__name__
    for attribute in _MODEL_ATTRIBUTES:
        model = getattr(embeddings, attribute, None)
        if isinstance(model, str) and model:
            return f"{kind}({model})"
    return kind
