"""Checks of the ids that callers pass.

A string is a sequence of strings, so `prune("42")` would mean the threads 4 and 2; and `str(None)` is a thread id too.
Every public method checks its ids here before it opens a connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from agentmem.errors import ConfigError


def check_id(value: Any, what: str = "thread id") -> str:
    """The id as text. Whole numbers and UUIDs are taken as well, as LangGraph's own savers do.

    Raises:
        ConfigError: the value is something else, for example None.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"expected a {what} (a string), found {value!r} of type {type(value).__name__}")


def check_ids(values: Any, what: str = "thread id") -> list[str]:
    """The ids as text, in order, each once.

    Raises:
        ConfigError: one string was passed instead of several, or something that is no id.
    """
    if isinstance(values, str | bytes | int | UUID):
        raise ConfigError(f"expected a sequence of {what}s, found one {what}, {values!r}; pass [{values!r}]")
    if isinstance(values, Mapping) or not isinstance(values, Iterable):
        raise ConfigError(f"expected a sequence of {what}s, found {values!r} of type {type(values).__name__}")
    return list(dict.fromkeys(check_id(value, what) for value in values))
