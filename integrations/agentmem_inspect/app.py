"""The application and its server: routes, errors, and the address that opens it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from secrets import token_urlsafe
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from agentmem.errors import AgentMemError, ConfigError
from agentmem_governance import Governor
from agentmem_inspect.contents import NotThereError
from agentmem_inspect.guard import Forms, Guard
from agentmem_inspect.pages import FormHandler, Pages

if TYPE_CHECKING:
    from agentmem import Engine

HOST = "127.0.0.1"


def make_app(governor: Governor, *, token: str, hosts: Collection[str], engine: Engine | None = None) -> Starlette:
    """The page as an ASGI application.

    Args:
        governor: the threads and facts, and who acts.
        token: the secret that opens the page: `/?token=...`.
        hosts: what requests may name as their host, each with its port: `["127.0.0.1:8000"]`.
        engine: answers questions; without one they cannot be asked.
    """
    forms = Forms()
    pages = Pages(governor, engine, forms.secret)

    def form(handler: FormHandler) -> Callable[[Request], object]:
        """A route's function that reads a form and checks that it is one of this page."""

        async def read(request: Request) -> Response:
            fields = await forms.read(request)
            return await run_in_threadpool(handler, request, fields)

        return read

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        pages.changes.close()

    thread = "/threads/{number:int}"
    routes = [
        Route("/", pages.threads),
        Route(thread, pages.tree),
        Route(thread + "/checkpoint", pages.checkpoint),
        Route(thread + "/matrices", pages.matrices),
        Route(thread + "/state", pages.state),
        Route(thread + "/ask", pages.questions),
        Route(thread + "/ask", form(pages.answer), methods=["POST"]),
        Route(thread + "/audit", pages.thread_audit),
        Route(thread + "/rewind", form(pages.rewind), methods=["POST"]),
        Route(thread + "/forget", pages.forgetting),
        Route(thread + "/forget", form(pages.forget_message), methods=["POST"]),
        Route("/facts", pages.facts),
        Route("/facts/{id}", pages.fact),
        Route("/audit", pages.audit),
        Route("/subjects", pages.subjects),
        Route("/subject", pages.subject),
        Route("/subject/export", form(pages.export), methods=["POST"]),
        Route("/subject/forget", form(pages.forget_subject), methods=["POST"]),
        Route("/resume", form(pages.resume), methods=["POST"]),
        Route("/receipts/{id}", pages.receipt),
        Route("/receipts/{id}/file", pages.receipt_file),
        Route("/exports/{id}", pages.exported),
        Route("/exports/{id}/file", pages.export_file),
        Mount("/static", StaticFiles(directory=Path(__file__).with_name("static"))),
    ]
    refused = partial(_refused, pages)
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, token=token, hosts=hosts)],
        exception_handlers={AgentMemError: refused, HTTPException: refused},
        lifespan=lifespan,
    )


async def _refused(pages: Pages, request: Request, error: Exception) -> Response:
    """An error as a page."""
    if isinstance(error, HTTPException):
        return await run_in_threadpool(pages.refusal, request, error.status_code, error.detail)
    status = HTTPStatus.NOT_FOUND if isinstance(error, NotThereError) else HTTPStatus.BAD_REQUEST
    return await run_in_threadpool(pages.refusal, request, int(status), f"{type(error).__name__}: {error}")


def serve(
    governor: Governor, *, engine: Engine | None = None, port: int = 0, on_ready: Callable[[str], None] = print
) -> None:
    """Serve the page on this machine alone, until the process is interrupted.

    Args:
        governor, engine: as for `make_app`.
        port: the port; 0 takes one that is free.
        on_ready: is told the address, which holds the token.

    Raises:
        ConfigError: the port cannot be used.
    """
    listener = socket.socket()
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, port))
            listener.listen()  # whoever is told the address may call at once
        except (OSError, OverflowError) as error:
            raise ConfigError(f"expected a free port, found {port}: {error}; leave --port out for any") from error
        bound = listener.getsockname()[1]
        token = token_urlsafe(32)
        app = make_app(governor, token=token, hosts=[f"{HOST}:{bound}", f"localhost:{bound}"], engine=engine)
        # No access log: it would hold the token.
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        on_ready(f"http://{HOST}:{bound}/?token={token}")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
