"""LangGraph's own conformance suite, through the asynchronous API and, mirrored, the synchronous one."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import Capability

from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import METHODS, SyncMirror

# How many cases of each capability the suite has at the least; a report of fewer would be of another suite.
CASES = {
    "put": 17,
    "put_writes": 10,
    "get_tuple": 10,
    "list": 16,
    "delete_thread": 5,
    "delete_for_runs": 7,
    "copy_thread": 8,
    "prune": 8,
}


async def check(saver: BaseCheckpointSaver[str]) -> None:
    """Run the suite. It names its threads by chance, so that all of it can run on one saver."""

    @checkpointer_test(name="SQLAlchemySaver")
    async def make() -> AsyncGenerator[BaseCheckpointSaver[str], None]:
        yield saver

    report = await validate(make)

    assert [failure for result in report.results.values() for failure in result.failures] == []
    assert report.passed_all_base()
    assert report.passed_all()
    # The report calls a saver complete whose methods it did not find: what it found is asserted as well.
    assert [name for name, result in report.results.items() if not result.detected] == []
    assert set(report.results) == {capability.value for capability in Capability} >= CASES.keys()
    passed = Counter({name: result.tests_passed for name, result in report.results.items()})
    assert passed >= Counter(CASES)


async def test_every_capability_conforms(any_saver: SQLAlchemySaver) -> None:
    await check(any_saver)


async def test_every_capability_conforms_through_the_synchronous_api() -> None:
    """On one database, and the one whose readers queue, since only the way into the saver is another."""
    with SQLAlchemySaver.from_url("sqlite://") as saver:
        await check(SyncMirror(saver))


@pytest.mark.parametrize("prefix", ["", "a"])
def test_every_method_of_a_checkpointer_is_the_savers_own(prefix: str) -> None:
    """A method of the base class would raise NotImplementedError, or be slow; the suite looks for some of them."""
    names = [f"{prefix}{name}" for name in (*METHODS, "list")]
    inherited = [name for name in names if getattr(SQLAlchemySaver, name) is getattr(BaseCheckpointSaver, name)]
    assert inherited == []
