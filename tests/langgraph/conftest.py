"""Engines for these tests: a stand-in with an ideal memory, and nano, through the same graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import agentmem
from agentmem import loading
from agentmem_langgraph import ChatDeltaMem
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.talks import World, world


@pytest.fixture(scope="session")
def nano_engine(needs: Callable[[object, str], None]) -> Iterator[Any]:
    needs((loading.NANO / "adapter").exists(), "the embedded model and its adapter (agentmem nano build)")
    with agentmem.load("nano") as engine:
        yield engine


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def w(request: pytest.FixtureRequest) -> World:
    """What graphs run on: the stand-in, or nano where a test names it as well."""
    nano = getattr(request, "param", "fake") == "nano"
    return world(request.getfixturevalue("nano_engine") if nano else FakeEngine())


@pytest.fixture
def llm(fake: FakeEngine) -> ChatDeltaMem:
    return ChatDeltaMem(engine=fake)
