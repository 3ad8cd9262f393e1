"""What the server counts, in Prometheus' form. No label names a thread, a key or a person."""

from __future__ import annotations

from collections.abc import Callable

from langchain_core.messages import AIMessage
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one application; `running` gives how many turns there are."""

    def __init__(self, running: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"agentmem_{name}", text, labels, registry=self._registry)

        self.requests = counter("requests", "Requests that were answered.", "route", "status")
        self.tokens = counter("tokens", "Tokens: shown in prompts, decoded, written into memories.", "kind")
        self.conflicts = counter("conflicts", "Turns that another request of their thread overtook.")
        seconds = "agentmem_request_seconds", "From a request's arrival to the last byte of its answer."
        self.seconds = Histogram(*seconds, ("route",), buckets=_SECONDS, registry=self._registry)
        turns = Gauge("agentmem_turns", "Turns that are running or waiting.", registry=self._registry)
        turns.set_function(running)

    def count(self, reply: AIMessage) -> None:
        """Count the tokens of a reply."""
        used = reply.usage_metadata
        if used is not None:
            self.tokens.labels("prompt").inc(used["input_tokens"])
            self.tokens.labels("reply").inc(used["output_tokens"])
        self.tokens.labels("written").inc((reply.response_metadata.get("memory") or {}).get("written") or 0)

    def text(self) -> bytes:
        """All of it, for `/metrics`."""
        return generate_latest(self._registry)
