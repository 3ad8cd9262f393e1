"""Text of LangGraph as the bytes that tables are keyed by.

Encodings are exact (NUL, lone surrogates and every plane survive), keep the order of the text, and distinct
inputs give distinct keys. Where the length is open, text longer than a key is replaced by a tagged SHA-256;
the name itself is then stored in another column. Pure functions, no database.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

from agentmem.errors import StorageError

DIGEST_BYTES = 32
KEY_BYTES = 128
RUN_BYTES = 8

# Never occurs in UTF-8, so a hashed key equals no spelled one.
_HASHED = b"\xff"


def encode_text(text: str) -> bytes:
    """UTF-8 that also carries lone surrogates."""
    return text.encode("utf-8", "surrogatepass")


def decode_text(data: bytes) -> str:
    """The inverse of ``encode_text``.

    Raises:
        StorageError: the bytes are none that it made.
    """
    try:
        return data.decode("utf-8", "surrogatepass")
    except (UnicodeDecodeError, AttributeError) as error:  # AttributeError: a damaged file gives other types, too
        raise StorageError(
            f"expected a stored name or id, found {str(data)[:40]}, which is no text: the row was changed from outside "
            "or the disk is damaged; restore the database from a backup"
        ) from error


@lru_cache(maxsize=1024)
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


def _fit(data: bytes) -> bytes:
    return data if len(data) <= KEY_BYTES else _HASHED + sha256(data).digest()
