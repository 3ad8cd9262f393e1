"""Rules for the source that no linter holds: public names, file size, class names, and docstring markup.

Who may import whom is held by import-linter (`make lint`, contracts in pyproject.toml).
"""

from __future__ import annotations

import ast
import importlib
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

import agentmem

ROOT = Path(__file__).resolve().parents[2]
# The command stands on more than public names: it runs evaluations and builds nano.
INTEGRATIONS = tuple(f"agentmem_{name}" for name in ("chroma", "governance", "inspect", "langgraph", "serve", "sql"))
PACKAGES = {
    "agentmem": ROOT / "agentmem",
    **{name: ROOT / "integrations" / name for name in (*INTEGRATIONS, "agentmem_cli")},
}

MAX_LINES = 600


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def all_sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sources(package)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


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


def test_no_circle_of_files() -> None:
    """import-linter compares siblings; a package's own `__init__` may be part of a circle as well."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)
    reached = {module: graph.find_upstream_modules(module) for module in graph.modules}
    groups = [{module, *(other for other in reached[module] if module in reached[other])} for module in sorted(reached)]
    circles = [group for place, group in enumerate(groups) if len(group) > 1 and group not in groups[:place]]
    assert circles == []


def test_integrations_use_public_names_only() -> None:
    """import-linter sees that the modules are public; whether a name of them is, stands here."""
    private = []
    for package in INTEGRATIONS:
        for path in sources(package):
            for node in ast.walk(parsed(path)):
                if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != "agentmem":
                    continue
                for alias in node.names:
                    public = alias.name in agentmem.__all__ or (ROOT / f"agentmem/{alias.name}.py").exists()
                    if alias.name.startswith("_") or (node.module == "agentmem" and not public):
                        private.append(f"{relative(path)}:{node.lineno} imports {alias.name}")
    assert private == []


def test_files_stay_small() -> None:
    lengths = {relative(path): len(path.read_text("utf-8").splitlines()) for path in all_sources()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_public_classes_of_a_package_have_names_of_their_own(package: str) -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in sources(package):
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(relative(path))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of a file, those behind an assignment included."""
    for node in ast.walk(parsed(path)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def test_docstrings_mark_names_with_single_backticks() -> None:
    double = [
        f"{relative(path)}:{line}"
        for path in all_sources()
        for line, text in docstrings(path)
        if re.search(r"(?<!`)``(?!`)", text)
    ]
    assert double == []
