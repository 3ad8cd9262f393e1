"""ARCHITECTURE.md names files, functions and classes that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"`([\w/]+\.py)(?::([\w.]+))?`")

# What the page describes and the code does not have yet. Each goes from here with the redesign of its part; the list
# only gets shorter.
UNSETTLED = {
    "agentmem_langgraph/memory_turn.py:MemoryTurn.claim",
    "agentmem_langgraph/memory_turn.py:MemoryTurn.commit",
    "agentmem_sql/content.py:Packer.pack",
    "agentmem_sql/content.py:Unpacker.unpack",
    "agentmem_sql/list_tree.py",
    "agentmem_sql/message_cache.py:CachedThread",
    "agentmem_sql/protection.py:Protection",
    "agentmem_sql/reader.py:Reader.find",
    "agentmem_sql/rows.py:encode_checkpoint",
    "agentmem_sql/rows.py:to_tuple",
    "agentmem_sql/store.py:Store.get_tuple",
    "agentmem_sql/store.py:Store.put",
    "agentmem_sql/writer.py:WriteMode",
    "agentmem_sql/writer.py:Writer.put_checkpoint",
    "delta/decode.py:TorchDecodeStep",
    "delta/decode_numba.py:NumbaDecodeStep",
    "delta/decode_pool.py:PooledDecodeStep",
    "generation/batch.py:DecodeBatch.run",
    "generation/batch_cache.py:BatchedKVCache",
    "generation/cuda_graph.py:CapturedDecode",
    "generation/kv_cache.py:PrefillCache.take",
    "generation/runner.py:ModelRunner.forward",
    "generation/scheduler.py:Scheduler.submit",
    "generation/turn.py:catch_up",
    "generation/turn.py:decode",
    "generation/turn.py:finish",
    "generation/turn.py:prefill",
}


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
    assert missing() - UNSETTLED == set()
    assert missing() >= UNSETTLED, "what exists needs no exception"


@pytest.mark.parametrize("part", sorted(path.name for path in (ROOT / "agentmem").iterdir() if path.name[0] != "_"))
def test_every_part_of_the_engine_stands_in_the_table(part: str) -> None:
    if part in ("py.typed", "quantization.py"):  # the latter goes into loading
        return
    assert f"`{part}" in (ROOT / "ARCHITECTURE.md").read_text("utf-8")
