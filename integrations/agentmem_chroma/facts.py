"""A fact as a value, and the row that a Chroma collection keeps of it.

A fact is the same fact when text, source and thread are the same: its id is a hash of the three, equal in
every process. Time and metadata describe it and may change. In the collection a fact is one document with
four metadata fields; metadata is one JSON string, because Chroma's own values are flat and merge on update.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from agentmem.errors import FactStoreError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Fact:
    """One exact statement and where it comes from.

    Attributes:
        text: the statement, kept character for character; not blank.
        source: what it was taken from (a file, a URL, a person); "" when unknown.
        thread: the conversation it belongs to; "" when it belongs to none.
        time: when it was stated, with a time zone; kept in UTC.
        metadata: anything else that JSON can hold.
        id: 32 hexadecimal digits, a hash of text, source and thread; never given.

    Raises:
        FactStoreError: blank text, a time without a zone, or values that cannot be stored.
    """

    id: str = field(init=False)
    text: str
    source: str = ""
    thread: str = ""
    time: datetime = field(default_factory=_now)
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("text", "source", "thread"):
            _check_text(name, getattr(self, name))
        if not self.text.strip():
            raise FactStoreError(f"a fact needs text, got {self.text!r}; leave blank texts out")
        if not isinstance(self.time, datetime) or self.time.utcoffset() is None:
            raise FactStoreError(
                f"a fact's time needs a time zone, got {self.time!r}; use datetime.now(timezone.utc), for example"
            )
        object.__setattr__(self, "time", self.time.astimezone(UTC))
        object.__setattr__(self, "metadata", _plain(self.metadata))
        object.__setattr__(self, "id", _content_id(self.text, self.source, self.thread))

    def row(self) -> dict[str, str | int]:
        """The metadata that Chroma keeps beside the text; time in whole microseconds since 1970 (UTC)."""
        return {
            "source": self.source,
            "thread": self.thread,
            "time": (self.time - _EPOCH) // _MICROSECOND,
            "metadata": json.dumps(self.metadata, sort_keys=True),
        }

    @classmethod
    def from_row(cls, id: str, text: str | None, row: Mapping[str, Any] | None) -> Fact:
        """The fact that ``row`` was made from.

        Raises:
            FactStoreError: the row was not written by a FactStore.
        """
        try:
            fact = cls(
                text=text if text is not None else "",
                source=row["source"] if row else "",
                thread=row["thread"] if row else "",
                time=row_time(row),
                metadata=json.loads(row["metadata"] if row else ""),
            )
        except (KeyError, TypeError, ValueError, OverflowError, FactStoreError) as error:
            raise FactStoreError(
                f"entry {id!r} of the collection is no fact ({error}): something else writes to this "
                "collection; delete the entry, or open another collection"
            ) from error
        if fact.id != id:
            raise FactStoreError(
                f"entry {id!r} of the collection holds the text of fact {fact.id!r}: it was changed by "
                "something other than a FactStore; delete the entry and add the fact again"
            )
        return fact


@dataclass(frozen=True)
class ScoredFact:
    """A fact that a search found; ``score`` is the cosine similarity to the query, from -1 to 1."""

    fact: Fact
    score: float


def row_time(row: Mapping[str, Any] | None) -> datetime:
    """The time in a row; raises KeyError or TypeError where there is none."""
    microseconds = row["time"] if row else None
    if not isinstance(microseconds, int):
        raise TypeError(f"time should be whole microseconds, found {microseconds!r}")
    return _EPOCH + microseconds * _MICROSECOND


def _content_id(text: str, source: str, thread: str) -> str:
    # JSON keeps the three apart: ("ab", "c") and ("a", "bc") differ.
    content = json.dumps([text, source, thread], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:32]


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise FactStoreError(f"a fact's {name} should be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FactStoreError(
            f"a fact's {name} should be valid Unicode, got a lone surrogate at character {error.start}; "
            "decode the input with errors='replace'"
        ) from error


def _plain(metadata: object) -> dict[str, Any]:
    """A copy of ``metadata`` as JSON gives it back, so that a fact equals itself after a restart."""
    if not isinstance(metadata, Mapping):
        raise FactStoreError(f"a fact's metadata should be a mapping, got {type(metadata).__name__}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise FactStoreError(
            f"a fact's metadata should be what JSON can hold ({error}); turn other values into strings first"
        ) from error
    return plain
