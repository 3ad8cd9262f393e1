"""Fixtures for governance: the databases of the SQL tests, a fact store whose embedder needs no model, and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding

from agentmem_chroma import FactStore
from tests.sql.conftest import (  # noqa: F401 - fixtures
    ask,
    database_url,
    look,
    server_database,
    tmp_path,
    usual_database,
    without_root_certificates,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:  # noqa: F811
    """Where a test's SQLite file and facts are."""
    return tmp_path / "data"


@pytest.fixture
def url(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return f"sqlite:///{folder / 'threads.db'}"


@pytest.fixture
def facts(folder: Path, needs: Callable[[object, str], None]) -> Iterator[FactStore]:
    needs(find_spec("chromadb"), "chromadb: pip install '.[chroma]'")
    with FactStore(folder / "facts", embeddings=DeterministicFakeEmbedding(size=8)) as store:
        yield store
