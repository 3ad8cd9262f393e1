"""What a FactStore keeps, finds and deletes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from langchain_core.documents import Document

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


def test_adding_twice_keeps_one(store: FactStore) -> None:
    first = store.add(["a fact", "a fact"], source="s")
    assert first[0] == first[1]
    assert store.add("a fact", source="s") == first[:1]
    assert store.count() == 1


def test_source_and_thread_are_part_of_a_fact(store: FactStore) -> None:
    ids = [
        *store.add("a fact"),
        *store.add("a fact", source="s"),
        *store.add("a fact", thread="s"),
        *store.add("a fact", source="s", thread="s"),
    ]
    assert len(set(ids)) == store.count() == 4


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("together", [True, False])
def test_the_newer_time_wins(store: FactStore, order: tuple[int, int], together: bool) -> None:
    versions = [Fact("a fact", time=NOON + n * HOUR, metadata={"version": n}) for n in (0, 1)]
    given = [versions[n] for n in order]
    for batch in [given] if together else [[fact] for fact in given]:
        store.add(batch)
    assert store.facts() == [versions[1]]


def test_of_equal_times_the_last_given_wins(store: FactStore) -> None:
    store.add("a fact", time=NOON, metadata={"version": 0, "gone": True})
    store.add("a fact", time=NOON, metadata={"version": 1})
    assert store.facts() == [Fact("a fact", time=NOON, metadata={"version": 1})]


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
        (["fine"], {"metadata": {"a": object()}}, "JSON"),
        (["fine"], {"metadata": {"a": float("nan")}}, "JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_nothing_is_stored(
    store: FactStore, facts: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(FactStoreError, match=said):
        store.add(facts, **options)
    assert store.count() == 0


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
    "filter", [{"$not": 1}, {"n": {"$like": "x"}}, {"$or": {}}, {"$or": []}, {"n": {"$in": "text"}}, "n = 3"]
)
def test_filters_that_are_none(store: FactStore, filter: Any) -> None:
    store.add("a fact")
    with pytest.raises(FactStoreError, match="filter"):
        store.search("fact", filter=filter)


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
