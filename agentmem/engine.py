"""The engine: one model, many sessions. Every call takes a state and returns a new one; nothing is remembered here.

All methods may be called from any thread, and the `a` forms never block an event loop. One worker thread owns the
model. It advances all running turns step by step, and decodes those that can share a forward pass together.
"""

from __future__ import annotations

import asyncio
import copy
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import cache, partial
from types import TracebackType
from typing import Any, TypeVar, Unpack

from agentmem.delta.model import SteeredModel
from agentmem.errors import TurnCancelledError
from agentmem.generation.batch import DecodeBatch
from agentmem.generation.guided import Grammars
from agentmem.generation.kv_cache import PrefillCache, StaleKVCache
from agentmem.generation.output_parser import Delta, Tags
from agentmem.generation.plan import Request, TurnOptions
from agentmem.generation.preparation import Preparation
from agentmem.generation.runner import ModelRunner
from agentmem.generation.scheduler import Scheduler
from agentmem.generation.sequence import Steps
from agentmem.generation.turn import (
    Emit,
    Remembered,
    Turn,
    TurnContext,
    prepare_remember,
    prepare_turn,
    run_remember,
    run_turn,
)
from agentmem.messages import Message, MessageCache, as_messages
from agentmem.prompt.transcript import Transcript
from agentmem.record import OnEdit
from agentmem.state import MemoryState, as_state
from agentmem.telemetry import EXPORTERS, LOADED, followed

T = TypeVar("T")
State = MemoryState | Mapping[str, Any] | None
"""A memory, its plain dict or JSON form (verified), or None for an empty one."""

_LARGE = 32_768  # characters of new messages, tools and schemas above which a turn is prepared apart
_TAIL = 16  # messages at the end of a history that may be new whatever the memory has consumed


