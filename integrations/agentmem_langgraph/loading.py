"""Loading a chat model's engines when they are first needed, and each of them once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentmem import Engine

OF_ONE_MODEL = frozenset({"revision", "adapter_revision"})
"""Options of `agentmem.load` that another model, which a call names, does not share."""

_LOADING = Lock()  # one load at a time: two calls at once must not load one model twice


def once(find: Callable[[], Engine | None], load: Callable[[], Engine]) -> Engine:
    """What `find` finds; if that is nothing, what `load` loads, in one thread at a time."""
    with _LOADING if find() is None else nullcontext():
        return find() or load()  # another thread may have been faster
