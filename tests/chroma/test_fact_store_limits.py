"""Batches, threads, the event loop, and embedders or rows that are not what they should be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import chromadb
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding

from agentmem.errors import FactStoreError
from agentmem_chroma import Fact, FactStore

Open = Callable[..., FactStore]


class SmallBatches:
    """A Chroma client that takes five entries a call and fails on more, as a real one does at its limit."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.sizes: list[int] = []

    def get_max_batch_size(self) -> int:
        return 5

    def get_or_create_collection(self, *args: Any, **options: Any) -> Any:
        collection = self._client.get_or_create_collection(*args, **options)
        for name in ("upsert", "update", "delete", "get"):
            setattr(collection, name, self._limited(getattr(collection, name)))
        return collection

    def _limited(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*args: Any, ids: list[str] | None = None, **options: Any) -> Any:
            if ids is None:
                return call(*args, **options)
            assert len(ids) <= 5
            self.sizes.append(len(ids))
            return call(*args, ids=ids, **options)

        return limited

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def test_every_call_stays_under_the_limit(tmp_path: Path, open_store: Open) -> None:
    with chromadb.PersistentClient(str(tmp_path / "db")) as client:
        small = SmallBatches(client)
        store = open_store(client=small)
        ids = store.add([f"fact {n}" for n in range(12)], time=datetime(2026, 1, 1, tzinfo=UTC))
        assert ids == store.add([f"fact {n}" for n in range(12)], metadata={"again": True})
        assert [fact.metadata for fact in store.get(ids)] == [{"again": True}] * 12
        assert len(store.facts()) == len(store.search("fact", 50)) == 12
        assert store.delete(ids[:7]) == 7
        assert store.count() == 5
        assert sorted(set(small.sizes)) == [2, 5]
        store.close()


def test_more_facts_than_chroma_takes_at_once(open_store: Open) -> None:
    store = open_store(embeddings=DeterministicFakeEmbedding(size=2))
    ids = store.add([f"fact {n}" for n in range(6000)], source="many")
    assert store.count() == len(set(ids)) == 6000
    assert [fact.text for fact in store.get([ids[0], ids[5999]])] == ["fact 0", "fact 5999"]
    assert store.delete(source="many") == 6000
    assert store.count() == 0


def test_threads_add_search_and_delete_at_once(store: FactStore) -> None:
    start = threading.Barrier(4)

    def work(worker: int) -> None:
        start.wait()
        for n in range(8):
            store.add([f"shared {n}", f"own {worker} {n}"], thread="t")
            assert store.search(f"own {worker} {n}", 1)[0].fact.text == f"own {worker} {n}"
            if n % 2:
                assert store.delete(store.add(f"short-lived {worker} {n}")) == 1

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, worker) for worker in range(4)]:
            done.result()
    assert store.count() == len(store.facts()) == 8 + 4 * 8


def test_the_newest_wins_between_threads(store: FactStore) -> None:
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    versions = [Fact("a fact", time=noon + timedelta(minutes=n), metadata={"n": n}) for n in range(16)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(store.add, versions[::2] + versions[1::2]))
    assert store.facts() == [versions[15]]


class Waiting(DeterministicFakeEmbedding):
    """Embeds only while someone else runs: a call on the event loop's own thread would never return."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self._wait()
        return super().embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        self._wait()
        return super().embed_query(text)

    def _wait(self) -> None:
        assert gate.wait(timeout=20), "the event loop was blocked"


gate = threading.Event()


async def test_async_twins_leave_the_event_loop_free(open_store: Open) -> None:
    gate.set()
    store = await asyncio.to_thread(open_store, embeddings=Waiting(size=4))
    calls: list[Coroutine[Any, Any, list[Any]]] = [store.aadd("a fact"), store.asearch("a fact")]
    for call in calls:
        gate.clear()
        task = asyncio.create_task(call)
        await asyncio.sleep(0)
        gate.set()
        assert len(await task) == 1


async def test_async_twins_do_what_their_twins_do(store: FactStore) -> None:
    when = datetime(2026, 3, 1, tzinfo=UTC)
    batches = await asyncio.gather(
        *(store.aadd([f"fact {n}"], source="s", thread="t", time=when, metadata={"n": n}) for n in range(6))
    )
    ids = [id for batch in batches for id in batch]
    assert await store.aget(ids) == [Fact(f"fact {n}", "s", "t", when, {"n": n}) for n in range(6)]
    assert await store.afacts(source="s", thread="t") == store.facts()
    assert await store.acount(source="s", thread="t") == await store.acount() == 6
    assert await store.asearch("fact 3", 1, source="s", thread="t", min_score=0.9) == store.search("fact 3", 1)
    assert await store.adelete(ids[:2], source="s", thread="t") == 2
    assert store.count() == 4


class Broken(DeterministicFakeEmbedding):
    """Gives whatever the test says for documents."""

    gives: Any = None

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        result: list[list[float]] = self.gives
        return result


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        ([[1.0, 0.0]], "2 vectors of 2"),
        ([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], "2 vectors of 2"),
        ([[1.0, 0.0], [1.0]], "equal length"),
        ([[1.0, 0.0], [float("nan"), 0.0]], "finite"),
        ([[1.0, 0.0], [0.0, 0.0]], "zero vector for 'two'"),
        ([], "finite numbers|2 vectors"),
    ],
)
def test_unusable_vectors_are_refused_and_nothing_is_stored(open_store: Open, gives: Any, said: str) -> None:
    store = open_store(embeddings=Broken(size=2, gives=gives))
    with pytest.raises(FactStoreError, match=said):
        store.add(["one", "two"])
    assert store.count() == 0


def test_something_that_is_no_embedder_is_refused(open_store: Open) -> None:
    with pytest.raises(FactStoreError, match="LangChain Embeddings"):
        open_store(embeddings=object())
    assert open_store().count() == 0  # and the directory was let go


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"documents": ["a stranger"], "metadatas": [{"topic": "x"}]}, "is no fact"),
        ({}, "is no fact"),
        ({"documents": ["a stranger"], "metadatas": [{**Fact("x").row(), "time": "noon"}]}, "is no fact"),
        ({"documents": ["changed"], "metadatas": [Fact("x").row()]}, "changed by something"),
    ],
)
def test_a_foreign_entry_is_named(tmp_path: Path, open_store: Open, entry: dict[str, Any], said: str) -> None:
    with chromadb.PersistentClient(str(tmp_path / "db")) as client:
        store = open_store(client=client)
        client.get_collection("facts", embedding_function=None).add(ids=["odd"], embeddings=[[1.0] * 16], **entry)
        for read in (store.facts, lambda: store.search("x"), lambda: store.get("odd")):
            with pytest.raises(FactStoreError, match=f"'odd'.*{said}"):
                read()
        assert store.delete("odd") == 1
        assert store.facts() == []
        store.close()
