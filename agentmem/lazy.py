"""Names of a package that load on first use, so that importing a light part of it pulls in nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from agentmem.errors import MissingExtraError


def lazy_names(
    package: str, homes: Mapping[str, str], needs: Mapping[str, tuple[str, str]] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package; the former raises MissingExtraError where a need is missing.

    Args:
        package: its name; its `__all__` holds all public names.
        homes: the module of each name that loads on first use.
        needs: for each package that may be missing, what is installed for it and the extra that it belongs to.
    """
    module = sys.modules[package]

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(homes[name]), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if needs is None or missing not in needs:
                raise
            raise MissingExtraError(*needs[missing]) from error
        setattr(module, name, value)  # so that this runs once for each name
        return value

    return load, lambda: sorted(module.__all__)
