"""The table of features in docs/moving.md says what the tests say: those that it names exist, and ended as it tells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE, RUN = ROOT / "docs" / "moving.md", ROOT / "docs" / "results" / "chat_models.md"

_OWN = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_RAN = re.compile(r"`(test_\w+(?:\[\w+\])?)`")


def rows(text: str) -> Iterator[list[str]]:
    """The cells of all tables, without heads and rules."""
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def features() -> list[list[str]]:
    table = PAGE.read_text().partition("## Features, each with its test")[2]
    head, *found = rows(table)
    assert head[1:3] == ["ChatDeltaMem", "ChatHuggingFace (pipeline)"]
    return found


def verdicts(column: int) -> dict[str, set[str]]:
    """What each test of the run ended as, by its id and by its name, which may stand for several ids."""
    found: dict[str, set[str]] = {}
    for cells in rows(RUN.read_text()):
        if cells[0].startswith("`test_"):
            test = cells[0].strip("`")
            for name in {test, test.partition("[")[0]}:
                found.setdefault(name, set()).add(cells[column].partition(":")[0])
    return found


def test_every_feature_of_ours_names_a_test_that_exists() -> None:
    missing = []
    for name, ours, *_ in features():
        assert _OWN.search(ours) or _RAN.search(ours), f"{name}: no test"
        for file, function in _OWN.findall(ours):
            path = ROOT / file
            if not (path.exists() and re.search(rf"^(async )?def {function}\(", path.read_text(), re.MULTILINE)):
                missing.append(f"{file}::{function}")
    assert missing == []


@pytest.mark.parametrize("column", [1, 2], ids=["ChatDeltaMem", "ChatHuggingFace"])
def test_what_was_run_ended_as_the_table_tells(column: int) -> None:
    ended, wrong = verdicts(column), []
    for name, *cells in features():
        said = re.match(r"(yes|no)\b", cells[column - 1])
        # What stands in brackets is said about another test than the one that decides.
        for test in _RAN.findall(cells[column - 1].partition(" (`")[0]):
            asked = {"passed"} if said is None or said[1] == "yes" else {"failed"}
            if ended.get(test) != asked:
                wrong.append(f"{name}: {test} ended as {ended.get(test)}")
    assert wrong == []
