"""Keeps matrices out of traces: a run records the digest of a memory and not the memory itself.

A policy applies to the runs of the node that it is given to. LangGraph also records the input of every other node and
the output of the whole graph; `docs/langgraph.md` says what to do about those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from langchain_core.messages import BaseMessage
from langgraph.types import TracePolicy
from pydantic import BaseModel

from agentmem.state import MemoryState


def without_matrices(value: Any) -> Any:
    """`value` with every memory in it, as a value or as a plain dict, replaced by its digest and count.

    Searches mappings, lists, tuples, dataclasses and pydantic models; the latter two become dicts. Messages hold no
    memory and stay as they are.
    """
    if isinstance(value, MemoryState):
        return {"digest": value.digest, "count": value.count}
    if isinstance(value, Mapping):
        if {"shape", "data", "digest"} <= value.keys():  # a plain dict, or the JSON form
            return {"digest": value["digest"], "count": value.get("count")}
        return {key: without_matrices(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_matrices(item) for item in value]
    if isinstance(value, BaseMessage):
        return value
    if isinstance(value, BaseModel):
        return {name: without_matrices(getattr(value, name)) for name in type(value).model_fields}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: without_matrices(getattr(value, field.name)) for field in fields(value)}
    return value


MATRIX_FREE = TracePolicy(process_inputs=without_matrices, process_outputs=without_matrices)
"""The policy for nodes and middleware that handle a memory."""
