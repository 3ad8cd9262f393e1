"""A fact as a value, and the row in which a Chroma collection stores it.

Two facts are the same if their text, source and thread are the same: the id is a hash of these three, equal in every
process. Time and metadata describe a fact and may change. In the collection a fact is one document with five metadata
fields; the fact's own metadata is one JSON string, because Chroma's values are flat and are merged on update. So
filters over metadata are evaluated here, on facts that Chroma has returned.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from langchain_core.documents import Document

from agentmem.errors import FactStoreError
from agentmem.text import parse_json

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Fact:
    """One exact statement and where it comes from.

    Attributes:
        text: the statement, kept character for character; must not be blank.
        source: where it comes from (a file, a URL, a person); "" if unknown.
        thread: the conversation it belongs to; "" if it belongs to none.
        time: when it was stated, with a time zone; converted to UTC.
        metadata: anything else, as long as JSON can hold it.
        id: 32 hexadecimal digits, a hash of text, source and thread; computed, not an argument.

    Raises:
        FactStoreError: blank text, a time without a time zone, or values that cannot be stored.
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
        try:
            object.__setattr__(self, "time", self.time.astimezone(UTC))
        except OverflowError as error:
            raise FactStoreError(f"a fact's time should be one that UTC can state, got {self.time!r}") from error
        object.__setattr__(self, "metadata", _plain(self.metadata))
        object.__setattr__(self, "id", _content_id(self.text, self.source, self.thread))

    def row(self) -> dict[str, str | int]:
        """The metadata that Chroma stores next to the text; the time is in whole microseconds since 1970 (UTC)."""
        return {
            "source": self.source,
            "thread": self.thread,
            "time": (self.time - _EPOCH) // _MICROSECOND,
            "metadata": json.dumps(self.metadata, sort_keys=True),
        }

    @classmethod
    def from_row(cls, id: str, text: str | None, row: Mapping[str, Any] | None) -> Fact:
        """The fact that is stored as this row.

        Raises:
            FactStoreError: the row was not written by a FactStore.
        """
        try:
            fact = cls(
                text=text if text is not None else "",
                source=row["source"] if row else "",
                thread=row["thread"] if row else "",
                time=row_time(row),
                metadata=parse_json(row["metadata"] if row else ""),
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
    """A fact that a search found; `score` is the cosine similarity to the query, from -1 to 1."""

    fact: Fact
    score: float


def from_document(document: Document, *, source: str, thread: str, time: datetime, metadata: Mapping[str, Any]) -> Fact:
    """A LangChain document as a fact.

    `source`, `thread` (or `thread_id`) and `time` come from its metadata, or else from the arguments; `score` is
    dropped, so that a document from a `FactRetriever` becomes the same fact again. Other keys override those of
    `metadata`.

    Raises:
        FactStoreError: see `Fact`; or `time` is neither a datetime nor ISO 8601 with a time zone.
    """
    own = {**metadata, **document.metadata}
    own.pop("score", None)
    thread = own.pop("thread_id", thread)
    stated = own.pop("time", time)
    if isinstance(stated, str):
        try:
            stated = datetime.fromisoformat(stated)
        except ValueError as error:
            raise FactStoreError(f"a document's time should be ISO 8601 with a zone, got {stated!r}") from error
    return Fact(document.page_content, own.pop("source", source), own.pop("thread", thread), stated, own)


def to_document(fact: Fact, score: float | None) -> Document:
    """A fact as a LangChain document; the fact's own fields override keys of the same name in its metadata."""
    own = {"source": fact.source, "thread": fact.thread, "time": fact.time.isoformat(), "score": score}
    return Document(id=fact.id, page_content=fact.text, metadata={**fact.metadata, **own})


def matches(fact: Fact, filter: Mapping[str, Any]) -> bool:
    """Whether a fact matches a filter in the form that Chroma and LangChain's stores use.

    `{"page": 3}`, `{"page": {"$gte": 3, "$lt": 9}}`, `{"$or": [..., ...]}`. A key is `source`, `thread`, `time`
    (compared as ISO 8601 text) or a key of the fact's metadata. A fact without the key matches only `$ne` and `$nin`.

    Raises:
        FactStoreError: see `check_filter`.
    """
    values = {**fact.metadata, "source": fact.source, "thread": fact.thread, "time": fact.time.isoformat()}
    return _meets(values, filter)


def check_filter(filter: Mapping[str, Any] | None) -> None:
    """Check a filter whatever the facts are: a mistake has to show where there are none, too.

    Raises:
        FactStoreError: an unknown operator, operands of the wrong type, or filters nested very deeply.
    """
    if filter is not None:
        _meets({}, filter)


_DEEPEST_FILTER = 100
_ABSENT = object()
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": operator.eq,
    "$ne": operator.ne,
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
    "$in": lambda value, options: value in options,
    "$nin": lambda value, options: value not in options,
}


