"""The engines that a chat model loads: each when it is first needed, once, and shared by the model's copies.

LangChain makes copies of a model all the time (`configurable_fields`, `model_copy`). They share one `Engines`, in which
an engine is found by what it was loaded from: a copy with another adapter has another engine, all others have the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import agentmem

if TYPE_CHECKING:
    from agentmem import Engine

_OF_ONE_MODEL = frozenset({"revision", "adapter_revision"})


class Source(NamedTuple):
    """What an engine is loaded from: the arguments of `agentmem.load`."""

    model: str | Path
    adapter: str | Path | Literal[False] | None
    options: Mapping[str, Any]

    def of_another(self, model: str | Path, *, memory: bool) -> Source:
        """Another model, with an adapter of its own or none, loaded with the same options but for revisions."""
        options = {name: value for name, value in self.options.items() if name not in _OF_ONE_MODEL}
        return Source(str(model), None if memory else False, options)

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for equal sources."""
        return str(self.model), repr(self.adapter), repr(sorted(self.options.items()))


class Engines:
    """Engines by source. Thread-safe: two calls at once load a model once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], Engine] = {}
        self._lock = Lock()

    def get(self, source: Source) -> Engine | None:
        """The engine, if it is loaded."""
        return self._found.get(source.key)

    def load(self, source: Source) -> Engine:
        """The engine, loaded if need be."""
        with self._lock:
            found = self._found.get(source.key)
            if found is None:
                found = agentmem.load(model=source.model, adapter=source.adapter, **source.options)
                self._found[source.key] = found
            return found

    def close(self) -> None:
        """Close all of them; whoever needs one again loads it anew."""
        with self._lock:
            while self._found:
                self._found.popitem()[1].close()
