"""`/v1/facts`: the exact facts of whoever asks are listed, added and deleted.

A fact belongs to a session, to the subject of a key, or to nobody. In `Fact.thread` stands whose it is: the thread's id
in the database, the subject's name, or nothing. So the `Governor` finds them by its own rules, and forgets those of a
session with the session, and all of a subject's with the subject.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentmem.errors import FactStoreError
from agentmem_serve.errors import ApiError
from agentmem_serve.parameters import checked_id
from agentmem_serve.service import Service

if TYPE_CHECKING:
    from agentmem_chroma import Fact, FactStore

_MOST = 1000  # facts of a request or of a page


class NewFacts(BaseModel):
    """The body of a request that adds facts."""

    model_config = ConfigDict(extra="forbid")

    texts: Annotated[list[str], Field(min_length=1, max_length=_MOST)]
    source: str = ""
    session: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


async def list_facts(request: Request) -> Response:
    """The facts of a session, or those that hold in all of them, oldest first; `after` an id, at most `limit`."""
    service: Service = request.app.state.service
    query = request.query_params
    limit = query.get("limit", "100")
    if not limit.isdecimal() or not 0 < int(limit) <= _MOST:
        raise ApiError(400, f"expected a limit of 1 to {_MOST}, found {limit[:20]!r}", param="limit")
    facts = await _store(service).afacts(thread=_owner(service, request, query.get("session")))
    ids = [fact.id for fact in facts]
    after = query.get("after")
    if after is not None and after not in ids:
        raise ApiError(404, f"there is no fact {after[:80]!r} here", code="not_found", param="after")
    rest = facts[ids.index(after) + 1 :] if after is not None else facts
    data = [_described(service, request, fact) for fact in rest[: int(limit)]]
    return JSONResponse({"object": "list", "data": data, "has_more": len(rest) > int(limit)})


async def add_facts(request: Request) -> Response:
    """Add facts to a session, or to all of them; a fact that is there is kept once."""
    from agentmem_chroma import Fact

    service: Service = request.app.state.service
    store = _store(service)
    body = NewFacts.model_validate_json(await request.body())
    owner = _owner(service, request, body.session)
    try:
        facts = [Fact(text, body.source, owner, metadata=body.metadata) for text in body.texts]
    except FactStoreError as error:
        raise ApiError(400, str(error), param="texts") from error
    await store.aadd(facts)
    return JSONResponse({"object": "list", "data": [_described(service, request, fact) for fact in facts]})


async def delete_fact(request: Request) -> Response:
    """Delete a fact."""
    service: Service = request.app.state.service
    store, name = _store(service), request.path_params["fact"]
    found = await store.aget([name])
    if not found or not _may(service, request, found[0]):
        raise ApiError(404, f"there is no fact {name[:80]!r} here", code="not_found")
    await store.adelete([name])
    return JSONResponse({"id": name, "object": "fact", "deleted": True})


def _store(service: Service) -> FactStore:
    if service.facts is None:
        raise ApiError(404, "this server has no fact store; it is started with --facts", code="not_found")
    return service.facts


def _owner(service: Service, request: Request, session: str | None) -> str:
    """What stands in `Fact.thread`: of a session, or of all sessions of whoever asks."""
    if session is not None:
        return service.thread_id(request, checked_id(session, "session"))
    return request.state.key.subject if request.state.key else ""


def _may(service: Service, request: Request, fact: Fact) -> bool:
    key = request.state.key
    return key is None or fact.thread == key.subject or fact.thread.startswith(service.thread_id(request, ""))


def _described(service: Service, request: Request, fact: Fact) -> dict[str, Any]:
    begin = service.thread_id(request, "")
    of_session = fact.thread != _owner(service, request, None)
    return {
        "id": fact.id,
        "object": "fact",
        "text": fact.text,
        "source": fact.source,
        "session": fact.thread.removeprefix(begin) if of_session else None,
        "created_at": int(fact.time.timestamp()),
        "metadata": dict(fact.metadata),
    }
