"""`/v1/responses`: OpenAI's newer form of a turn, in which the server keeps the conversation.

The id of a response is a checkpoint. So `previous_response_id` continues the conversation, or goes back to any earlier
point of it; two requests with the same one are two branches, with a memory each.
"""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import uuid4

from langchain_core.messages import AIMessage
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentmem_serve.chat import about
from agentmem_serve.errors import ApiError
from agentmem_serve.items import as_chat, chat_format, chat_tools, output_of, place_of, response_id, status_of
from agentmem_serve.parameters import Parameters, checked_id, conversation_of, retry_key, thread_of, tokens_within
from agentmem_serve.response_events import response_events
from agentmem_serve.service import Service
from agentmem_serve.streams import EventStream, joined, until_said, while_connected
from agentmem_serve.turns import Begun, Finished, TurnRequest, not_found


class ResponseParameters(Parameters):
    """The body of `/v1/responses`."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: dict[str, Any] | None = None

    # The window decides what is shown, whatever these say.
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None

    background: Literal[False] | None = None

    def options(self, most_tokens: int) -> dict[str, Any]:
        """All options of a call to the chat model."""
        named: dict[str, Any] = {"response_format": chat_format(self.text)}
        if self.tools:
            named |= {"tools": chat_tools(self.tools), "tool_choice": self.tool_choice}
        options = {name: value for name, value in named.items() if value is not None}
        return {**self.common_options(), **options, "max_tokens": tokens_within(self.max_output_tokens, most_tokens)}


async def create_response(request: Request) -> Response:
    """Answer an input."""
    service: Service = request.app.state.service
    body = ResponseParameters.model_validate_json(await request.body())
    service.check_model(body.model)
    system, messages = await asyncio.to_thread(lambda: conversation_of(as_chat(body.input), "input"))
    thread, after = _place(request, body)
    store = body.store is not False
    if thread is None and store:
        thread = f"resp-{uuid4().hex}"
    place = None if thread is None else service.thread_id(request, thread)
    turn = TurnRequest(
        messages=messages,
        system="\n\n".join(filter(None, [body.instructions, system])),
        options=body.options(service.settings.max_tokens),
        thread=place,
        after=after,
        store=store,
        metadata=service.metadata(request),
        retry_key=retry_key(request),
        salt=service.salt(request),
        owners=service.owners(request, place),
    )

    def described(checkpoint: str | None) -> dict[str, Any]:
        """What is known of the response when the model begins to answer."""
        name = f"resp_{uuid4().hex}" if checkpoint is None or thread is None else response_id(thread, checkpoint)
        return {**_blank(service, name, int(time.time())), **_echo(body)}

    if not body.stream:
        finished = await while_connected(request, service.turns.complete(turn))
        service.count(finished.reply)
        return JSONResponse(completed(described(finished.checkpoint), finished, thread))

    def finish(response: dict[str, Any], finished: Finished) -> dict[str, Any]:
        service.count(finished.reply)
        return completed(response, finished, thread)

    events = service.turns.stream(turn)
    begun = await while_connected(request, until_said(events, Begun))
    return EventStream(response_events(request, described, finish, joined(begun, events)), events)


async def retrieve_response(request: Request) -> Response:
    """A response that is stored."""
    service: Service = request.app.state.service
    name = request.path_params["response"]
    thread, checkpoint = place_of(name, "response_id")
    found = await service.turns.threads.read(service.thread_id(request, thread), checkpoint)
    reply = found.messages[-1] if found.messages else None
    if found.stored is None or not isinstance(reply, AIMessage):
        raise not_found("response", name)
    made = int(datetime.fromisoformat(found.stored.checkpoint["ts"]).timestamp())
    previous = None if found.parent is None else response_id(thread, found.parent)
    blank = {**_blank(service, name, made), "previous_response_id": previous}
    return JSONResponse(completed(blank, Finished(reply, checkpoint), thread))


def _place(request: Request, body: ResponseParameters) -> tuple[str | None, str | None]:
    """The thread that a request names, and the checkpoint to go on from; None: the newest."""
    named = body.conversation
    conversation = named.get("id") if isinstance(named, dict) else named
    thread = thread_of(request, body.metadata)
    if conversation is not None:
        checked_id(conversation, "conversation")
        if thread not in (None, conversation):
            raise ApiError(
                400, "conversation names one thread, and the request another; name one", param="conversation"
            )
        thread = conversation
    if body.previous_response_id is None:
        return thread, None
    if thread is not None:
        message = "previous_response_id says where to go on, and so does the thread that is named; pass one"
        raise ApiError(400, message, param="previous_response_id")
    return place_of(body.previous_response_id, "previous_response_id")


def _blank(service: Service, name: str, made: int) -> dict[str, Any]:
    """A response without an answer."""
    return {
        "id": name,
        "object": "response",
        "created_at": made,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": service.model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": True,
        "temperature": service.settings.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "auto",
        "usage": None,
    }


def _echo(body: ResponseParameters) -> dict[str, Any]:
    """What a response repeats of its request."""
    names = {
        *("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "previous_response_id", "store"),
        *("temperature", "text", "tool_choice", "tools", "top_p", "user"),
    }
    return body.model_dump(include=names, exclude_none=True)


def completed(response: dict[str, Any], finished: Finished, thread: str | None) -> dict[str, Any]:
    """A response with its answer."""
    reply, status = finished.reply, status_of(finished.reply)
    used = reply.usage_metadata or {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    details = {"cached_tokens": (used.get("input_token_details") or {}).get("cache_read", 0)}
    return {
        **response,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": output_of(reply),
        "usage": {
            "input_tokens": used["input_tokens"],
            "input_tokens_details": {**details, "cache_write_tokens": 0},
            "output_tokens": used["output_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        },
        "agentmem": about(finished, thread),
    }
