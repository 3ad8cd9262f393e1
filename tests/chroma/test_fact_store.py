"""What a FactStore keeps, finds and deletes; batches, threads, the event loop; embedders and rows that are not what
they should be.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from functools import reduce
from pathlib import Path
from typing import Any

import chromadb
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from agentmem.errors import FactStoreError
from agentmem_chroma import Fact, FactStore

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
Open = Callable[..., FactStore]


def texts(facts: list[Fact]) -> list[str]:
    return [fact.text for fact in facts]


def test_a_fact_comes_back_whole(store: FactStore) -> None:
    fact = Fact(
        "Der Port ist 8080, naïve\n\tsecond line 🙂",
        source="notes/ports.md",
        thread="t1",
        time=datetime(2026, 3, 1, 23, 59, 59, 123456, tzinfo=timezone(timedelta(hours=-7))),
        metadata={"line": 7, "tags": ["net", "dev"], "nested": {"ok": True, "none": None}},
    )
    assert store.add(fact) == [fact.id]
    (found,) = store.get(fact.id)
    assert found == fact
    assert found.time == fact.time
    assert found.time.utcoffset() == timedelta(0)


def test_plain_texts_take_what_the_call_says(store: FactStore) -> None:
    before = datetime.now(UTC)
    ids = store.add(["one", "two"], source="s", thread="t", metadata={"n": 1})
    first, second = store.get(ids)
    assert (first.text, first.source, first.thread, first.metadata) == ("one", "s", "t", {"n": 1})
    assert before <= first.time == second.time <= datetime.now(UTC)
    (alone,) = store.add("the whole sentence")
    assert texts(store.get(alone)) == ["the whole sentence"]
    assert store.add([]) == []


def test_source_and_thread_are_part_of_a_fact(store: FactStore) -> None:
    ids = [
        *store.add("a fact"),
        *store.add("a fact", source="s"),
        *store.add("a fact", thread="s"),
        *store.add("a fact", source="s", thread="s"),
    ]
    assert len(set(ids)) == store.count() == 4
    assert store.add(["a fact", "a fact"], source="s") == [ids[1]] * 2
    assert store.count() == 4


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("together", [True, False])
def test_the_newer_time_wins(store: FactStore, order: tuple[int, int], together: bool) -> None:
    versions = [Fact("a fact", time=NOON + n * HOUR, metadata={"version": n}) for n in (0, 1)]
    given = [versions[n] for n in order]
    for batch in [given] if together else [[fact] for fact in given]:
        store.add(batch)
    assert store.facts() == [versions[1]]
    # Of equal times the last given.
    last = Fact("a fact", time=NOON + HOUR, metadata={"last": True})
    store.add(last)
    assert store.facts() == [last]


@pytest.mark.parametrize(
    ("facts", "options", "said"),
    [
        (["fine", ""], {}, "text"),
        (["fine", " \n\t"], {}, "text"),
        (["fine", 7], {}, "string"),
        (["fine", {"text": "a fact"}], {}, "string"),
        ({"text": "a mapping is not its keys"}, {}, r"Fact\(text="),
        (["fine", "\ud800"], {}, "Unicode"),
        (["fine"], {"time": datetime(2026, 3, 1)}, "time zone"),
        (["fine"], {"time": datetime(9999, 12, 31, 23, tzinfo=timezone(-12 * HOUR))}, "UTC"),
        (["fine"], {"metadata": {"a": object()}}, "JSON"),
        (["fine"], {"metadata": {"a": float("nan")}}, "JSON"),
        (["fine"], {"metadata": reduce(lambda inner, _: {"a": inner}, range(3000), {})}, "JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_nothing_is_stored(
    store: FactStore, facts: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(FactStoreError, match=said):
        store.add(facts, **options)
    assert store.count() == 0


def test_the_newest_facts_come_page_by_page(store: FactStore) -> None:
    for number in range(7):
        store.add(Fact(f"fact {number}"))
    store.delete(store.newest(7)[1].id)  # number 5
    store.add(Fact("fact 0"))  # stored already: it keeps its place
    pages = [store.newest(4), store.newest(4, 4), store.newest(4, 8)]
    assert [[fact.text[-1] for fact in page] for page in pages] == [["6", "4", "3", "2"], ["1", "0"], []]
    for wrong in ((0, 0), (1, -1), ("5", 0), (1, None)):
        with pytest.raises(FactStoreError, match="limit"):
            store.newest(*wrong)  # type: ignore[arg-type]


def test_documents_are_facts(store: FactStore) -> None:
    documents = [
        Document(page_content="one", metadata={"source": "a.md", "page": 3}),
        Document(page_content="two", metadata={"time": "2026-03-01T12:00:00+00:00", "thread_id": "t"}),
    ]
    ids = store.add(documents, source="elsewhere", time=NOON + HOUR, metadata={"kept": True})
    assert store.get(ids) == [
        Fact("one", "a.md", "", NOON + HOUR, {"kept": True, "page": 3}),
        Fact("two", "elsewhere", "t", NOON, {"kept": True}),
    ]
    assert store.add(Document(page_content="three")) == [Fact("three").id]
    with pytest.raises(FactStoreError, match="ISO 8601"):
        store.add(Document(page_content="four", metadata={"time": "noon"}))


@pytest.mark.parametrize(
    ("filter", "numbers"),
    [
        ({"n": 3}, {3}),
        ({"n": {"$gte": 3, "$lt": 5}}, {3, 4}),
        ({"kind": "even", "n": {"$gt": 5}}, {6, 8}),
        ({"$or": [{"n": 1}, {"n": {"$in": [7, 8]}}]}, {1, 7, 8}),
        ({"$and": [{"kind": "odd"}, {"n": {"$nin": [1, 3]}}]}, {5, 7, 9}),
        ({"kind": {"$ne": "odd"}}, {0, 2, 4, 6, 8}),
        ({"source": "s1"}, {1, 4, 7}),
        ({"n": {"$gt": "text"}}, set()),
        ({"absent": 1}, set()),
        ({"absent": {"$ne": 1}}, set(range(10))),
        ({}, set(range(10))),
    ],
)
def test_filters_over_metadata(store: FactStore, filter: dict[str, Any], numbers: set[int]) -> None:
    for n in range(10):
        store.add(f"fact {n}", source=f"s{n % 3}", metadata={"n": n, "kind": "odd" if n % 2 else "even"})
    assert {hit.fact.metadata["n"] for hit in store.search("fact", 10, filter=filter)} == numbers
    assert {fact.metadata["n"] for fact in store.facts(filter=filter)} == numbers
    assert store.count(filter=filter) == len(numbers)
    if numbers:
        assert len(store.search("fact", 1, filter=filter)) == 1


@pytest.mark.parametrize(
    "filter",
    [
        *(
            {"$not": 1},
            {"n": {"$like": "x"}},
            {"$or": {}},
            {"$or": []},
            {"n": {"$in": "text"}},
            {3: 1},
            "n = 3",
            "",
            [],
            0,
        ),
        reduce(lambda inner, _: {"$and": [inner]}, range(5000), {}),
    ],
)
def test_filters_that_are_none(store: FactStore, filter: Any) -> None:
    for facts in ([], ["a fact"]):  # a mistake shows in an empty store too
        store.add(facts)
        for call in (store.facts, store.count, lambda **options: store.search("fact", **options)):
            with pytest.raises(FactStoreError, match="filter"):
                call(filter=filter)


def test_scores_are_cosine_similarities_best_first(open_store: Open, table: Any) -> None:
    vectors = {"same": [5.0, 0.0], "near": [0.6, 0.8], "across": [0.0, 1.0], "opposite": [-2.0, 0.0]}
    store = open_store(embeddings=table(vectors, [1.0, 0.0]))
    store.add(["across", "opposite", "same", "near"])
    found = [(hit.fact.text, hit.score) for hit in store.search("anything")]
    assert [text for text, _ in found] == ["same", "near", "across", "opposite"]
    assert [score for _, score in found] == pytest.approx([1.0, 0.6, 0.0, -1.0], abs=2e-6)
    assert all(-1.0 <= score <= 1.0 for _, score in found)
    assert [hit.fact.text for hit in store.search("anything", min_score=0.5)] == ["same", "near"]


def test_ties_are_ordered_by_time_then_id(open_store: Open, table: Any) -> None:
    same = table({}, [0.3, 0.4, 0.5])
    facts = [Fact(f"fact {n}", time=NOON + (n % 3) * HOUR) for n in range(60)]
    expected = sorted(sorted(facts, key=lambda f: f.id), key=lambda f: f.time, reverse=True)
    forward = open_store(embeddings=same, collection="forward")
    backward = open_store(embeddings=same, collection="backward")
    forward.add(facts)
    backward.add(facts[::-1])
    for k in (1, 3, 25, 60):
        assert [hit.fact for hit in forward.search("q", k)] == expected[:k]
        assert [hit.fact for hit in backward.search("q", k)] == expected[:k]


def test_search_by_source_and_thread(store: FactStore) -> None:
    for source in ("", "a", "b"):
        for thread in ("", "t1", "t2"):
            store.add(f"from {source!r} in {thread!r}", source=source, thread=thread)

    def found(**where: Any) -> set[tuple[str, str]]:
        return {(hit.fact.source, hit.fact.thread) for hit in store.search("from", 20, **where)}

    assert len(found()) == 9
    assert found(source="a") == {("a", ""), ("a", "t1"), ("a", "t2")}
    assert found(thread="t1") == {("", "t1"), ("a", "t1"), ("b", "t1")}
    assert found(source="b", thread="t2") == {("b", "t2")}
    assert found(source="") == {("", ""), ("", "t1"), ("", "t2")}
    assert found(thread="none such") == set()


def test_the_ends_of_search(store: FactStore) -> None:
    assert store.search("anything") == []
    store.add(["one", "two"])
    assert len(store.search("one", 50)) == 2
    assert store.search("one", 1)[0].fact.text == "one"
    assert store.search(" \n") == []
    with pytest.raises(FactStoreError, match="k should be 1 or more"):
        store.search("one", 0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda store: store.search("one", "4"), "k should be 1 or more, got '4'"),
        (lambda store: store.search(5), "a query should be a string, got int"),
        (lambda store: store.search("one", min_score="high"), "min_score should be a cosine similarity"),
        (lambda store: store.search("one", min_score=50), "min_score should be a cosine similarity"),
        (lambda store: store.search("one", min_score=float("nan")), "min_score should be a cosine similarity"),
        (lambda store: store.search("one", thread=5), "thread should be a string or None for all, got 5"),
        (lambda store: store.count(source=["a"]), "source should be a string or None for all"),
        (lambda store: store.delete(thread=5), "thread should be a string"),
        (lambda store: store.delete(5), "ids of facts are strings, got 5"),
        (lambda store: store.get([None]), "ids of facts are strings, got None"),
        (lambda store: store.add(None), "facts are texts, Fact objects or documents, got NoneType"),
    ],
)
def test_arguments_of_another_type_are_refused(store: FactStore, call: Callable[[Any], object], said: str) -> None:
    """The number of a user is not the user's thread: nothing would be found, and nothing deleted."""
    store.add("one", thread="5")
    with pytest.raises(FactStoreError, match=said):
        call(store)
    assert store.count(thread="5") == 1


