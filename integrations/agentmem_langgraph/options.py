"""What a chat model says of options that it has not got, with the names that other chat models give to those it has."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

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


def unknown_options(unknown: Sequence[str], names: Sequence[str]) -> str:
    """What an error says of options that do not exist: those that do, and which one was probably meant."""
    close = {name: _OTHER_NAMES.get(name) or next(iter(get_close_matches(name, names, 1)), None) for name in unknown}
    meant = [f"{name} is {right} here" for name, right in close.items() if right is not None]
    return f"options are {', '.join(names)}; found {', '.join(unknown)}{'; ' * bool(meant)}{'; '.join(meant)}"
