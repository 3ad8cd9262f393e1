"""FactRetriever: LangChain's standard suite, what its documents carry; and the recipe: numbered facts in, citations
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pydantic import ValidationError

from agentmem.errors import FactStoreError
from agentmem_chroma import Fact, FactRetriever, FactStore, cited, facts_block
from agentmem_langgraph import ChatDeltaMem, MemoryNode
from tests.helpers.fake_engine import FakeEngine


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
    store.delete(fact.id)
    assert store.add([document]) == [fact.id], "documents go back into a store"


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
    # A None, of a caller who found no thread to name, lifts nothing.
    for nothing in ({"thread_id": None}, {"thread": None}, {"search_kwargs": {"filter": None, "thread": None}}):
        assert made.invoke("one", **nothing) == await made.ainvoke("one", **nothing) == made.invoke("one")
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
    with pytest.raises(ValidationError, match="search_kwargs should be a mapping"):
        FactRetriever(store=store, search_kwargs="x")
    with pytest.raises(ValidationError, match="thread is given twice"):
        FactRetriever(store=store, thread="a", thread_id="b")
    with pytest.raises(ValidationError):
        FactRetriever(store=store, k=0)
    with pytest.raises(FactStoreError, match="k should be 1"):
        FactRetriever(store=store).invoke("anything", k=0)


DOCUMENTS = [Document(page_content=text) for text in ("first text", "second text", "third text")]


def test_the_block_numbers_its_facts() -> None:
    assert facts_block(DOCUMENTS[:2]) == "Facts:\nfirst text [1]\nsecond text [2]"
    assert facts_block([]) == ""


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "  a\n\n  b\n", "a\u2028b", "a\x0bb"])
def test_a_fact_takes_one_line(text: str) -> None:
    assert facts_block([Document(page_content=text)]) == "Facts:\na b [1]"


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ("The port is 8080 [2].", [2]),
        ("So [3][1], and again [3].", [3, 1]),
        ("Both [1, 3] say so; [2,1] too.", [1, 3, 2]),
        ("Nothing is known.", []),
        ("[0] [4] [-1] [1a] [] [99999999999999999999]", []),
        ("Call `argv[1]` first [2].", [2]),
        ("```python\nx = rows[1]\n```\nas said [3]", [3]),
        ("```\nrows[1]", []),
        ("", []),
    ],
)
def test_what_a_reply_cites(reply: str, numbers: list[int]) -> None:
    assert cited(reply, DOCUMENTS) == [DOCUMENTS[n - 1] for n in numbers]
    assert cited(AIMessage(reply), DOCUMENTS) == cited(reply, DOCUMENTS)


def test_a_stored_reply_leads_to_its_facts_after_a_restart(tmp_path: Path, embeddings: Embeddings) -> None:
    with FactStore(tmp_path, embeddings=embeddings) as store:
        store.add("The port is 8443.", source="handbook/deploy.md", metadata={"page": 3})
        store.add("The host is ada.", source="handbook/hosts.md")
        documents = FactRetriever(store=store, k=2).invoke("What is the port?")
        node = MemoryNode(ChatDeltaMem(engine=FakeEngine()), retriever=FactRetriever(store=store, k=2))
        reply = node.invoke({"messages": [HumanMessage("What is the port?")]})["messages"][0]
        shown = cited(reply, documents)
        assert [document.page_content for document in shown] == ["The port is 8443."]
    stored: Any = AIMessage.model_validate_json(reply.model_dump_json())
    with FactStore(tmp_path, embeddings=embeddings) as store:
        assert cited(stored, store) == shown
        (named,) = cited(stored)
        assert (named.id, named.page_content) == (shown[0].id, "")
        assert named.metadata == {name: shown[0].metadata[name] for name in ("source", "score")}
        store.delete(ids=[shown[0].id])
        assert cited(stored, store) == [named]


def test_what_is_no_document_or_reply_is_refused() -> None:
    with pytest.raises(FactStoreError, match="got str"):
        facts_block(["a text"])  # type: ignore[list-item]
    with pytest.raises(FactStoreError, match="got NoneType"):
        cited(None, DOCUMENTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("facts", [[{"number": "1", "id": "a"}], [{"number": 1, "id": 2}], {"1": "a"}, ["a"]])
def test_without_documents_the_reply_has_to_say_what_was_shown(facts: object) -> None:
    for reply in ("said [1]", AIMessage("said [1]", response_metadata={"facts": facts})):
        with pytest.raises(FactStoreError, match="pass the documents"):
            cited(reply)
    assert cited(AIMessage("no facts were shown [1]")) == []
    assert cited(AIMessage("said [2]", response_metadata={"facts": [{"number": 1, "id": "a"}]})) == []
