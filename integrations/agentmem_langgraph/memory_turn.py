"""The carrier that takes a memory through one LangChain call and brings the new one back.

LangChain hands a chat model messages and keyword arguments, and gives back a message. Matrices in either
would end in traces, cache keys and stored messages. So the memory travels in a `MemoryTurn`: an object of
which everybody but the model sees a digest.

One carrier serves one call. A call that fails or is cancelled leaves the state as it was and the carrier
free for a retry; after a call that succeeded a second one raises, so that nothing is ever applied twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from agentmem.errors import MemoryWarning, TurnError
from agentmem.messages import Message, MessageCache
from agentmem.state import MemoryState


def warn_once(cache: MessageCache, text: str) -> None:
    """Warn, once for each engine, whose cache of seen messages this is."""
    if cache.get(("warned", text)) is None:
        cache.put(("warned", text), True, 0)
        warnings.warn(text, MemoryWarning, stacklevel=2)


def warn_of_lost_memory(messages: Sequence[BaseMessage], cache: MessageCache, run_manager: Any) -> None:
    """Say so where a graph calls the model without its memory: every turn then writes the whole thread anew."""
    if not messages or "langgraph_node" not in (getattr(run_manager, "metadata", None) or {}):
        return
    if any(isinstance(message, AIMessage) and message.response_metadata.get("memory") for message in messages):
        warn_once(
            cache,
            "A graph calls ChatDeltaMem without memory=, so that every call writes the whole thread anew and forgets "
            "it. Use MemoryNode, or MemoryMiddleware in create_agent; or use_memory=False for a model without memory.",
        )


def warn_of_changed_reply(
    history: Sequence[BaseMessage], messages: Sequence[Message], state: MemoryState | None, cache: MessageCache
) -> None:
    """Say so where the reply that left a memory has another text now than that memory has read.

    Whoever rewrites a reply (PIIMiddleware) keeps what the model noted in it, the digest of the memory behind it.

    Args:
        history: as the caller gave it.
        messages: the same for the engine; they may begin with one more.
        state: the memory at the start of the turn.
        cache: the engine's.
    """
    added = len(messages) - len(history)
    place = next((n for n in reversed(range(len(history))) if isinstance(history[n], AIMessage)), None)
    if state is None or place is None:
        return
    noted = history[place].response_metadata.get("memory") or {}
    # The record ends with the first 8 bytes of the reply's digest.
    if noted.get("digest") == state.digest and not state.tail.endswith(messages[place + added].digest()[:8]):
        warn_once(
            cache,
            "A reply was changed after it was given (by PIIMiddleware(apply_to_output=True), for instance); the "
            "memory has it as it was spoken, too. Where that must not be, use ChatDeltaMem(write='input'), which "
            "writes of replies only what was changed (docs/langgraph.md, 'Agents of create_agent').",
        )


def as_state(value: MemoryState | Mapping[str, Any] | None) -> MemoryState | None:
    """A memory in any form that a graph holds: the value, its plain dict or JSON form (verified), or None.

    Raises:
        CorruptStateError: the dict is not exactly what `MemoryState.to_dict` or `to_json` gave.
    """
    return value if value is None or isinstance(value, MemoryState) else MemoryState.from_dict(value)


class MemoryTurn:
    """Carries a memory into one call of a chat model, and the new memory out.

        turn = MemoryTurn(state)
        reply = llm.invoke(messages, memory=turn)
        turn.state                               # the memory after the call

    It has no `__dict__`, is no dataclass and has no `to_dict`, and its repr is the digest: whatever records
    the arguments of a call records that.

    Args:
        state: a MemoryState, its plain dict or JSON form, or None for an empty memory.

    Raises:
        CorruptStateError: the dict is not exactly what `MemoryState.to_dict` or `to_json` gave.
    """

    __slots__ = ("_lock", "_phase", "_state")

    def __init__(self, state: MemoryState | Mapping[str, Any] | None = None) -> None:
        self._state = as_state(state)
        self._phase = "ready"
        self._lock = Lock()

    @property
    def state(self) -> MemoryState | None:
        """The memory given, until a call has succeeded; from then on the memory after that call."""
        return self._state

    @property
    def used(self) -> bool:
        """Whether a call has succeeded with this carrier."""
        return self._phase == "used"

    @contextmanager
    def claim(self) -> Iterator[MemoryState | None]:
        """Hold the carrier for one call; gives the state to start from.

        If the block ends before `commit`, for whatever reason, the carrier is as before.

        Raises:
            TurnError: a call has succeeded with this carrier, or one is under way.
        """
        with self._lock:
            if self._phase != "ready":
                raise TurnError(
                    f"a MemoryTurn serves one call; {self!r} "
                    f"{'has served its call' if self._phase == 'used' else 'is serving another call now'}; "
                    "make a new one for each call: MemoryTurn(turn.state)"
                )
            self._phase = "running"
        try:
            yield self._state
        finally:
            with self._lock:
                if self._phase == "running":
                    self._phase = "ready"

    def commit(self, state: MemoryState | None) -> None:
        """The call has succeeded: take its new state. Only inside `claim`.

        Raises:
            TurnError: no call is under way.
        """
        with self._lock:
            if self._phase != "running":
                raise TurnError(f"{self!r} is {self._phase}; only a call under way brings a new state")
            self._state, self._phase = state, "used"

    def require_used(self) -> None:
        """Refuse a carrier that no call has used: its memory would silently stay behind.

        Raises:
            TurnError: no call has succeeded with this carrier.
        """
        if not self.used:
            raise TurnError(
                f"the model answered without using {self!r}; "
                "a ChatDeltaMem was expected, with or without tools and options bound"
            )

    def __repr__(self) -> str:
        return f"MemoryTurn({self._state.digest if self._state else 'empty'})"

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryTurn:
        # A copy would be a second call with one state. Tracers copy what they record.
        return self

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("a MemoryTurn stays in its process; carry turn.state.to_dict() instead")
