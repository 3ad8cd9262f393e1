"""Puts ``core_models`` on the path: pytest's importlib mode leaves this folder off it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module", params=["plain", "compiled"])
def steps(request: pytest.FixtureRequest, needs: Callable[[object, str], None]) -> Iterator[str]:
    """What single tokens are computed with on a CPU: torch's operations, or calls that numba compiled."""
    kind: str = request.param
    if kind == "compiled":
        needs(find_spec("numba"), "numba, which is part of the dependency group `dev`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTMEM_NUMBA", "1" if kind == "compiled" else "0")
        yield kind


@pytest.fixture(scope="session")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    """Scripts of the benchmarks' folder, which is no package, by name; they import each other by name."""
    names = ("shapes", "counting", "overhead_decoders", "overhead", "scan", "sessions")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield {name: import_module(name) for name in names}
    for name in (*names, "conditions"):
        del sys.modules[name]
