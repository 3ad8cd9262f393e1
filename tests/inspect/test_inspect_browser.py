"""The page of `agentmem inspect` in a real browser: Debian's Chromium, driven by playwright.

Slow, and skipped where there is no Chromium: what CI installs comes from the index of packages, and no browser does.
To run it: `apt-get install chromium`, then `pytest -m slow tests/inspect`.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import uvicorn
from langchain_core.embeddings import DeterministicFakeEmbedding
from langgraph.graph import START, StateGraph

import agentmem
from agentmem import Window
from agentmem_chroma import Fact, FactRetriever, FactStore
from agentmem_governance import Governor
from agentmem_inspect import make_app
from agentmem_langgraph import ChatDeltaMem, MemoryMessagesState, MemoryNode
from agentmem_sql import SQLAlchemySaver
from tests.helpers.inspected import TOKEN

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture
def address(saver: SQLAlchemySaver, tmp_path: Path) -> Iterator[str]:
    """The page, served, over what nano was told; one fact was shown to it."""
    with (
        agentmem.load("nano") as engine,
        FactStore(tmp_path / "facts", embeddings=DeterministicFakeEmbedding(size=8)) as facts,
    ):
        facts.add(Fact("The port of berlin is 4711.", source="ports.md", thread="ada/1"))
        llm = ChatDeltaMem(engine=engine, max_tokens=24, window=Window(messages=1))
        node = MemoryNode(llm, retriever=FactRetriever(store=facts, k=1))
        graph: Any = StateGraph(MemoryMessagesState).add_node("agent", node).add_edge(START, "agent")
        agent = graph.compile(checkpointer=saver)
        for thread, texts in {
            "ada/1": ["My editor is helix.", "My favorite color is teal.", "What is my editor?"],
            "ben/1": ["My editor is emacs."],
        }.items():
            for text in texts:
                agent.invoke({"messages": [("user", text)]}, {"configurable": {"thread_id": thread}})
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        host = "127.0.0.1:{1}".format(*listener.getsockname())
        app = make_app(
            Governor(saver, facts=facts, engines=[engine], actor="inspector"), token=TOKEN, hosts=[host], engine=engine
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        running = Thread(target=server.run, kwargs={"sockets": [listener]})
        running.start()
        yield f"http://{host}"
        server.should_exit = True
        running.join()
        listener.close()


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """A tab of the browser; whatever it complains about fails the test."""
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as driver:
        # As root, which has no sandbox in a container.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1100, "height": 760})
        tab.set_default_timeout(60_000)
        tab.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda sent: None if sent.url.startswith(address) else complaints.append(sent.url))
        tab.goto(f"{address}/?token={TOKEN.replace(' ', '%20')}")
        tab.wait_for_url(f"{address}/")
        yield tab
        browser.close()
    assert complaints == []


def test_every_view_works_by_clicks_and_keys(page: Any, address: str, tmp_path: Path) -> None:
    def opens(link: str, title: str) -> None:
        page.get_by_role("link", name=link, exact=True).first.click()
        page.get_by_role("heading", name=title, exact=True).wait_for()
        page.screenshot(path=tmp_path / f"{link.replace('/', '-')}.png")

    # Threads, by keys alone.
    page.keyboard.press("/")
    page.keyboard.type("ada")
    page.keyboard.press("Enter")
    page.get_by_text("1 thread whose id contains").wait_for()
    opens("ada/1", "ada/1")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    # Messages beside what each wrote.
    page.get_by_text("moved by").first.wait_for()
    assert page.locator(".bars rect").count() == 3 * 4, "a bar for each layer at each turn"
    # Matrices, with a slider that keys move.
    opens("Matrices", "ada/1")
    page.get_by_text("Turn 3 of 3").wait_for()
    assert page.locator("#maps canvas").count() == 4
    assert page.locator("#maps figcaption").first.text_content().startswith("layer 0 · norm")
    norms = page.locator("#maps figcaption").all_text_contents()
    page.focus("#turn")
    page.keyboard.press("ArrowLeft")
    page.get_by_text("Turn 2 of 3").wait_for()
    assert page.locator("#maps figcaption").all_text_contents() != norms
    page.select_option("#against", "1")
    page.get_by_text("less turn 2").wait_for()
    assert page.locator("#most").text_content() == "0.00", "nothing differs from itself"
    page.check("#own")
    page.screenshot(path=tmp_path / "difference.png")
    # Ask it.
    opens("Ask it", "ada/1")
    page.get_by_label("Question").fill("What is my editor?")
    page.keyboard.press("Enter")
    page.locator("[data-arm] .note").nth(3).wait_for()
    memory, other, zero, whole = page.locator("[data-arm] .text").all_text_contents()
    assert "helix" in memory
    assert "helix" in whole
    assert "emacs" in other
    assert "helix" not in zero
    page.screenshot(path=tmp_path / "answers.png")
    # Back to the second turn: the copy becomes the newest.
    opens("Checkpoints", "ada/1")
    page.locator(".tree li a", has_text="step 4, loop").click()
    page.get_by_role("button", name="Let the thread go on from here").click()
    page.get_by_text("Nothing was removed").wait_for()
    opens("Audit trail", "Audit trail of the database")
    # Facts, and the reply that one was shown to.
    opens("Facts", "Facts")
    opens("The port of berlin is 4711.", "The port of berlin is 4711.")
    page.get_by_role("link", name="ada/1").first.click()
    page.get_by_role("navigation", name="Thread").get_by_role("link", name="Audit trail").click()
    page.get_by_text("The chain holds").wait_for()
    # Export and forget, with what they did.
    opens("Subjects", "Subjects")
    opens("ben", "ben")
    page.get_by_role("button", name="Export").click()
    with page.expect_download() as export:
        page.get_by_role("link", name="Save the file").click()
    assert Path(export.value.path()).stat().st_size > 0
    page.goto(f"{address}/subject?name=ben")
    page.get_by_label("Write the subject's name to confirm").fill("ben")
    page.get_by_role("button", name="Forget ben").click()
    page.get_by_role("heading", name="Forgotten").wait_for()
    assert "not_reached" in page.locator(".receipt").text_content()
    # A message, which the model writes the memory anew without.
    page.goto(f"{address}/")
    opens("ada/1", "ada/1")
    page.locator(".tree li a").first.click()
    page.get_by_role("link", name="forget").first.click()
    page.get_by_role("button", name="Forget it").click()
    page.get_by_role("heading", name="Forgotten").wait_for()
    page.get_by_text("1 memory was written anew").wait_for()


def test_it_fits_a_phone_and_the_dark(page: Any, address: str) -> None:
    number = page.get_by_role("link", name="ada/1").get_attribute("href")
    views = ["/", number, *(f"{number}/{view}" for view in ("checkpoint", "matrices", "ask", "audit"))]
    page.set_viewport_size({"width": 360, "height": 740})
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for view in [*views, "/facts", "/audit", "/subjects", "/subject?name=ada"]:
            page.goto(address + view)
            assert page.evaluate("document.documentElement.scrollWidth") == 360, f"{view} is wider than a phone"
            for current in page.locator("[aria-current=page]").all():
                box = current.bounding_box()
                assert 0 <= box["x"] < box["x"] + box["width"] <= 360, f"where one is cannot be seen in {view}"
            times = page.locator(".stacked time")
            lines = times.evaluate_all("times => times.map(time => time.getClientRects().length)")
            assert set(lines) <= {1}, f"a time is broken in {view}"
        grounds.append(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
    assert grounds[0] != grounds[1]
