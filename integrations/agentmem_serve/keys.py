"""API keys: a file with a digest of each and whose it is. Who has the file has no key.

A key is 32 random bytes, so that its plain SHA-256 cannot be searched for. The file has a JSON object a line; a server
reads it again when it has changed, so that a key that was revoked is refused at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from secrets import token_hex, token_urlsafe

from filelock import FileLock

from agentmem.errors import ConfigError, StorageError
from agentmem.text import parse_json


@dataclass(frozen=True)
class ApiKey:
    """What the file has of a key.

    Attributes:
        id: names it; a part of the key.
        subject: whose threads it opens: those whose ids begin with this and `/`.
        sha256: of the key, hexadecimal.
        created: ISO 8601 in UTC.
    """

    id: str
    subject: str
    sha256: str
    created: str


class KeyFile:
    """The keys in a file, which need not exist.

    Raises:
        ConfigError: the file holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._read_as: tuple[int, int, int] | None = None
        self._keys: Mapping[str, ApiKey] = {}
        self.listed()

    def listed(self) -> Sequence[ApiKey]:
        """All keys, in the order of the file."""
        return [*self._current().values()]

    def find(self, key: str) -> ApiKey | None:
        """The entry of a key; None if there is none.

        Raises:
            StorageError: the file has changed and can no longer be read.
        """
        try:
            # By digest, so that how long it takes says nothing about any key.
            return self._current().get(sha256(key.encode("utf-8", "surrogatepass")).hexdigest())
        except ConfigError as error:
            raise StorageError(str(error)) from error

    def add(self, subject: str) -> str:
        """Add a key of a subject and give it; it cannot be had again.

        Raises:
            ConfigError: no subject can have this name.
        """
        if not subject or "/" in subject:
            raise ConfigError(
                f"expected a subject's name without '/', which ends it in the ids of threads, found {subject!r}"
            )
        name = token_hex(4)
        key = f"am-{name}-{token_urlsafe(32)}"
        made = ApiKey(name, subject, sha256(key.encode()).hexdigest(), datetime.now(UTC).isoformat(timespec="seconds"))
        with self._alone():
            self._write([*self.listed(), made])
        return key

    def revoke(self, name: str) -> ApiKey:
        """Remove the key of this id, and give what was there.

        Raises:
            ConfigError: there is none.
        """
        with self._alone():
            keys = self.listed()
            gone = next((key for key in keys if key.id == name), None)
            if gone is None:
                raise ConfigError(f"expected the id of a key in {str(self._path)!r}, found {name!r}; see agentmem keys")
            self._write([key for key in keys if key is not gone])
        return gone

    def _alone(self) -> FileLock:
        return FileLock(f"{self._path}.lock")

    def _current(self) -> Mapping[str, ApiKey]:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            self._read_as, self._keys = None, {}
            return self._keys
        read_as = (found.st_ino, found.st_size, found.st_mtime_ns)
        if read_as != self._read_as:
            try:
                lines = self._path.read_text("utf-8").splitlines()
                keys = [ApiKey(**parse_json(line)) for line in lines if line.strip()]
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(
                    f"expected a file of API keys at {str(self._path)!r}, found another: {error}"
                ) from error
            self._keys, self._read_as = {key.sha256: key for key in keys}, read_as
        return self._keys

    def _write(self, keys: Sequence[ApiKey]) -> None:
        # A file of its own that takes the other's place, so that nobody reads a half of it.
        new = self._path.with_name(f"{self._path.name}.new")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(key)) + "\n" for key in keys)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._path)
