"""A server on a free port of this process, and OpenAI's client for it. One engine, nano, serves every test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

import agentmem
from agentmem import Engine, Window
from agentmem_serve import ServeSettings, create_app
from agentmem_sql import SQLAlchemySaver
from tests.sql.conftest import (  # noqa: F401 - fixtures
    database_url,
    path,
    postgresql_url,
    server_database,
    tmp_path,
    url,
    usual_database,
)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with agentmem.load("nano") as loaded:
        yield loaded


@contextmanager
def listening(app: Any, grace: int = 5) -> Iterator[str]:
    """Serve an application from a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=grace))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.005)
    assert server.started
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


Serve = Callable[..., OpenAI]


@pytest.fixture
def serve(engine: Engine, url: str) -> Iterator[Serve]:  # noqa: F811
    """`serve(**settings)` starts a server on the test's database, or `at=` another; gives a client without retries."""
    with ExitStack() as stack:

        def start(at: str = url, key: str = "none", serving: Any = engine, **options: Any) -> OpenAI:
            given = {name: options.pop(name) for name in ("keys", "facts") if name in options}
            saver = stack.enter_context(SQLAlchemySaver.from_url(at))
            settings = ServeSettings(**{"window": Window(messages=1), "max_tokens": 40, **options})
            address = stack.enter_context(listening(create_app(serving, saver, settings, **given)))
            client = OpenAI(api_key=key, base_url=f"{address}/v1", max_retries=0, timeout=120)
            return stack.enter_context(client)

        yield start


@pytest.fixture
def client(serve: Serve) -> OpenAI:
    return serve()


def plain(client: OpenAI, at: str, method: str = "GET", **options: Any) -> httpx.Response:
    """A request for a path that is none of OpenAI's."""
    address = str(client.base_url).removesuffix("/v1/")
    headers = {"Authorization": f"Bearer {client.api_key}", **options.pop("headers", {})}
    return httpx.request(method, address + at, headers=headers, timeout=60, **options)


def say(client: OpenAI, text: str, thread: str | None = None, **options: Any) -> Any:
    """One message, in a thread or none; gives the completion."""
    headers = {} if thread is None else {"X-Thread-Id": thread}
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="nano", messages=messages, extra_headers=headers, **options)


def text_of(completion: Any) -> str:
    return str(completion.choices[0].message.content)
