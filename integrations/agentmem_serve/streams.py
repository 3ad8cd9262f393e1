"""Server-sent events, and turns that end when nobody is there any more to receive them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class EventStream(StreamingResponse):
    """Sends what a generator yields; however that ends, the turn that it is made of ends with it."""

    def __init__(self, events: AsyncGenerator[bytes], turn: AsyncGenerator[Any]) -> None:
        # A proxy that collects the pieces would make the stream useless.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._generators = (events, turn)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generator in self._generators:
                await generator.aclose()


async def until_said(events: AsyncIterator[T], silent: type) -> list[T]:
    """The first events, up to one that is not `silent`: what fails before it can be answered with a status."""
    begun = []
    async for one in events:
        begun.append(one)
        if not isinstance(one, silent):
            break
    return begun


async def joined(begun: Iterable[T], events: AsyncIterator[T]) -> AsyncIterator[T]:
    """The first events, and the others."""
    for one in begun:
        yield one
    async for one in events:
        yield one


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of work that is cancelled if the client goes away. The request's body must have been read.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})  # so that the turn has ended, and let go of its thread


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
