"""Opens Chroma databases and collections for one process, and refuses those that would give wrong results.

One process owns a directory: Chroma's embedded index is not made for two processes; the second would read stale
results, and both can damage the files. So a directory is held by an exclusive file lock, which the operating system
frees however its owner ends. Inside one process a directory may be claimed any number of times; releasing the last
claim releases the lock. A note next to the lock says who holds it, for the error message in a second process.

A collection of facts measures cosine distance and records, in its metadata, which embedder made its vectors. Both are
set at creation and checked whenever the collection is opened. Chroma itself would silently keep an existing
collection's distance, and accept vectors of any model that have the right length. Chroma's default embedding function,
which downloads a model, is never used.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from agentmem.errors import FactIndexError, FactStoreError, MissingExtraError, StoreOwnedError
from agentmem.text import parse_json
from agentmem_chroma.embeddings import Embedder
from agentmem_chroma.index_files import IndexReport, has_lost_database, inspect, save_fingerprints, zero_unused

_LOCK = "agentmem.lock"
_OWNER = "agentmem.owner.json"
_DELETING = "agentmem.deleting"  # exists from a deletion until its remains are overwritten, for whoever opens next

_FORMAT, _NAME, _DIMENSION = "agentmem:format", "agentmem:embedder", "agentmem:dimension"
_FORMAT_VERSION = 1
_REBUILT = "-rebuilt"  # appended to a collection's name while its index is rebuilt

# With Chroma's defaults (100, 100, 16) a search finds less than half of the nearest four among 20,000 random vectors of
# 384 numbers; with these values 96 %, at twice the time to insert. Sentence vectors are easier than random ones.
_INDEX = {"space": "cosine", "ef_construction": 200, "ef_search": 500, "max_neighbors": 32}

# Chroma counts the users of a database without a lock, so opening and closing take turns.
_opening = threading.Lock()


class Access:
    """Controls who may use a database at the same time: one writer and any number of readers, or one exclusive user.

    Attributes:
        writes: the writers' lock. Readers need not wait for it.
    """

    def __init__(self) -> None:
        self.writes = threading.RLock()
        self._condition = threading.Condition()
        self._readers = 0
        self._alone = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Wait for an exclusive user to finish, and keep others from becoming one."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Exclusive use: nobody else reads or writes. Not to be called within `reading`."""
        with self.writes:
            with self._condition:
                self._alone = True
                self._condition.wait_for(lambda: not self._readers)
            try:
                yield
            finally:
                with self._condition:
                    self._alone = False
                    self._condition.notify_all()


class _HeldDirectory:
    """A directory that this process has locked: its name, the claims that share it, the state of its indexes."""

    def __init__(self, lock: FileLock, opened_as: str, indexes: IndexReport, open_already: bool) -> None:
        self.lock = lock
        self.opened_as = opened_as
        self.indexes = indexes
        self.open_already = open_already
        self.access = Access()
        self.claims = 0
        self.pid = os.getpid()
        self.deleted = self.to_overwrite = False
        # An earlier process was killed on its way: which collection's index has remains is known to an owner alone.
        self.left_over = False

    def leave_sound(self, directory: Path) -> None:
        """Overwrite deleted text that Chroma has written since, and record which index files are intact."""
        if self.deleted:
            for header in directory.glob("*/header.bin"):
                zero_unused(header.parent)
            if not self.to_overwrite:
                (directory / _DELETING).unlink(missing_ok=True)
        # A damaged index that was not repaired must be noticed again next time.
        save_fingerprints(directory, self.indexes.doubtful())


_held: dict[Path, _HeldDirectory] = {}
_guard = threading.RLock()


