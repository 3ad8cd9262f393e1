"""An index that is lost, damaged or of another embedder: noticed when the store opens, built anew from the texts."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings

from agentmem.errors import FactIndexError, FactStoreError
from agentmem_chroma import Fact, FactStore
from tests.helpers.fact_processes import Hashed, run_forked, write
from tests.helpers.processes import Process

Open = Callable[..., FactStore]
MANY = 1200  # Chroma saves an index after a thousand writes


def fill(store: FactStore, start: int = 0, count: int = MANY) -> None:
    for first in range(start, start + count, 300):
        store.add([f"fact {n}" for n in range(first, first + 300)], source="many")


def folder(directory: Path) -> Path:
    (header,) = directory.glob("*/header.bin")
    return header.parent


def check_whole(store: FactStore, count: int = MANY) -> None:
    """Everything is there, and the index finds it."""
    assert store.count() == len(store.facts()) == count
    for n in (0, count // 2, count - 1):
        hit = store.search(f"fact {n}", 1)[0]
        assert (hit.fact.text, hit.score) == (f"fact {n}", 1.0)


@pytest.fixture
def embeddings() -> Embeddings:
    return Hashed()


@pytest.fixture(scope="session")
def filled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed directory whose index has been saved."""
    directory = tmp_path_factory.mktemp("filled") / "facts"
    with FactStore(directory, embeddings=Hashed()) as store:
        fill(store)
    assert (folder(directory) / "index_metadata.pickle").is_file()
    return directory


@pytest.fixture
def forked_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index is tried in a process that has chromadb already: to import it takes longer than the trial."""
    real = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if "probe" in command:
            return run_forked(command, **options)
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture
def filled(filled_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled_once, tmp_path / "facts"))


def lose_folder(directory: Path) -> None:
    shutil.rmtree(folder(directory))


def lose_one_file(directory: Path) -> None:
    (folder(directory) / "data_level0.bin").unlink()


def cut(directory: Path) -> None:
    file = folder(directory) / "index_metadata.pickle"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble_header(directory: Path) -> None:
    (folder(directory) / "header.bin").write_bytes(os.urandom(100))


def other_vectors(directory: Path) -> None:
    """Sound in itself, and of other texts: as where an old file stands among new ones."""
    file = folder(directory) / "data_level0.bin"
    data = np.frombuffer(file.read_bytes(), dtype=np.uint8).copy()
    size = int.from_bytes((folder(directory) / "header.bin").read_bytes()[28:36], "little")
    rows = data[: MANY // 2 * size].reshape(-1, size)
    vectors = slice(-8 - 8 * 4, -8)  # before the label
    rows[:, vectors] = rows[::-1, vectors]
    file.write_bytes(data.tobytes())


@pytest.mark.usefixtures("forked_probes")
@pytest.mark.parametrize("damage", [lose_folder, lose_one_file, cut, garble_header, other_vectors])
def test_a_damaged_index_is_noticed_and_built_anew(
    filled: Path, open_store: Open, damage: Callable[[Path], None]
) -> None:
    damage(filled)
    for _ in range(2):  # and again, until something is done
        with pytest.raises(FactIndexError, match="rebuild=True"):
            open_store()
    with open_store(rebuild=True) as store:
        check_whole(store)
        store.add("one more")
    with open_store() as store:
        assert store.count() == MANY + 1
        assert store.search("one more", 1)[0].score == 1.0
    assert len(list(filled.glob("*/header.bin"))) == 1


def test_an_index_is_tried_by_an_interpreter_of_its_own(filled: Path, open_store: Open) -> None:
    """That finds chromadb wherever this one does; in the other tests it is forked off."""
    cut(filled)
    with pytest.raises(FactIndexError, match="reading it failed with exit code"):
        open_store()


def links_above(content: bytes) -> tuple[int, set[int]]:
    """Where the first links above level 0 stand in `link_lists.bin`, and the vectors that have none."""
    first, without, place = 0, set(), 0
    for number in range(MANY):
        length = int.from_bytes(content[place : place + 4], "little")
        first = first or (place + 4) * bool(length)
        without |= set() if length else {number}
        place += 4 + length
    return first, without


@pytest.mark.parametrize("what", ["level 0", "above", "a level that it is not on", "how many"])
def test_a_link_past_the_end_is_seen_without_a_search_that_meets_it(filled: Path, open_store: Open, what: str) -> None:
    """Searching there reads memory that is not the index's: the trial may pass, and a later search crash."""
    file = folder(filled) / ("data_level0.bin" if what == "level 0" else "link_lists.bin")
    data = bytearray(file.read_bytes())
    size = int.from_bytes((folder(filled) / "header.bin").read_bytes()[28:36], "little")
    first, without = (7 * size, {0}) if what == "level 0" else links_above(data)  # the eighth vector's
    if what == "how many":
        data[first : first + 2] = (60_000).to_bytes(2, "little")
    else:
        linked = min(without) if what.startswith("a level") else MANY + 10_000_000
        data[first + 4 : first + 8] = linked.to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(FactIndexError, match="links to vectors that it has not got"):
        open_store()
    if what == "above":
        with open_store(rebuild=True) as store:
            check_whole(store)


