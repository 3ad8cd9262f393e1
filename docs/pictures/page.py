"""Photographs the page of `agentmem inspect` for docs/howto/inspect.md: `python docs/pictures/page.py`.

Needs Chromium (`apt-get install chromium`) and the dependency group `dev`. What is shown is what nano was told.
"""

from __future__ import annotations

import shutil
import socket
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import uvicorn
from playwright.sync_api import sync_playwright

import agentmem
from agentmem import Window
from agentmem_cli.graph import build_agent, thread
from agentmem_governance import Governor
from agentmem_inspect import make_app
from agentmem_langgraph import ChatDeltaMem
from agentmem_sql import SQLAlchemySaver

HERE = Path(__file__).resolve().parent
TOLD = ("My editor is helix.", "My favorite color is teal.", "My codename is zebra.")
SIZE = {"width": 960, "height": 660}


def main() -> None:
    """Tell nano something in two branches and another thread, and photograph three views."""
    with (
        TemporaryDirectory() as folder,
        chdir(folder),
        agentmem.load("nano") as engine,
        SQLAlchemySaver.from_url("sqlite:///threads.db", audit=True) as saver,
    ):
        agent = build_agent(ChatDeltaMem(engine=engine, max_tokens=24, window=Window(messages=1)), saver)
        for text in TOLD:
            agent.invoke({"messages": [("user", text)]}, thread("ada/1"))
        before = agent.get_state(thread("ada/1")).config
        agent.invoke({"messages": [("user", "Actually, my editor is now emacs.")]}, thread("ada/1"))
        agent.invoke({"messages": [("user", "My pet is a cat.")]}, before)
        agent.invoke({"messages": [("user", "My editor is vim.")]}, thread("ben/1"))
        photograph(Governor(saver, engines=[engine], actor="ada"), engine)


def photograph(governor: Governor, engine: agentmem.Engine) -> None:
    """Serve the page and take its pictures."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    host = f"127.0.0.1:{listener.getsockname()[1]}"
    app = make_app(governor, token="token", hosts=[host], engine=engine)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    running = Thread(target=server.run, kwargs={"sockets": [listener]})
    running.start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport=SIZE)
        tab.goto(f"http://{host}/?token=token")
        tab.get_by_role("link", name="ada/1").click()
        tab.get_by_text("branches").wait_for()
        tab.screenshot(path=HERE / "inspect_checkpoints.png")
        tab.emulate_media(color_scheme="dark")
        tab.get_by_role("link", name="Matrices", exact=True).click()
        tab.select_option("#against", "before")
        tab.locator("#maps canvas").nth(3).wait_for()
        tab.screenshot(path=HERE / "inspect_matrices.png")
        tab.emulate_media(color_scheme="light")
        tab.get_by_role("link", name="Ask it", exact=True).click()
        tab.get_by_label("Question").fill("What is my editor?")
        tab.keyboard.press("Enter")
        tab.locator("[data-arm] .note").nth(3).wait_for()
        tab.screenshot(path=HERE / "inspect_ask.png")
        browser.close()
    server.should_exit = True
    running.join()
    listener.close()


if __name__ == "__main__":
    main()
