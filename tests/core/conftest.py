"""The scripts of the benchmarks, for the tests that call them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    """Scripts of the benchmarks' folder, which is no package, by name; they import each other by name."""
    names = ("shapes", "counting", "overhead_decoders", "overhead", "overhead_memory", "scan", "sessions")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield {name: import_module(name) for name in names}
    for name in (*names, "conditions"):
        del sys.modules[name]
