"""The engines of chat models: each is loaded when first needed, once per process, and shared by all its models.

Two models with the same source (model, adapter, options) share one engine. So do the copies that LangChain keeps making
of a model (`configurable_fields`, `model_copy`, `deepcopy`). An engine is closed when the last model that uses it is
closed.
"""

from __future__ import annotations

import inspect
import os
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
    """What an engine is loaded from: arguments of `agentmem.load`."""

    model: str | Path
    adapter: str | Path | Literal[False] | None
    options: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """A key that is equal for equal sources."""
        return str(self.model), repr(self.adapter), repr(sorted(self.options.items()))


class _Shared:
    """An engine (None until it is loaded) and the objects that use it; the lock `loading` is held while it loads."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.loading = Lock()
        self.holders: WeakSet[Engines] = WeakSet()


# Holds models and adapters, never conversations; an engine is in it as long as some holder uses it.
_SHARED: WeakValueDictionary[tuple[str, str, str], _Shared] = WeakValueDictionary()
_LOCK = Lock()  # for the dictionaries; never held while something loads


def _begin_anew() -> None:
    """Start afresh in a forked child: the parent's engines have no thread here, and its locks may stay held forever."""
    global _LOCK
    _LOCK = Lock()
    _SHARED.clear()


os.register_at_fork(after_in_child=_begin_anew)


class Engines:
    """The engines that one chat model and its copies use. Thread-safe: two simultaneous calls load a model once.

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
        """The engine, if it is already in use here."""
        shared = self._held.get(source.key)
        return None if shared is None else shared.engine

    def load(self, source: Source) -> Engine:
        """The engine; loaded unless some model in this process already has it.

        Raises:
            ConfigError: `trust_remote_code` was given for another model; or `agentmem.load` has no such option.
        """
        known = [name for name in inspect.signature(agentmem.load).parameters if name not in ("model", "adapter")]
        if unknown := sorted(source.options.keys() - known):
            raise ConfigError(f"load_options takes {', '.join(known)}; found {', '.join(unknown)}")
        if source.options.get("trust_remote_code") and self._trusted not in (None, str(source.model)):
            raise ConfigError(
                f"trust_remote_code was given for the model {self._trusted!r}, not for {str(source.model)!r}, which a "
                "copy of it names; make another ChatDeltaMem for that model, and trust it there if you do"
            )
        with _LOCK:
            shared = self._held.get(source.key) or _SHARED.setdefault(source.key, _Shared())
            shared.holders.add(self)
            self._held[source.key] = shared
        with shared.loading:
            if shared.engine is None:
                shared.engine = agentmem.load(model=source.model, adapter=source.adapter, **source.options)
            return shared.engine

    def close(self) -> None:
        """Give up all engines, and close those that nobody else uses; one that is needed again is loaded again."""
        unused = []
        with _LOCK:
            while self._held:
                key, shared = self._held.popitem()
                shared.holders.discard(self)
                if not shared.holders:
                    _SHARED.pop(key, None)
                    unused.append(shared)
        for shared in unused:
            with shared.loading:
                if shared.engine is not None:
                    shared.engine.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Engines:
        return self  # a copy of a model shares its engines

    def __reduce__(self) -> tuple[type[Engines], tuple[str | None]]:
        return Engines, (self._trusted,)  # in another process the engine is loaded again when it is needed


def profile_of(engine: Engine | None, model: str | Path) -> ModelProfile:
    """The profile that LangChain reads before it uses a model. Loads no weights and downloads nothing.

    Args:
        engine: the engine, if the model is loaded.
        model: its name; the length of its context is read from its config file.
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
