"""The application: its routes, and the process that serves it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import uvicorn
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agentmem.text import printable
from agentmem_governance.signing import signing_key
from agentmem_serve.chat import chat_completions
from agentmem_serve.errors import ApiError
from agentmem_serve.facts import add_facts, delete_fact, list_facts
from agentmem_serve.gate import Gate
from agentmem_serve.keys import KeyFile
from agentmem_serve.metrics import CONTENT_TYPE
from agentmem_serve.responses import create_response, retrieve_response
from agentmem_serve.service import ServeSettings, Service
from agentmem_serve.sessions import delete_all_sessions, delete_session, inspect_session, list_sessions
from agentmem_sql import SQLAlchemySaver

if TYPE_CHECKING:
    from agentmem import Engine
    from agentmem_chroma import FactStore


def create_app(
    engine: Engine,
    saver: SQLAlchemySaver,
    settings: ServeSettings | None = None,
    *,
    keys: KeyFile | None = None,
    receipt_key: bytes | None = None,
    facts: FactStore | None = None,
) -> Starlette:
    """An ASGI application that serves an engine's model, with threads in a saver's database.

    It closes neither the engine nor the saver nor the facts.

    Args:
        engine: the model, with or without memory.
        saver: the threads.
        settings: how requests are answered.
        keys: who may ask, and whose threads they see; None: everybody sees every thread.
        receipt_key: what receipts of deletions are signed with: at least 16 secret bytes, or an Ed25519 private key as
            PEM.
        facts: exact facts, of which those that a question is about are shown in its turn.

    Raises:
        ConfigError: the receipt key cannot be used.
        MissingExtraError: it is PEM, and `cryptography` is not installed.
    """
    if receipt_key is not None:
        signing_key(receipt_key)
    service = Service(engine, saver, settings or ServeSettings(), keys, receipt_key, facts)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await saver.asetup()  # a database that cannot be used is reported before anything is answered
        yield

    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/responses", create_response, methods=["POST"]),
        Route("/v1/responses/{response}", retrieve_response),
        Route("/v1/sessions", list_sessions),
        Route("/v1/sessions", delete_all_sessions, methods=["DELETE"]),
        Route("/v1/sessions/{session:path}", inspect_session),
        Route("/v1/sessions/{session:path}", delete_session, methods=["DELETE"]),
        Route("/v1/facts", list_facts),
        Route("/v1/facts", add_facts, methods=["POST"]),
        Route("/v1/facts/{fact}", delete_fact, methods=["DELETE"]),
        Route("/v1/models", _models),
        Route("/v1/models/{model:path}", _model),
        Route("/healthz", _healthz),
        Route("/readyz", _readyz),
        Route("/metrics", _metrics),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refused}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.add_middleware(Gate, service=service)
    app.state.service = service
    return app


def run(app: Starlette, *, host: str, port: int, grace: float) -> None:
    """Serve an application until SIGTERM or SIGINT.

    Requests that are under way then have `grace` seconds to finish; those that have not are cancelled, with nothing of
    them stored.
    """
    uvicorn.run(
        app,
        host=host,
        port=port,
        timeout_graceful_shutdown=int(grace),
        access_log=False,
        server_header=False,
        log_config=_LOGGING,
    )


class _Printable(logging.Formatter):
    """Escapes control characters: errors quote what clients sent, and a log is read on a terminal.

    Of the message line feeds as well, so that none looks like another record; a traceback keeps its lines.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message, lines=False)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


_LOGGER = {"handlers": ["stderr"], "level": "INFO", "propagate": False}
_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"printable": {"()": _Printable, "format": "%(levelname)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "printable"}},
    "loggers": {"agentmem_serve": _LOGGER, "uvicorn": _LOGGER},
}


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(request.app.state.service)]})


async def _model(request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(request.path_params["model"])
    return JSONResponse(_described(service))


def _described(service: Service) -> dict[str, Any]:
    return {"id": service.model, "object": "model", "created": service.started, "owned_by": "agentmem"}


async def _healthz(_: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def _readyz(request: Request) -> Response:
    """The database answers, too."""
    service: Service = request.app.state.service
    await asyncio.to_thread(service.saver.parts.database.run, lambda database: database.execute(text("SELECT 1")))
    return JSONResponse({"status": "ok"})


async def _metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


async def _refused(_: Request, error: HTTPException) -> Response:
    """Starlette's own answers: no such path, no such method."""
    return ApiError(error.status_code, f"{error.detail}", code="not_found").response