class DirectoryClaim:
    """One of this process's claims to a directory that it holds.

    Args:
        directory: created if it does not exist.
        opened_as: the name under which the database is opened; all claims in a process must use the same name.
        open_already: whether Chroma already has it open; its files must not be inspected then.

    Attributes:
        directory: the directory, as an absolute path with links resolved.
        access: controls who may use it now; shared by all claims in the process.
        indexes: the damage that was found before the first claim opened it.

    Raises:
        StoreOwnedError: another process holds the directory.
        FactStoreError: the directory cannot be created or locked, has lost its database, was opened under another name,
            or is held by the process that this one was forked from.
    """

    def __init__(self, directory: Path, opened_as: str, *, open_already: bool) -> None:
        self.directory = directory.resolve()
        with _guard:
            held = _held.get(self.directory)
            if held is None:
                lock = _acquire(self.directory)
                try:
                    if not open_already and has_lost_database(self.directory):
                        raise FactStoreError(
                            f"{self.directory} has held facts, and the database with their texts, chroma.sqlite3, is "
                            "missing or empty; restore it from a backup, or delete the directory to begin anew"
                        )
                    indexes = IndexReport() if open_already else inspect(self.directory)
                except BaseException:
                    lock.release()
                    raise
                held = _held[self.directory] = _HeldDirectory(lock, opened_as, indexes, open_already)
                held.deleted = held.to_overwrite = held.left_over = (self.directory / _DELETING).exists()
            elif held.pid != os.getpid():
                raise FactStoreError(
                    f"the fact store in {self.directory} was open in process {held.pid} when it forked "
                    "this one; start worker processes with the 'spawn' method, or open the store after the "
                    "fork only"
                )
            elif held.opened_as != opened_as:
                raise FactStoreError(
                    f"{self.directory} is open in this process as {held.opened_as!r}, now as "
                    f"{opened_as!r}: two Chroma systems over one directory do not see each other's writes; "
                    "give both stores the same client, or both the path"
                )
            held.claims += 1
            self._held = held
            self.access = held.access
            self.indexes = held.indexes

    @property
    def must_overwrite(self) -> bool:
        """Whether something was deleted, by an earlier process too, and its remains are still to be overwritten."""
        return self._held.to_overwrite

    def begin_deletion(self) -> None:
        """Record that something is about to be deleted: its remains are overwritten then, or at the next opening.

        Raises:
            FactStoreError: the record cannot be written.
        """
        try:
            (self.directory / _DELETING).touch()
        except OSError as error:
            raise FactStoreError(
                f"nothing was deleted, because {self.directory} cannot be written to: {error}"
            ) from error
        self._held.deleted = self._held.to_overwrite = True

    def end_deletion(self) -> None:
        """Record that the remains were overwritten; what Chroma still writes of them is when the directory closes."""
        self._held.to_overwrite = False
        if self._held.open_already and not self._held.left_over:
            (self.directory / _DELETING).unlink(missing_ok=True)

    def release(self) -> None:
        """Give up the claim; the last one frees the directory for other processes. Call it once."""
        with _guard:
            self._held.claims -= 1
            if self._held.claims == 0 and self._held.pid == os.getpid():
                del _held[self.directory]
                if not self._held.open_already:  # otherwise its client is still in use and may write
                    with suppress(OSError):  # a missing directory or a full disk must not prevent closing
                        self._held.leave_sound(self.directory)
                (self.directory / _OWNER).unlink(missing_ok=True)
                self._held.lock.release()


