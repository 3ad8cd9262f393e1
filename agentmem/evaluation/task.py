"""What a task is, and how the files of one are read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from agentmem.errors import DataError, MissingExtraError
from agentmem.evaluation.facts import SEED
from agentmem.evaluation.judge import Judge
from agentmem.text import parse_json
from agentmem.training.contexts import ARMS, Arm
from agentmem.training.conversations import Ask, SourceFile, read_file
from agentmem.training.predictions import Probe

T = TypeVar("T")

SHORT_REPLY = 48
"""Most tokens of a reply that is one value: the longest value with a sentence around it."""

SHORT_WORDS = 40
"""Most words of such a reply, so that no enumeration is right."""

HARM_ARMS: tuple[Arm, ...] = ("bare", "zero", "memory", "foreign", "static")
"""Who is asked where the conversation has nothing to do with the question: whether a memory does harm."""

Score = Callable[[Ask, str], float]
"""A published score: what the text of a reply to a question gets, from 0 to 1."""


@dataclass(frozen=True)
class TaskData:
    """What a task is opened with.

    Attributes:
        path: its folder, or its file.
        limit: most questions; None: all there are.
        seed: what the task draws itself is drawn from it.
        judge: decides where words cannot be compared; None: there is none.
    """

    path: Path
    limit: int | None = None
    seed: int = SEED
    judge: Judge | None = None


@dataclass(frozen=True)
class Task:
    """A task with its questions.

    Attributes:
        name: the key in `agentmem.evaluation.tasks.TASKS`.
        title: what a right reply shows.
        probes: the questions. Any first so many are a fair sample.
        arms: who can be asked.
        max_tokens: most tokens of a reply.
        max_words: most words of a right reply; None: any number.
        licence: of the data, an SPDX identifier.
        files: the files that were read.
        skipped: what was left out, by reason.
        scores: published scores beside the share of right replies, by name.
    """

    name: str
    title: str
    probes: tuple[Probe, ...]
    arms: tuple[Arm, ...] = ARMS
    max_tokens: int = SHORT_REPLY
    max_words: int | None = SHORT_WORDS
    licence: str = ""
    files: tuple[SourceFile, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its questions, in the order in which they first come."""
        return tuple(dict.fromkeys(probe.ask.kind for probe in self.probes))


def by_hash(items: Iterable[T], text: Callable[[T], str]) -> list[T]:
    """Items in the order of a hash of their text, so that any first so many are a fair sample in every run."""
    return sorted(items, key=lambda item: zlib.crc32(text(item).encode()))


def in_turn(groups: Iterable[Sequence[T]]) -> list[T]:
    """One item of each group in turn, so that any first so many are from all groups."""
    absent: Any = object()
    return [item for item in chain.from_iterable(zip_longest(*groups, fillvalue=absent)) if item is not absent]


def read_bytes(path: Path, files: list[SourceFile]) -> bytes:
    """The content of a file, which may be compressed as .xz; `files` gets the file.

    Raises:
        DataError: see `agentmem.training.conversations.read_file`.
    """
    compressed = path.with_name(path.name + ".xz")
    file, content = read_file(compressed if compressed.is_file() and not path.is_file() else path)
    files.append(file)
    return content


def read_objects(path: Path, files: list[SourceFile]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, of a JSON file that is a list of objects, or of a Parquet file; see `read_bytes`.

    Raises:
        DataError: the file is in another form, or empty.
        MissingExtraError: it is a Parquet file, and pyarrow is not installed.
    """
    content = read_bytes(path, files)
    if path.suffix == ".parquet":
        return _read_parquet(path, content)
    kind = "a list of JSON objects" if path.suffix == ".json" and content.lstrip()[:1] == b"[" else "lines"
    try:
        if kind == "lines":
            rows = [parse_json(line) for line in content.split(b"\n") if line.strip()]
        else:
            rows = parse_json(content)
    except ValueError as error:
        raise DataError(f"{files[-1].path} has one JSON object per line; found another form ({error})") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        found = "nothing in it" if not rows else "other values"
        raise DataError(f"{files[-1].path} has one JSON object per line, or a list of objects; found {found}")
    return rows


def _read_parquet(path: Path, content: bytes) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, BufferReader
        from pyarrow.parquet import read_table
    except ImportError:
        raise MissingExtraError("pyarrow", "eval") from None
    try:
        rows: list[dict[str, Any]] = read_table(BufferReader(content)).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is a Parquet file; found another form ({error}); fetch it again") from error
    return rows


def other_form(task: str, expected: str, row: object, path: Path, error: Exception) -> DataError:
    """The error for a row of a task's data that lacks something, or has it in another form."""
    return DataError(
        f"a question of {task} has {expected}; found {row!r:.120} ({error!r}); fetch the files of {path} again"
    )
