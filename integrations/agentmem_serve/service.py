"""What the endpoints of one application share: model, threads, settings, counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage
from starlette.requests import Request

from agentmem import Window
from agentmem.errors import ConfigError
from agentmem_langgraph import ChatDeltaMem
from agentmem_serve.errors import ApiError
from agentmem_serve.keys import KeyFile
from agentmem_serve.limits import Limits
from agentmem_serve.metrics import Metrics
from agentmem_serve.shown_facts import ShownFacts
from agentmem_serve.turns import Turns
from agentmem_sql import SQLAlchemySaver

if TYPE_CHECKING:
    from agentmem import Engine
    from agentmem_chroma import FactStore


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How requests are answered.

    Attributes:
        window: what a prompt shows of a thread.
        max_tokens: the most tokens of a reply, and how long it may become if a request says nothing.
        temperature: of requests that say nothing; 0 always takes the likeliest token.
        timeout: seconds that a turn may take, waiting included.
        max_turns: turns that run or wait at once; what comes beyond that is told when to come again.
        requests_per_minute: of each subject; None: any number.
        max_body: bytes of a request.
        facts: the most facts that are shown in a turn, where there is a store of them.
        min_score: how close a fact has to be to the question to be shown, as a cosine similarity.

    Raises:
        ConfigError: a number is not above 0.
    """

    window: Window | None = None
    max_tokens: int = 1024
    temperature: float = 0.0
    timeout: float = 300.0
    max_turns: int = 128
    requests_per_minute: int | None = None
    max_body: int = 4 * 2**20
    facts: int = 3
    min_score: float = 0.7

    def __post_init__(self) -> None:
        for name in ("max_tokens", "timeout", "max_turns", "requests_per_minute", "max_body", "facts"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"expected {name} to be above 0, found {value!r}")


class Service:
    """What the endpoints of one application share."""

    def __init__(
        self,
        engine: Engine,
        saver: SQLAlchemySaver,
        settings: ServeSettings,
        keys: KeyFile | None,
        receipt_key: bytes | None,
        facts: FactStore | None,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.saver = saver
        self.keys = keys
        self.receipt_key = receipt_key
        self.facts = facts
        self.limits = Limits(settings.max_turns, settings.requests_per_minute, settings.max_body)
        self.deleting = asyncio.Lock()
        self.model = engine.name
        self.started = int(time.time())
        marks = f"{engine.model_fingerprint} {engine.adapter_fingerprint}"
        self.fingerprint = f"fp_{sha256(marks.encode()).hexdigest()[:16]}"
        self.metrics = Metrics(lambda: self.limits.running)
        llm = ChatDeltaMem(
            engine=engine,
            window=settings.window,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            timeout=settings.timeout,
            use_memory=engine.has_memory,
        )
        shown = None if facts is None else ShownFacts(facts, settings.facts, settings.min_score)
        self.turns = Turns(llm, saver, settings.timeout, self.metrics.conflicts.inc, shown)

    def check_model(self, name: str) -> None:
        """Refuse a request for a model that is not served.

        Raises:
            ApiError: it is another one.
        """
        if name != self.model:
            message = f"this server has the model {self.model!r}, not {name[:80]!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def thread_id(self, request: Request, name: str) -> str:
        """The id in the database of the thread that a request names: its subject's, whatever the name."""
        key = request.state.key
        return name if key is None else f"{key.subject}/{name}"

    def owners(self, request: Request, thread: str | None) -> Sequence[str]:
        """Whose facts are shown in a turn: the thread's, those of the subject that asks, and those of nobody."""
        key = request.state.key
        return [*([] if thread is None else [thread]), *([] if key is None else [key.subject]), ""]

    def salt(self, request: Request) -> str | None:
        """What turns without a thread share KV by; None: nothing, where it is not known who asks."""
        key = request.state.key
        return None if key is None else f"subject:{key.subject}"

    def metadata(self, request: Request) -> Mapping[str, Any]:
        """What a checkpoint says of the request that made it."""
        key = request.state.key
        actor = {} if key is None else {"actor": f"API key {key.id}"}
        return {"request_id": request.state.id, **actor}

    def count(self, reply: AIMessage) -> None:
        """Count a turn's tokens."""
        self.metrics.count(reply)
