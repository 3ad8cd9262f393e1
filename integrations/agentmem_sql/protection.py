"""How stored bytes are protected: by digests and seals (MACs of rows), keyed if there is a key, and by encryption.

Without a key, digests are SHA-256 and detect damage. With a key they are HMAC-SHA256, so that nobody without it can
replace stored bytes unnoticed. With an `EncryptedSerializer`, content and checkpoints are encrypted by its cipher, and
rows that are not are refused. Equal content must have equal digests to be stored once, but from plain digests a reader
could confirm guesses; so an encrypted database keeps a random key for them, itself encrypted.

The settings table records how a database is protected. A saver with other settings is refused when it opens the
database, before it reads or writes a row.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256
from secrets import token_bytes

from langgraph.checkpoint.serde.base import CipherProtocol, SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from sqlalchemy import Connection, insert, select

from agentmem.errors import ConfigError, StorageError
from agentmem_sql.schema import RUN_BYTES, Tables

MIN_KEY_BYTES = 16

_PLAIN, _ENCRYPTED = b"\0", b"\1"  # first byte of everything stored
_MODE, _SECRET, _CHECK, _AUDIT = b"protection", b"secret", b"check", b"audit"
_RUN = 255  # no kind of content
_KINDS = [bytes((kind,)) for kind in range(256)]
_CHECKED = b"agentmem"  # what the check is a digest of


class Protection:
    """Digests, seals and encryption of one database; shared by a saver and its clones."""

    def __init__(self, serde: SerializerProtocol, hmac_key: bytes | None, audit: bool = False) -> None:
        """Use the cipher of an `EncryptedSerializer`, and the caller's key for digests; `audit` switches that on.

        Raises:
            ConfigError: the key is not bytes or too short.
        """
        if hmac_key is not None and (not isinstance(hmac_key, bytes) or len(hmac_key) < MIN_KEY_BYTES):
            found = f"{len(hmac_key)} bytes" if isinstance(hmac_key, bytes) else type(hmac_key).__name__
            raise ConfigError(
                f"expected an hmac_key of at least {MIN_KEY_BYTES} random bytes, found {found}; "
                "make one with secrets.token_bytes(32) and keep it outside the database"
            )
        self._cipher: CipherProtocol | None = serde.cipher if isinstance(serde, EncryptedSerializer) else None
        self.encrypts = self._cipher is not None
        self._hmac_key = hmac_key
        self._key = hmac_key  # of an encrypted database without hmac_key it is known once that is open
        self.has_key = self._cipher is None or hmac_key is not None  # for digests
        self.audited: bool | None = None  # whether what is written is also noted in `audit`; None until opened
        self._audit = audit

    def digest(self, kind: int, plain: bytes) -> bytes:
        """The digest of a body of content, different for each kind; empty for a kind that does not exist."""
        if type(kind) is not int or not 0 <= kind < len(_KINDS):
            return b""
        return self.digests(kind, [plain])[0]

    def digests(self, kind: int, bodies: Iterable[bytes]) -> list[bytes]:
        """`digest` for each of several bodies of one kind."""
        key, mark = self._key, _KINDS[kind]
        if key is None:
            return [sha256(mark + body).digest() for body in bodies]
        return [hmac.digest(key, mark + body, "sha256") for body in bodies]

    def run_key(self, run_id: str) -> bytes:
        """A part of a digest that checkpoints of a run are found by; other runs may have the same."""
        return self.digest(_RUN, run_id.encode("utf-8", "surrogatepass"))[:RUN_BYTES]

    def row_mac(self, fields: Iterable[object]) -> bytes:
        """One digest over several columns, each with its length, so that no byte can move from one to another."""
        columns = [
            # Other types come from damaged files only.
            data if data is None or type(data) is bytes else b"%d" % data if type(data) is int else repr(data).encode()
            for data in fields
        ]
        joined = b"".join([b"-" if data is None else b"%d:%b" % (len(data), data) for data in columns])
        return sha256(joined).digest() if self._key is None else hmac.digest(self._key, joined, "sha256")

    def encrypt(self, plain: bytes) -> bytes:
        """The bytes to store: encrypted, if there is a cipher."""
        if self._cipher is None:
            return _PLAIN + plain
        name, encrypted = self._cipher.encrypt(plain)
        return _ENCRYPTED + name.encode() + b"\0" + encrypted

    def decrypt(self, stored: bytes) -> bytes:
        """The inverse of `encrypt`.

        Raises:
            StorageError: the bytes are encrypted and this saver has no cipher, or the other way round, or
                they were not encrypted with this cipher's key.
        """
        mark = stored[:1] if isinstance(stored, bytes) else b""  # a damaged file gives other types, too
        if mark == _PLAIN and self._cipher is None:
            return stored[1:]
        if mark == _ENCRYPTED and self._cipher is not None:
            name, _, encrypted = stored[1:].partition(b"\0")
            try:
                return self._cipher.decrypt(name.decode(), encrypted)
            except Exception as error:
                raise StorageError(
                    "a stored row cannot be decrypted: it was changed or damaged, or encrypted with another key; "
                    "pass the serializer that the database was written with, or restore a backup"
                ) from error
        if mark == _PLAIN and self._cipher is not None:
            raise StorageError(
                "expected an encrypted row, found one that is not: someone wrote it without the key; restore a backup"
            )
        raise StorageError("a stored row is damaged, or encrypted and this saver has no cipher; restore a backup")

    # The settings of a database.

    def is_settled(self, connection: Connection, tables: Tables) -> bool:
        """Whether the database records how it is protected.

        Raises:
            StorageError: it is protected in another way than this saver does, or with another key.
        """
        rows = connection.execute(select(tables.settings.c.name, tables.settings.c.value)).all()
        stored = {name: value for name, value in rows if isinstance(name, bytes) and isinstance(value, bytes)}
        if _MODE not in stored:
            self.audited = None
            return False
        if stored[_MODE] != self._mode():
            raise StorageError(
                f"expected a checkpoint database that is {self._mode().decode()}, found one that is "
                f"{stored[_MODE].decode(errors='replace')}; pass the serde and the hmac_key that it was made with, "
                "or copy its threads into a new database with agentmem_sql.copy_threads"
            )
        if self.encrypts:
            secret = self.decrypt(stored.get(_SECRET, b""))
            self._key, self.has_key = self._hmac_key or secret, True
        if self._key is not None and not hmac.compare_digest(stored.get(_CHECK, b""), self.row_mac([_CHECKED])):
            raise StorageError(
                "expected the key that this checkpoint database was made with, found another; "
                "pass the hmac_key and the serde that were used when the database was new"
            )
        self.audited = _AUDIT in stored
        return self.audited or not self._audit

    def settle(self, connection: Connection, tables: Tables) -> None:
        """Record how a new database is protected, in a transaction that may write; raises as `is_settled`."""
        if self.is_settled(connection, tables):
            return
        settings = {_AUDIT: b"1"} if self._audit else {}
        new = self.audited is None
        if new:
            settings[_MODE] = self._mode()
        if new and self.encrypts:
            secret = token_bytes(32)
            settings[_SECRET] = self.encrypt(secret)
            self._key, self.has_key = self._hmac_key or secret, True
        if new and self._key is not None:
            settings[_CHECK] = self.row_mac([_CHECKED])
        self.audited = self._audit
        rows = [{"name": name, "value": value} for name, value in settings.items()]
        connection.execute(insert(tables.settings), rows)

    def _mode(self) -> bytes:
        encryption = b"encrypted" if self.encrypts else b"not encrypted"
        return encryption + (b", with an hmac_key" if self._hmac_key is not None else b", without hmac_key")
