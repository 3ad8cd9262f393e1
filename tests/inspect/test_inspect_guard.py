"""Who may see the page of `agentmem inspect`, and who may change something through it."""

from __future__ import annotations

import pytest

from agentmem_governance import Governor
from agentmem_inspect import make_app
from agentmem_sql import SQLAlchemySaver
from tests.helpers.inspected import HOST, TOKEN, Browser, turns


@pytest.fixture
def stranger(governor: Governor) -> Browser:
    """One who has not opened the printed address."""
    return Browser(make_app(governor, token=TOKEN, hosts=[HOST]), opened=False)


@pytest.mark.parametrize("address", ["/", "/threads/1", "/static/inspect.js", "/?token=", "/?token=another", "/none"])
def test_nothing_is_shown_without_the_token(stranger: Browser, address: str) -> None:
    refused = stranger.get(address)
    assert refused.status_code == 403
    assert "token" in refused.text


def test_the_token_gives_a_cookie_that_scripts_and_other_sites_do_not_get(stranger: Browser) -> None:
    opened = stranger.get(f"/?token={TOKEN}")
    cookie = opened.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    assert TOKEN not in cookie
    assert stranger.read("/").startswith("<!doctype html>")


@pytest.mark.parametrize("host", ["attacker.example", "127.0.0.1", "127.0.0.1:8001", "attacker.example:8000"])
def test_another_host_is_refused_even_with_the_cookie(browser: Browser, host: str) -> None:
    assert browser.get("/", headers={"host": host}).status_code == 421


def test_a_change_needs_a_form_of_this_page(browser: Browser, saver: SQLAlchemySaver) -> None:
    (at,) = turns(saver, "ada/1", "hello")
    fields = {"at": at["configurable"]["checkpoint_id"]}
    assert browser.post("/threads/1/rewind", data=fields).status_code == 403
    assert browser.post("/threads/1/rewind", data={"csrf": "guessed", **fields}).status_code == 403
    assert browser.post("/threads/1/rewind", content=b"x" * 300_000).status_code == 413
    assert browser.get("/threads/1/rewind").status_code == 405
    known = {"csrf": browser.csrf(), **fields}
    elsewhere = browser.post("/threads/1/rewind", data=known, headers={"origin": "http://attacker.example"})
    assert elsewhere.status_code == 403
    assert len(list(saver.list(at))) == 1, "nothing was changed"


def test_the_browser_is_told_to_load_nothing_from_elsewhere(browser: Browser, stranger: Browser) -> None:
    for found in (browser.get("/"), browser.get("/static/inspect.css"), browser.get("/nothing"), stranger.get("/")):
        policy = found.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert found.headers["cache-control"] == "no-store"
        assert found.headers["x-content-type-options"] == "nosniff"
    assert 'src="http' not in browser.read("/")
