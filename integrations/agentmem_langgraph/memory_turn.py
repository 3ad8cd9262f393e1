"""The carrier that takes a memory through one LangChain call and brings the new one back.

LangChain hands a chat model messages and keyword arguments, and gives back a message. Matrices in either
would end in traces, cache keys and stored messages. So the memory travels in a `MemoryTurn`: an object of
which everybody but the model sees a digest.

One carrier serves one call. A call that fails or is cancelled leaves the state as it was and the carrier
free for a retry; after a call that succeeded a second one raises, so that nothing is ever applied twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

from agentmem.errors import MemoryWarning, TurnError
from agentmem.messages import MessageCache
from agentmem.state import MemoryState


def warn_once(cache: MessageCache, text: str) -> None:
    """Warn, once for each engine, whose cache of seen messages this is."""
    if cache.get(("warned", text)) is None:
        cache.put(("warned", text), True, 0)
        warnings.warn(text, MemoryWarning, stacklevel=2)


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
