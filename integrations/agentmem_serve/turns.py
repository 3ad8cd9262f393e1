"""A request's turn: read the thread, let the model answer, store what became of it.

Nothing is locked while the model answers. If another request was stored in the thread meanwhile, the turn is made again
from there; if a part of the reply has been sent by then, that is impossible, and the request fails with nothing stored.
Requests of one thread that reach the same process wait for each other, which saves such turns and guarantees nothing:
the order is the database's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, message_chunk_to_message

from agentmem.errors import TurnTimeoutError
from agentmem_langgraph import ChatDeltaMem, MemoryTurn, numbered_facts
from agentmem_langgraph.prompting import facts_metadata, question, with_leading_text
from agentmem_serve.errors import ApiError, ThreadConflict
from agentmem_serve.line_up import begins_with, continued, with_ids
from agentmem_serve.shown_facts import ShownFacts
from agentmem_serve.threads import Snapshot, Threads, checkpoint_id_after
from agentmem_sql import SQLAlchemySaver

# How far a thread is gone back for another version of its conversation.
_MOST_BACK = 64


@dataclass(frozen=True, kw_only=True)
class TurnRequest:
    """What a turn is made from.

    Attributes:
        messages: the request's, without system messages.
        system: the text that is shown before them, and neither stored nor written.
        options: of the call to the chat model: sampling, tools, format.
        thread: the thread's id in the database; None: the turn begins with nothing, and nothing is stored.
        after: the checkpoint to go on from, to which all messages are new; None: the newest, by `line_up`.
        store: whether the turn is stored.
        metadata: of the checkpoint.
        retry_key: names the request. If the thread's newest turn has the same, its reply is given again.
        salt: KV is shared between turns with the same one; with a thread it is the thread.
        owners: whose facts are shown, where there is a store of them.
    """

    messages: Sequence[BaseMessage]
    system: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    thread: str | None = None
    after: str | None = None
    store: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    retry_key: str | None = None
    salt: str | None = None
    owners: Sequence[str] = ()


@dataclass(frozen=True)
class Begun:
    """The model begins to answer.

    Attributes:
        checkpoint: the id that the turn will be stored under; None if it is not.
        reply_id: the reply's.
    """

    checkpoint: str | None
    reply_id: str


@dataclass(frozen=True)
class Finished:
    """A turn that is complete, and stored if it was to be.

    Attributes:
        reply: with an id, usage and metadata.
        checkpoint: under which it is stored; None if it is not.
        repeated: whether it had been stored for an earlier request with the same `retry_key`.
    """

    reply: AIMessage
    checkpoint: str | None
    repeated: bool = False


Event = Begun | AIMessageChunk | Finished


class Turns:
    """Makes the turns of one process.

    Args:
        llm: the model; its options hold where a request says nothing.
        saver: the threads.
        timeout: seconds after which a turn that others overtake is not made again.
        on_conflict: called when one is overtaken.
        facts: finds the facts that are shown; they are neither stored nor written.
    """

    def __init__(
        self,
        llm: ChatDeltaMem,
        saver: SQLAlchemySaver,
        timeout: float,
        on_conflict: Callable[[], object],
        facts: ShownFacts | None = None,
    ) -> None:
        self.threads = Threads(saver)
        self._on_conflict = on_conflict
        self._llm = llm
        self._timeout = timeout
        self._facts = facts
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def complete(self, request: TurnRequest) -> Finished:
        """Make a turn and give its reply.

        Raises:
            ThreadConflict: others went on with the thread again and again until the time was over.
            ApiError: the checkpoint to go on from is not there.
            AgentMemError: see `ChatDeltaMem` and `Threads.append`; nothing was stored.
        """
        ends = time.monotonic() + self._timeout
        async with self._in_turn(request):
            while True:
                try:
                    async with aclosing(self._attempt(request, streaming=False)) as events:
                        async for event in events:
                            if isinstance(event, Finished):
                                return event
                except ThreadConflict:
                    self._on_conflict()
                    if request.after is not None or time.monotonic() > ends:
                        raise

    async def stream(self, request: TurnRequest) -> AsyncGenerator[Event]:
        """As `complete`, in pieces: `Begun`, chunks, `Finished`. Closing the iterator early cancels the turn.

        A turn that others overtook is not made again, since a part of it has been sent.
        """
        async with self._in_turn(request), aclosing(self._attempt(request, streaming=True)) as events:
            try:
                async for event in events:
                    yield event
            except ThreadConflict:
                self._on_conflict()
                raise

    @asynccontextmanager
    async def _in_turn(self, request: TurnRequest) -> AsyncIterator[None]:
        """Wait for the requests of the same thread that came to this process earlier."""
        if request.thread is None or request.after is not None:
            yield
            return
        lock = self._locks.setdefault(request.thread, asyncio.Lock())
        try:
            async with asyncio.timeout(self._timeout):
                await lock.acquire()
        except TimeoutError:
            raise TurnTimeoutError(
                f"the turn waited for {self._timeout:g} s for others of its thread; send fewer of them at once"
            ) from None
        try:
            yield
        finally:
            lock.release()

    async def _attempt(self, request: TurnRequest, *, streaming: bool) -> AsyncGenerator[Event]:
        base, conversation, version = Snapshot(""), list(request.messages), None
        if request.thread is not None:
            newest = await self.threads.read(request.thread)
            version = newest.id
            if request.retry_key and newest.metadata.get("retry_key") == request.retry_key and newest.messages:
                reply = newest.messages[-1]
                assert isinstance(reply, AIMessage)
                yield Begun(version, str(reply.id))
                yield Finished(reply, version, repeated=True)
                return
            base, conversation = await self._base(request, newest)
        checkpoint = checkpoint_id_after(version) if request.thread is not None and request.store else None
        turn = MemoryTurn(base.memory)
        reply_id = f"msg_{uuid4().hex}"
        yield Begun(checkpoint, reply_id)
        facts = await self._facts.find(question(conversation), request.owners) if self._facts else []
        shown = with_leading_text(conversation, request.system, numbered_facts(facts))
        options: dict[str, Any] = {**request.options, "memory": turn}
        options["cache_salt"] = request.salt if request.thread is None else f"thread:{request.thread}"
        if streaming:
            total: AIMessageChunk | None = None
            async for chunk in self._llm.astream(shown, **options):
                total = chunk if total is None else total + chunk
                yield chunk
            assert total is not None
            reply = message_chunk_to_message(total)
        else:
            reply = await self._llm.ainvoke(shown, **options)
        assert isinstance(reply, AIMessage)
        notes = {**reply.response_metadata, **({"facts": facts_metadata(facts)} if facts else {})}
        named = reply.model_copy(update={"id": reply_id, "response_metadata": notes})
        if checkpoint is not None:
            metadata = dict(request.metadata)
            if request.retry_key:
                metadata["retry_key"] = request.retry_key
            messages = [*with_ids(conversation, base.messages), named]
            memory = None if turn.state is None else turn.state.to_dict()
            await self.threads.append(
                base, checkpoint, messages, memory, metadata, version=version, alone=request.after is None
            )
        yield Finished(named, checkpoint)

    async def _base(self, request: TurnRequest, newest: Snapshot) -> tuple[Snapshot, list[BaseMessage]]:
        """The checkpoint that a turn goes on from, and the conversation with the request's messages."""
        thread, sent = newest.thread, request.messages
        if request.after is not None:
            base = newest if newest.id == request.after else await self.threads.read(thread, request.after)
            if base.stored is None:
                raise not_found("response", request.after)
            return base, [*base.messages, *sent]
        conversation = continued(newest.messages, sent)
        if conversation is not None:
            return newest, conversation
        back = newest
        for _ in range(_MOST_BACK):
            if back.parent is None:
                break
            back = await self.threads.read(thread, back.parent)
            if begins_with(sent, back.messages):
                return back, [*back.messages, *sent[len(back.messages) :]]
        return newest, list(sent)


def not_found(what: str, name: str) -> ApiError:
    """The answer where something is not there, or belongs to somebody else."""
    return ApiError(404, f"there is no {what} {name[:80]!r} here", code="not_found")
