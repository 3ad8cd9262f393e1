"""The files that Chroma keeps in a directory: finds damaged indexes, and overwrites deleted text.

A directory holds `chroma.sqlite3` (texts, metadata, and a queue of the latest writes) and, for each collection, a
folder of five files (the HNSW index), which Chroma rewrites in place after every thousand writes. So a process that is
killed while writing leaves a mixture of old and new files. Chroma reads it without a check, and calls then raise, crash
or never return. The texts are safe in SQLite, and `FactStore` rebuilds the index from them.

- `inspect` finds such damage before Chroma opens the directory. Files that have not changed since the directory was
last closed are trusted; others are tested in a separate process, since the test may hang or crash.
- `overwrite_deleted` removes the remains of deleted facts: the copies in the queue, freed pages of SQLite, and process
memory that was written into unused parts of the index files.

Run as a program (`probe` and `scrub`) this module imports nothing from agentmem. Overwriting needs a separate process
too: Chroma contains a second copy of SQLite, and two copies in one process do not see each other's locks.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_DATABASE = "chroma.sqlite3"
_FILES = ("header.bin", "data_level0.bin", "length.bin", "link_lists.bin", "index_metadata.pickle")
_FINGERPRINTS = "agentmem.index.json"

# hnswlib's header: a version, the offset of level 0, the capacity and the number of vectors, the bytes of each, offsets
# of label and data, the highest level, the entry point, and how many links a vector has at most (above level 0, at
# level 0, as configured).
_HEADER = struct.Struct("<iQQQQQQiIQQQ")
_PAGE = 500
_PROBE_SECONDS = 60  # plus as many again for every 5 MB of index


@dataclass(frozen=True)
class DamagedIndex:
    """An index that is lost or damaged: its folder, and what is wrong with it."""

    folder: Path
    problem: str


@dataclass
class IndexReport:
    """The result of `inspect`.

    Attributes:
        damaged: collections whose index cannot be used.
        probed: collections whose index was tested and works, with its folder. Whether it holds the right vectors
            was not checked.
    """

    damaged: dict[str, DamagedIndex] = field(default_factory=dict)
    probed: dict[str, Path] = field(default_factory=dict)

    def doubtful(self) -> set[Path]:
        """The folders of all collections in the report."""
        return {index.folder for index in self.damaged.values()} | set(self.probed.values())


@dataclass(frozen=True)
class _Segment:
    """The index of one collection: the name of its folder, and whether Chroma has saved it."""

    folder: str
    collection: str
    saved: bool


def inspect(directory: Path) -> IndexReport:
    """Inspect every index in a directory that no process has open."""
    report = IndexReport()
    trusted = _read_fingerprints(directory)
    for segment in _segments(directory):
        folder = directory / segment.folder
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if segment.saved and missing:
            report.damaged[segment.collection] = DamagedIndex(folder, f"{', '.join(missing)} missing in {folder}")
        elif not missing and trusted.get(segment.folder) != _fingerprint(folder):
            problem = _broken_links(folder) or _probe_problem(directory, segment)
            if problem is None:
                report.probed[segment.collection] = folder
            else:
                report.damaged[segment.collection] = DamagedIndex(folder, problem)
    return report


def has_lost_database(directory: Path) -> bool:
    """Whether a directory that has been a store's has no database any more: Chroma would make an empty one."""
    file = directory / _DATABASE
    remains = (directory / _FINGERPRINTS).is_file() or any(directory.glob("*/header.bin"))
    return remains and not (file.is_file() and file.stat().st_size)


def save_fingerprints(directory: Path, doubtful: set[Path]) -> None:
    """Record that index files are intact, except in `doubtful` folders. Call it when the directory is closed."""
    fingerprints = {
        folder.name: _fingerprint(folder)
        for folder in directory.iterdir()
        if folder not in doubtful and all((folder / name).is_file() for name in _FILES)
    }
    note = directory / (_FINGERPRINTS + ".new")
    note.write_text(json.dumps(fingerprints), encoding="utf-8")
    note.replace(directory / _FINGERPRINTS)


