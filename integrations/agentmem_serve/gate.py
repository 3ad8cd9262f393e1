"""What every request passes first: it gets an id, who asks is found out, and whether there is room for it.

Errors become answers, and what was answered is counted and timed.
"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentmem_serve.errors import ApiError, api_error
from agentmem_serve.keys import ApiKey
from agentmem_serve.service import Service

_GUARDED = "/v1/"  # needs a key and counts; whether the server is well, and what it counted, does not
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
        headers = Headers(scope=scope)
        named = headers.get("X-Request-Id", "")
        request_id = named if _ID.fullmatch(named) else f"req_{uuid4().hex}"
        state = scope.setdefault("state", {})
        state |= {"id": request_id, "key": None}
        begun, status, begun_to_answer = time.monotonic(), 500, False

        async def send_named(message: Message) -> None:
            nonlocal status, begun_to_answer
            if message["type"] == "http.response.start":
                status, begun_to_answer = message["status"], True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            with ExitStack() as inside:
                if scope["path"].startswith(_GUARDED):
                    state["key"] = self._key(headers)
                    self._service.limits.request(state["key"].subject if state["key"] else None)
                    receive = self._service.limits.reading(scope, receive)
                    if scope["method"] == "POST":
                        inside.enter_context(self._service.limits.turn())
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

    def _key(self, headers: Headers) -> ApiKey | None:
        keys = self._service.keys
        if keys is None:
            return None
        scheme, _, text = headers.get("Authorization", "").partition(" ")
        found = keys.find(text.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            message = "expected an API key in the header Authorization (Bearer ...), found none that is valid here"
            raise ApiError(401, message, code="invalid_api_key")
        return found
