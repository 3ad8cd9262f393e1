"""The pages: what each address shows. Everything in them comes from a template, which escapes what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from agentmem.errors import AgentMemError, ConfigError
from agentmem.state import MemoryState
from agentmem_governance import Exported, Governor, Receipt, Subject
from agentmem_inspect.asking import ARMS, MOST_TOKENS, ask, check_arm, fits
from agentmem_inspect.catalog import PAGE, Catalog
from agentmem_inspect.changes import Changes
from agentmem_inspect.contents import (
    NotThereError,
    Place,
    changes,
    citations,
    find,
    groups,
    memory_at,
    one_by_one,
    said,
)
from agentmem_inspect.tree import COLUMN_WIDTH, ROW_HEIGHT, DrawnRow, draw

if TYPE_CHECKING:
    from agentmem import Engine
    from agentmem_chroma import Fact

FormHandler = Callable[[Request, Mapping[str, str]], Response]

_TREE_PAGE = 100  # checkpoints, and rows of an audit trail
_NUMBERS = 2**63  # which no database has
_OTHERS = 12  # other memories of each kind to compare with


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
        name = self._catalog.name(number) if number < _NUMBERS else None
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
        links = self._catalog.links(number, ns)
        shown = draw(links, page * _TREE_PAGE, (page + 1) * _TREE_PAGE)
        described = self._catalog.describe(number, name, ns, [row.link for row in shown])
        return self._page(
            "tree.html",
            number=number,
            name=name,
            ns=ns,
            namespaces=self._catalog.namespaces(number),
            rows=[(row, described[row.link.id]) for row in shown if row.link.id in described],
            total=len(links),
            tips=len({link.id for link in links} - {link.parent for link in links}),
            width=_width(shown),
            height=ROW_HEIGHT,
            page=page,
            pages=-(-len(links) // _TREE_PAGE),
            done=request.query_params.get("done", ""),
        )

    def checkpoint(self, request: Request) -> Response:
        """What a checkpoint holds: messages beside what each wrote."""
        place = self._place(request)
        channel = self._channel(request, place)
        history = [] if channel is None else changes(self._governor.saver, place, channel)
        talks = [(name, *groups(messages, history, self._governor.facts)) for name, messages in place.messages.items()]
        engine = self._engine
        can_write = engine is not None and channel is not None and fits(engine, place.memories[channel]) is None
        alone = can_write and "alone" in request.query_params
        if alone and engine is not None:
            talks = [(name, left_out, [one_by_one(engine, each) for each in talk]) for name, left_out, talk in talks]
        return self._page(
            "checkpoint.html",
            can_write=can_write,
            alone=alone,
            place=place,
            channel=channel,
            talks=talks,
            earlier=history[0].step.checkpoint_id
            if history and history[0].step.consumed > history[0].step.new
            else None,
            largest=max(
                (
                    *(value for change in history for value in change.layers),
                    *(value for _, _, talk in talks for group in talk for each in group.said for value in each.alone),
                ),
                default=0.0,
            ),
        )

    def matrices(self, request: Request) -> Response:
        """The matrices of a memory as heat-maps, over the turns that led to it; the script asks `state` for them."""
        place = self._place(request)
        channel = self._channel(request, place)
        history = [] if channel is None else changes(self._governor.saver, place, channel)
        fixed = None
        if channel is not None and (other := request.query_params.get("with", "").strip()):
            there = find(self._governor.saver, place.number, place.thread, place.ns, other)
            fixed = {"id": other, "when": "", "shape": memory_at(there, channel).shape}
        steps = [
            {
                "id": change.step.checkpoint_id,
                "when": _when(change.step.time),
                "consumed": change.step.consumed,
                "shape": change.step.state.shape,
            }
            for change in history
        ]
        layers = [] if channel is None else place.memories[channel].stats()["layers"]
        return self._page("matrices.html", place=place, channel=channel, steps=steps, fixed=fixed, layers=layers)

    def state(self, request: Request) -> Response:
        """The matrices of a memory: float32, little-endian, [layers, heads, rank, rank]."""
        _, name = self._thread(request)
        asked = request.query_params
        history = self._governor.saver.memory_history(
            name,
            checkpoint_ns=asked.get("ns", ""),
            checkpoint_id=asked.get("at") or None,
            channel=asked.get("channel") or None,
            newest_first=True,
        )
        step = next(history, None)
        if step is None:
            raise NotThereError("expected a memory here, found none; it may have been pruned")
        return Response(step.state.data, media_type="application/octet-stream")

    @staticmethod
    def _channel(request: Request, place: Place) -> str | None:
        """The channel of the memory that is looked at; None where the checkpoint has no memory."""
        asked = request.query_params.get("channel", "")
        return asked if asked in place.memories else next(iter(place.memories), None)

    # Questions.

    def questions(self, request: Request) -> Response:
        """A form that asks a memory; the script sends each way of asking to `answer`."""
        place = self._place(request)
        channel = self._channel(request, place)
        problem, others = None, []
        if channel is not None and self._engine is not None:
            problem = fits(self._engine, place.memories[channel])
            others = self._other_memories(place, channel)
        return self._page(
            "ask.html",
            place=place,
            channel=channel,
            arms=ARMS,
            others=others,
            problem=problem,
            question=request.query_params.get("question", ""),
            most_tokens=MOST_TOKENS,
        )

    def _other_memories(self, place: Place, channel: str) -> list[tuple[str, str]]:
        """What can be compared with: the newest checkpoints of other threads, and earlier ones of this thread."""
        listed = self._catalog.threads().threads
        others = [(f"{each.number}", each.name) for each in listed if each.number != place.number][:_OTHERS]
        earlier = changes(self._governor.saver, place, channel, _OTHERS)[:-1]
        return others + [
            (
                f"{place.number} {change.step.checkpoint_id}",
                f"this thread, {_when(change.step.time)}, {change.step.consumed} messages",
            )
            for change in reversed(earlier)
        ]

    def answer(self, request: Request, fields: Mapping[str, str]) -> Response:
        """The answer of one way of asking, as a part of a page; what hinders it is told in its place."""
        try:
            if self._engine is None:
                raise ConfigError("expected a model to ask, found none; start again with --model")
            number, name = self._thread(request)
            place = find(self._governor.saver, number, name, fields.get("ns", ""), fields.get("at") or None)
            arm, most = check_arm(fields.get("arm", "")), fields.get("most", "")
            channel, state = fields.get("channel", ""), None
            if arm == "memory":
                state = memory_at(place, channel)
            elif arm == "other":
                state = self._other_memory(place, channel, fields.get("other", ""))
            tokens = int(most) if most.isascii() and most.isdigit() and len(most) < 10 else 0
            answer = ask(self._engine, arm, fields.get("question", ""), place, state, tokens)
        except AgentMemError as error:
            return self._page("answer.html", problem=f"{type(error).__name__}: {error}", answer=None)
        return self._page("answer.html", problem=None, answer=answer)

    def _other_memory(self, place: Place, channel: str, other: str) -> MemoryState:
        """The memory that a choice of the form names: a thread's number, and perhaps a checkpoint's id."""
        number, _, checkpoint_id = other.partition(" ")
        name = self._catalog.name(int(number)) if number.isascii() and number.isdigit() and len(number) < 19 else None
        if name is None:
            raise NotThereError("expected another checkpoint to compare with, found none; choose one")
        self.changes.note_inspection(name)
        there = find(self._governor.saver, int(number), name, place.ns, checkpoint_id or None)
        return memory_at(there, channel if channel in there.memories else next(iter(there.memories), channel))

    # Facts, and the audit trail.

    def facts(self, request: Request) -> Response:
        """All facts with their sources, or those that are about something."""
        store, part, page = self._governor.facts, request.query_params.get("q", "").strip(), _whole(request, "page")
        shown: list[Fact] = []
        total = 0
        if store is not None and part:
            shown = [each.fact for each in store.search(part, PAGE)]
            total, page = len(shown), 0
        elif store is not None:
            shown, total = store.newest(PAGE, page * PAGE), store.count()
        return self._page(
            "facts.html",
            section="facts",
            facts=[(fact, self._catalog.number(fact.thread)) for fact in shown],
            total=total,
            part=part,
            page=page,
            pages=-(-total // PAGE),
        )

    def fact(self, request: Request) -> Response:
        """One fact, and the replies that it was shown to."""
        store, own = self._governor.facts, str(request.path_params["id"])
        found = [] if store is None else store.get([own])
        if not found:
            raise NotThereError("expected a fact of this id, found none; it may have been deleted")
        (fact,) = found
        threads = self._catalog.threads().threads
        number = self._catalog.number(fact.thread)
        looked = {each.number: each.name for each in threads} | ({} if number is None else {number: fact.thread})
        replies = citations(self._newest(looked), own)
        for name in {place.thread for place, _, _ in replies}:  # which the page shows a reply of
            self.changes.note_inspection(name)
        return self._page(
            "fact.html",
            section="facts",
            fact=fact,
            number=number,
            looked=len(looked),
            replies=replies,
        )

    def _newest(self, threads: Mapping[int, str]) -> Iterator[Place]:
        """The newest checkpoints of threads, as far as they have one that can be read."""
        for number, name in threads.items():
            with suppress(AgentMemError):
                yield find(self._governor.saver, number, name, "", None)

    def audit(self, request: Request) -> Response:
        """The audit trail of the database."""
        return self._page("audit.html", section="audit", **self._trail(request, None))

    def thread_audit(self, request: Request) -> Response:
        """The audit trail of a thread."""
        number, name = self._thread(request)
        values = self._trail(request, name)
        return self._page("thread_audit.html", number=number, name=name, ns="", at=None, **values)

    def _trail(self, request: Request, thread: str | None) -> dict[str, Any]:
        trail, page = self._governor.audit(thread), _whole(request, "page")
        rows = trail.entries[::-1]
        return {
            "audited": bool(self._governor.saver.parts.protection.audited),
            "trail": trail,
            "entries": rows[page * _TREE_PAGE : (page + 1) * _TREE_PAGE],
            "page": page,
            "pages": -(-len(rows) // _TREE_PAGE),
        }

    # Subjects.

    def subjects(self, request: Request) -> Response:
        """Who owns threads and facts."""
        part, page = request.query_params.get("q", ""), _whole(request, "page")
        found = [each for each in self._governor.subjects() if part in each.name]
        return self._page(
            "subjects.html",
            section="subjects",
            subjects=found[page * PAGE : (page + 1) * PAGE],
            total=len(found),
            part=part,
            page=page,
            pages=-(-len(found) // PAGE),
            pending=self._governor.pending(),
            receipts=list(self.changes.receipts.values()),
        )

    def _subject(self, name: str) -> Subject:
        for each in self._governor.subjects():
            if each.name == name:
                return each
        raise NotThereError(f"expected a subject that owns something, found {name!r}, who owns nothing here")

    def subject(self, request: Request) -> Response:
        """What a subject owns, and what can be done with it."""
        subject = self._subject(request.query_params.get("name", ""))
        threads = [(self._catalog.number(name), name) for name in subject.threads[:PAGE]]
        return self._page("subject.html", section="subjects", subject=subject, threads=threads)

    def receipt(self, request: Request) -> Response:
        """A receipt of this session."""
        return self._page("receipt.html", section="subjects", receipt=self._receipt(request))

    def receipt_file(self, request: Request) -> Response:
        """The same as a file."""
        receipt = self._receipt(request)
        headers = {"content-disposition": f'attachment; filename="receipt-{receipt.id}.json"'}
        return Response(receipt.to_json(), media_type="application/json", headers=headers)

    def _receipt(self, request: Request) -> Receipt:
        receipt = self.changes.receipts.get(str(request.path_params["id"]))
        if receipt is None:
            raise NotThereError("expected a receipt of this session, found none; receipts are kept until it ends")
        return receipt

    def exported(self, request: Request) -> Response:
        """What an export of this session holds."""
        own, done, path = self._export(request)
        return self._page("exported.html", section="subjects", id=own, done=done, size=path.stat().st_size)

    def export_file(self, request: Request) -> Response:
        """Its file."""
        own, _, path = self._export(request)
        return FileResponse(path, media_type="application/zip", filename=f"export-{own}.zip")

    def _export(self, request: Request) -> tuple[str, Exported, Path]:
        own = str(request.path_params["id"])
        if own not in self.changes.exports:
            raise NotThereError("expected an export of this session, found none; exports are kept until it ends")
        return (own, *self.changes.exports[own])

    # Changes.

    def export(self, _request: Request, fields: Mapping[str, str]) -> Response:
        """Export a subject."""
        own = self.changes.export(self._subject(fields.get("subject", "")).name)
        return RedirectResponse(f"/exports/{own}", 303)

    def forget_subject(self, _request: Request, fields: Mapping[str, str]) -> Response:
        """Forget a subject whose name was written to confirm it."""
        subject = self._subject(fields.get("subject", ""))
        if fields.get("confirm") != subject.name:
            raise ConfigError(
                f"expected {subject.name!r} to confirm, found {fields.get('confirm')!r}; nothing was forgotten"
            )
        return RedirectResponse(f"/receipts/{self.changes.forget_subject(subject.name).id}", 303)

    def forgetting(self, request: Request) -> Response:
        """Asks whether a message is to be forgotten."""
        place, message = self._place(request), request.query_params.get("message", "")
        there = [each for messages in place.messages.values() for each in messages if each.id == message]
        told = said(there[0]) if there else None
        return self._page("forget_message.html", place=place, message=message, said=told)

    def forget_message(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Forget a message."""
        _, name = self._thread(request)
        receipt = self.changes.forget_message(
            name,
            fields.get("message", ""),
            with_reply="with_reply" in fields,
            keep_checkpoints="keep_checkpoints" in fields,
        )
        return RedirectResponse(f"/receipts/{receipt.id}", 303)

    def resume(self, _request: Request, _fields: Mapping[str, str]) -> Response:
        """Complete deletions that were interrupted."""
        self.changes.resume()
        return RedirectResponse("/subjects", 303)

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
