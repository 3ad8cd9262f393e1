"""What every request passes first: it gets an id, errors become answers, and the answer is counted and timed."""

from __future__ import annotations

import re
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentmem_serve.errors import api_error
from agentmem_serve.service import Service

_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """A layer around the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        named = Headers(scope=scope).get("X-Request-Id", "")
        request_id = named if _ID.fullmatch(named) else f"req_{uuid4().hex}"
        scope.setdefault("state", {})["id"] = request_id
        begun, status, begun_to_answer = time.monotonic(), 500, False

        async def send_named(message: Message) -> None:
            nonlocal status, begun_to_answer
            if message["type"] == "http.response.start":
                status, begun_to_answer = message["status"], True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            status = 499  # nobody reads an answer any more; the metrics tell
        except Exception as error:
            if begun_to_answer:
                raise
            await api_error(error, request_id).response(scope, receive, send_named)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # never a path that somebody made up
            self._service.metrics.requests.labels(route, status).inc()
            self._service.metrics.seconds.labels(route).observe(time.monotonic() - begun)
