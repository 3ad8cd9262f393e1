"""Text and numbers of LangGraph as the bytes that tables are keyed by, and digests.

Encodings are exact (NUL, lone surrogates and every plane survive), keep the order of the text, and distinct
inputs give distinct keys. Where the length is open, text longer than a key is replaced by a tagged SHA-256;
the name itself is then stored in another column. Pure functions, no database.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

from agentmem.errors import StorageError

DIGEST_BYTES = 32
KEY_BYTES = 128

# Never occurs in UTF-8, so a hashed key equals no spelled one.
_HASHED = b"\xff"


def encode_text(text: str) -> bytes:
    """UTF-8 that also carries lone surrogates."""
    return text.encode("utf-8", "surrogatepass")


def decode_text(data: bytes) -> str:
    """The inverse of ``encode_text``."""
    return data.decode("utf-8", "surrogatepass")


def thread_key(thread_id: str) -> bytes:
    """The 32-byte key of a thread id of any length."""
    return sha256(encode_text(thread_id)).digest()


def open_key(text: str) -> bytes:
    """A key of at most ``KEY_BYTES`` for any text: the text, or its tagged digest where it is longer."""
    return _fit(encode_text(text))


def is_hashed(key: bytes) -> bool:
    """Whether ``open_key`` had to replace the text by its digest."""
    return key.startswith(_HASHED)


def exact_key(text: str, what: str) -> bytes:
    """A key that spells the text, for ids that are sorted by and read back.

    Raises:
        StorageError: the text takes more than ``KEY_BYTES`` bytes.
    """
    data = encode_text(text)
    if len(data) > KEY_BYTES:
        raise StorageError(
            f"expected a {what} of at most {KEY_BYTES} bytes, found {len(data)} bytes ({text[:40]!r}...); "
            "LangGraph's own ids have 36 characters, use a shorter one"
        )
    return data


def version_key(version: str | int | float) -> bytes:
    """The key of a channel version; ``1``, ``1.0`` and ``"1"`` stay apart."""
    if isinstance(version, str):
        return _fit(b"s" + encode_text(version))
    return _fit(f"{'i' if isinstance(version, int) else 'f'}{version!r}".encode())


def content_digest(kind: int, body: bytes) -> bytes:
    """The digest that a blob is keyed by; equal bodies of different kinds have different ones."""
    return sha256(bytes([kind]) + body).digest()


def seal(fields: Iterable[bytes | None]) -> bytes:
    """One digest over several columns, each with its length, so that no byte can move from one to another."""
    total = sha256()
    for data in fields:
        total.update(b"-" if data is None else b"%d:" % len(data) + data)
    return total.digest()


def _fit(data: bytes) -> bytes:
    return data if len(data) <= KEY_BYTES else _HASHED + sha256(data).digest()
