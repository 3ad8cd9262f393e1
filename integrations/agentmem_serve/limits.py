"""How much is let in: turns at once, requests a minute, bytes of a request. What is too much is told when to return."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from agentmem_serve.errors import ApiError

_LONGEST_WAIT = 60  # seconds that anybody is told to wait
_SMOOTHING = 0.1  # the weight of the newest turn in the mean


class Limits:
    """The limits of one process; of n replicas, n times as much gets in.

    Args:
        turns: that run or wait at once.
        per_minute: requests of each subject, which may all come at once; None: any number.
        body: bytes of a request.
    """

    def __init__(self, turns: int, per_minute: int | None, body: int) -> None:
        self.running = 0
        self._turns = turns
        self._per_minute = per_minute
        self._body = body
        self._seconds = 1.0  # that a turn takes, on average
        self._left: dict[str | None, tuple[float, float]] = {}  # requests that a subject still has, and when

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count a turn for as long as it lasts.

        Raises:
            ApiError: there are as many as there may be.
        """
        if self.running >= self._turns:
            wait = min(max(1, math.ceil(self._seconds)), _LONGEST_WAIT)
            message = f"{self.running} turns are running or waiting, which is the most here; try again in {wait} s"
            raise ApiError(429, message, kind="server_overloaded", code="overloaded", retry_after=wait)
        self.running += 1
        begun = time.monotonic()
        try:
            yield
        finally:
            self.running -= 1
            self._seconds += _SMOOTHING * (time.monotonic() - begun - self._seconds)

    def request(self, subject: str | None) -> None:
        """Count a request.

        Raises:
            ApiError: the subject has none left for now.
        """
        if self._per_minute is None:
            return
        now, a_second = time.monotonic(), self._per_minute / 60
        left, since = self._left.get(subject, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * a_second)
        if left < 1:
            wait = min(max(1, math.ceil((1 - left) / a_second)), _LONGEST_WAIT)
            message = f"more than {self._per_minute} requests a minute; try again in {wait} s"
            raise ApiError(429, message, kind="requests", code="rate_limit_exceeded", retry_after=wait)
        self._left[subject] = left - 1, now

    def reading(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` for a request whose body may not be longer than allowed.

        Raises:
            ApiError: it says that it is. What is longer than it says raises the same when it is read.
        """
        declared = Headers(scope=scope).get("Content-Length", "0")
        if declared.isdecimal() and int(declared) > self._body:
            raise self._too_long()
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._body:
                raise self._too_long()
            return message

        return counted

    def _too_long(self) -> ApiError:
        message = f"expected a request of at most {self._body} bytes; send less of the conversation, the thread has it"
        return ApiError(413, message, code="request_too_large")
