"""FactRetriever: LangChain's standard suite, and what its documents carry."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pydantic import ValidationError

from agentmem.errors import FactStoreError
from agentmem_chroma import Fact, FactRetriever, FactStore


class TestStandardSuite(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> Iterator[None]:
        with FactStore(tmp_path, embeddings=DeterministicFakeEmbedding(size=8)) as self.store:
            self.store.add([f"fact number {n}" for n in range(6)])
            yield

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return FactRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"store": self.store}

    @property
    def retriever_query_example(self) -> str:
        return "fact number 3"


def test_documents_carry_the_fact_and_the_score(store: FactStore) -> None:
    when = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
    fact = Fact("the port is 8080", "ports.md", "t1", when, {"line": 3, "score": "overlaid"})
    store.add(fact)
    (document,) = FactRetriever(store=store).invoke("the port is 8080")
    assert document == Document(
        id=fact.id,
        page_content="the port is 8080",
        metadata={"source": "ports.md", "thread": "t1", "time": "2026-03-01T12:30:00+00:00", "score": 1.0, "line": 3},
    )


async def test_the_fields_narrow_the_search(store: FactStore) -> None:
    for source in ("a", "b"):
        for thread in ("t1", "t2"):
            store.add(["one", "two"], source=source, thread=thread)

    async def found(**fields: Any) -> list[tuple[str, str, str]]:
        retriever = FactRetriever(store=store, k=10, **fields)
        documents = retriever.invoke("one")
        assert await retriever.ainvoke("one") == documents
        return [(d.page_content, d.metadata["source"], d.metadata["thread"]) for d in documents]

    assert len(await found()) == 8
    assert {thread for _, _, thread in await found(thread="t1")} == {"t1"}
    assert {source for _, source, _ in await found(source="b")} == {"b"}
    assert await found(source="b", thread="t2", min_score=0.99) == [("one", "b", "t2")]


async def test_many_retrievals_at_once(store: FactStore) -> None:
    store.add([f"fact {n}" for n in range(10)])
    retriever = FactRetriever(store=store, k=1)
    found = await asyncio.gather(*(retriever.ainvoke(f"fact {n}") for n in range(10)))
    assert [documents[0].page_content for documents in found] == [f"fact {n}" for n in range(10)]


@pytest.mark.parametrize(
    "options",
    [
        {"thread_id": "t1"},
        {"search_kwargs": {"thread_id": "t1"}},
        {"filter": {"thread": "t1"}},
        {"search_kwargs": {"filter": {"thread": {"$in": ["t1"]}}, "k": 10}},
    ],
)
async def test_names_that_langchain_users_write(store: FactStore, options: dict[str, Any]) -> None:
    for thread in ("t1", "t2"):
        store.add(["one", "two"], thread=thread)
    made = FactRetriever(store=store, **options)
    called = FactRetriever(store=store)
    for documents in (made.invoke("one"), called.invoke("one", **options), await called.ainvoke("one", **options)):
        assert [(d.page_content, d.metadata["thread"]) for d in documents] == [("one", "t1"), ("two", "t1")]
    assert [d.page_content for d in FactRetriever(store=store, score_threshold=0.99).invoke("two")] == ["two", "two"]
    assert len(called.invoke("two", k=1)) == len(called.invoke("two", search_kwargs={"k": 1})) == 1


@pytest.mark.parametrize("name", ["threads", "user_id", "namespace", "search_type", "fetch_k"])
def test_what_is_not_known_is_refused(store: FactStore, name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        FactRetriever(store=store, **{name: "t1"})
    with pytest.raises(ValidationError, match=name):
        FactRetriever(store=store, search_kwargs={name: "t1"})
    with pytest.raises(FactStoreError, match=name):
        FactRetriever(store=store).invoke("anything", **{name: "t1"})


def test_options_that_cannot_be_are_refused(store: FactStore) -> None:
    with pytest.raises(ValidationError, match="thread is given twice"):
        FactRetriever(store=store, thread="a", thread_id="b")
    with pytest.raises(ValidationError):
        FactRetriever(store=store, k=0)
    with pytest.raises(FactStoreError, match="k should be 1"):
        FactRetriever(store=store).invoke("anything", k=0)


def test_documents_go_back_into_a_store(store: FactStore) -> None:
    fact = Fact("the port is 8080", "ports.md", "t1", metadata={"line": 3})
    store.add(fact)
    documents = FactRetriever(store=store).invoke("the port is 8080")
    store.delete(fact.id)
    assert store.add(documents) == [fact.id]
    assert store.facts() == [fact]
