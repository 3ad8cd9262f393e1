"""ARCHITECTURE.md names files, functions and classes that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"`([\w/]+\.py)(?::([\w.]+))?`")


def places() -> set[tuple[str, str]]:
    """Path and name of every place on the page; the name is empty where only the file is meant."""
    return set(PLACE.findall((ROOT / "ARCHITECTURE.md").read_text("utf-8")))


def source(path: str) -> Path:
    """The file of a path as the page writes it."""
    if path.startswith("tests/"):
        return ROOT / path
    return ROOT / ("integrations" if path.startswith("agentmem_") else "agentmem") / path


def names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Functions and classes that a file defines, methods as `Class.method`."""
    defined: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            defined.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                defined |= names(node.body, f"{node.name}.")
    return defined


def missing() -> set[str]:
    absent = set()
    for path, name in places():
        file = source(path)
        if file.exists() and (not name or name in names(ast.parse(file.read_text("utf-8")).body)):
            continue
        absent.add(f"{path}:{name}" if name else path)
    return absent


def test_every_place_exists() -> None:
    assert len(places()) > 30
    assert missing() == set()


def test_every_part_of_the_engine_stands_in_the_table() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    parts = {path.name for path in (ROOT / "agentmem").iterdir() if path.name[0] != "_" and path.name != "py.typed"}
    assert {part for part in parts if f"`{part}" not in page} == set()
