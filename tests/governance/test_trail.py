"""A chain of the audit trail shows what was changed or removed, and holds through retention and forgetting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from langchain_core.messages import HumanMessage

from agentmem.errors import ConfigError
from agentmem_governance import Governor
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import Sql, config, put
from tests.sql.conftest import on_sqlite

KEY = b"k" * 32


@pytest.fixture(params=[None, KEY], ids=["plain", "keyed"])
def governor(database_url: str, request: pytest.FixtureRequest) -> Iterator[Governor]:
    """A thread with four rows in its chain."""
    with SQLAlchemySaver.from_url(database_url, audit=True, hmac_key=request.param) as saver:
        at, said = config(), []
        for number in range(4):
            said.append(HumanMessage(f"{number}", id=f"{number}"))
            at = put(saver, at, {"messages": list(said)}, user_id="ada")
        yield Governor(saver, actor="auditor")


CHANGES = {
    "DELETE FROM agentmem_audit WHERE seq = 2": "rows 2 to 2 are missing",
    "DELETE FROM agentmem_audit WHERE seq = 1": "rows 1 to 1 are missing",
    "DELETE FROM agentmem_audit WHERE seq = 4": "rows at the end are missing",
    "DELETE FROM agentmem_audit": "rows at the end are missing",
    "UPDATE agentmem_audit SET created = created + 1 WHERE seq = 3": "row 3 was changed",
    "UPDATE agentmem_audit SET body = (SELECT o.body FROM (SELECT body FROM agentmem_audit WHERE seq = 1) o) "
    "WHERE seq = 2": "row 2 was changed",
    "UPDATE agentmem_audit SET private = (SELECT o.private FROM (SELECT private FROM agentmem_audit WHERE seq = 1) o) "
    "WHERE seq = 2": "what is private in row 2 was changed",
    "UPDATE agentmem_audit SET private = NULL WHERE seq = 2": "no later row says that it was forgotten",
    "DELETE FROM agentmem_audit_chains": "the chain's head is missing",
}


@on_sqlite
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_behind_its_back_shows(governor: Governor, ask: Sql, change: str) -> None:
    assert governor.audit("t").holds
    ask(change)
    trail = governor.audit("t")
    assert any(CHANGES[change] in problem for problem in trail.problems), trail.problems


def test_retention_leaves_a_chain_that_holds(governor: Governor, ask: Sql) -> None:
    time.sleep(0.01)
    between = datetime.now(UTC)
    put(governor.saver, config(), {"messages": [HumanMessage("late", id="late")]})
    assert governor.expire_audit(between) == 4
    trail = governor.audit("t")
    assert trail.holds, trail.problems
    assert [entry.event for entry in trail.entries] == ["written", "expired"]
    assert governor.expire_audit(between) == 0
    with pytest.raises(ConfigError, match="time zone"):
        governor.expire_audit(datetime.now())
    ask("DELETE FROM agentmem_audit WHERE seq = 5")
    assert not governor.audit("t").holds


@on_sqlite
def test_what_is_noted_of_persons_goes_and_the_chain_holds(governor: Governor) -> None:
    assert governor.audit("t").entries[0].details["actor"] == "ada"
    head = governor.audit("t").head
    governor.note_inspection("t")
    governor.forget("t")
    trail = governor.audit("t")
    assert trail.holds, trail.problems
    assert [entry.event for entry in trail.entries] == ["written"] * 4 + ["inspected", "forgotten"]
    assert all("actor" not in entry.details and entry.redacted for entry in trail.entries[:4])
    assert trail.head != head
    assert trail.entries[-1].details["actor"] == "auditor"
    assert [entry.event for entry in governor.audit().entries] == ["inspected", "forgotten"]


@on_sqlite
def test_an_empty_trail_holds(governor: Governor) -> None:
    trail = governor.audit("another")
    assert (trail.entries, trail.head, trail.holds) == ((), "", True)
