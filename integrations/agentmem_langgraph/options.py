"""Checks of a chat model's options, the same whether they are given when it is made or in a call.

Those given when a model is made are checked by pydantic, which turns what is raised here into its ValidationError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import agentmem
from agentmem import Window
from agentmem.errors import ConfigError

# What other chat models call them.
_OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "num_ctx": "window",
    "stop_sequences": "stop",
    "model_name": "model",
    "model_id": "model",
    "model_kwargs": "load_options",
    "model": "another ChatDeltaMem",  # as an option of a call
    "request_timeout": "timeout",
}


def checked_window(window: Any) -> Window:
    """The window that a number of tokens, a Window or None stands for.

    Raises:
        ConfigError: it is something else, or shows nothing.
    """
    if window is None:
        return Window()
    if isinstance(window, int):
        return Window(tokens=window)
    if not isinstance(window, Window):
        raise ConfigError(f"window is a number of tokens, a Window or None; found {window!r}")
    return window


def checked_sampling(how: Mapping[str, Any], stop: tuple[str, ...]) -> agentmem.Sampling:
    """The sampling that options describe.

    Raises:
        ConfigError: one of them is no number, or out of range; or a stop string is none.
    """
    try:
        return agentmem.Sampling(**how, stop=stop)
    except TypeError as error:
        values = ", ".join(f"{name}={value!r}" for name, value in how.items())
        raise ConfigError(f"sampling takes numbers; found {values} ({error})") from None


def checked_timeout(timeout: Any) -> float | None:
    """The timeout.

    Raises:
        ConfigError: it is neither None nor a number of seconds above 0.
    """
    if timeout is not None and not (isinstance(timeout, float | int) and timeout > 0):
        raise ConfigError(f"timeout is a number of seconds above 0, or None; found {timeout!r}")
    return timeout


def unknown_options(unknown: Sequence[str], names: Sequence[str]) -> str:
    """What an error says of options that do not exist: those that do, and which one was probably meant."""
    close = {name: _OTHER_NAMES.get(name) or next(iter(get_close_matches(name, names, 1)), None) for name in unknown}
    meant = [f"{name} is {right} here" for name, right in close.items() if right is not None]
    return f"options are {', '.join(names)}; found {', '.join(unknown)}{'; ' * bool(meant)}{'; '.join(meant)}"