def _meets(values: Mapping[str, Any], filter: Mapping[str, Any], depth: int = 0) -> bool:
    if depth > _DEEPEST_FILTER:
        raise FactStoreError(f"a filter should have at most {_DEEPEST_FILTER} $and and $or inside each other, got more")
    if not isinstance(filter, Mapping):
        raise FactStoreError(f"a filter should be a mapping such as {{'page': 3}}, got {type(filter).__name__}")
    results = []  # all parts are evaluated, so that a mistake is reported whatever the values are
    for key, condition in filter.items():
        if not isinstance(key, str):
            raise FactStoreError(f"a filter's keys are names of metadata, and those are strings; got {key!r}")
        if key in ("$and", "$or"):
            if not isinstance(condition, Sequence) or isinstance(condition, str) or not condition:
                raise FactStoreError(f"{key} in a filter should hold a list of filters, got {condition!r}")
            parts = [_meets(values, part, depth + 1) for part in condition]
            results.append(all(parts) if key == "$and" else any(parts))
        elif key.startswith("$"):
            raise FactStoreError(f"a filter's keys are names of metadata, $and and $or; got {key!r}")
        else:
            tests = condition if isinstance(condition, Mapping) else {"$eq": condition}
            results += [_test(values.get(key, _ABSENT), name, operand) for name, operand in tests.items()]
    return all(results)


def _test(value: Any, name: str, operand: Any) -> bool:
    if name not in _OPERATORS:
        raise FactStoreError(f"a filter's operators are {', '.join(_OPERATORS)}; got {name!r}")
    if name in ("$in", "$nin") and (isinstance(operand, str) or not isinstance(operand, Sequence)):
        raise FactStoreError(f"{name} in a filter should hold a list of values, got {operand!r}")
    if value is _ABSENT:
        return name in ("$ne", "$nin")
    try:
        return bool(_OPERATORS[name](value, operand))
    except TypeError:  # a text and a number cannot be ordered
        return False


def row_time(row: Mapping[str, Any] | None) -> datetime:
    """The time in a row; raises KeyError or TypeError where there is none."""
    microseconds = row["time"] if row else None
    if not isinstance(microseconds, int):
        raise TypeError(f"time should be whole microseconds, found {microseconds!r}")
    return _EPOCH + microseconds * _MICROSECOND


def _content_id(text: str, source: str, thread: str) -> str:
    # JSON keeps the three fields apart: ("ab", "c") and ("a", "bc") differ.
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
    """A copy of `metadata` after a round trip through JSON, so that a fact equals itself after a restart."""
    if not isinstance(metadata, Mapping):
        raise FactStoreError(f"a fact's metadata should be a mapping, got {type(metadata).__name__}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise FactStoreError(
            f"a fact's metadata should be what JSON can hold ({error}); turn other values into strings first"
        ) from error
    return plain


def chosen_by(source: str | None, thread: str | None) -> dict[str, Any] | None:
    """Chroma's condition for the facts of a source and a thread; None for all.

    Raises:
        FactStoreError: one of them is no string.
    """
    for name, value in (("source", source), ("thread", thread)):
        if not isinstance(value, str | None):  # the number 5 is no fact's thread: nothing would be found, or deleted
            raise FactStoreError(f"{name} should be a string or None for all, got {value!r}")
    conditions = [{key: value} for key, value in (("source", source), ("thread", thread)) if value is not None]
    if len(conditions) == 2:
        return {"$and": conditions}
    return conditions[0] if conditions else None


def id_list(ids: str | Iterable[str]) -> list[str]:
    """The ids as a list.

    Raises:
        FactStoreError: one of them is no string, which Chroma would report in words of its own.
    """
    listed = [ids] if isinstance(ids, str) or not isinstance(ids, Iterable) else list(ids)
    for id in listed:
        if not isinstance(id, str):
            raise FactStoreError(f"ids of facts are strings, got {id!r}")
    return listed


def from_rows(rows: Any) -> Iterator[Fact]:
    """The facts of what Chroma's `get` gives, with their documents and metadata."""
    for id, text, row in zip(rows["ids"], rows["documents"], rows["metadatas"], strict=True):
        yield Fact.from_row(id, text, row)