def overwrite_deleted(directory: Path, collection_id: str, *, owned: bool) -> None:
    """Remove everything of deleted facts, and of replaced metadata, from the files.

    Rewrites the database, which takes time in proportion to its size. Nothing may use the collection meanwhile. If the
    whole directory is `owned`, nothing may use any collection, and folders that belong to no collection are removed.

    Raises:
        OSError: the separate process failed; the message says why.
    """
    work = {"directory": str(directory), "collection": collection_id, "owned": owned}
    command = [sys.executable, "-I", "-S", __file__, "scrub"]
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}")


def zero_unused(folder: Path) -> None:
    """Zero the unused end of index files, after the last vector: Chroma writes there whatever was in its memory."""
    with suppress(FileNotFoundError):
        head = (folder / "header.bin").read_bytes()
        if len(head) < _HEADER.size:
            return
        _, _, capacity, count, size, *_ = _HEADER.unpack_from(head)
        for name, each in (("data_level0.bin", size), ("length.bin", 4)):
            file = folder / name
            # A file with another layout than the one above is left alone.
            if count <= capacity and file.stat().st_size == capacity * each:
                with file.open("r+b") as stream:
                    stream.seek(count * each)
                    stream.write(bytes((capacity - count) * each))


# ---------------------------------------------------------------------- damage


def _segments(directory: Path) -> list[_Segment]:
    """The indexes that the database lists; none if it cannot be read (opening it will report the error)."""
    file = directory / _DATABASE
    if not file.is_file():
        return []
    query = """
        SELECT segments.id, collections.name, max_seq_id.seq_id IS NOT NULL
        FROM segments JOIN collections ON collections.id = segments.collection
        LEFT JOIN max_seq_id ON max_seq_id.segment_id = segments.id
        WHERE segments.scope = 'VECTOR'"""
    try:
        with closing(sqlite3.connect(file, timeout=30)) as connection:
            return [_Segment(id, name, bool(saved)) for id, name, saved in connection.execute(query)]
    except sqlite3.Error:
        return []


