"""OpenTelemetry: spans and metrics of turns and of the audit trail, for an application that has set its providers.

Who exports anything has loaded an exporter's module of the SDK: until then nothing is imported, and until a provider is
set nothing is made or measured. What is recorded holds no text, no thread and no person: tokens, seconds, digests, ids
of checkpoints, and the norms of a memory's layers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from opentelemetry.trace import Span

T = TypeVar("T")
S = TypeVar("S")
Steps = Generator[S, None, T]

# While these are disjoint, nobody can want spans or metrics. What is on the way of every turn looks before it calls.
LOADED = sys.modules.keys()
EXPORTERS = frozenset({"opentelemetry.sdk.trace.export", "opentelemetry.sdk.metrics.export"})
_SCOPE = "agentmem"


class _Instruments:
    """What is recorded with; OpenTelemetry's own proxies follow the other provider, if it is set later."""

    def __init__(self) -> None:
        from opentelemetry import metrics, trace

        self.trace = trace
        self.tracer = trace.get_tracer(_SCOPE)
        meter = metrics.get_meter(_SCOPE)
        self.seconds = meter.create_histogram("agentmem.turn.duration", "s", "A turn, from its call to its end.")
        self.waited = meter.create_histogram("agentmem.turn.queued", "s", "From a turn's call to its first step.")
        self.turns = meter.create_up_down_counter("agentmem.turns", "{turn}", "Turns that are running or waiting.")
        self.tokens = meter.create_counter("agentmem.tokens", "{token}", "Tokens, by kind.")
        self.batch = meter.create_histogram("agentmem.batch.size", "{sequence}", "Sequences of one decoding pass.")
        self.norm = meter.create_histogram("agentmem.memory.norm", "1", "Of a layer's matrices after a turn.")
        self.events = meter.create_counter("agentmem.audit.events", "{event}", "What the audit trail was told.")


ACTIVE: list[_Instruments] = []
"""The instruments, from the first operation on that was called with a provider set."""


def _instruments() -> _Instruments | None:
    """The instruments; None as long as the application has set no provider."""
    if not ACTIVE and not LOADED.isdisjoint(EXPORTERS):
        from opentelemetry import metrics, trace

        # What the API itself gives where none was set are proxies.
        modules = type(trace.get_tracer_provider()).__module__, type(metrics.get_meter_provider()).__module__
        if not all(name.startswith(("opentelemetry.trace", "opentelemetry.metrics")) for name in modules):
            ACTIVE.append(_Instruments())
    return ACTIVE[0] if ACTIVE else None


def followed(
    operation: str, model: str, start: Callable[[Callable[[Steps[S, T]], Steps[S, T]]], Future[T]]
) -> Future[T]:
    """Start a turn or another operation of an engine, and record it until it ends.

    Args:
        operation: "chat" or "remember".
        model: the model's name.
        start: starts it; is given what its steps have to go through, so that its first one is seen.
    """
    found = _instruments()
    if found is None:
        return start(lambda steps: steps)
    about = {"gen_ai.operation.name": operation, "gen_ai.request.model": model}
    span = found.tracer.start_span(f"{operation} {model}", attributes=about)
    began = time.perf_counter()

    def first(steps: Steps[S, T]) -> Steps[S, T]:
        found.waited.record(time.perf_counter() - began, about)
        return (yield from steps)

    try:
        future = start(first)
    except BaseException as error:
        _end(found, span, about, type(error).__name__)
        raise
    found.turns.add(1, about)
    future.add_done_callback(partial(_ended, found, span, about, began))
    return future


def batched(size: int) -> None:
    """Record how many sequences a decoding pass has; called where `ACTIVE` is not empty."""
    ACTIVE[0].batch.record(size)


def audited(event: str, public: Mapping[str, Any]) -> None:
    """Record an event of the audit trail, without what is private in it."""
    if (found := _instruments()) is None:
        return
    found.events.add(1, {"event": event})
    with found.tracer.start_as_current_span(f"agentmem.{event}", attributes=_attributes(public)):
        pass


def _ended(found: _Instruments, span: Span, about: Mapping[str, str], began: float, future: Future[Any]) -> None:
    found.turns.add(-1, about)
    failed = "TurnCancelledError" if future.cancelled() else ""
    if not failed and (error := future.exception()) is not None:
        failed = type(error).__name__  # its message may quote what was said
    if not failed:
        _record(found, span, about, future.result())
    found.seconds.record(time.perf_counter() - began, {**about, **({"error.type": failed} if failed else {})})
    _end(found, span, about, failed)


def _end(found: _Instruments, span: Span, about: Mapping[str, str], failed: str) -> None:
    if failed:
        span.set_attribute("error.type", failed)
        span.set_status(found.trace.StatusCode.ERROR)
    span.end()


def _record(found: _Instruments, span: Span, about: Mapping[str, str], result: Any) -> None:
    """Record a `Turn` or a `Remembered`."""
    tokens = {"written": result.written}
    if (usage := getattr(result, "usage", None)) is not None:
        tokens |= {"input": usage.input_tokens, "output": usage.output_tokens, "read": result.read}
        tokens["cache_read"] = usage.cache_read_tokens
        span.set_attribute("gen_ai.response.finish_reasons", [result.finish_reason])
        span.set_attribute("gen_ai.usage.input_tokens", usage.input_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", usage.output_tokens)
    for kind, count in tokens.items():
        found.tokens.add(count, {**about, "kind": kind})
    span.set_attribute("agentmem.tokens.written", result.written)
    if result.state is not None:
        span.set_attribute("agentmem.memory.digest", result.state.digest)
        squares = (result.state.matrices.astype("float64") ** 2).sum(axis=(1, 2, 3))  # [layers]
        for layer, norm in enumerate(squares**0.5):
            found.norm.record(float(norm), {**about, "layer": layer})


def _attributes(public: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data as attributes, but for who acted: a list of mappings becomes one list for each of their keys."""
    flat: dict[str, Any] = {}
    for name, value in public.items():
        if name == "actor":
            continue
        if isinstance(value, str | bool | int | float):
            flat[f"agentmem.{name}"] = value
        elif isinstance(value, Sequence):
            rows = [row for row in value if isinstance(row, Mapping)]
            for key in dict.fromkeys(key for row in rows for key in row):
                flat[f"agentmem.{name}.{key}"] = ["" if row.get(key) is None else str(row[key]) for row in rows]
    return flat
