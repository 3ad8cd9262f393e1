"""Matrices on the page of `agentmem inspect`."""

from __future__ import annotations

import json
import re
from html import unescape
from typing import Any

import numpy as np

from agentmem_sql import SQLAlchemySaver
from tests.helpers.inspected import SHAPE, Browser, turns
from tests.helpers.sql_cases import config, put


def told(page: str) -> Any:
    """What a page tells its script."""
    found = re.search(r"data-matrices='([^']*)'", page)
    assert found is not None
    return json.loads(unescape(found[1]))


def test_the_turns_are_there_to_slide_over_and_their_numbers_are_the_memory(
    browser: Browser, saver: SQLAlchemySaver
) -> None:
    made = turns(saver, "ada/1", "one", "two", "three")
    data = told(browser.read("/threads/1/matrices"))
    assert [step["id"] for step in data["steps"]] == [each["configurable"]["checkpoint_id"] for each in made]
    assert [step["consumed"] for step in data["steps"]] == [2, 4, 6]
    for step, ones in zip(data["steps"], (2, 4, 6), strict=True):
        sent = browser.get(f"{data['address']}&at={step['id']}")
        matrices = np.frombuffer(sent.content, "<f4").reshape(step["shape"])
        assert matrices.shape == SHAPE
        assert matrices.sum() == matrices[0].sum() == ones
    # An earlier checkpoint has its own history only.
    assert len(told(browser.read(f"/threads/1/matrices?at={data['steps'][1]['id']}"))["steps"]) == 2


def test_another_checkpoint_can_be_compared_with(browser: Browser, saver: SQLAlchemySaver) -> None:
    first, _ = turns(saver, "ada/1", "one", "two")
    other = turns(saver, "ada/1", "three", at=first)[-1]["configurable"]["checkpoint_id"]
    page = browser.read(f"/threads/1/matrices?with={other}")
    assert told(page)["fixed"] == {"id": other, "when": "", "shape": list(SHAPE)}
    assert "found none" in browser.read("/threads/1/matrices?with=nothing", 404)


def test_where_there_is_no_memory_the_page_says_so(browser: Browser, saver: SQLAlchemySaver) -> None:
    put(saver, config(), {"messages": []})
    assert "no memory" in browser.read("/threads/1/matrices")
    assert browser.get("/threads/1/state").status_code == 404
    assert browser.get("/threads/2/state").status_code == 404


def test_each_of_several_memories_can_be_chosen(browser: Browser, saver: SQLAlchemySaver) -> None:
    (at,) = turns(saver, "ada/1", "one")
    stored = saver.get_tuple(at)
    assert stored is not None
    memory = stored.checkpoint["channel_values"]["memory"]
    put(saver, at, {"memory": memory, "planner": memory})
    page = browser.read("/threads/1/matrices?channel=planner")
    assert "channel=planner" in told(page)["address"]
    assert 'channel=memory"' in page