class Engine:
    """A model ready to take turns; make one with `agentmem.load`, or from a model that you built.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with a chat template.
        steered: the model with memory attached; None = no memory.
        name: the model name that replies carry.
        kv_cache_tokens: how many prompt tokens of recent prefills are kept for retries and branches, and as many again
            for turns with `kv="carry"`; 0 = none.
        max_batch: how many sessions decode in one pass; 1 = they take turns. In a batch a session's numbers differ
            in their last bits from those it would have alone, so only 1 gives bit-identical states whatever else is
            running.
        template_options: variables for the chat template, `{"enable_thinking": False}` for example.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        steered: SteeredModel | None = None,
        *,
        name: str = "model",
        kv_cache_tokens: int = 8192,
        max_batch: int = 64,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        model.eval()
        self.name = name
        runner, tags, end_ids = ModelRunner(model, steered), Tags.of(tokenizer), _end_ids(model, tokenizer)
        transcript = Transcript(tokenizer, template_options)
        self._context = TurnContext(
            runner=runner,
            batch=DecodeBatch(runner, max_batch, kv_cache_tokens),
            tokenizer=tokenizer,
            transcript=transcript,
            closing_ids=cache(transcript.closing_ids),
            end_ids=end_ids,
            tags=tags,
            grammars=Grammars(tokenizer, tags, end_ids, model.config.get_text_config().vocab_size),
            prefills=PrefillCache(kv_cache_tokens),
            stale_kv=StaleKVCache(kv_cache_tokens),
        )
        self._scheduler = Scheduler(f"agentmem-{name}", runner, self._context.batch)
        self._preparation = Preparation(f"agentmem-{name}-preparation", self._scheduler)
        self._apart = cache(partial(_with_tokenizer_copied, self._context, template_options))
        self._counter = cache(partial(_with_tokenizer_copied, self._context, template_options))
        self._counting = threading.Lock()
        weakref.finalize(self, self._scheduler.close)  # the threads end with the engine, closed or not
        weakref.finalize(self, self._preparation.close)

    @property
    def model(self) -> Any:
        """The transformers model. Do not run it while turns are under way."""
        return self._context.runner.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._context.tokenizer

    @property
    def steered(self) -> SteeredModel | None:
        """The model with its memory, or None."""
        return self._context.runner.steered

    @property
    def has_memory(self) -> bool:
        """Whether an adapter is attached."""
        return self._context.runner.steered is not None

    @property
    def message_cache(self) -> MessageCache:
        """What this engine has computed about the messages it has seen; emptied when the engine is closed."""
        return self._context.transcript.cache

    @property
    def max_tokens_limit(self) -> int:
        """The longest context of the model, in tokens."""
        return self._context.runner.context_limit

    @property
    def model_fingerprint(self) -> str:
        """Identifies the model (see `fingerprint`)."""
        return self._context.runner.model_fingerprint

    @property
    def adapter_fingerprint(self) -> str:
        """Identifies the adapter; empty without one."""
        return self._context.runner.adapter_fingerprint

    def zero_state(self) -> MemoryState:
        """The memory of a session that has consumed nothing.

        Raises:
            MissingAdapterError: the engine has no memory.
        """
        return self._context.runner.zero_state()

    def turn(self, messages: Sequence[Message], state: State = None, **options: Unpack[TurnOptions]) -> Turn:
        """Answer the last message.

        Args:
            messages: the whole history; whatever the state has not consumed yet is written, once.
            state: the memory at the start, as a value, a plain dict or its JSON form; None = empty. Never changed.
            options: see `TurnOptions`.

        Raises:
            StateMismatchError, CorruptStateError: the state belongs to another model or adapter.
            WindowError, TranscriptError, HistoryEditedError, ConfigError: see these classes.
            TurnCancelledError, TurnTimeoutError, EngineClosedError: the turn was cancelled, took too long, or the
                engine was closed.
        """
        request = Request(as_messages(messages), options)
        return _wait(self._submit(request, state))

    def stream(self, messages: Sequence[Message], state: State = None, **options: Unpack[TurnOptions]) -> TurnStream:
        """As `turn`, yielding the reply as it is decoded: iterate, then call `result()`."""
        request = Request(as_messages(messages), options)
        return TurnStream(lambda emit: self._submit(request, state, emit))

    async def aturn(self, messages: Sequence[Message], state: State = None, **options: Unpack[TurnOptions]) -> Turn:
        """As `turn`, without blocking the event loop; cancelling the task cancels the turn."""
        request = Request(as_messages(messages), options)
        return await _await(self._submit(request, state))

    def astream(
        self, messages: Sequence[Message], state: State = None, **options: Unpack[TurnOptions]
    ) -> AsyncTurnStream:
        """As `aturn`, yielding the reply as it is decoded: `async for`, then `await stream.result()`."""
        request = Request(as_messages(messages), options)
        return AsyncTurnStream(lambda emit: self._submit(request, state, emit))

    def remember(self, messages: Sequence[Message], state: State = None, *, on_edit: OnEdit = "write") -> Remembered:
        """Write messages into the memory without a reply.

        Raises:
            MissingAdapterError: the engine has no memory.
            StateMismatchError: the state belongs to another model or adapter.
        """
        return _wait(self._submit_remember(messages, state, on_edit))

    async def aremember(
        self, messages: Sequence[Message], state: State = None, *, on_edit: OnEdit = "write"
    ) -> Remembered:
        """As `remember`, without blocking the event loop."""
        return await _await(self._submit_remember(messages, state, on_edit))

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """The number of tokens of these messages as the chat template renders them. Waits for no turn."""
        self._scheduler.require_open()
        with self._counting:  # on the caller's thread: on the model's it would wait for a step at every call
            transcript = self._counter().transcript
            return len(transcript.render(as_messages(messages), tools=tools).input_ids)

    def forget_prefills(self) -> None:
        """Empty the KV caches. This changes speed and no result, except for turns with `kv="carry"`."""
        _wait(self._scheduler.submit(self._clear()))

    def close(self) -> None:
        """End the worker thread and drop all KV; running turns fail with EngineClosedError. Idempotent."""
        self._scheduler.close()
        self._preparation.close()
        self.message_cache.clear()
        self._context.prefills.clear()
        self._context.stale_kv.clear()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, request: Request, state: State, emit: Emit | None = None) -> Future[Turn]:
        start = partial(self._start_turn, request, None if state is None else as_state(state), emit)
        return start(_unseen) if LOADED.isdisjoint(EXPORTERS) else followed("chat", self.name, start)

    def _start_turn(
        self, request: Request, state: MemoryState | None, emit: Emit | None, seen: Callable[[Steps[Turn]], Steps[Turn]]
    ) -> Future[Turn]:
        context, options = self._context, request.options
        form = options["form"]
        schemas = () if form is None else (form.tools, form.schema)
        if not _is_large(request.messages, state, options["tools"], *schemas):
            return self._scheduler.submit(seen(run_turn(context, request, state, emit)), options["timeout"])
        apart = self._apart
        return self._preparation.submit(
            lambda: seen(run_turn(context, request, state, emit, prepare_turn(apart(), request, state))),
            options["timeout"],
        )

    def _submit_remember(self, messages: Sequence[Message], state: State, on_edit: OnEdit) -> Future[Remembered]:
        messages = as_messages(messages)
        start = partial(self._start_remember, messages, None if state is None else as_state(state), on_edit)
        return start(_unseen) if LOADED.isdisjoint(EXPORTERS) else followed("remember", self.name, start)

    def _start_remember(
        self,
        messages: Sequence[Message],
        state: MemoryState | None,
        on_edit: OnEdit,
        seen: Callable[[Steps[Remembered]], Steps[Remembered]],
    ) -> Future[Remembered]:
        context, apart = self._context, self._apart
        if not _is_large(messages, state):
            return self._scheduler.submit(seen(run_remember(context, messages, state, on_edit)))

        def prepared() -> Steps[Remembered]:
            return seen(
                run_remember(context, messages, state, on_edit, prepare_remember(apart(), messages, state, on_edit))
            )

        return self._preparation.submit(prepared)

    def _clear(self) -> Steps[None]:
        self._context.prefills.clear()
        self._context.stale_kv.clear()
        yield None


class TurnStream:
    """A running turn, to iterate over once. Leaving the iteration early cancels the turn."""

    def __init__(self, start: Callable[[Emit], Future[Turn]]) -> None:
        self._queue: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
        self._future: Future[Turn] = start(self._queue.put)
        self._future.add_done_callback(lambda _: self._queue.put(None))

    def __iter__(self) -> Iterator[Delta]:
        try:
            while (delta := self._queue.get()) is not None:
                yield delta
        finally:
            self.cancel()
        if not self._future.cancelled() and (error := self._future.exception()) is not None:
            raise error

    def result(self) -> Turn:
        """The finished turn; waits for it. Raises what `Engine.turn` raises."""
        return _wait(self._future)

    def cancel(self) -> None:
        """End the turn before its next step; nothing is changed. Without effect on a finished turn."""
        self._future.cancel()


class AsyncTurnStream:
    """As `TurnStream`, for an event loop. Must be made and iterated in the same loop."""

    def __init__(self, start: Callable[[Emit], Future[Turn]]) -> None:
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | None] = asyncio.Queue()

        def put(delta: Delta | None) -> None:
            # The loop may already be closed when a turn ends that nobody waits for.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._queue.put_nowait, delta)

        self._future: Future[Turn] = start(put)
        self._future.add_done_callback(lambda _: put(None))

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while (delta := await self._queue.get()) is not None:
                yield delta
        finally:
            self.cancel()
        if not self._future.cancelled() and (error := self._future.exception()) is not None:
            raise error

    async def result(self) -> Turn:
        """The finished turn; waits for it. Raises what `Engine.turn` raises."""
        return await _await(self._future)

    def cancel(self) -> None:
        """As `TurnStream.cancel`."""
        self._future.cancel()


def _with_tokenizer_copied(context: TurnContext, template_options: Mapping[str, Any] | None) -> TurnContext:
    """What another thread prepares or counts with, since tokenizers are not made for several threads."""
    tokenizer = copy.deepcopy(context.tokenizer)
    transcript = Transcript(tokenizer, template_options, context.transcript.cache)
    return replace(context, tokenizer=tokenizer, transcript=transcript)


def _unseen(steps: Steps[T]) -> Steps[T]:
    """The steps of an operation that nobody follows."""
    return steps


def _is_large(messages: Sequence[Message], state: MemoryState | None, *schemas: Any) -> bool:
    """Whether a turn takes long to prepare, by what may be new in it; what was seen before is tokenised already."""
    known = 0 if state is None else state.count
    size = 0
    for message in messages[-max(_TAIL, len(messages) - known) :]:
        size += len(message.content)
        if message.tool_calls:
            size += sum(_size(call.arguments) for call in message.tool_calls)
        if size > _LARGE:
            return True
    return size + sum(_size(schema) for schema in schemas) > _LARGE


def _size(value: Any) -> int:
    """Characters of the strings in plain data, and a few for every item."""
    size, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, Sequence):
            left += item
        size += 2
        if size > _LARGE:  # so that one that holds itself ends too
            break
    return size


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a reply: those of the generation config and the tokenizer's own."""
    named = [getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id]
    return frozenset(i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids]))


def _wait(future: Future[T]) -> T:
    try:
        return future.result()
    except CancelledError:
        raise TurnCancelledError("the turn was cancelled; its state is unchanged") from None
    except BaseException:
        future.cancel()  # the wait was interrupted (Ctrl-C): end the turn too
        raise


async def _await(future: Future[T]) -> T:
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        if future.cancelled() and not _being_cancelled():
            raise TurnCancelledError("the turn was cancelled; its state is unchanged") from None
        future.cancel()
        raise


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
