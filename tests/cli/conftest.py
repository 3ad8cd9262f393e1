"""What the commands are run on: a talk with an ideal memory, and tiny models in directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.chatterer import save_chatterer
from tests.helpers.cli_talk import Talk

CHATTERER = {"max_position_embeddings": 512, "initializer_range": 0.5}


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    return Talk(tmp_path / "threads.db")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chatterer(tmp_path_factory.mktemp("tiny"), **CHATTERER)


@pytest.fixture(scope="session")
def other_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the same model, with other weights."""
    return save_chatterer(tmp_path_factory.mktemp("other"), adapter_seed=2, **CHATTERER) / "adapter"
