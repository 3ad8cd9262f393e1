"""FactStore: exact facts in a Chroma collection.

A fact is stored once per text, source and thread; adding it again only updates its time. Searches return cosine
similarities in a fixed order. A directory belongs to one process, in which any number of stores may share it. Calls
from several threads are safe: writes take turns (per directory, or per store when you pass a client), and reads run in
parallel, except while deleted text is being overwritten. The async methods run the same calls in a worker thread;
cancelling one does not stop a write that has begun.

The facts' texts and the index of their vectors are stored separately: an index that is lost, damaged or made by another
embedder is noticed, and can be rebuilt from the texts.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from langchain_core.documents import Document

from agentmem.errors import FactIndexError, FactStoreError
from agentmem_chroma.collection import (
    REBUILD,
    Access,
    DirectoryClaim,
    checked_place,
    chroma_errors,
    embedded_directory,
    finish_rebuild,
    import_chromadb,
    is_of,
    local_directory,
    open_collection,
    open_database,
    open_server,
    start_rebuild,
)
from agentmem_chroma.embeddings import Embedder
from agentmem_chroma.facts import Fact, ScoredFact, check_filter, chosen_by, from_document, from_rows, id_list, matches
from agentmem_chroma.index_files import overwrite_deleted

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

_Item = TypeVar("_Item")

# Similarities are float32 sums: the seventh decimal is noise, and would decide the order of equal texts.
_SCORE_DECIMALS = 6
_EMBEDDED_AT_ONCE = 256  # texts embedded together while an index is rebuilt
_CHECKED = 16  # facts whose vectors are checked against their texts after a process was killed
_SAME_VECTOR = 0.99  # cosine; an embedder's own noise stays above this


class FactStore:
    """Exact facts that can be searched by meaning, listed, and deleted by id, source or thread.

    Args:
        path: a directory for an embedded database, created if it does not exist (`~` is the home directory), or a
            Chroma server as `http://HOST:PORT`. Pass either this or `client`.
        embeddings: turns text into vectors, for facts and queries alike. One word is embedded when the store is
            opened.
        client: a Chroma client of your own, such as `chromadb.HttpClient(...)`; the store does not close it.
        collection: the collection's name; 3 to 500 of `a-z A-Z 0-9 . _ -`.
        embedder: a name for the embedder; None derives one from its class and model name. A collection can only be
            opened with the name and dimension that it was created with.
        rebuild: if the index is lost or damaged, or holds another embedder's vectors, rebuild it from the facts'
            texts. Without it such a store is refused. No effect on an intact store.

    Raises:
        StoreOwnedError: another process owns the directory.
        FactIndexError: the index is lost or damaged.
        FactStoreError: neither or both of `path` and `client`; a collection with another distance or embedder, or
            made by another program; a server that does not answer.
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
        rebuild: bool = False,
    ) -> None:
        if (path is None) == (client is None):
            raise FactStoreError(
                "a fact store needs a path or a client, "
                f"got {'neither' if path is None else 'both'}; FactStore('facts', embeddings=...) opens a "
                "directory"
            )
        import_chromadb()
        self._name = collection
        self._pid = os.getpid()
        self._closed = False
        place = None if path is None else checked_place(path)
        self._opened_here = place is not None and "://" not in place
        with ExitStack() as opened:
            damaged = self._open_database(place, client, opened, rebuild)
            self._embedder = Embedder(embeddings, embedder)
            with self._access.writes:
                self._collection = open_collection(
                    self._client,
                    collection,
                    self._embedder,
                    any_embedder=rebuild,
                    owned=self._opened_here,
                )
                with chroma_errors("opening the collection"):
                    self._batch: int = self._client.get_max_batch_size()
                if damaged or not is_of(self._collection, self._embedder):
                    self.rebuild_index()
                else:
                    self._check_index(rebuild)
                if self._claim is not None and self._claim.must_overwrite:  # a process was killed on its way
                    self._overwrite_deleted()
            self._resources = opened.pop_all()

    def _open_database(self, place: str | None, client: Any, opened: ExitStack, rebuild: bool) -> bool:
        """Set the client, the claim to its directory if it has one, and the access control.

        Returns:
            Whether the collection's index was damaged, and has been removed.
        """
        self._claim: DirectoryClaim | None = None
        self._access = Access()
        if place is not None and not self._opened_here:
            self._place = place
            self._client = open_server(place, opened)
            return False
        directory = embedded_directory(client) if place is None else local_directory(place)
        self._place = directory or "a client"
        damage = None
        if directory is not None:
            self._claim = DirectoryClaim(Path(directory), directory, open_already=client is not None)
            opened.callback(self._claim.release)
            self._access = self._claim.access
            damage = self._claim.indexes.damaged.get(self._name)
            if damage is not None:
                if not rebuild:
                    raise FactIndexError(f"the index of {self!r} is damaged: {damage.problem}; {REBUILD}")
                # The directory may be open in this process, but not this collection: opening it was refused.
                shutil.rmtree(damage.folder, ignore_errors=True)
        self._client = open_database(self._claim.directory, opened) if client is None and self._claim else client
        return damage is not None

    def add(
        self,
        facts: str | Fact | Document | Iterable[str | Fact | Document],
        *,
        source: str = "",
        thread: str = "",
        time: datetime | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Store facts and return their ids, one per given fact, in order.

        A fact that already exists is not stored again: the newer time and its metadata are kept (if times are equal,
        those given last). All texts are embedded before anything is written.

        Args:
            facts: texts; `Fact` objects, which describe themselves; or LangChain documents, whose metadata may
                contain `source`, `thread` and `time`.
            source: where the texts come from.
            thread: the conversation they belong to.
            time: when they were stated, with a time zone; None is now.
            metadata: anything else to store with the texts, as long as JSON can hold it.

        Raises:
            FactStoreError: a blank text, a time without a time zone, something that JSON cannot hold, or an
                embedder that returns unusable vectors. Nothing is stored then.
        """
        if isinstance(facts, Mapping):
            raise FactStoreError(
                f"facts are texts, Fact objects or documents, got a mapping with the keys {sorted(map(str, facts))}, "
                "which would be stored in place of its values; write Fact(text=..., source=..., metadata=...)"
            )
        stated = datetime.now(UTC) if time is None else time
        items = [facts] if isinstance(facts, str | Fact | Document) else facts
        if not isinstance(items, Iterable):
            raise FactStoreError(f"facts are texts, Fact objects or documents, got {type(facts).__name__}")
        given = []
        for item in items:
            if isinstance(item, Document):
                given.append(from_document(item, source=source, thread=thread, time=stated, metadata=metadata or {}))
            else:
                given.append(item if isinstance(item, Fact) else Fact(item, source, thread, stated, metadata or {}))
        newest: dict[str, Fact] = {}
        for fact in given:
            if fact.id not in newest or fact.time >= newest[fact.id].time:
                newest[fact.id] = fact
        with self._access.writes:
            self._check_open()
            stored = self._times(newest)
            fresh = [fact for fact in newest.values() if fact.id not in stored]
            newer = [fact for fact in newest.values() if fact.id in stored and fact.time >= stored[fact.id]]
            self._insert(fresh)
            for batch in self._batches(newer):
                self._call("update", ids=[f.id for f in batch], metadatas=[f.row() for f in batch])
        return [fact.id for fact in given]

    def search(
        self,
        query: str,
        k: int = 4,
        *,
        source: str | None = None,
        thread: str | None = None,
        min_score: float | None = None,
        filter: Mapping[str, Any] | None = None,
    ) -> list[ScoredFact]:
        """The `k` facts closest to `query`, best first; for equal scores the newer first, then by id.

        The index is approximate (HNSW): in large collections a search sometimes misses a fact that should be in the
        result. A blank query finds nothing.

        Args:
            query: what to look for.
            k: the maximum number of facts, 1 or more.
            source: only facts of this source; None for all, "" for facts of no source.
            thread: only facts of this thread; None for all, "" for facts of no thread.
            min_score: only facts with at least this similarity.
            filter: only facts that match: `{"page": 3}`, `{"page": {"$gte": 3}}`, `{"$or": [{...}, {...}]}`.
                Operators: `$eq $ne $gt $gte $lt $lte $in $nin $and $or`; keys: those of the metadata, `source`,
                `thread`, `time`. If few facts match the filter, many facts are read.
        """
        self._check_open()
        if not isinstance(k, int) or k < 1:
            raise FactStoreError(f"k should be 1 or more, got {k!r}")
        if min_score is not None and not (isinstance(min_score, float | int) and -1 <= min_score <= 1):
            raise FactStoreError(f"min_score should be a cosine similarity from -1 to 1, got {min_score!r}")
        if not isinstance(query, str):
            raise FactStoreError(f"a query should be a string, got {type(query).__name__}")
        check_filter(filter)
        if not query.strip():
            return []
        vector = self._embedder.query(query)
        where = chosen_by(source, thread)
        wanted = k + 1
        with self._access.reading():
            while True:
                nearest = self._nearest(vector, wanted, where)
                hits = [hit for hit in nearest if filter is None or matches(hit.fact, filter)]
                # Facts that were not fetched could have the last score too, and come before some that were.
                if len(nearest) < wanted or (len(hits) >= k and hits[k - 1].score > nearest[-1].score):
                    break
                wanted *= 4
        return [hit for hit in hits[:k] if min_score is None or hit.score >= min_score]

    def get(self, ids: str | Iterable[str]) -> list[Fact]:
        """The facts with these ids, in the order of the ids; ids that do not exist are left out."""
        self._check_open()
        wanted = id_list(ids)
        by_id: dict[str, Fact] = {}
        with self._access.reading():
            for batch in self._batches(list(dict.fromkeys(wanted))):
                rows = self._call("get", ids=batch, include=["documents", "metadatas"])
                by_id.update((fact.id, fact) for fact in from_rows(rows))
        return [by_id[id] for id in wanted if id in by_id]

    def facts(
        self, *, source: str | None = None, thread: str | None = None, filter: Mapping[str, Any] | None = None
    ) -> list[Fact]:
        """All facts, or those of a source and thread that match a filter (see `search`), oldest first, then by id."""
        self._check_open()
        check_filter(filter)
        with self._access.reading():
            rows = self._call("get", where=chosen_by(source, thread), include=["documents", "metadatas"])
        found = [fact for fact in from_rows(rows) if filter is None or matches(fact, filter)]
        return sorted(found, key=lambda fact: (fact.time, fact.id))

    def newest(self, limit: int, offset: int = 0) -> list[Fact]:
        """So many of all facts after the first `offset`, those first that were stored last. Reads no others.

        Raises:
            FactStoreError: `limit` is below 1, or `offset` below 0.
        """
        if not isinstance(limit, int) or not isinstance(offset, int) or limit < 1 or offset < 0:
            raise FactStoreError(f"expected a limit from 1 and an offset from 0 up, found {limit!r} and {offset!r}")
        self._check_open()
        with self._access.reading():
            end = int(self._call("count")) - offset
            if end <= 0:
                return []
            part = {"limit": min(limit, end), "offset": max(0, end - limit)}  # Chroma gives the oldest first
            return list(from_rows(self._call("get", include=["documents", "metadatas"], **part)))[::-1]

    def count(
        self, *, source: str | None = None, thread: str | None = None, filter: Mapping[str, Any] | None = None
    ) -> int:
        """The number of facts, of all or of those with this source and thread that match a filter (see `search`)."""
        self._check_open()
        if filter is not None:
            return len(self.facts(source=source, thread=thread, filter=filter))
        where = chosen_by(source, thread)
        with self._access.reading():
            if where is None:
                return int(self._call("count"))
            return len(self._call("get", where=where, include=[])["ids"])

    def delete(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        source: str | None = None,
        thread: str | None = None,
    ) -> int:
        """Delete the facts that meet every given condition, and return their number.

        In an embedded store no byte of their texts, sources, threads and metadata is left in the directory when the
        call returns, or when the store is opened again if the process was killed. For that the database file is
        rewritten, in a time proportional to its size: delete many facts in one call. A server keeps what it keeps.

        Raises:
            FactStoreError: no condition was given, which would delete everything; or the facts were deleted but
                what Chroma left of them could not be overwritten.
        """
        if ids is None and source is None and thread is None:
            raise FactStoreError("delete needs ids, a source or a thread; to delete everything, name every id")
        where = chosen_by(source, thread)
        with self._access.writes:
            self._check_open()
            # Chroma reports ids that never existed as deleted, so the existing ones are looked up first.
            if ids is None:
                present: list[str] = self._call("get", where=where, include=[])["ids"]
            else:
                wanted = list(dict.fromkeys(id_list(ids)))
                present = [
                    id
                    for batch in self._batches(wanted)
                    for id in self._call("get", ids=batch, where=where, include=[])["ids"]
                ]
            if present and self._claim is not None:
                self._claim.begin_deletion()
            for batch in self._batches(present):
                self._call("delete", ids=batch)
            if present and self._opened_here and not self._call("count"):
                self.rebuild_index()  # nothing has to be embedded, and the old index's disk space is freed
            elif present:
                self._overwrite_deleted()
        return len(present)

    def rebuild_index(self) -> int:
        """Rebuild the index from the facts' texts, and return the number of facts.

        Every text is embedded again. An index does not shrink when facts are deleted (except when the last one is);
        rebuilding makes it as small as possible. The old index is used until the new one is complete. A process that is
        killed in between leaves either the old one or the new one, and no fact is lost.

        Raises:
            FactStoreError: the embedder or Chroma failed; the old index is still in use.
        """
        with self._access.alone():
            self._check_open()
            rows = self._call("get", include=["documents", "metadatas"])
            facts = list(from_rows(rows))
            with chroma_errors("building the index anew"):
                old, self._collection = self._collection, start_rebuild(self._client, self._name, self._embedder)
                try:
                    for start in range(0, len(facts), _EMBEDDED_AT_ONCE):
                        self._insert(facts[start : start + _EMBEDDED_AT_ONCE])
                    if int(self._call("count")) != len(facts):
                        raise FactStoreError(f"Chroma did not keep all of {len(facts)} facts; the old index stays")
                except BaseException:
                    self._collection = old
                    raise
                self._collection = finish_rebuild(self._client, self._name)
            if self._claim is not None:
                self._claim.indexes.damaged.pop(self._name, None)
                self._claim.indexes.probed.pop(self._name, None)
            self._overwrite_deleted()
        return len(facts)

    @property
    def is_local(self) -> bool:
        """Whether the files are within reach of this process, so that it overwrites what it deletes."""
        return self._claim is not None

    async def aadd(
        self,
        facts: str | Fact | Document | Iterable[str | Fact | Document],
        *,
        source: str = "",
        thread: str = "",
        time: datetime | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """As `add`, in a worker thread."""
        return await asyncio.to_thread(self.add, facts, source=source, thread=thread, time=time, metadata=metadata)

    async def asearch(
        self,
        query: str,
        k: int = 4,
        *,
        source: str | None = None,
        thread: str | None = None,
        min_score: float | None = None,
        filter: Mapping[str, Any] | None = None,
    ) -> list[ScoredFact]:
        """As `search`, in a worker thread."""
        return await asyncio.to_thread(
            self.search, query, k, source=source, thread=thread, min_score=min_score, filter=filter
        )

    async def aget(self, ids: str | Iterable[str]) -> list[Fact]:
        """As `get`, in a worker thread."""
        return await asyncio.to_thread(self.get, ids)

    async def afacts(
        self, *, source: str | None = None, thread: str | None = None, filter: Mapping[str, Any] | None = None
    ) -> list[Fact]:
        """As `facts`, in a worker thread."""
        return await asyncio.to_thread(self.facts, source=source, thread=thread, filter=filter)

    async def acount(
        self, *, source: str | None = None, thread: str | None = None, filter: Mapping[str, Any] | None = None
    ) -> int:
        """As `count`, in a worker thread."""
        return await asyncio.to_thread(self.count, source=source, thread=thread, filter=filter)

    async def adelete(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        source: str | None = None,
        thread: str | None = None,
    ) -> int:
        """As `delete`, in a worker thread."""
        return await asyncio.to_thread(self.delete, ids, source=source, thread=thread)

    async def arebuild_index(self) -> int:
        """As `rebuild_index`, in a worker thread."""
        return await asyncio.to_thread(self.rebuild_index)

    def close(self) -> None:
        """Close the store; the last one to close frees the directory. A second call does nothing.

        Call it when no other call is running. A client that you passed stays open.
        """
        with self._access.writes:
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
        return f"FactStore({self._place!r}, collection={self._name!r})"

    def _check_open(self) -> None:
        if self._closed:
            raise FactStoreError(f"{self!r} is closed; open a new one")
        if self._pid != os.getpid():
            raise FactStoreError(
                f"{self!r} was opened by process {self._pid} and this is its fork {os.getpid()}; Chroma "
                "does not survive a fork: start workers with the 'spawn' method"
            )

    def _call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the collection and convert its errors.

        Raises:
            FactIndexError, FactStoreError: see `chroma_errors`; or the collection was deleted.
        """
        missing = import_chromadb().errors.NotFoundError
        doing = f"working on {self!r} ({method})"
        try:
            with chroma_errors(doing):
                return getattr(self._collection, method)(**arguments)
        except FactStoreError as error:
            if not isinstance(error.__cause__, missing):
                raise
        # Another store or process rebuilt the index: the name now belongs to another collection.
        try:
            with chroma_errors(doing):
                self._collection = self._client.get_collection(self._name, embedding_function=None)
                if not is_of(self._collection, self._embedder):
                    raise FactStoreError(f"{self!r} was made anew with another embedder; open it again with that")
                return getattr(self._collection, method)(**arguments)
        except FactStoreError as error:
            if not isinstance(error.__cause__, missing):
                raise
            raise FactStoreError(f"the collection of {self!r} was deleted; a new store makes it again") from error

    def _check_index(self, rebuild: bool) -> None:
        """Notice an index that can be read but lacks vectors, or holds those of other texts.

        Raises:
            FactIndexError: it does, and `rebuild` is False.
        """
        probed = self._claim is not None and self._name in self._claim.indexes.probed
        # A directory that this process opened by its path was already inspected, more thoroughly.
        problem = self._vector_problem(compare=probed) if probed or not self._opened_here else None
        if problem is not None:
            if not rebuild:
                raise FactIndexError(f"the index of {self!r} is damaged: {problem}; {REBUILD}")
            self.rebuild_index()
        elif probed and self._claim is not None:
            del self._claim.indexes.probed[self._name]

    def _vector_problem(self, *, compare: bool) -> str | None:
        """What is wrong with the vectors of the oldest and newest facts; `compare`: embed their texts again."""
        try:
            size = int(self._call("count"))
            for offset in {0, max(0, size - _CHECKED)} if size else ():
                rows = self._call("get", limit=_CHECKED, offset=offset, include=["documents", "embeddings"])
                if compare:
                    stored = np.asarray(rows["embeddings"], dtype=np.float32)  # [_CHECKED, dimension]
                    right = self._embedder.documents([text or "" for text in rows["documents"]])
                    lengths = np.linalg.norm(stored, axis=1) * np.linalg.norm(right, axis=1)
                    if ((stored * right).sum(axis=1) < _SAME_VECTOR * lengths).any():
                        return "it holds vectors of other texts"
        except FactIndexError as error:
            return str(error.__cause__)
        return None

    def _overwrite_deleted(self) -> None:
        if self._claim is None:
            return
        self._claim.begin_deletion()
        with self._access.alone():
            try:
                overwrite_deleted(self._claim.directory, str(self._collection.id), owned=self._opened_here)
                self._claim.end_deletion()
            except OSError as error:
                raise FactStoreError(
                    f"the facts are deleted from {self!r}, but what Chroma left of them in its files could not be "
                    f"overwritten: {error}; open it or rebuild_index() again once that is mended"
                ) from error

    def _times(self, ids: Iterable[str]) -> dict[str, datetime]:
        """The stored times of those of the given facts that exist."""
        times: dict[str, datetime] = {}
        for batch in self._batches(list(ids)):
            rows = self._call("get", ids=batch, include=["documents", "metadatas"])
            times.update((fact.id, fact.time) for fact in from_rows(rows))
        return times

    def _insert(self, facts: Sequence[Fact]) -> None:
        if not facts:
            return
        vectors = self._embedder.documents([fact.text for fact in facts])
        for start in range(0, len(facts), self._batch):
            batch = facts[start : start + self._batch]
            self._call(
                "upsert",
                ids=[fact.id for fact in batch],
                embeddings=vectors[start : start + self._batch],
                documents=[fact.text for fact in batch],
                metadatas=[fact.row() for fact in batch],
            )

    def _nearest(self, vector: Any, count: int, where: dict[str, Any] | None) -> list[ScoredFact]:
        rows = self._call(
            "query",
            query_embeddings=[vector],
            n_results=count,
            where=where,
            include=["documents", "metadatas", "distances"],
        )
        columns = zip(rows["ids"][0], rows["documents"][0], rows["metadatas"][0], rows["distances"][0], strict=True)
        hits = []
        for id, text, row, distance in columns:
            # Chroma looks into the index first and reads rows after: a fact that is deleted in between has none.
            if text is None and not row and not self._call("get", ids=[id], include=[])["ids"]:
                continue
            hits.append(ScoredFact(Fact.from_row(id, text, row), _score(distance)))
        hits.sort(key=lambda hit: hit.fact.id)
        hits.sort(key=lambda hit: (hit.score, hit.fact.time), reverse=True)
        return hits

    def _batches(self, items: Sequence[_Item]) -> Iterator[list[_Item]]:
        for start in range(0, len(items), self._batch):
            yield list(items[start : start + self._batch])


def _score(distance: float) -> float:
    return round(min(1.0, max(-1.0, 1.0 - distance)), _SCORE_DECIMALS)
