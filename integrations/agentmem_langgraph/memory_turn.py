"""MemoryTurn carries a memory into one LangChain call, and the new memory out of it.

LangChain passes a chat model messages and keyword arguments, and gets a message back. Matrices in either would end up
in traces, cache keys and stored messages. So the memory is passed in a `MemoryTurn`, an object of which everything but
the model sees only a digest.

A `MemoryTurn` can be used for one call. A call that fails or is cancelled leaves its state unchanged, and it can be
used for a retry. After a call that succeeded, a second one raises, so that nothing is ever applied twice.

Uses of a memory that work but lose or double something are warned of here, once for each engine.
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
from agentmem.state import MemoryState, as_state


def warn_once(cache: MessageCache, text: str) -> None:
    """Warn once per engine; `cache` is the engine's cache of seen messages."""
    if cache.get(("warned", text)) is None:
        cache.put(("warned", text), True, 0)
        warnings.warn(text, MemoryWarning, stacklevel=2)


class MemoryTurn:
    """Carries a memory into one call of a chat model, and the new memory out.

        turn = MemoryTurn(state)
        reply = llm.invoke(messages, memory=turn)
        turn.state                               # the memory after the call

    It has no `__dict__`, is not a dataclass and has no `to_dict`, and its repr is the digest. So code that records the
    arguments of a call records only the digest.

    Args:
        state: a MemoryState, its plain dict or JSON form, or None for an empty memory.

    Raises:
        CorruptStateError: the dict is not exactly what `MemoryState.to_dict` or `to_json` returned.
    """

    __slots__ = ("_lock", "_phase", "_state")

    def __init__(self, state: MemoryState | Mapping[str, Any] | None = None) -> None:
        self._state = None if state is None else as_state(state)
        self._phase = "ready"
        self._lock = Lock()

    @property
    def state(self) -> MemoryState | None:
        """The given memory until a call has succeeded; after that the memory after that call."""
        return self._state

    @property
    def used(self) -> bool:
        """Whether a call has succeeded with this `MemoryTurn`."""
        return self._phase == "used"

    @contextmanager
    def claim(self) -> Iterator[MemoryState | None]:
        """Reserve this object for one call; yields the state to start from.

        If the block ends without `commit`, for whatever reason, nothing has changed.

        Raises:
            TurnError: a call has succeeded with this object, or one is running.
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
        """Set the new state after a successful call. Only inside `claim`.

        Raises:
            TurnError: no call is running.
        """
        with self._lock:
            if self._phase != "running":
                raise TurnError(f"{self!r} is {self._phase}; only a call under way brings a new state")
            self._state, self._phase = state, "used"

    def require_used(self) -> None:
        """Raise if no call has used this object: the memory would silently be lost.

        Raises:
            TurnError: no call has succeeded with this object.
        """
        if not self.used:
            raise TurnError(
                f"the model answered without using {self!r}; "
                "a ChatDeltaMem was expected, with or without tools and options bound"
            )

    def __repr__(self) -> str:
        return f"MemoryTurn({self._state.digest if self._state else 'empty'})"

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryTurn:
        # A copy would allow a second call with the same state. Tracers copy what they record.
        return self

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("a MemoryTurn stays in its process; carry turn.state.to_dict() instead")


def warn_of_changed_reply(
    state: MemoryState | None, history: Sequence[BaseMessage], messages: Sequence[Message], cache: MessageCache
) -> None:
    """Warn where the reply that left this memory has another text than the memory has read.

    Whoever rewrites a reply (PIIMiddleware) keeps what the model noted in it, the digest of the memory behind it.

    Args:
        history: as the caller passed it.
        messages: the same for the engine; there may be a system message more in front.
    """
    added = len(messages) - len(history)
    place = next((n for n in reversed(range(len(history))) if isinstance(history[n], AIMessage)), None)
    if state is None or place is None or not state.record.recent:
        return
    noted = history[place].response_metadata.get("memory") or {}
    spoken = state.record.recent[-1]
    if noted.get("digest") == state.digest and messages[place + added].digest()[: len(spoken)] != spoken:
        warn_once(
            cache,
            "A reply was changed after it was given (by PIIMiddleware(apply_to_output=True), for instance); the "
            "memory has it as it was spoken, too. Where that must not be, use ChatDeltaMem(write='input'), which "
            "writes of replies only what was changed (docs/langgraph.md, 'Agents of create_agent').",
        )


def warn_of_lost_memory(messages: Sequence[BaseMessage], cache: MessageCache, run_manager: Any) -> None:
    """Warn if a graph calls the model without its memory: every turn then writes the whole thread again."""
    if not messages or "langgraph_node" not in (getattr(run_manager, "metadata", None) or {}):
        return
    if any(isinstance(message, AIMessage) and message.response_metadata.get("memory") for message in messages):
        warn_once(
            cache,
            "A graph calls ChatDeltaMem without memory=, so that every call writes the whole thread anew and forgets "
            "it. Use MemoryNode, or MemoryMiddleware in create_agent; or use_memory=False for a model without memory.",
        )
