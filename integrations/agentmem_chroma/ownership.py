"""One owner process per directory.

Chroma's embedded index is not made for two processes: the second reads stale results and both can damage the
files. So a directory is held by an exclusive file lock, which the operating system frees however its owner
ends. Inside one process a directory may be claimed any number of times; the lock goes when the last claim is
released. Beside the lock lies a note of who holds it, for the message that a second process gets. Knows
nothing of Chroma.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

from filelock import FileLock, Timeout

from agentmem.errors import FactStoreError, StoreOwnedError

_LOCK = "agentmem.lock"
_OWNER = "agentmem.owner.json"

_claims: dict[Path, _Holding] = {}
_guard = threading.RLock()


class _Holding:
    """This process's hold on one directory: the lock, what it was opened as, how many claims share it."""

    def __init__(self, lock: FileLock, opened_as: str) -> None:
        self.lock = lock
        self.opened_as = opened_as
        self.writes = threading.RLock()
        self.claims = 0
        self.pid = os.getpid()


class Claim:
    """A share in this process's hold on a directory.

    Args:
        directory: created where it does not exist.
        opened_as: the name under which the database is opened; every claim of one process must use the same.

    Attributes:
        directory: the directory, absolute, links resolved.
        writes: a lock common to every claim on the directory in this process.

    Raises:
        StoreOwnedError: another process holds the directory.
        FactStoreError: the directory cannot be made or locked, was opened under another name, or is held by
            the process that this one was forked from.
    """

    def __init__(self, directory: Path, opened_as: str) -> None:
        self.directory = directory.resolve()
        with _guard:
            holding = _claims.get(self.directory)
            if holding is None:
                holding = _Holding(_acquire(self.directory), opened_as)
                _claims[self.directory] = holding
            elif holding.pid != os.getpid():
                raise FactStoreError(
                    f"the fact store in {self.directory} was open in process {holding.pid} when it forked "
                    "this one; start worker processes with the 'spawn' method, or open the store after the "
                    "fork only"
                )
            elif holding.opened_as != opened_as:
                raise FactStoreError(
                    f"{self.directory} is open in this process as {holding.opened_as!r}, now as "
                    f"{opened_as!r}: two Chroma systems over one directory do not see each other's writes; "
                    "give both stores the same client, or both the path"
                )
            holding.claims += 1
            self._holding = holding
            self.writes = holding.writes

    def release(self) -> None:
        """Give the share back; the last one frees the directory for other processes. Call it once."""
        with _guard:
            self._holding.claims -= 1
            if self._holding.claims == 0 and self._holding.pid == os.getpid():
                del _claims[self.directory]
                (self.directory / _OWNER).unlink(missing_ok=True)
                self._holding.lock.release()


def _acquire(directory: Path) -> FileLock:
    # thread_local=False: the store may be closed by another thread than the one that opened it.
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
    _write_owner(directory)
    return lock


def _write_owner(directory: Path) -> None:
    note = directory / (_OWNER + ".new")
    note.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
    note.replace(directory / _OWNER)


def _owned_message(directory: Path) -> str:
    try:
        note = json.loads((directory / _OWNER).read_text(encoding="utf-8"))
        owner = f"process {note['pid']} on host {note['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        owner = "another process"  # it holds the lock and has not signed yet
    return (
        f"the fact store in {directory} belongs to {owner}, and one process owns a directory; close it "
        f"there, or share it: close it everywhere, run `chroma run --path {directory}`, and open it in "
        "every process with FactStore(client=chromadb.HttpClient(host=..., port=...), embeddings=...)"
    )
