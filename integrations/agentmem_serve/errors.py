"""Errors as answers: a status and the error object of OpenAI's API."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from agentmem.errors import (
    AgentMemError,
    ConfigError,
    CorruptStateError,
    EngineClosedError,
    FactStoreError,
    StateMismatchError,
    StorageError,
    TranscriptError,
    TurnTimeoutError,
    WindowError,
)

log = logging.getLogger("agentmem_serve")

_INVALID = "invalid_request_error"
# Status, type, code, and seconds after which another attempt may succeed (0: none will). The first that fits.
_OF: tuple[tuple[type[AgentMemError], int, str, str | None, int], ...] = (
    # A thread of another model or adapter; not 409, which clients try again.
    (StateMismatchError, 400, _INVALID, "state_mismatch", 0),
    (CorruptStateError, 500, "server_error", "corrupt_state", 0),
    (WindowError, 400, _INVALID, "context_length_exceeded", 0),
    (ConfigError, 400, _INVALID, None, 0),
    (TranscriptError, 400, _INVALID, None, 0),
    (TurnTimeoutError, 504, "server_error", "timeout", 0),
    (StorageError, 503, "server_error", "storage", 1),
    (FactStoreError, 503, "server_error", "fact_store", 1),
    (EngineClosedError, 503, "server_error", "engine_closed", 1),
)


class ApiError(Exception):
    """An answer other than the one that was asked for.

    Args:
        status: of HTTP.
        message: for people.
        kind: the error's type, "invalid_request_error" for example.
        code, param: as in OpenAI's API.
        retry_after: seconds after which to try again; 0: the header is left out.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        code: str | None = None,
        param: str | None = None,
        retry_after: int = 0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        headers: Mapping[str, str] = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return JSONResponse(self.body, self.status, headers)


class ThreadConflict(Exception):
    """Another request stored a turn in the thread since this one read it; nothing was stored."""


def api_error(error: Exception, request_id: str = "") -> ApiError:
    """The answer to an error; what is no user's mistake is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = f"{place}: {first['msg']}" if place else str(first["msg"])
        if first["type"] == "extra_forbidden":
            message = f"this server has no parameter {place!r}; leave it out"
        return ApiError(400, message, param=place or None)
    if isinstance(error, ThreadConflict):
        message = (
            "another request went on with this thread at the same time and was stored first; nothing of this one was "
            "stored, send it again"
        )
        return ApiError(409, message, kind="conflict_error", code="thread_conflict", retry_after=1)
    for kind, status, name, code, retry_after in _OF:
        if isinstance(error, kind):
            message = str(error)
            if status >= 500:
                log.warning("%s: %s", request_id, error)
            if kind in (StorageError, FactStoreError):  # they name hosts and files, which are nothing for clients
                what = "database" if kind is StorageError else "fact store"
                message = f"the {what} cannot be used; the server's log says why, at request {request_id}"
            return ApiError(status, message, kind=name, code=code, retry_after=retry_after)
    log.error("%s failed", request_id, exc_info=error)
    return ApiError(500, f"the server failed; its log says why, at request {request_id}", kind="server_error")
