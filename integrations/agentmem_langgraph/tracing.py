"""Keeps matrices out of traces: a run records the digest of a memory and not the memory itself.

A policy applies to the runs of the node that it is given to; `redact_traces` gives one to every node of a graph that is
already compiled. LangGraph also records the input and output of the whole graph; `docs/langgraph.md` says what to do
about those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from langchain_core.messages import BaseMessage
from langgraph.pregel import Pregel
from langgraph.types import TracePolicy
from pydantic import BaseModel

from agentmem.state import MemoryState

Graph = TypeVar("Graph", bound="Pregel[Any, Any, Any, Any]")


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


class TracedAsDigest:
    """The update `{"memory": ...}` of a graph's state, which tracers record as the digest of the memory.

    LangGraph takes an update's keys from the annotations of its class. Like `MemoryTurn`, it is no dataclass and has no
    `to_dict`, so that code that records it records its repr.

    Args:
        memory: the plain dict of a MemoryState.
    """

    __slots__ = ("memory",)
    memory: dict[str, Any]

    def __init__(self, memory: dict[str, Any]) -> None:
        self.memory = memory

    def __repr__(self) -> str:
        return f"memory {self.memory['digest']}"


def redact_traces(graph: Graph) -> Graph:
    """Keep matrices out of what all nodes of a compiled graph, and of its subgraphs, record as their input and output.

    For an agent of `create_agent`, whose nodes cannot be given a policy otherwise. Policies that nodes have remain, and
    see the whole value.

    Returns:
        the same graph.
    """
    for name, node in graph.nodes.items():
        policy = node.trace_policy or TracePolicy()
        redacting = TracePolicy(
            process_inputs=_then_without_matrices(policy.process_inputs),
            process_outputs=_then_without_matrices(policy.process_outputs),
        )
        graph.nodes[name] = node.copy({"trace_policy": redacting})
        for subgraph in node.subgraphs:
            if isinstance(subgraph, Pregel):
                redact_traces(subgraph)
    return graph


def _then_without_matrices(process: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    return without_matrices if process is None else lambda value: without_matrices(process(value))
