"""The graph channel that keeps a memory: `Annotated[MemoryState, MemoryChannel]`.

Nodes read a MemoryState. Checkpoints hold its plain dict, so every saver can store it, strict msgpack included, and no
type has to be registered. Input is verified by its digest. Parallel branches are merged relative to the memory at the
start of the step (`agentmem_langgraph.merge`), in task order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NotRequired, Self

from langgraph.channels.base import BaseChannel
from langgraph.errors import EmptyChannelError, InvalidUpdateError
from langgraph.graph import MessagesState
from langgraph.types import Overwrite

from agentmem.state import MemoryState, as_state
from agentmem_langgraph.merge import merge_from_nothing, merge_states

Update = MemoryState | dict[str, Any] | None
_OVERWRITE = "__overwrite__"  # LangGraph's mark of an `Overwrite` in JSON


class MemoryChannel(BaseChannel[MemoryState, Update, dict[str, Any]]):
    """Holds one memory; empty at first.

    An update is a MemoryState, its plain dict or its JSON form. None empties the channel, and `Overwrite(x)`, or what
    JSON makes of it, replaces its value, whatever else was written in the same step.
    """

    __slots__ = ("_state",)

    def __init__(self, typ: Any = MemoryState, key: str = "") -> None:
        super().__init__(typ, key)
        self._state: MemoryState | None = None

    def __eq__(self, other: object) -> bool:
        # Channels are equal if they behave alike; LangGraph compares the channels of several schemas.
        return isinstance(other, MemoryChannel)

    __hash__ = None  # type: ignore[assignment]

    @property
    def ValueType(self) -> Any:
        """What nodes read."""
        return MemoryState

    @property
    def UpdateType(self) -> Any:
        """What nodes write."""
        return Update

    def get(self) -> MemoryState:
        """The memory.

        Raises:
            EmptyChannelError: nothing was written yet.
        """
        if self._state is None:
            raise EmptyChannelError()
        return self._state

    def checkpoint(self) -> dict[str, Any] | Any:
        """The memory's plain dict, or LangGraph's marker for an empty channel."""
        return super().checkpoint() if self._state is None else self._state.to_dict()

    def from_checkpoint(self, checkpoint: dict[str, Any] | Any) -> Self:
        """A channel with the value that `checkpoint` returned.

        Raises:
            CorruptStateError: the checkpoint is not exactly what was written.
        """
        channel = type(self)(self.typ, self.key)
        if checkpoint is not channel.checkpoint():
            channel._state = as_state(checkpoint)
        return channel

    def copy(self) -> Self:
        """A channel with the same memory; being immutable, it is shared."""
        channel = type(self)(self.typ, self.key)
        channel._state = self._state
        return channel

    def update(self, values: Sequence[Any]) -> bool:
        """Apply what a step wrote, in task order; True if the memory changed.

        Raises:
            CorruptStateError: a dict is not exactly what `MemoryState.to_dict` or `to_json` returned.
            StateMismatchError: a memory was written by another model or adapter, or a parallel branch does
                not continue the memory that this channel holds.
            InvalidUpdateError: several writes of the step replace the memory.
        """
        if not values:
            return False
        base = self._state
        replacing = [new for replaces, new in map(_replacement, values) if replaces]
        if len(replacing) > 1:
            raise InvalidUpdateError(
                f"at key {self.key!r} one write of a step may replace the memory (None or Overwrite); "
                f"found {len(replacing)}"
            )
        if replacing:
            self._state = None if replacing[0] is None else as_state(replacing[0])
        else:
            states = [as_state(value) for value in values]
            self._state = merge_from_nothing(states) if base is None else merge_states(base, states)
        return self._state != base


def _replacement(value: Any) -> tuple[bool, Any]:
    """Whether a write replaces the memory, and by what."""
    if value is None:
        return True, None
    if isinstance(value, Overwrite):
        return True, value.value
    # An `Overwrite` from a client of LangGraph's server: written out by hand, or a dataclass that became a dict.
    if isinstance(value, dict) and value.keys() == {_OVERWRITE}:
        return True, value[_OVERWRITE]
    if isinstance(value, dict) and value.get("type") == _OVERWRITE and "value" in value:
        return True, value["value"]
    return False, None


class MemoryMessagesState(MessagesState):
    """The state of a graph with messages and a memory, ready for `StateGraph(MemoryMessagesState)`."""

    memory: NotRequired[Annotated[MemoryState, MemoryChannel]]
