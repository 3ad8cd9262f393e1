"""A deleted fact leaves no byte in the files: the test reads them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import pytest

from agentmem.errors import FactStoreError
from agentmem_chroma import Fact, FactStore
from tests.helpers.fact_processes import Hashed, die_while_deleting

Open = Callable[..., FactStore]
SECRET = Fact(
    "The vault's combination is 81-Kestrel-44.",
    source="kept-by-Marguerite",
    thread="thread-of-Marguerite",
    metadata={"note": "as told by Marguerite"},
)
PIECES = (b"81-Kestrel-44", b"Marguerite")


def left(directory: Path) -> list[str]:
    files = [file for file in directory.rglob("*") if file.is_file()]
    assert any(file.name == "chroma.sqlite3" for file in files)
    return [file.name for file in files if any(piece in file.read_bytes() for piece in PIECES)]


@pytest.mark.parametrize("others", [0, 3, 1500])
def test_no_byte_is_left(tmp_path: Path, open_store: Open, others: int) -> None:
    directory = tmp_path / "facts"
    with open_store() as store:
        store.add([f"other fact {n}" for n in range(others // 2)])
        store.add(SECRET)
        store.add(Fact(SECRET.text, SECRET.source, SECRET.thread, metadata={"note": "Marguerite said it again"}))
        store.add([f"other fact {n}" for n in range(others // 2, others)])
        assert left(directory)
        assert store.delete(SECRET.id) == 1
        assert left(directory) == []
        assert store.count() == others
    assert left(directory) == []
    with open_store() as store:
        assert store.count() == len(store.facts()) == others
        if others:
            assert store.search("other fact 1", 1)[0].score == 1.0
        store.add(SECRET)
        assert store.search(SECRET.text, 1)[0].fact == SECRET
        assert store.delete(thread=SECRET.thread) == 1
    assert left(directory) == []


def test_a_fact_of_an_earlier_process_leaves_none_either(tmp_path: Path, open_store: Open) -> None:
    with open_store() as store:
        store.add([SECRET, *(Fact(f"other {n}") for n in range(1200))])
    with open_store() as store:
        assert store.delete(source=SECRET.source) == 1
        assert left(tmp_path / "facts") == []
        assert store.rebuild_index() == 1200
    assert left(tmp_path / "facts") == []


def test_a_given_client_on_a_directory_leaves_none(tmp_path: Path, open_store: Open) -> None:
    with chromadb.PersistentClient(str(tmp_path / "db")) as client, open_store(client=client) as store:
        store.add([SECRET, "another"])
        store.delete(SECRET.id)
        assert left(tmp_path / "db") == []
        assert [fact.text for fact in store.facts()] == ["another"]


def test_others_read_and_write_meanwhile(open_store: Open) -> None:
    store = open_store()
    store.add([f"kept {n}" for n in range(50)])
    stop, problems = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                assert store.search("kept 7", 1)[0].fact.text == "kept 7"
            except Exception as error:  # noqa: BLE001 - the main thread reports it
                problems.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for n in range(8):
        assert store.delete(store.add(f"short-lived {n}")) == 1
    stop.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert store.count() == 50


def test_a_deletion_that_is_not_complete_says_so(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store()
    store.add(SECRET)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(FactStoreError, match="could not be overwritten"):
        store.delete(SECRET.id)
    assert store.count() == 0


def test_a_killed_deletion_is_completed_when_the_store_is_opened_again(
    tmp_path: Path, open_store: Open, processes: Callable[..., Any]
) -> None:
    child = processes(die_while_deleting, str(tmp_path / "facts"), SECRET.text)
    assert child.wait() == -signal.SIGKILL
    assert left(tmp_path / "facts")
    with open_store(embeddings=Hashed()) as store:
        assert [fact.text for fact in store.facts()] == ["another"]
        assert left(tmp_path / "facts") == []
    assert not (tmp_path / "facts" / "agentmem.deleting").exists()


def test_a_deletion_takes_replaced_metadata_along(tmp_path: Path, open_store: Open) -> None:
    store = open_store()
    _, other = store.add(["a fact", "another"], metadata={"note": "as told by Marguerite"})
    store.add(["a fact", "another"], metadata={"note": "as told by no one"})
    assert left(tmp_path / "facts")
    store.delete(other)
    assert left(tmp_path / "facts") == []
    store.close()
    with open_store() as store:
        assert store.search("a fact", 1)[0].fact.metadata == {"note": "as told by no one"}