def test_get_keeps_the_order_and_leaves_out_what_is_missing(store: FactStore) -> None:
    one, two, three = store.add(["one", "two", "three"])
    assert texts(store.get([three, "nope", one, three, two])) == ["three", "one", "three", "two"]
    assert store.get([]) == []


def test_facts_are_listed_oldest_first_and_counted(store: FactStore) -> None:
    for n, thread in ((3, "a"), (1, "b"), (2, "a")):
        store.add(f"fact {n}", source="s", thread=thread, time=NOON + n * HOUR)
    assert texts(store.facts()) == ["fact 1", "fact 2", "fact 3"]
    assert texts(store.facts(thread="a", source="s")) == ["fact 2", "fact 3"]
    assert (store.count(), store.count(thread="a"), store.count(source="x")) == (3, 2, 0)


def test_delete_tells_how_many_were_there(store: FactStore) -> None:
    one, two, three = store.add(["one", "two", "three"])
    assert store.delete(["nope"]) == 0
    assert store.delete([one, one, "nope", two]) == 2
    assert store.delete(one) == 0
    assert store.delete([]) == 0
    with pytest.raises(FactStoreError, match="ids, a source or a thread"):
        store.delete()
    assert texts(store.facts()) == ["three"]
    assert [hit.fact.id for hit in store.search("one", 5)] == [three]


