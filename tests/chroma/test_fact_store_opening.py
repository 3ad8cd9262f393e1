"""Which databases and collections a FactStore opens, and what closing means."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings

from agentmem.errors import FactStoreError, MissingExtraError
from agentmem_chroma import FactStore

Open = Callable[..., FactStore]


def test_a_path_or_a_client(embeddings: Embeddings, tmp_path: Path) -> None:
    with pytest.raises(FactStoreError, match="neither"):
        FactStore(embeddings=embeddings)
    with chromadb.EphemeralClient() as client, pytest.raises(FactStoreError, match="both"):
        FactStore(tmp_path, client=client, embeddings=embeddings)


def test_facts_outlive_the_store(open_store: Open) -> None:
    with open_store() as store:
        (id,) = store.add("a fact", source="s")
    again = open_store()
    assert again.search("a fact", 1)[0].fact.id == id
    assert again.add("a fact", source="s") == [id]
    assert again.count() == 1


def test_a_closed_store_says_so(store: FactStore) -> None:
    store.close()
    store.close()
    for call in (store.count, store.facts, lambda: store.add("x"), lambda: store.search("x")):
        with pytest.raises(FactStoreError, match="closed"):
            call()


def test_a_given_client_stays_open_and_collections_are_apart(embeddings: Embeddings) -> None:
    with chromadb.EphemeralClient() as client:
        for count, name in ((0, "one"), (1, "one"), (0, "two")):
            with FactStore(client=client, embeddings=embeddings, collection=f"collection-{name}") as store:
                assert store.count() == count
                store.add("a fact")


@pytest.mark.parametrize(
    ("space", "said"),
    [
        *((space, f"'{space}' distance.*'cosine'.*another collection") for space in ("l2", "ip")),
        ("cosine", "not made by a FactStore"),
    ],
)
def test_a_collection_that_is_not_ours_is_refused(tmp_path: Path, open_store: Open, space: Any, said: str) -> None:
    with chromadb.PersistentClient(str(tmp_path / "db")) as client:
        client.create_collection("facts", configuration={"hnsw": {"space": space}})
        with pytest.raises(FactStoreError, match=said):
            open_store(client=client)


class Renamed(DeterministicFakeEmbedding):
    model_name: str = "small"


def test_another_embedder_is_refused_and_a_given_name_overrides(open_store: Open) -> None:
    open_store(embeddings=Renamed(size=16)).close()
    with pytest.raises(FactStoreError, match=r"dimension 16.*dimension 8"):
        open_store(embeddings=Renamed(size=8))
    with pytest.raises(FactStoreError, match=r"'Renamed\(small\)'.*'Renamed\(large\)'"):
        open_store(embeddings=Renamed(size=16, model_name="large"))
    with pytest.raises(FactStoreError, match="'DeterministicFakeEmbedding'"):
        open_store(embeddings=DeterministicFakeEmbedding(size=16))
    assert open_store(embeddings=Renamed(size=16, model_name="large"), embedder="Renamed(small)").count() == 0


def test_a_bad_collection_name_is_refused(open_store: Open) -> None:
    with pytest.raises(FactStoreError, match="collection 'no spaces'"):
        open_store(collection="no spaces")


def test_a_damaged_database_and_a_file_are_refused(tmp_path: Path, open_store: Open) -> None:
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "chroma.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(FactStoreError, match="cannot open the database"):
        open_store()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FactStoreError, match="directory"):
        open_store(path=tmp_path / "file")


def test_home_is_expanded(tmp_path: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with open_store(path="~/kept/facts") as store:
        store.add("a fact")
    assert (tmp_path / "kept" / "facts" / "chroma.sqlite3").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "sqlite:///facts", "https://user:word@host", "http://host/path", "localhost:8000", ""]
)
def test_a_url_is_a_server_or_refused(
    tmp_path: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FactStoreError, match="server"):
        open_store(path=url)
    assert list(tmp_path.iterdir()) == []


def test_a_collection_that_was_made_anew_is_found(tmp_path: Path, open_store: Open) -> None:
    with chromadb.PersistentClient(str(tmp_path / "db")) as client:
        store, other = open_store(client=client), open_store(client=client)
        store.add("a fact")
        assert other.rebuild_index() == 1
        assert store.search("a fact", 1)[0].score == 1.0
        client.delete_collection("facts")
        with pytest.raises(FactStoreError, match="was deleted"):
            store.count()
        store.close()
        other.close()


@pytest.mark.parametrize("call", ["count", "facts", "add", "search", "delete"])
def test_what_chroma_raises_is_typed(open_store: Open, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store = open_store()
    store.add("a fact")

    def fails(*_: Any, **__: Any) -> None:
        raise chromadb.errors.InternalError("database is locked")

    for method in ("count", "get", "query", "upsert", "update", "delete"):
        monkeypatch.setattr(type(store._collection), method, fails)
    argument = {"add": ("x",), "search": ("x",), "delete": ("x",)}.get(call, ())
    with pytest.raises(FactStoreError, match="database is locked"):
        getattr(store, call)(*argument)


def test_a_missing_chromadb_names_the_extra(open_store: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "chromadb", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[chroma\]'"):
        open_store()
    assert not (tmp_path / "facts").exists()
