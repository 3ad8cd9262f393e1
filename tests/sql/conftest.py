"""Fixtures for the SQL checkpointer: a saver on a file, its URL, and plain SQL on that file."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem_sql import SQLAlchemySaver

# pytest's importlib mode leaves this folder off the path; sql_cases is shared with child processes.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "threads.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def saver(url: str) -> Iterator[SQLAlchemySaver]:
    with SQLAlchemySaver.from_url(url) as opened:
        yield opened


@pytest.fixture
def sql(path: Path) -> Callable[..., list[Any]]:
    """Run one statement on the file, behind the saver's back; gives the rows."""

    def run(statement: str, *parameters: object) -> list[Any]:
        connection = sqlite3.connect(path)
        try:
            with connection:
                return connection.execute(statement, parameters).fetchall()
        finally:
            connection.close()

    return run
