"""`/v1/sessions`: the threads of whoever asks: which there are, what is in one, and its end with a receipt."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import Any

from langchain_core.messages import convert_to_openai_messages
from langchain_core.runnables import RunnableConfig
from sqlalchemy import Connection, func, select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentmem.state import MemoryState
from agentmem_governance import Governor
from agentmem_serve.errors import ApiError
from agentmem_serve.items import response_id
from agentmem_serve.parameters import checked_id
from agentmem_serve.service import Service
from agentmem_serve.threads import Snapshot
from agentmem_serve.turns import not_found
from agentmem_sql.schema import decode_text, encode_text

_MOST = 100  # sessions of a page, and checkpoints of a session


async def list_sessions(request: Request) -> Response:
    """The sessions, by id; `after` an id, at most `limit`."""
    service: Service = request.app.state.service
    limit, after = _limit(request), request.query_params.get("after", "")
    begin = encode_text(service.thread_id(request, ""))
    tables = service.saver.parts.database.tables
    threads, checkpoints = tables.threads.c, tables.checkpoints.c
    statement = (
        select(threads.name, func.count(), func.min(checkpoints.created), func.max(checkpoints.created))
        .join_from(tables.threads, tables.checkpoints, checkpoints.thread == threads.number)
        .where(checkpoints.ns == b"", threads.name > begin + encode_text(after))
        .group_by(threads.name)
        .order_by(threads.name)
        .limit(limit + 1)
    )
    if begin:
        statement = statement.where(threads.name < begin[:-1] + b"0")  # the byte after "/", with which `begin` ends

    def read(connection: Connection) -> list[Any]:
        return list(connection.execute(statement))

    rows = await asyncio.to_thread(service.saver.parts.database.run, read)
    data = [
        {
            "id": decode_text(bytes(name)[len(begin) :]),
            "object": "session",
            "created_at": first // 1000,
            "updated_at": last // 1000,
            "checkpoints": count,
        }
        for name, count, first, last in rows[:limit]
    ]
    return JSONResponse({"object": "list", "data": data, "has_more": len(rows) > limit})


async def inspect_session(request: Request) -> Response:
    """What was said in a session, what its memory is, and its newest `limit` checkpoints."""
    service: Service = request.app.state.service
    name, limit = checked_id(request.path_params["session"], "session"), _limit(request)
    thread = service.thread_id(request, name)
    newest = await service.turns.threads.read(thread)
    if newest.stored is None:
        raise not_found("session", name)
    saver = service.saver
    if saver.parts.protection.audited:
        await asyncio.to_thread(lambda: _governor(service, request).note_inspection(thread))
    config = RunnableConfig(configurable={"thread_id": thread, "checkpoint_ns": ""})
    history = [_described(name, Snapshot(thread, stored)) async for stored in saver.alist(config, limit=limit)]
    memory = None
    if newest.memory is not None:
        stats = MemoryState.from_dict(newest.memory).stats()
        memory = {key: stats[key] for key in ("digest", "consumed", "bytes", "norm")}
    session = {
        "id": name,
        "object": "session",
        "checkpoint_id": newest.id,
        "messages": convert_to_openai_messages(newest.messages, include_id=True),
        "memory": memory,
        "checkpoints": history,
    }
    return JSONResponse(session)


def _described(session: str, snapshot: Snapshot) -> dict[str, Any]:
    assert snapshot.stored is not None
    made = datetime.fromisoformat(snapshot.stored.checkpoint["ts"])
    return {
        "id": snapshot.id,
        "response_id": response_id(session, str(snapshot.id)),
        "parent_id": snapshot.parent,
        "created_at": int(made.timestamp()),
        "messages": len(snapshot.messages),
    }


async def delete_session(request: Request) -> Response:
    """Forget a session; gives the receipt."""
    service: Service = request.app.state.service
    name = checked_id(request.path_params["session"], "session")
    thread = service.thread_id(request, name)
    facts = 0 if service.facts is None else await service.facts.acount(thread=thread)
    if not facts and (await service.turns.threads.read(thread)).stored is None:
        raise not_found("session", name)
    return await _forget(service, request, thread=thread)


async def delete_all_sessions(request: Request) -> Response:
    """Forget all that belongs to the subject of the request's key; gives the receipt."""
    service: Service = request.app.state.service
    key = request.state.key
    if key is None:
        raise ApiError(400, "without API keys nobody is a subject; delete one session after another")
    return await _forget(service, request, subject=key.subject)


async def _forget(
    service: Service, request: Request, *, subject: str | None = None, thread: str | None = None
) -> Response:
    # One after the other: a Governor refuses to begin while a deletion is under way. Tables of a server are not locked
    # to be written anew, and the receipt says so.
    async with service.deleting:
        receipt = await asyncio.to_thread(
            lambda: _governor(service, request).forget(subject, thread=thread, rewrite=False)
        )
    return JSONResponse(json.loads(receipt.to_json()))


def _governor(service: Service, request: Request) -> Governor:
    actor = str(service.metadata(request).get("actor", "agentmem serve"))
    engines = [service.engine]
    return Governor(service.saver, facts=service.facts, engines=engines, actor=actor, key=service.receipt_key)


def _limit(request: Request) -> int:
    limit = request.query_params.get("limit", "20")
    if not limit.isdecimal() or not 0 < int(limit) <= _MOST:
        raise ApiError(400, f"expected a limit of 1 to {_MOST}, found {limit[:20]!r}", param="limit")
    return int(limit)
