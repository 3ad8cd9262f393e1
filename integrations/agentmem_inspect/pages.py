"""The pages: what each address shows. Everything in them comes from a template, which escapes what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from agentmem_governance import Governor
from agentmem_inspect.catalog import PAGE, Catalog
from agentmem_inspect.changes import Changes
from agentmem_inspect.contents import NotThereError, Place, changes, find, groups
from agentmem_inspect.tree import COLUMN_WIDTH, ROW_HEIGHT, DrawnRow, draw

if TYPE_CHECKING:
    from agentmem import Engine

FormHandler = Callable[[Request, Mapping[str, str]], Response]

_TREE_PAGE = 100  # checkpoints


class Pages:
    """Answers requests.

    Attributes:
        changes: makes changes.
    """

    def __init__(self, governor: Governor, engine: Engine | None, csrf: str) -> None:
        self._governor = governor
        self._engine = engine
        self._catalog = Catalog(governor.saver)
        self.changes = Changes(governor)
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).with_name("templates")),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {"when": _when, "short": _short}
        self._templates.globals |= {
            "csrf": csrf,
            "query": _query,
            "database": governor.saver.parts.database.url,
            "actor": governor.actor,
            "model": None if engine is None else engine.name,
            "has_facts": governor.facts is not None,
        }

    def _page(self, template: str, status: int = 200, /, **values: Any) -> Response:
        text = self._templates.get_template(template).render({"section": "threads"} | values)
        # Ids and texts may hold half a surrogate pair, which no encoding of the web has.
        return HTMLResponse(text.encode("utf-8", "replace"), status)

    def refusal(self, _request: Request, status: int, message: str) -> Response:
        """What is shown instead of a page."""
        return self._page("refusal.html", status, message=message)

    # Threads.

    def threads(self, request: Request) -> Response:
        """All threads, by pages, and a search."""
        part, page = request.query_params.get("q", ""), _whole(request, "page")
        found = self._catalog.threads(part, page=page)
        return self._page("threads.html", found=found, part=part, page=page, pages=-(-found.total // PAGE))

    def _thread(self, request: Request) -> tuple[int, str]:
        """The number and id of the thread that a request names. That it is looked at goes into the audit trail.

        Raises:
            NotThereError: there is none.
        """
        number = int(request.path_params["number"])
        name = self._catalog.name(number)
        if name is None:
            raise NotThereError(f"expected a thread number {number}, found none; it may have been deleted")
        self.changes.note_inspection(name)
        return number, name

    def _place(self, request: Request) -> Place:
        """The checkpoint that a request names, the newest if it names none."""
        number, name = self._thread(request)
        at, ns = request.query_params.get("at") or None, request.query_params.get("ns", "")
        return find(self._governor.saver, number, name, ns, at)

    def tree(self, request: Request) -> Response:
        """The checkpoints of a thread, with their branches."""
        number, name = self._thread(request)
        ns, page = request.query_params.get("ns", ""), _whole(request, "page")
        rows = draw(self._catalog.links(number, ns))
        shown = rows[page * _TREE_PAGE : (page + 1) * _TREE_PAGE]
        described = self._catalog.describe(number, name, ns, [row.link for row in shown])
        return self._page(
            "tree.html",
            number=number,
            name=name,
            ns=ns,
            namespaces=self._catalog.namespaces(number),
            rows=[(row, described[row.link.id]) for row in shown if row.link.id in described],
            total=len(rows),
            tips=sum(row.tip for row in rows),
            width=_width(shown),
            height=ROW_HEIGHT,
            page=page,
            pages=-(-len(rows) // _TREE_PAGE),
            done=request.query_params.get("done", ""),
        )

    def checkpoint(self, request: Request) -> Response:
        """What a checkpoint holds: messages beside what each wrote."""
        place = self._place(request)
        channel = self._channel(request, place)
        history = [] if channel is None else changes(self._governor.saver, place, channel)
        talks = [(name, *groups(messages, history, self._governor.facts)) for name, messages in place.messages.items()]
        return self._page(
            "checkpoint.html",
            place=place,
            channel=channel,
            talks=talks,
            earlier=history[0].step.checkpoint_id
            if history and history[0].step.consumed > history[0].step.new
            else None,
            largest=max((value for change in history for value in change.layers), default=0.0),
        )

    @staticmethod
    def _channel(request: Request, place: Place) -> str | None:
        """The channel of the memory that is looked at; None where the checkpoint has no memory."""
        asked = request.query_params.get("channel", "")
        return asked if asked in place.memories else next(iter(place.memories), None)

    # Changes.

    def rewind(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Let a thread go on from a checkpoint."""
        number, name = self._thread(request)
        place = find(self._governor.saver, number, name, fields.get("ns", ""), fields.get("at") or "")
        copy = self.changes.rewind(place)
        return RedirectResponse(f"/threads/{number}?{_query(done=copy)}", 303)


def _whole(request: Request, name: str) -> int:
    """A whole number from 0 up in a request; 0 where there is none."""
    text = request.query_params.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _width(rows: list[DrawnRow]) -> int:
    """The width of the picture's rows."""
    return COLUMN_WIDTH * max((row.columns for row in rows), default=1)


def _query(**values: object) -> str:
    """Parameters of an address, without those that are empty."""
    given = {name: str(value) for name, value in values.items() if value not in (None, "")}
    return urlencode(given, errors="replace")


def _when(time: datetime | None) -> str:
    """A time as it is shown."""
    return "" if time is None else f"{time:%Y-%m-%d %H:%M:%S}"


def _short(text: str, most: int = 24) -> str:
    """The beginning of an id, as far as it tells ids of one thread apart."""
    return text if len(text) <= most else text[:most] + "…"