@pytest.mark.usefixtures("forked_probes")
def test_files_of_two_moments_are_noticed_or_harmless(tmp_path: Path, filled: Path, open_store: Open) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder(filled), old)
    with open_store() as store:
        fill(store, MANY)
    new = tmp_path / "new"
    shutil.copytree(filled, new)
    for name in ("data_level0.bin", "index_metadata.pickle", "link_lists.bin"):
        shutil.rmtree(filled)
        shutil.copytree(new, filled)
        shutil.copy2(old / name, folder(filled) / name)
        with open_store(rebuild=True) as store:
            check_whole(store, 2 * MANY)


def test_a_given_client_is_looked_at_too(filled: Path, open_store: Open) -> None:
    lose_folder(filled)
    with chromadb.PersistentClient(str(filled)) as client:
        with pytest.raises(FactIndexError, match="rebuild=True"):
            open_store(client=client)
        with open_store(client=client, rebuild=True) as store:
            check_whole(store)


def test_an_index_that_was_never_saved_needs_none(tmp_path: Path, open_store: Open) -> None:
    with open_store() as store:
        store.add(["one", "two"])
    lose_folder(tmp_path / "facts")
    with open_store() as store:
        assert [hit.score for hit in store.search("one", 1)] == [1.0]


def test_rebuilding_shrinks_what_is_left(filled: Path, open_store: Open) -> None:
    def size() -> int:
        return sum(file.stat().st_size for file in filled.rglob("*") if file.is_file())

    before = size()
    with open_store() as store:
        other = open_store()  # shares the directory, and holds the old collection
        store.add("what is left")
        assert store.delete(source="many") == MANY
        vacuumed = size()
        assert store.rebuild_index() == 1
        assert other.search("left", 1)[0].fact.text == "what is left"
        assert other.count() == 1
        other.close()
    assert size() < vacuumed < before / 2
    assert open_store().search("what is left", 1)[0].score == 1.0


def test_an_empty_store_is_small(filled: Path, open_store: Open) -> None:
    with open_store() as store:
        assert store.delete(source="many") == MANY
        assert sum(file.stat().st_size for file in filled.rglob("*") if file.is_file()) < 400_000
        store.add("a new beginning")
        assert store.search("beginning", 1)[0].fact.text == "a new beginning"


class Wider(DeterministicFakeEmbedding):
    """Another embedder, of another dimension."""


@pytest.mark.parametrize("other", [Wider(size=32), Wider(size=8)])
def test_a_store_goes_on_with_another_embedder(open_store: Open, other: Embeddings) -> None:
    facts = [Fact(f"fact {n}", "s", metadata={"n": n}) for n in range(5)]
    with open_store() as store:
        store.add(facts)
    with pytest.raises(FactStoreError, match="rebuild=True"):
        open_store(embeddings=other)
    with open_store(embeddings=other, rebuild=True) as store:
        assert sorted(store.facts(), key=lambda fact: fact.text) == facts
        assert store.search("fact 3", 1)[0].score == 1.0
    assert open_store(embeddings=other).count() == 5


class Failing(Hashed):
    """Embeds so many texts, then no more."""

    left = 100

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.left -= 1
        if self.left == 0:
            raise ConnectionError("the embedding service is gone")
        return super().embed_documents(texts)


def test_a_rebuilding_that_fails_leaves_the_old_index(filled: Path, open_store: Open) -> None:
    with open_store(embeddings=(failing := Failing()), embedder="Hashed") as store:
        failing.left = 3
        with pytest.raises(FactStoreError, match="embedding service"):
            store.rebuild_index()
        check_whole(store)
    with open_store() as store:
        check_whole(store)
    names = [collection.name for collection in chromadb.PersistentClient(str(filled)).list_collections()]
    assert names == ["facts"]


def test_a_rebuilding_that_is_killed_between_its_last_steps(tmp_path: Path, open_store: Open) -> None:
    with open_store() as store:
        store.add(["one", "two"])
    with chromadb.PersistentClient(str(tmp_path / "facts")) as client:
        client.get_collection("facts", embedding_function=None).modify(name="facts-rebuilt")
    assert open_store().count() == 2


@pytest.mark.usefixtures("forked_probes")
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_no_acknowledged_fact_is_lost_by_kills(
    tmp_path: Path, open_store: Open, processes: Callable[..., Process], kills: int
) -> None:
    chance, acknowledged = random.Random(kills), 0
    for _ in range(kills):
        writer = processes(write, str(tmp_path / "facts"))
        writer.until_it_says(1)
        time.sleep(chance.uniform(0.05, 0.8))
        writer.kill()
        writer.wait()
        said = [count for (count,) in writer.said()]
        assert said[0] >= acknowledged
        acknowledged = said[-1]
    with open_store(rebuild=True) as store:
        there = {fact.text for fact in store.facts()}
        assert {f"fact {n}" for n in range(acknowledged)} <= there
        for n in random.Random(0).sample(range(acknowledged), min(acknowledged, 200)):
            assert store.search(f"fact {n}", 1)[0].score == pytest.approx(1.0, abs=1e-5)
