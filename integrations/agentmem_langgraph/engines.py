"""The engines that chat models load: each when it is first needed, once in a process, and shared by all that name it.

Two models of one source (model, adapter, options) have one engine, and so do the copies that LangChain makes of a model
all the time (`configurable_fields`, `model_copy`, `deepcopy`). An engine is closed when the last model that uses it
closes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakSet, WeakValueDictionary

from langchain_core.language_models import ModelProfile

import agentmem
from agentmem.errors import ConfigError

if TYPE_CHECKING:
    from agentmem import Engine


class Source(NamedTuple):
    """What an engine is loaded from: the arguments of `agentmem.load`."""

    model: str | Path
    adapter: str | Path | Literal[False] | None
    options: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for equal sources."""
        return str(self.model), repr(self.adapter), repr(sorted(self.options.items()))


class _Shared:
    """An engine and the holders that use it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.holders: WeakSet[Engines] = WeakSet()


# Models and adapters, never what anybody said: an engine is here as long as a holder keeps it.
_SHARED: WeakValueDictionary[tuple[str, str, str], _Shared] = WeakValueDictionary()
_LOCK = Lock()


class Engines:
    """The engines that one chat model and its copies use. Thread-safe: two calls at once load a model once.

    Args:
        trusted: the model whose own code may run; None while nobody has said so of one.
    """

    def __init__(self, trusted: str | None = None) -> None:
        self._held: dict[tuple[str, str, str], _Shared] = {}
        self._trusted = trusted

    def trust(self, model: str | Path) -> None:
        """Note the model that `trust_remote_code` was given for: the first one, whatever copies name later."""
        if self._trusted is None:
            self._trusted = str(model)

    def get(self, source: Source) -> Engine | None:
        """The engine, if it is in use here."""
        shared = self._held.get(source.key)
        return None if shared is None else shared.engine

    def load(self, source: Source) -> Engine:
        """The engine, loaded if no model of this process has it.

        Raises:
            ConfigError: `trust_remote_code` was given for another model.
        """
        if source.options.get("trust_remote_code") and self._trusted not in (None, str(source.model)):
            raise ConfigError(
                f"trust_remote_code was given for the model {self._trusted!r}, not for {str(source.model)!r}, which a "
                "copy of it names; make another ChatDeltaMem for that model, and trust it there if you do"
            )
        with _LOCK:
            shared = self._held.get(source.key) or _SHARED.get(source.key)
            if shared is None:
                engine = agentmem.load(model=source.model, adapter=source.adapter, **source.options)
                shared = _SHARED[source.key] = _Shared(engine)
            shared.holders.add(self)
            self._held[source.key] = shared
            return shared.engine

    def close(self) -> None:
        """Leave all of them, and close those that nobody else uses; whoever needs one again loads it anew."""
        with _LOCK:
            while self._held:
                key, shared = self._held.popitem()
                shared.holders.discard(self)
                if not shared.holders:
                    _SHARED.pop(key, None)
                    shared.engine.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Engines:
        return self  # a copy of a model is the same model

    def __reduce__(self) -> tuple[type[Engines], tuple[str | None]]:
        return Engines, (self._trusted,)  # in another process the engine is loaded again when it is needed


def profile_of(engine: Engine | None, model: str | Path) -> ModelProfile:
    """What LangChain asks of a model before it is used. Loads no weights and downloads nothing.

    Args:
        engine: if the model is loaded.
        model: its name; how long a context it takes stands in its config file.
    """
    profile = ModelProfile(
        name=str(model),
        text_inputs=True,
        image_inputs=False,
        audio_inputs=False,
        video_inputs=False,
        pdf_inputs=False,
        text_outputs=True,
        tool_calling=True,
        tool_choice=True,
        structured_output=True,
    )
    limit = engine.max_tokens_limit if engine is not None else agentmem.context_limit(model)
    if limit is not None:
        profile["max_input_tokens"] = profile["max_output_tokens"] = limit
    return profile