def _fingerprint(folder: Path) -> list[list[int]]:
    stats = [(folder / name).stat() for name in _FILES]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def _read_fingerprints(directory: Path) -> dict[str, Any]:
    try:
        fingerprints = json.loads((directory / _FINGERPRINTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return fingerprints if isinstance(fingerprints, dict) else {}


def _broken_links(folder: Path) -> str | None:
    """Whether an index links to vectors that it has not got: a search would read past its end, and may crash later."""
    header = (folder / "header.bin").read_bytes()
    if len(header) < _HEADER.size:
        return f"the header in {folder} is cut off"
    _, offset, _, count, size, _, _, highest, entry, most_above, most, _ = _HEADER.unpack_from(header)
    level0, above = ((folder / name).read_bytes() for name in ("data_level0.bin", "link_lists.bin"))
    if not count:
        return None
    mixed = f"the files in {folder} do not belong together"
    if entry >= count or size < offset + 4 + 4 * most or len(level0) < count * size or len(above) < count * 4:
        return mixed
    # Where the links of each vector stand above level 0: their size, and a block for each level that the vector is on.
    levels, starts, block, end = [], [], 4 + 4 * most_above, 0
    for _ in range(count):
        length = int.from_bytes(above[end : end + 4], "little")
        levels.append(length // block)
        starts.append(end + 4)
        end += 4 + length
        if length % block or end > len(above):
            return mixed
    if levels[entry] < highest:
        return mixed
    places = [(level0, number * size + offset, most, 0) for number in range(count)]
    places += [
        (above, start + block * level, most_above, level + 1)
        for start, height in zip(starts, levels, strict=True)
        for level in range(height)
    ]
    for links, start, limit, level in places:
        number = int.from_bytes(links[start : start + 2], "little")
        linked = struct.unpack_from(f"<{min(number, limit)}I", links, start + 4)
        if number > limit or any(link >= count or levels[link] < level for link in linked):
            return f"the index in {folder} links to vectors that it has not got"
    return None


def _probe_problem(directory: Path, segment: _Segment) -> str | None:
    """What is wrong with an index, found by using it in a separate process; None if it works."""
    size = sum((directory / segment.folder / name).stat().st_size for name in _FILES)
    command = [sys.executable, "-P", __file__, "probe", str(directory), segment.collection]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS + size / 5e6,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        return f"reading it did not end within {expired.timeout:.0f} s"
    lines = done.stdout.split()
    # A failure before the index is read is not the index's; opening the directory will report it.
    if lines[-1:] == ["works"] or "opened" not in lines:
        return None
    said = " ".join(done.stderr.split("\n")[-3:]).strip()
    return f"reading it failed with exit code {done.returncode}: {said[-300:]}"


def _probe(directory: str, name: str) -> None:
    """Read every vector of a collection, and search for each: a search only meets what is damaged on its own way."""
    import chromadb

    client = chromadb.PersistentClient(directory)
    print("opened", flush=True)
    collection = client.get_collection(name, embedding_function=None)
    count = collection.count()
    tried = right = 0
    for offset in range(0, count, _PAGE):
        vectors = collection.get(limit=_PAGE, offset=offset, include=["embeddings"])["embeddings"]
        found = collection.query(query_embeddings=vectors, n_results=1, include=["distances"])["distances"]
        tried += len(found)
        right += sum(bool(distances) and distances[0] < 1e-3 for distances in found)
    # The index is approximate: a search sometimes misses an existing vector.
    if right * 2 < tried:
        raise ValueError(f"of {tried} vectors the index found {right}")
    print("works", flush=True)


# ---------------------------------------------------------------------- overwriting


def _scrub(directory: Path, collection_id: str, owned: bool) -> None:
    with closing(sqlite3.connect(directory / _DATABASE, timeout=60, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("BEGIN IMMEDIATE")
        # The entry that says "deleted" (3) stays: an index that was saved before the deletion still needs it. Of the
        # others an index needs the vectors only, once texts and metadata are in their tables.
        connection.execute(
            """WITH deleted AS MATERIALIZED
                (SELECT topic, id, max(seq_id) AS last FROM embeddings_queue WHERE operation = 3 GROUP BY topic, id)
            DELETE FROM embeddings_queue AS entry WHERE operation <> 3 AND seq_id <
                (SELECT last FROM deleted WHERE deleted.id = entry.id AND deleted.topic = entry.topic)"""
        )
        connection.execute(
            """UPDATE embeddings_queue SET metadata = NULL WHERE metadata IS NOT NULL AND seq_id <=
                (SELECT max_seq_id.seq_id FROM max_seq_id JOIN segments ON segments.id = max_seq_id.segment_id
                WHERE segments.scope = 'METADATA' AND embeddings_queue.topic LIKE '%' || segments.collection)"""
        )
        connection.execute("COMMIT")
        with suppress(sqlite3.OperationalError):  # without full-text search in this SQLite, three-letter pieces remain
            connection.execute("INSERT INTO embedding_fulltext_search(embedding_fulltext_search) VALUES ('rebuild')")
        connection.execute("VACUUM")
        owners = dict(connection.execute("SELECT id, collection FROM segments").fetchall())
    for folder in [header.parent for header in directory.glob("*/header.bin")]:
        owner = owners.get(folder.name)
        if owner is None and owned:
            shutil.rmtree(folder)
        elif owned or owner == collection_id:
            zero_unused(folder)


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        _probe(*sys.argv[2:])
    else:
        work = json.load(sys.stdin)
        _scrub(Path(work["directory"]), work["collection"], work["owned"])