def _acquire(directory: Path) -> FileLock:
    # thread_local=False: a store may be closed by another thread than the one that opened it.
    lock = FileLock(directory / _LOCK, thread_local=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise StoreOwnedError(_owned_message(directory)) from error
    except OSError as error:
        raise FactStoreError(
            f"cannot make or lock the fact store's directory {directory}: {error}; give a directory on a "
            "local disk that this user may write to"
        ) from error
    note = directory / (_OWNER + ".new")
    note.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
    note.replace(directory / _OWNER)
    return lock


def _owned_message(directory: Path) -> str:
    try:
        note = parse_json((directory / _OWNER).read_text(encoding="utf-8"))
        owner = f"process {note['pid']} on host {note['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        owner = "another process"  # it holds the lock and has not written the note yet
    return (
        f"the fact store in {directory} belongs to {owner}, and one process owns a directory; close it "
        f"there, or share it: close it everywhere, run `chroma run --path {directory}`, and open it in "
        "every process with FactStore('http://HOST:PORT', embeddings=...), or with client=chromadb.HttpClient(...)"
    )


# ---------------------------------------------------------------------- databases


def open_database(directory: Path, stack: ExitStack) -> Any:
    """A Chroma client on `directory`, closed with `stack`; all clients of one directory share one database.

    Raises:
        FactStoreError: Chroma cannot open the files.
    """
    chromadb = import_chromadb()
    with _opening:
        try:
            client = chromadb.PersistentClient(path=str(directory))
        except Exception as error:
            # Chroma keeps the half-started database for the next client, which fails as well and only then drops it.
            with suppress(Exception):
                chromadb.PersistentClient(path=str(directory)).close()
            raise FactStoreError(
                f"Chroma cannot open the database in {directory}: {error}; if it was made by a newer "
                "version, upgrade chromadb; if it is damaged, restore it from a backup"
            ) from error
    stack.callback(_close, client)
    return client


def open_server(url: str, stack: ExitStack) -> Any:
    """A client of the Chroma server at `http://HOST:PORT` or `https://HOST:PORT`, closed with `stack`.

    Raises:
        FactStoreError: the URL has another form, or no server answers.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # brackets without an address, a port that is no number
        parts, port = urlsplit(""), None
    beyond = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
    if parts.scheme not in ("http", "https") or not parts.hostname or beyond:
        shown = re.sub("//.*@", "//...@", url)  # without a password
        raise FactStoreError(
            f"a fact store is a directory or a Chroma server (http://HOST:PORT), got {shown!r}; for tokens, "
            "headers and paths give a client: FactStore(client=chromadb.HttpClient(...), embeddings=...)"
        )
    chromadb = import_chromadb()
    secure = parts.scheme == "https"
    try:
        client = chromadb.HttpClient(host=parts.hostname, port=port or (443 if secure else 8000), ssl=secure)
    except Exception as error:
        raise FactStoreError(
            f"no Chroma server answers at {url}: {error}; start one with `chroma run --path DIR`"
        ) from error
    stack.callback(_close, client)
    return client


def checked_place(path: object) -> str:
    """A store's directory or URL as text.

    Raises:
        FactStoreError: it is neither text nor a path, blank, or has characters that no name of a file has.
    """
    place = os.fspath(path) if isinstance(path, os.PathLike) else path
    try:
        if isinstance(place, str) and place.strip() and "\0" not in place and place.encode():
            return place
    except UnicodeEncodeError:  # half a surrogate pair
        pass
    raise FactStoreError(
        f"a fact store is a directory or a Chroma server (http://HOST:PORT), got {path!r}; '.' is the current directory"
    )


def local_directory(path: str) -> str:
    """The absolute path of a store's directory.

    Raises:
        FactStoreError: the path begins with the home directory of a user who does not exist, or looks like the address
            of a server.
    """
    if address := re.fullmatch(r"(?:[A-Za-z]\w+:/)?([\w.-]+:\d+)", path) or re.match(r"[A-Za-z]\w+:/(.*)", path):
        raise FactStoreError(
            f"a fact store is a directory or a Chroma server (http://HOST:PORT), got {path!r}; for a Chroma server: "
            f"FactStore('http://{address[1]}', ...), as text and not as a Path"
        )
    try:
        return str(Path(path).expanduser().resolve())
    except RuntimeError as error:
        raise FactStoreError(f"{path!r} is in a home directory that cannot be found: {error}") from error


def embedded_directory(client: Any) -> str | None:
    """The directory of an embedded client, as it was given to Chroma; None for any other client.

    Raises:
        FactStoreError: it is no client of Chroma.
    """
    if not callable(getattr(client, "get_settings", None)):
        raise FactStoreError(
            f"client should be a Chroma client such as chromadb.HttpClient(...), got {type(client).__name__}; a "
            "directory or an address is the store's path: FactStore('facts', embeddings=...)"
        )
    settings = client.get_settings()
    return str(settings.persist_directory) if settings.is_persistent else None


def import_chromadb() -> Any:
    """The chromadb module; raises MissingExtraError if it is not installed."""
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


@contextmanager
def chroma_errors(doing: str) -> Iterator[None]:
    """Turns errors of Chroma and its HTTP client into ours.

    Raises:
        FactStoreError: says what was being done, what Chroma reported, and what to do.
        FactIndexError: the index caused the error.
    """
    errors = import_chromadb().errors
    try:
        yield
    except FactStoreError:
        raise
    except Exception as error:
        text = f"Chroma failed while {doing}: {type(error).__name__}: {error}"
        if isinstance(error, errors.InternalError) and _is_about_the_index(str(error)):
            raise FactIndexError(f"{text}; {REBUILD}") from error
        if type(error).__module__.partition(".")[0] == "httpx":
            raise FactStoreError(f"{text}; see that the server runs and can be reached, and try again") from error
        raise FactStoreError(f"{text}; see its message; a full disk and rights of files are common causes") from error


REBUILD = (
    "the facts themselves are kept apart from the index and can be used to build it anew: open the store once with "
    "FactStore(..., rebuild=True)"
)


def _is_about_the_index(text: str) -> bool:
    return any(word in text.lower() for word in ("hnsw", "index", "error finding id", "segment", "compaction"))


# ---------------------------------------------------------------------- collections


def open_collection(client: Any, name: str, embedder: Embedder, *, any_embedder: bool, owned: bool) -> Any:
    """The collection of that name, created if there is none.

    Args:
        any_embedder: also accept another embedder's vectors, because the index will be rebuilt.
        owned: whether no other process uses the database, so that an unfinished index was left by a process that
            ended.

    Raises:
        FactStoreError: the collection has another distance, was not made by a FactStore, or holds another
            embedder's vectors; Chroma does not allow the name; or the server fails.
    """
    with chroma_errors(f"opening the collection {name!r}"):
        collection = _finish_rebuild(client, name) or client.get_or_create_collection(
            name,
            embedding_function=None,
            configuration={"hnsw": _INDEX},
            metadata=_record(embedder),
        )
        if owned:
            _drop_rebuilt(client, name)
    _check(collection, name, embedder, any_embedder)
    return collection


def start_rebuild(client: Any, name: str, embedder: Embedder) -> Any:
    """An empty collection for the facts of `name`; remains of an earlier attempt are deleted."""
    _drop_rebuilt(client, name)
    return client.create_collection(
        name + _REBUILT, embedding_function=None, configuration={"hnsw": _INDEX}, metadata=_record(embedder)
    )


def finish_rebuild(client: Any, name: str) -> Any:
    """Replace the collection `name` by the filled one from `start_rebuild`."""
    # If the process ends between these two steps, opening the collection performs the second one.
    client.delete_collection(name)
    return _finish_rebuild(client, name)


def is_of(collection: Any, embedder: Embedder) -> bool:
    """Whether a collection's vectors were made by this embedder."""
    record = collection.metadata or {}
    return (record.get(_NAME), record.get(_DIMENSION)) == (embedder.name, embedder.dimension)


def _drop_rebuilt(client: Any, name: str) -> None:
    with suppress(import_chromadb().errors.NotFoundError):
        client.delete_collection(name + _REBUILT)


def _finish_rebuild(client: Any, name: str) -> Any:
    """Rename the rebuilt collection, if the one that it replaces has been deleted; otherwise None."""
    missing = import_chromadb().errors.NotFoundError
    try:
        client.get_collection(name, embedding_function=None)
    except missing:
        with suppress(missing):
            rebuilt = client.get_collection(name + _REBUILT, embedding_function=None)
            rebuilt.modify(name=name)
            return client.get_collection(name, embedding_function=None)
    return None


def _record(embedder: Embedder) -> dict[str, str | int]:
    return {_FORMAT: _FORMAT_VERSION, _NAME: embedder.name, _DIMENSION: embedder.dimension}


def _check(collection: Any, name: str, embedder: Embedder, any_embedder: bool) -> None:
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
    if not is_of(collection, embedder) and not any_embedder:
        raise FactStoreError(
            f"collection {name!r} holds vectors of embedder {record.get(_NAME)!r} with dimension "
            f"{record.get(_DIMENSION)}, this one is {embedder.name!r} with dimension {embedder.dimension}, and their "
            "vectors do not compare; open it with the embedder it was made with (embedder=... gives it the same "
            "name), embed every fact anew (rebuild=True), or give another collection name"
        )


def _space(collection: Any) -> str | None:
    # Not `collection.configuration`: it warns about, and may build, an embedding function.
    configuration = collection.configuration_json or {}
    for index in ("hnsw", "spann"):
        if configuration.get(index):
            space: str | None = configuration[index].get("space")
            return space
    return None
