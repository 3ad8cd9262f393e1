"""Rules of the house that no linter holds: who may import whom, file size, and public names that exist."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import agentmem

ROOT = Path(__file__).resolve().parents[2]
INTEGRATIONS = ("agentmem_chroma", "agentmem_langgraph", "agentmem_sql")
FRAMEWORKS = ("langchain", "langgraph", "sqlalchemy", "chromadb")

# Public modules of the engine. Beside names that `agentmem` itself offers, integrations use these.
PUBLIC_MODULES = {"agentmem", "agentmem.errors", "agentmem.messages", "agentmem.state"}

MAX_LINES = 400
# Path -> why this file is one idea although it is longer.
LONGER: dict[str, str] = {}

# DESIGN's direction of imports: a module may use those before it, never those after it.
CHAIN = (
    "agentmem.errors",
    "agentmem.kernels.recurrence",
    "agentmem.delta.layer",
    "agentmem.delta.model",
    "agentmem.engine",
)


@dataclass(frozen=True)
class Import:
    """One imported name; ``name`` is None for ``import module``."""

    where: str
    module: str
    name: str | None
    at_import_time: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    base = ROOT / "integrations" if path.is_relative_to(ROOT / "integrations") else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[Import]:
    """Every import in a file; those inside functions and under TYPE_CHECKING are not made at import time."""

    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (Import(where, alias.name, None, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(where, node.module or "", alias.name, top) for alias in node.names)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, top and not typing_only and not inside)

    yield from walk(ast.parse(path.read_text()), True)


def test_public_names_resolve() -> None:
    assert sorted(agentmem.__all__) == dir(agentmem)
    for name in agentmem.__all__:
        assert getattr(agentmem, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = agentmem.nothing


@pytest.mark.parametrize("package", INTEGRATIONS)
def test_public_names_of_integrations_resolve(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_engine_knows_no_agent_framework() -> None:
    banned = [
        f"{found.where} imports {found.module}"
        for path in sources("agentmem")
        for found in imports(path)
        if found.top.startswith(FRAMEWORKS) or found.top in INTEGRATIONS
    ]
    assert banned == []


def test_integrations_use_public_names_only() -> None:
    wrong = [
        f"{found.where} uses {found.module}.{found.name or ''}"
        for path in sources(*(f"integrations/{package}" for package in INTEGRATIONS))
        for found in imports(path)
        if found.top == "agentmem" and not is_public(found)
    ]
    assert wrong == []


def is_public(found: Import) -> bool:
    if found.module not in PUBLIC_MODULES:
        return False
    if found.name is None or found.module != "agentmem":
        return not (found.name or "").startswith("_")
    return found.name in agentmem.__all__ or f"agentmem.{found.name}" in PUBLIC_MODULES


def test_integrations_do_not_know_each_other() -> None:
    wrong = [
        f"{found.where} imports {found.module}"
        for package in INTEGRATIONS
        for path in sources(f"integrations/{package}")
        for found in imports(path)
        if found.top in INTEGRATIONS and found.top != package
    ]
    assert wrong == []


def engine_graph() -> dict[str, set[str]]:
    """Module -> the modules of agentmem that it imports when it is imported."""
    modules = {module_name(path) for path in sources("agentmem")}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for path in sources("agentmem"):
        for found in imports(path):
            if found.at_import_time and found.top == "agentmem":
                inner = f"{found.module}.{found.name}"
                graph[module_name(path)].add(inner if inner in modules else found.module)
    return graph


def test_imports_run_one_way() -> None:
    graph = engine_graph()
    # Raises CycleError, which names the cycle.
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(graph)
    for position, early in enumerate(CHAIN):
        later = reached(graph, early) & set(CHAIN[position + 1 :])
        assert later == set(), f"{early} should not reach {sorted(later)}"


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Every module that importing ``start`` imports."""
    seen: set[str] = set()
    todo = {start}
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= graph[name] - seen
    return seen


def test_engine_does_not_need_its_tools() -> None:
    tools = ("agentmem_cli", "agentmem.evaluation", "agentmem.training")
    wrong = [
        f"{name} imports {used}"
        for name, uses in engine_graph().items()
        for used in uses
        if name.count(".") < 2 and not name.startswith((*tools, "agentmem.nano")) and used.startswith(tools)
    ]
    assert wrong == []


def test_files_stay_small() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in sources("agentmem", "integrations")
    }
    assert {name: n for name, n in lengths.items() if n > MAX_LINES and name not in LONGER} == {}
    stale = [name for name in LONGER if lengths.get(name, 0) <= MAX_LINES]
    assert stale == [], "a file that is short again needs no exception"
