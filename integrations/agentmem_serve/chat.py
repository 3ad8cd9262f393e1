"""`/v1/chat/completions`: OpenAI's form of a turn, complete or as a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from uuid import uuid4

from langchain_core.messages import AIMessage, AIMessageChunk
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentmem_langgraph.messages import REASONING
from agentmem_serve.errors import api_error
from agentmem_serve.parameters import ChatParameters, conversation_of, retry_key, thread_of
from agentmem_serve.service import Service
from agentmem_serve.streams import EventStream, event, joined, until_said, while_connected
from agentmem_serve.turns import Begun, Event, Finished, TurnRequest


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = ChatParameters.model_validate_json(await request.body())
    service.check_model(body.model)
    system, messages = await asyncio.to_thread(conversation_of, body.messages, "messages")
    thread = thread_of(request, body.metadata)
    place = None if thread is None else service.thread_id(request, thread)
    turn = TurnRequest(
        messages=messages,
        system=system,
        options=body.options(service.settings.max_tokens),
        thread=place,
        store=body.store is not False,
        metadata=service.metadata(request),
        retry_key=retry_key(request),
        salt=service.salt(request),
        owners=service.owners(request, place),
    )
    head = {
        "id": f"chatcmpl-{uuid4().hex}",
        "created": int(time.time()),
        "model": service.model,
        "system_fingerprint": service.fingerprint,
    }
    if not body.stream:
        finished = await while_connected(request, service.turns.complete(turn))
        service.count(finished.reply)
        return JSONResponse(_completion(head, finished, thread))
    events = service.turns.stream(turn)
    all_events = joined(await while_connected(request, until_said(events, Begun)), events)
    with_usage = bool((body.stream_options or {}).get("include_usage"))
    return EventStream(_chunks(service, request, head, all_events, thread, with_usage), events)


async def _chunks(
    service: Service,
    request: Request,
    head: dict[str, Any],
    events: AsyncIterator[Event],
    thread: str | None,
    with_usage: bool,
) -> AsyncGenerator[bytes]:
    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for one in events:
            if isinstance(one, AIMessageChunk) and (delta := _delta(one)):
                yield chunk(delta)
            elif isinstance(one, Finished):
                service.count(one.reply)
                if one.repeated:  # there was no chunk
                    yield chunk(_message(one.reply))
                yield chunk({}, finish_reason(one.reply), agentmem=about(one, thread))
                if with_usage:
                    usage = {"object": "chat.completion.chunk", "choices": [], "usage": _usage(one.reply)}
                    yield event({**head, **usage})
    except Exception as error:  # noqa: BLE001 - the status is sent already: whatever it is, the client gets it here
        yield event(api_error(error, request.state.id).body)
        return
    yield b"data: [DONE]\n\n"


def _delta(chunk: AIMessageChunk) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if chunk.text:
        delta["content"] = chunk.text
    if reasoning := chunk.additional_kwargs.get(REASONING):
        delta[REASONING] = reasoning
    if chunk.tool_call_chunks:
        delta["tool_calls"] = [_call_delta(dict(call)) for call in chunk.tool_call_chunks]
    return delta


def _call_delta(call: dict[str, Any]) -> dict[str, Any]:
    function = {"arguments": call["args"] or ""}
    if not call["name"]:
        return {"index": call["index"], "function": function}
    return {
        "index": call["index"],
        "id": call["id"],
        "type": "function",
        "function": {"name": call["name"], **function},
    }


def _completion(head: dict[str, Any], finished: Finished, thread: str | None) -> dict[str, Any]:
    reply = finished.reply
    choice = {"index": 0, "message": _message(reply), "logprobs": None, "finish_reason": finish_reason(reply)}
    more = {"choices": [choice], "usage": _usage(reply), "agentmem": about(finished, thread)}
    return {**head, "object": "chat.completion", **more}


def _message(reply: AIMessage) -> dict[str, Any]:
    calls = calls_of(reply)
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not reply.text else reply.text}
    message["refusal"] = None
    if calls:
        message["tool_calls"] = [
            {
                "index": index,
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for index, call in enumerate(calls)
        ]
    if reasoning := reply.additional_kwargs.get(REASONING):
        message[REASONING] = reasoning
    return message


def calls_of(reply: AIMessage) -> list[dict[str, str]]:
    """The calls of a reply with id, name and arguments as text: JSON, unless the call is an invalid one."""
    calls = [(call["id"], call["name"], json.dumps(call["args"], ensure_ascii=False)) for call in reply.tool_calls]
    calls += [(call["id"], call["name"], call["args"] or "") for call in reply.invalid_tool_calls]  # type: ignore[misc]
    return [{"id": call or f"call_{uuid4().hex}", "name": name or "", "arguments": text} for call, name, text in calls]


def finish_reason(reply: AIMessage) -> str:
    """ "stop", "length" or "tool_calls"."""
    return str(reply.response_metadata.get("finish_reason", "stop"))


def about(finished: Finished, thread: str | None) -> dict[str, Any]:
    """What only this server says of a turn: where it is stored, and what became of the memory."""
    notes = finished.reply.response_metadata
    more = {name: notes[name] for name in ("edits", "deletions", "truncation", "facts") if name in notes}
    if finished.repeated:
        more["repeated"] = True
    return {"thread_id": thread, "checkpoint_id": finished.checkpoint, "memory": notes.get("memory"), **more}


def _usage(reply: AIMessage) -> dict[str, Any]:
    used = reply.usage_metadata or {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    cached = (used.get("input_token_details") or {}).get("cache_read", 0)
    return {
        "prompt_tokens": used["input_tokens"],
        "completion_tokens": used["output_tokens"],
        "total_tokens": used["total_tokens"],
        "prompt_tokens_details": {"cached_tokens": cached},
    }
