"""Opens Chroma databases and collections, and refuses a collection that would give wrong answers.

A collection of facts measures cosine distance and records, in its metadata, which embedder its vectors are
from. Both are set at creation and checked at every opening: Chroma itself keeps an existing collection's
distance without a word, and takes vectors of any model that has the right length. Chroma's default embedding
function, which downloads a model, is never used.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from agentmem.errors import FactStoreError, MissingExtraError
from agentmem_chroma.embedder import Embedder

_FORMAT, _NAME, _DIMENSION = "agentmem:format", "agentmem:embedder", "agentmem:dimension"
_FORMAT_VERSION = 1

# Chroma's defaults (100, 100, 16) find less than half of the nearest four among 20,000 random vectors of 384
# numbers; these find 96 % of them, at twice the time to insert. Sentence vectors are easier than random ones.
_INDEX = {"space": "cosine", "ef_construction": 200, "ef_search": 500, "max_neighbors": 32}

# Chroma counts the users of a database without a lock, so opening and closing take turns.
_opening = threading.Lock()


def open_database(directory: Path, stack: ExitStack) -> Any:
    """A Chroma client on ``directory``, closed with ``stack``; clients of one directory share one database.

    Raises:
        FactStoreError: Chroma cannot open what is there.
    """
    chromadb = import_chromadb()
    with _opening:
        try:
            client = chromadb.PersistentClient(path=str(directory))
        except Exception as error:
            raise FactStoreError(
                f"Chroma cannot open the database in {directory}: {error}; if it was made by a newer "
                "version, upgrade chromadb; if it is damaged, restore it from a backup"
            ) from error
    stack.callback(_close, client)
    return client


def embedded_directory(client: Any) -> str | None:
    """Where an embedded client keeps its files, as it was given; None for any other client."""
    settings = client.get_settings()
    return str(settings.persist_directory) if settings.is_persistent else None


def open_collection(client: Any, name: str, embedder: Embedder) -> Any:
    """The collection of that name, made if there is none.

    Raises:
        FactStoreError: the collection measures another distance, was not made by a FactStore, or holds
            another embedder's vectors; or the name is not one that Chroma allows.
    """
    errors = import_chromadb().errors
    try:
        collection = client.get_or_create_collection(
            name,
            embedding_function=None,
            configuration={"hnsw": _INDEX},
            metadata={_FORMAT: _FORMAT_VERSION, _NAME: embedder.name, _DIMENSION: embedder.dimension},
        )
    except (errors.ChromaError, ValueError) as error:
        raise FactStoreError(f"Chroma cannot open the collection {name!r}: {error}") from error
    _check(collection, name, embedder)
    return collection


def import_chromadb() -> Any:
    """The chromadb module; raises MissingExtraError without it."""
    try:
        import chromadb
    except ModuleNotFoundError as error:
        if error.name != "chromadb":
            raise
        raise MissingExtraError("chromadb", "chroma") from error
    return chromadb


def _close(client: Any) -> None:
    with _opening:
        client.close()


def _check(collection: Any, name: str, embedder: Embedder) -> None:
    space = _space(collection)
    if space != "cosine":
        raise FactStoreError(
            f"collection {name!r} measures {space!r} distance, a fact store needs 'cosine', and Chroma "
            "cannot change it; give another collection name and add the facts there"
        )
    record = collection.metadata or {}
    if record.get(_FORMAT) != _FORMAT_VERSION:
        raise FactStoreError(
            f"collection {name!r} has the format {record.get(_FORMAT)!r}, this version reads "
            f"{_FORMAT_VERSION}: it was not made by a FactStore, or by another version; give another "
            "collection name"
        )
    found = (record.get(_NAME), record.get(_DIMENSION))
    if found != (embedder.name, embedder.dimension):
        raise FactStoreError(
            f"collection {name!r} holds vectors of embedder {found[0]!r} with dimension {found[1]}, this "
            f"one is {embedder.name!r} with dimension {embedder.dimension}, and their vectors do not "
            "compare; open it with the embedder it was made with (embedder=... gives it the same name), or "
            "give another collection name"
        )


def _space(collection: Any) -> str | None:
    # Not `collection.configuration`: it warns about, and may build, an embedding function.
    configuration = collection.configuration_json or {}
    for index in ("hnsw", "spann"):
        if configuration.get(index):
            space: str | None = configuration[index].get("space")
            return space
    return None
