"""Which databases and collections a FactStore opens, what closing means, and that one process owns a directory: tried
with processes.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings

from agentmem.errors import FactStoreError, MissingExtraError, StoreOwnedError
from agentmem_chroma import Fact, FactStore
from tests.helpers.fact_processes import ask_a_server, chroma_server, fork, lose_a_server, own, try_to_open
from tests.helpers.processes import Process

Open = Callable[..., FactStore]
Start = Callable[..., Process]


def test_a_path_or_a_client(embeddings: Embeddings, tmp_path: Path) -> None:
    with pytest.raises(FactStoreError, match="neither"):
        FactStore(embeddings=embeddings)
    with chromadb.EphemeralClient() as client, pytest.raises(FactStoreError, match="both"):
        FactStore(tmp_path, client=client, embeddings=embeddings)


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
    for _ in range(2):
        with pytest.raises(FactStoreError, match=r"cannot open the database.*not a database"):
            open_store()
    shutil.rmtree(tmp_path / "facts")  # what is mended opens in the same process
    assert open_store().count() == 0
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FactStoreError, match="directory"):
        open_store(path=tmp_path / "file")


@pytest.mark.parametrize("lose", [Path.unlink, lambda file: file.write_bytes(b"")], ids=["missing", "empty"])
@pytest.mark.parametrize("rebuild", [False, True])
def test_a_store_that_lost_its_database_is_no_empty_store(
    tmp_path: Path, open_store: Open, lose: Callable[[Path], object], rebuild: bool
) -> None:
    with open_store() as store:
        store.add("a fact")
    lose(tmp_path / "facts" / "chroma.sqlite3")
    for _ in range(2):
        with pytest.raises(FactStoreError, match=r"has held facts.*restore it from a backup"):
            open_store(rebuild=rebuild)


def test_home_is_expanded(tmp_path: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with open_store(path="~/kept/facts") as store:
        store.add("a fact")
    assert (tmp_path / "kept" / "facts" / "chroma.sqlite3").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:9", "sqlite:///facts", "http://host/path", "http://host?key=1", "localhost:8000"),
        *("http://[::1", "http://host:port", Path("http://host:8000"), Path("https://host"), "", " ", "a\0b", "\ud800"),
        *(5, b"facts", ["facts"]),
    ],
)
def test_a_url_is_a_server_or_refused(
    tmp_path: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch, url: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FactStoreError, match="server"):
        open_store(path=url)
    assert list(tmp_path.iterdir()) == []


def test_a_password_in_a_url_is_not_repeated(open_store: Open) -> None:
    with pytest.raises(FactStoreError, match="tokens") as caught:
        open_store(path="https://user:pass@word@host")
    assert "user" not in str(caught.value)
    assert "word" not in str(caught.value)


@pytest.mark.parametrize("client", ["http://localhost:8000", object()])
def test_what_is_no_client_is_refused(open_store: Open, client: object) -> None:
    with pytest.raises(FactStoreError, match="client should be a Chroma client"):
        open_store(client=client)


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


def test_an_owner_is_named_and_its_death_frees_the_directory(
    tmp_path: Path, open_store: Open, processes: Start
) -> None:
    owner = processes(own, str(tmp_path / "facts"))
    owner.until_it_says(1)
    with pytest.raises(StoreOwnedError) as refused:
        open_store()
    message = str(refused.value)
    for part in (f"process {owner.pid}", socket.gethostname(), str(tmp_path / "facts"), "HttpClient"):
        assert part in message
    owner.kill()
    owner.wait()
    store = open_store()
    assert store.search("the port is 8080", 1)[0].fact.source == "other process"
    assert store.count() == 2


def test_a_second_process_waits_for_the_last_store_to_close(tmp_path: Path, open_store: Open, processes: Start) -> None:
    def tried() -> list[list[str]]:
        other = processes(try_to_open, str(tmp_path / "facts"))
        assert other.wait() == 0
        return other.said()

    first = open_store()
    (tmp_path / "link").symlink_to(tmp_path / "facts")
    second = open_store(path=tmp_path / "link")
    first.close()
    second.add("still here")
    ((outcome, why),) = tried()
    assert outcome == "refused"
    assert f"process {os.getpid()} " in why
    second.close()
    assert tried() == [["opened", Fact("from the second", "s", "t").id]]
    again = open_store()
    assert {fact.text for fact in again.facts()} == {"still here", "from the second"}


def test_stores_of_one_process_share_a_directory(tmp_path: Path, open_store: Open) -> None:
    first, second = open_store(), open_store()
    first.add("written by the first")
    assert second.search("written by the first", 1)[0].fact.text == "written by the first"
    second.add("written by the second")
    first.close()
    assert {fact.text for fact in second.facts()} == {"written by the first", "written by the second"}
    assert second.search("written by the second", 1)[0].score == 1.0


def test_a_given_embedded_client_owns_its_directory_too(
    tmp_path: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with chromadb.PersistentClient("facts") as client:
        with open_store(client=client), pytest.raises(FactStoreError, match="the same client"):
            open_store()  # Chroma would make a second system, blind to the first one's writes
        open_store()


def test_a_failed_opening_lets_the_directory_go(
    tmp_path: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(embedder="first").close()
    with pytest.raises(FactStoreError, match="'second'"):
        open_store(embedder="second")
    monkeypatch.chdir(tmp_path)
    with chromadb.PersistentClient("facts") as client, open_store(client=client, embedder="first") as store:
        assert store.count() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_told_to_spawn(tmp_path: Path, processes: Start) -> None:
    forking = processes(fork, str(tmp_path / "facts"))
    assert forking.wait() == 0
    assert forking.said() == [[True], [True], [1]]


def test_a_server_is_a_store_as_well(tmp_path: Path, processes: Start) -> None:
    gone = tmp_path / "gone"
    with chroma_server(tmp_path / "db") as (url, server):
        client, losing = processes(ask_a_server, url), processes(lose_a_server, url, str(gone))
        assert client.wait() == 0
        losing.until_it_says(1)
        server.kill()
        server.wait()
        gone.touch()
        assert losing.wait() == 0
    shared, first, second = (Fact(text).id for text in ("shared", "first", "second"))
    assert client.said() == [[shared, first], [2, "shared", 0], [shared, second], [3, "shared", 0]]
    assert "see that the server runs" in losing.said()[1][0]
