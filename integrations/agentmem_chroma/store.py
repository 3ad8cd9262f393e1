"""FactStore: exact facts in a Chroma collection.

A fact is stored once per text, source and thread; adding it again keeps one, with the newer time. Searches
return cosine similarities in a fixed order. A directory belongs to one process, in which any number of stores
may share it. Calls from several threads are safe: writes take turns (per directory, or per store on a given
client), reads run freely. The async twins run the same calls in a worker thread; cancelling one does not stop
a write under way.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from agentmem.errors import FactStoreError
from agentmem_chroma.collection import embedded_directory, import_chromadb, open_collection, open_database
from agentmem_chroma.embedder import Embedder
from agentmem_chroma.facts import Fact, ScoredFact
from agentmem_chroma.ownership import Claim

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

_Item = TypeVar("_Item")

# Similarities are float32 sums: the seventh decimal is noise, and equal texts would be ordered by it.
_SCORE_DECIMALS = 6


class FactStore:
    """Exact facts that can be searched by meaning, listed, and deleted by id, source or thread.

    Args:
        path: a directory for an embedded database, made where it does not exist. Give this or ``client``.
        embeddings: turns text into vectors, for facts and queries alike. One word is embedded at opening.
        client: a Chroma client of your own, ``chromadb.HttpClient(...)`` for example; the store does not
            close it.
        collection: the collection's name; 3 to 512 of ``a-z A-Z 0-9 . _ -``.
        embedder: a name for the embedder; None derives one from its class and model name. A collection opens
            only with the name and the dimension that it was made with.

    Raises:
        StoreOwnedError: another process owns the directory.
        FactStoreError: neither or both of path and client; a collection of another distance, embedder or
            program.
        MissingExtraError: chromadb is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        embeddings: Embeddings,
        client: Any = None,
        collection: str = "facts",
        embedder: str | None = None,
    ) -> None:
        if (path is None) == (client is None):
            raise FactStoreError(
                "a fact store needs a path or a client, "
                f"got {'neither' if path is None else 'both'}; FactStore('facts', embeddings=...) opens a "
                "directory"
            )
        import_chromadb()
        with ExitStack() as opened:
            directory = embedded_directory(client) if path is None else str(Path(path).resolve())
            self._writes = threading.RLock()
            if directory is not None:
                claim = Claim(Path(directory), directory)
                opened.callback(claim.release)
                self._writes = claim.writes
                if client is None:
                    client = open_database(claim.directory, opened)
            self._embedder = Embedder(embeddings, embedder)
            self._collection = open_collection(client, collection, self._embedder)
            self._batch: int = client.get_max_batch_size()
            self._resources = opened.pop_all()
        self._where_open = directory or "a client"
        self._name = collection
        self._pid = os.getpid()
        self._closed = False

    def add(
        self,
        facts: str | Fact | Iterable[str | Fact],
        *,
        source: str = "",
        thread: str = "",
        time: datetime | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Store facts and return their ids, one per fact given, in order.

        A fact that is already there is not stored again: the newer time and its metadata stay (of equal
        times, the one given last). Everything is embedded before anything is written.

        Args:
            facts: texts, or ``Fact`` objects, which describe themselves.
            source: what the texts were taken from.
            thread: the conversation they belong to.
            time: when they were stated, with a time zone; None is now.
            metadata: anything else to keep with the texts, as JSON can hold it.

        Raises:
            FactStoreError: a blank text, a time without a zone, something that JSON cannot hold, or an
                embedder that returns unusable vectors. Nothing is stored then.
        """
        stated = datetime.now(UTC) if time is None else time
        given = [
            item if isinstance(item, Fact) else Fact(item, source, thread, stated, metadata or {})
            for item in ([facts] if isinstance(facts, str | Fact) else facts)
        ]
        newest: dict[str, Fact] = {}
        for fact in given:
            if fact.id not in newest or fact.time >= newest[fact.id].time:
                newest[fact.id] = fact
        with self._writes:
            self._check_open()
            known = self._times(newest)
            fresh = [fact for fact in newest.values() if fact.id not in known]
            newer = [fact for fact in newest.values() if fact.id in known and fact.time >= known[fact.id]]
            self._insert(fresh)
            for batch in self._batches(newer):
                self._collection.update(ids=[f.id for f in batch], metadatas=[f.row() for f in batch])
        return [fact.id for fact in given]

    def search(
        self,
        query: str,
        k: int = 4,
        *,
        source: str | None = None,
        thread: str | None = None,
        min_score: float | None = None,
    ) -> list[ScoredFact]:
        """The ``k`` facts closest to ``query``, best first; of equal scores the newer first, then by id.

        The index is approximate (HNSW): in large collections a fact that belongs in the result is missed now
        and then. A blank query finds nothing.

        Args:
            query: what to look for.
            k: how many facts at most, 1 or more.
            source: only facts of this source; None for all, "" for facts of no source.
            thread: only facts of this thread; None for all, "" for facts of no thread.
            min_score: only facts with at least this similarity.
        """
        self._check_open()
        if k < 1:
            raise FactStoreError(f"k should be 1 or more, got {k}")
        if not query.strip():
            return []
        vector = self._embedder.query(query)
        where = _where(source, thread)
        wanted = k + 1
        while True:
            hits = self._nearest(vector, wanted, where)
            # A tie that reaches past what was fetched could hide the facts that come first in it.
            if len(hits) < wanted or hits[k - 1].score > hits[-1].score:
                break
            wanted *= 4
        return [hit for hit in hits[:k] if min_score is None or hit.score >= min_score]

    def get(self, ids: str | Iterable[str]) -> list[Fact]:
        """The facts with these ids, in the order asked for; ids that are not there are left out."""
        self._check_open()
        asked = [ids] if isinstance(ids, str) else list(ids)
        found: dict[str, Fact] = {}
        for batch in self._batches(list(dict.fromkeys(asked))):
            rows = self._collection.get(ids=batch, include=["documents", "metadatas"])
            found.update((fact.id, fact) for fact in _facts(rows))
        return [found[id] for id in asked if id in found]

    def facts(self, *, source: str | None = None, thread: str | None = None) -> list[Fact]:
        """All facts, or those of a source and thread, oldest first; of equal times by id."""
        self._check_open()
        rows = self._collection.get(where=_where(source, thread), include=["documents", "metadatas"])
        return sorted(_facts(rows), key=lambda fact: (fact.time, fact.id))

    def count(self, *, source: str | None = None, thread: str | None = None) -> int:
        """How many facts there are, in all or of a source and thread."""
        self._check_open()
        where = _where(source, thread)
        if where is None:
            return int(self._collection.count())
        return len(self._collection.get(where=where, include=[])["ids"])

    def delete(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        source: str | None = None,
        thread: str | None = None,
    ) -> int:
        """Delete the facts that meet every condition given, and return how many there were.

        Raises:
            FactStoreError: no condition at all, which would delete everything.
        """
        if ids is None and source is None and thread is None:
            raise FactStoreError("delete needs ids, a source or a thread; to delete everything, name every id")
        where = _where(source, thread)
        with self._writes:
            self._check_open()
            # Chroma reports ids that were never there as deleted, so what is there is looked up first.
            if ids is None:
                present: list[str] = self._collection.get(where=where, include=[])["ids"]
            else:
                asked = list(dict.fromkeys([ids] if isinstance(ids, str) else ids))
                present = [
                    id
                    for batch in self._batches(asked)
                    for id in self._collection.get(ids=batch, where=where, include=[])["ids"]
                ]
            for batch in self._batches(present):
                self._collection.delete(ids=batch)
        return len(present)

    async def aadd(
        self,
        facts: str | Fact | Iterable[str | Fact],
        *,
        source: str = "",
        thread: str = "",
        time: datetime | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """``add`` off the event loop."""
        return await asyncio.to_thread(self.add, facts, source=source, thread=thread, time=time, metadata=metadata)

    async def asearch(
        self,
        query: str,
        k: int = 4,
        *,
        source: str | None = None,
        thread: str | None = None,
        min_score: float | None = None,
    ) -> list[ScoredFact]:
        """``search`` off the event loop."""
        return await asyncio.to_thread(self.search, query, k, source=source, thread=thread, min_score=min_score)

    async def aget(self, ids: str | Iterable[str]) -> list[Fact]:
        """``get`` off the event loop."""
        return await asyncio.to_thread(self.get, ids)

    async def afacts(self, *, source: str | None = None, thread: str | None = None) -> list[Fact]:
        """``facts`` off the event loop."""
        return await asyncio.to_thread(self.facts, source=source, thread=thread)

    async def acount(self, *, source: str | None = None, thread: str | None = None) -> int:
        """``count`` off the event loop."""
        return await asyncio.to_thread(self.count, source=source, thread=thread)

    async def adelete(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        source: str | None = None,
        thread: str | None = None,
    ) -> int:
        """``delete`` off the event loop."""
        return await asyncio.to_thread(self.delete, ids, source=source, thread=thread)

    def close(self) -> None:
        """Close the database and free the directory once its last store closes; a second call does nothing.

        Call it when no other call is under way. A client that was given stays open.
        """
        with self._writes:
            if not self._closed:
                self._closed = True
                self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FactStore({self._where_open!r}, collection={self._name!r})"

    def _check_open(self) -> None:
        if self._closed:
            raise FactStoreError(f"{self!r} is closed; open a new one")
        if self._pid != os.getpid():
            raise FactStoreError(
                f"{self!r} was opened by process {self._pid} and this is its fork {os.getpid()}; Chroma "
                "does not survive a fork: start workers with the 'spawn' method"
            )

    def _times(self, ids: Iterable[str]) -> dict[str, datetime]:
        """The stored time of every given fact that is there."""
        times: dict[str, datetime] = {}
        for batch in self._batches(list(ids)):
            rows = self._collection.get(ids=batch, include=["documents", "metadatas"])
            times.update((fact.id, fact.time) for fact in _facts(rows))
        return times

    def _insert(self, facts: Sequence[Fact]) -> None:
        if not facts:
            return
        vectors = self._embedder.documents([fact.text for fact in facts])
        for start in range(0, len(facts), self._batch):
            batch = facts[start : start + self._batch]
            self._collection.upsert(
                ids=[fact.id for fact in batch],
                embeddings=vectors[start : start + self._batch],
                documents=[fact.text for fact in batch],
                metadatas=[fact.row() for fact in batch],
            )

    def _nearest(self, vector: Any, count: int, where: dict[str, Any] | None) -> list[ScoredFact]:
        rows = self._collection.query(
            query_embeddings=[vector],
            n_results=count,
            where=where,
            include=["documents", "metadatas", "distances"],
        )
        columns = zip(rows["ids"][0], rows["documents"][0], rows["metadatas"][0], rows["distances"][0], strict=True)
        hits = [ScoredFact(Fact.from_row(id, text, row), _score(distance)) for id, text, row, distance in columns]
        hits.sort(key=lambda hit: hit.fact.id)
        hits.sort(key=lambda hit: (hit.score, hit.fact.time), reverse=True)
        return hits

    def _batches(self, items: Sequence[_Item]) -> Iterator[list[_Item]]:
        for start in range(0, len(items), self._batch):
            yield list(items[start : start + self._batch])


def _where(source: str | None, thread: str | None) -> dict[str, Any] | None:
    conditions = [{key: value} for key, value in (("source", source), ("thread", thread)) if value is not None]
    if len(conditions) == 2:
        return {"$and": conditions}
    return conditions[0] if conditions else None


def _score(distance: float) -> float:
    return round(min(1.0, max(-1.0, 1.0 - distance)), _SCORE_DECIMALS)


def _facts(rows: Any) -> Iterator[Fact]:
    for id, text, row in zip(rows["ids"], rows["documents"], rows["metadatas"], strict=True):
        yield Fact.from_row(id, text, row)