def test_delete_by_source_and_thread_meets_every_condition(store: FactStore) -> None:
    ids = {
        (source, thread): store.add("text", source=source, thread=thread)[0]
        for source in ("a", "b")
        for thread in ("t1", "t2")
    }
    assert store.delete(source="none such") == 0
    assert store.delete([ids["a", "t1"], ids["b", "t1"]], source="a") == 1
    assert store.delete(source="b", thread="t2") == 1
    assert {(fact.source, fact.thread) for fact in store.facts()} == {("a", "t2"), ("b", "t1")}
    assert store.delete(thread="t1") == 1
    assert store.delete(source="a") == 1
    assert store.count() == 0


def test_more_facts_than_chroma_takes_at_once(open_store: Open) -> None:
    store = open_store(embeddings=DeterministicFakeEmbedding(size=2))
    ids = store.add([f"fact {n}" for n in range(6000)], source="many")
    assert store.count() == len(set(ids)) == 6000
    assert ids == store.add([f"fact {n}" for n in range(6000)], source="many", metadata={"again": True})
    assert [fact.text for fact in store.get(ids)] == [f"fact {n}" for n in range(6000)]
    assert len(store.facts()) == len(store.search("fact", 6000)) == 6000
    assert store.delete(ids[:5990]) == 5990
    assert store.delete(source="many") == 10
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
