"""`examples/agent_server` in LangGraph's own server: two of them on one PostgreSQL database."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from langgraph_sdk import get_sync_client
from langgraph_sdk.client import SyncLangGraphClient

from agentmem_sql import SQLAlchemySaver

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "agent_server"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # two servers start, one after the other, and load a model each
    pytest.mark.skipif(find_spec("langgraph_api") is None, reason="needs the dependency group agent-server"),
]


@contextmanager
def agent_server(folder: Path, database: str) -> Iterator[tuple[subprocess.Popen[bytes], SyncLangGraphClient]]:
    """`langgraph dev` on a copy of the example, since it keeps files of its own there; and a client for it."""
    shutil.copytree(EXAMPLE, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", folder / "server.log"
    environment = {
        **os.environ,
        "THREADS_URL": database,
        "PYTHONPATH": os.pathsep.join(sys.path),
        # Nothing is reported to anybody, nor asked for.
        "LANGGRAPH_CLI_NO_ANALYTICS": "1",
        "LANGGRAPH_NO_VERSION_CHECK": "true",
    }
    command = [sys.executable, "-m", "langgraph_cli", "dev", "--no-browser", "--no-reload", "--port", str(port)]
    with (
        log.open("wb") as out,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out) as running,
        httpx.Client() as asking,
    ):
        try:
            while True:
                assert running.poll() is None, log.read_text()
                try:
                    if asking.get(f"{address}/ok", timeout=1).is_success:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            with get_sync_client(url=address, api_key=None, timeout=900) as client:
                yield running, client
        finally:
            running.kill()


def say(client: SyncLangGraphClient, thread: str, text: str, **options: Any) -> str:
    """A run of a thread, which the server need not have heard of; gives the reply."""
    client.threads.create(thread_id=thread, if_exists="do_nothing")
    state: Any = client.runs.wait(thread, "agent", input={"messages": [{"role": "user", "content": text}]}, **options)
    assert state.keys() == {"messages"}, "what clients get holds no matrices"
    return str(state["messages"][-1]["content"])


def test_two_servers_go_on_with_the_same_threads(tmp_path: Path, postgresql_url: str) -> None:
    thread, copied = str(uuid4()), ""
    with agent_server(tmp_path / "second", postgresql_url) as (_, second):
        with agent_server(tmp_path / "first", postgresql_url) as (running, first):
            say(first, thread, "My editor is helix.")
            told: Any = first.threads.get_state(thread)["checkpoint"]
            assert "helix" in say(second, thread, "What is my editor?")
            say(second, thread, "Actually, my editor is now emacs.")
            running.kill()
        assert "emacs" in say(second, thread, "What is my editor?")
        assert "helix" in say(second, thread, "What is my editor?", checkpoint_id=told["checkpoint_id"])
        copied = str(second.threads.copy(thread)["thread_id"])  # type: ignore[func-returns-value, index]
        second.threads.delete(thread)
        assert "helix" in say(second, copied, "What is my editor?")
    with SQLAlchemySaver.from_url(postgresql_url) as saver:
        assert saver.get_tuple({"configurable": {"thread_id": thread}}) is None
        assert saver.get_tuple({"configurable": {"thread_id": copied}}) is not None
