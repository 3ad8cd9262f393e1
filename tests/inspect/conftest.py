"""The page of `agentmem inspect` over a database with an audit trail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem_governance import Governor
from agentmem_inspect import make_app
from agentmem_sql import SQLAlchemySaver
from tests.helpers.inspected import HOST, TOKEN, Browser
from tests.sql.conftest import (  # noqa: F401 - fixtures
    database_url,
    server_database,
    tmp_path,
    usual_database,
    without_root_certificates,
)


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[SQLAlchemySaver]:  # noqa: F811
    with SQLAlchemySaver.from_url(f"sqlite:///{tmp_path / 'threads.db'}", audit=True) as opened:
        yield opened


@pytest.fixture
def governor(saver: SQLAlchemySaver) -> Governor:
    return Governor(saver, actor="inspector")


@pytest.fixture
def browser(governor: Governor) -> Iterator[Browser]:
    with Browser(make_app(governor, token=TOKEN, hosts=[HOST])) as opened:
        yield opened
